"""Every sentence an argument error can say: *requirement, got X: what to do*.

The checks read types, shapes, dtypes, devices and Python numbers. They read the values of a tensor
on a CPU only, where this costs little: reading them from a GPU would make the host wait for it at
every step.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def check_embeddings(*, leading: bool = True, rows: int = 2, **tensors: Any) -> None:
    """Require floating point tensors of one shape, one dtype and one device.

    The shape is `(*, N, D)`, as the functions take it, or `(N, D)`, as the modules do.
    """
    for name, z in tensors.items():
        check_floating(name, z)
    (name, first), *others = tensors.items()
    ndim_is_right = first.ndim >= 2 if leading else first.ndim == 2
    if not ndim_is_right or first.shape[-2] < rows or first.shape[-1] < 1:
        raise ValueError(
            f"`{name}` must have shape {'(*, N, D)' if leading else '(N, D)'} with N >= {rows} and "
            f"D >= 1, got {tuple(first.shape)}: pass one row per sample, as .flatten(1) makes "
            "them. A single sample has no other to be compared with: leave out last batches of one "
            "with drop_last=True."
        )
    for other_name, other in others:
        if first.shape != other.shape:
            raise ValueError(
                f"`{name}` and `{other_name}` must have the same shape, got {show(first)} and "
                f"{show(other)}: pass the embeddings of the same samples, from the same encoder."
            )
        _same_dtype_and_device(name, first, other_name, other)


def check_rows(x: Any) -> None:
    """Require a tensor of rows."""
    if not isinstance(x, Tensor) or not x.ndim:
        raise ValueError(
            f"`x` must have shape (N, ...), got {show(x)}: gather a single value as x[None]."
        )


def check_queue(negatives: Any, z: Tensor) -> None:
    """Require negatives of shape `(K, D)` beside embeddings `z` of shape `(*, N, D)`."""
    check_floating("negatives", negatives)
    if negatives.ndim != 2 or not len(negatives) or negatives.shape[1] != z.shape[-1]:
        raise ValueError(
            f"`negatives` must have shape (K, {z.shape[-1]}) with K >= 1, the embedding dimension "
            f"of `z1`, got {show(negatives)}: store one negative per row."
        )
    _on_device("negatives", negatives, z.device)


def as_chunks(value: Any, n: int, device: torch.device) -> int | Tensor:
    """Require a number of chunks, or one integer id for each of `n` rows, and return it."""
    if not isinstance(value, Tensor):
        check_not_recorded("a number of chunks", "pass ids, or use torch.export")
        return as_chunk_count(value)
    fractional = value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    if fractional or value.shape != (n,):
        raise ValueError(
            f"`chunks` given as ids must be integers of shape ({n},), got {show(value)}: pass one "
            "id for each row, or an int for that many contiguous chunks."
        )
    if value.device.type != "cpu":  # where ids can be read at no cost
        _on_device("chunks", value, device)
    return value


def as_chunk_count(value: Any) -> int:
    """Require a number of chunks, and return it as an int."""
    if _is_int(value) and value >= 1:
        return value if type(value) is int else int(value)
    array = hasattr(value, "__array__") and not isinstance(value, Tensor) and not _is_int(value)
    if array or isinstance(value, (list, tuple)):
        raise TypeError(
            f"`chunks` given as ids must be a torch.Tensor, got {show(value)}: convert the ids "
            "with torch.as_tensor(), and pass them in the call, with their batch."
        )
    raise ValueError(
        f"`chunks` must be an int >= 1, got {show(value)}: pass the number of chunks to cut a "
        "batch into. Ids of rows are a tensor, and belong in the call, with their batch."
    )


def as_chunks_of_call(value: Any, default: int | None) -> Any:
    """Require chunks in a call or in the constructor, and return those of the call if given."""
    if value is None and default is None:
        raise ValueError(
            "`chunks` must be given in the call or in the constructor, got neither: pass the "
            "`chunks` that the views came with, loss(..., chunks=chunks)."
        )
    return default if value is None else value


def check_pairs(chunks: Sequence[Any]) -> None:
    """Require that ids name at least one chunk of two rows or more."""
    if not chunks:
        raise ValueError(
            "`chunks` given as ids must contain an id at least twice, got ids that are all unique: "
            "pass the id of the chunk of each row, not the index of the sample."
        )


def check_reduction(value: Any, chunks: Any = None) -> None:
    """Require `"mean"` or `"none"`, and `"mean"` where the chunks are ids."""
    _choice("reduction", value, ("mean", "none"))
    if value == "none" and isinstance(chunks, Tensor):
        raise ValueError(
            "`reduction` must be 'mean' when `chunks` are ids, got 'none': pass an int to get one "
            "value per chunk."
        )


def check_scale(value: Any) -> None:
    """Require `"mean"` or `"authors"`."""
    _choice("scale", value, ("mean", "authors"))


def check_default_weight(scale: str) -> None:
    """Require the scale that the default weight is meant for."""
    if scale != "mean":
        raise ValueError(
            f"`equivariance_weight` must be given with scale={scale!r}, got none: the default is "
            'meant for scale="mean". Pass the weight of the recipe, such as 0.01.'
        )


def as_temperature(value: Any, device: torch.device) -> float | Tensor:
    """Require a temperature > 0, a number or a tensor without dimensions, and return it.

    Where the value of a tensor is not read, one that is not above 0 becomes NaN.
    """
    if not isinstance(value, Tensor):
        return as_number("temperature", value)
    if value.ndim or not value.is_floating_point():
        raise ValueError(
            f"`temperature` must be a number or a floating point tensor of shape (), got "
            f"{show(value)}: one temperature serves all rows."
        )
    if value.device.type != "cpu":  # a single number may stay there
        _on_device("temperature", value, device)
    found = _read(value, float)
    if found is None:
        return torch.where(value > 0, value, torch.nan)
    if found <= 0:
        raise ValueError(
            f"`temperature` must be > 0, got {found:.3g}: where it is learned, learn its logarithm "
            "and pass .exp()."
        )
    return value


def as_number(name: str, value: Any, *, or_zero: bool = False) -> float:
    """Require a finite number > 0, or >= 0, and return it as a Python number."""
    if not _is_real(value) or not (0 < value < math.inf or (or_zero and value == 0)):
        raise ValueError(
            f"`{name}` must be a finite number {'>=' if or_zero else '>'} 0, got {show(value)}: "
            "pass a Python number in that range."
        )
    return value if type(value) is float else float(value)


def as_boolean(name: str, value: Any) -> bool:
    """Require True or False, and return it as a Python bool."""
    if type(value).__name__ not in ("bool", "bool_"):  # of Python or of NumPy
        raise TypeError(
            f"`{name}` must be True or False, got {show(value)}: pass a bool, in a YAML file true "
            "or false without quotes."
        )
    return bool(value)


def check_base_loss(value: Any, gather_distributed: bool, temperature_is_default: bool) -> None:
    """Require a callable base loss beside which nothing is set that only InfoNCE uses, or None."""
    if value is None:
        return
    if not callable(value) or isinstance(value, type):
        kind = f"the class {value.__name__}" if isinstance(value, type) else show(value)
        raise TypeError(
            "`base_loss` must be an instance of a loss module or another callable (z1, z2) -> "
            f"scalar, got {kind}: create the module first, as in base_loss=Loss()."
        )
    if gather_distributed:
        raise ValueError(
            "`gather_distributed` must be False when `base_loss` is given, got True: it applies to "
            "InfoNCE, which `base_loss` replaces. Let the base loss gather for itself."
        )
    if not temperature_is_default:
        raise ValueError(
            "`temperature` must be left out when `base_loss` is given, got one that is not the "
            "default: it applies to InfoNCE, which `base_loss` replaces. Give the temperature to "
            "the base loss."
        )


def as_scalar(value: Any) -> Tensor:
    """Require that a base loss returned a tensor without dimensions, and return it."""
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(
            f"`base_loss` must return a scalar tensor, got {show(value)}: "
            "reduce it inside the callable, for example with .mean()."
        )
    return value


def check_equivariant_pair(first: Any, second: Any, shared_views: bool) -> None:
    """Require both equivariant views, or neither where the ordinary views are chunk-shared."""
    is_view = isinstance(first, Tensor) and (first.is_floating_point() or first.is_complex())
    if first is not None and second is None and not is_view:
        raise TypeError(
            f"`chunks` must be passed by keyword, got {show(first)} as third positional argument: "
            "write loss(z1, z2, chunks=chunks)."
        )
    if (first is None) != (second is None):
        given = "equivariant2" if first is None else "equivariant1"
        raise ValueError(
            f"`equivariant1` and `equivariant2` must be given together, got only `{given}`: "
            "pass the two chunk-shared views, or neither with shared_views=True."
        )
    if first is None and not shared_views:
        raise ValueError(
            "`equivariant1` and `equivariant2` must be given unless shared_views=True, got only "
            "`z1` and `z2`: if every sample has an augmentation of its own, no rotation relates "
            "the views. Pass two views whose augmentation is shared by each chunk, or set "
            "shared_views=True if `z1` and `z2` are such views."
        )
    if first is not None and shared_views:
        raise ValueError(
            "`equivariant1` and `equivariant2` must be left out when shared_views=True, got four "
            "views: with shared_views=True `z1` and `z2` serve both terms. Set shared_views=False "
            "to pass four."
        )


def check_rows_to_fit(source: Any, target: Any, weights: Any) -> None:
    """Require rows `(*, N, D)` to fit a rotation to, and a weight `(*, N)` for each or None."""
    check_not_recorded("rotations", "use torch.export")
    check_floating("source", source)
    check_floating("target", target)
    if source.ndim < 2 or source.shape[-2] < 1 or source.shape[-1] < 1:
        raise ValueError(
            "`source` must have shape (*, N, D) with N >= 1 and D >= 1, got "
            f"{tuple(source.shape)}: pass one vector per row."
        )
    if source.shape[-2:] != target.shape[-2:]:
        raise ValueError(
            "`source` and `target` must have the same N and D in their shapes (*, N, D), got "
            f"{tuple(source.shape)} and {tuple(target.shape)}: row i of `target` is what row i of "
            "`source` is mapped to."
        )
    _same_dtype_and_device("source", source, "target", target)
    leading = _broadcastable("source", source.shape[:-2], "target", target.shape[:-2])
    _row_weights(weights, "source", source, "source` and `target", leading)


def check_points_to_average(x: Any, weights: Any) -> None:
    """Require points `(*, N, D)`, and a weight `(*, N)` for each or None."""
    check_floating("x", x)
    if x.ndim < 2 or x.shape[-2] < 1 or x.shape[-1] < 1:
        raise ValueError(
            f"`x` must have shape (*, N, D) with N >= 1 and D >= 1, got {tuple(x.shape)}: pass "
            "one point per row."
        )
    _row_weights(weights, "x", x, "x", x.shape[:-2])


def check_vectors(**tensors: Any) -> None:
    """Require vectors `(*, D)` of one D, one dtype and one device, with shapes that broadcast."""
    for name, x in tensors.items():
        check_floating(name, x)
        if not x.ndim or x.shape[-1] < 1:
            raise ValueError(
                f"`{name}` must have shape (*, D) with D >= 1, got {tuple(x.shape)}: the last "
                "dimension holds the entries of a vector."
            )
    (name, first), *others = tensors.items()
    names, leading = name, first.shape[:-1]
    for other_name, other in others:
        if first.shape[-1] != other.shape[-1]:
            raise ValueError(
                f"`{name}` and `{other_name}` must have the same D in their shapes (*, D), got "
                f"{tuple(first.shape)} and {tuple(other.shape)}: pass vectors of the same space."
            )
        _same_dtype_and_device(name, first, other_name, other)
        if other.shape[:-1] != leading:
            leading = _broadcastable(names, leading, other_name, other.shape[:-1])
        names += f"` and `{other_name}"


def check_unit(**tensors: Tensor) -> None:
    """Require unit vectors, or zero vectors, where their lengths can be read."""
    for name, x in tensors.items():
        length = _read(x, _length_farthest_from_1)
        if length is not None and abs(length - 1) > 0.01:
            raise ValueError(
                f"`{name}` must contain unit vectors along the last dimension, got one of length "
                f"{length:.3g}: pass care_loss.sphere.normalize({name})."
            )


def as_position(name: str, value: Any, x: Tensor, y: Tensor) -> float | Tensor:
    """Require a finite number or a tensor that broadcasts with `x` and `y`, and return it."""
    if isinstance(value, Tensor):
        check_floating(name, value)
        if value.ndim or value.device.type != "cpu":  # a single number may stay there
            _on_device(name, value, x.device, "the points")
        leading = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        _broadcastable("x` and `y", leading, name, value.shape)
        return value
    if not _is_real(value) or not abs(value) < math.inf:
        raise TypeError(
            f"`{name}` must be a finite number or a torch.Tensor of a floating point dtype, got "
            f"{show(value)}: convert it with torch.as_tensor() or float()."
        )
    return value if type(value) is float else float(value)


def check_square(**tensors: Any) -> None:
    """Require square matrices `(*, D, D)` of one dtype and device, with one D."""
    check_not_recorded("rotations", "use torch.export")
    for name, matrix in tensors.items():
        check_floating(name, matrix)
        if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] < 1:
            raise ValueError(
                f"`{name}` must have shape (*, D, D) with D >= 1, got {tuple(matrix.shape)}: pass "
                "square matrices."
            )
    (name, first), *others = tensors.items()
    for other_name, other in others:
        if first.shape[-1] != other.shape[-1]:
            raise ValueError(
                f"`{name}` and `{other_name}` must have the same D in their shapes (*, D, D), got "
                f"{tuple(first.shape)} and {tuple(other.shape)}: pass two maps of the same space."
            )
        _same_dtype_and_device(name, first, other_name, other)
        _broadcastable(name, first.shape[:-2], other_name, other.shape[:-2])


def check_sample(dim: Any, batch_shape: Any, generator: Any, dtype: Any) -> None:
    """Require a dimension >= 1, sizes >= 0, a generator or None, and a floating point dtype."""
    if not _is_int(dim) or dim < 1:
        raise ValueError(f"`dim` must be an int >= 1, got {show(dim)}: pass the dimension D.")
    is_shape = isinstance(batch_shape, (tuple, list))
    if not is_shape or not all(_is_int(size) and size >= 0 for size in batch_shape):
        raise ValueError(
            f"`batch_shape` must be a tuple of ints >= 0, got {batch_shape!r}: pass (n,) for n "
            "samples."
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"`generator` must be a torch.Generator or None, got {show(generator)}: pass "
            "torch.Generator(device).manual_seed(seed)."
        )
    if not isinstance(dtype, torch.dtype) or not _is_floating(dtype):
        raise TypeError(
            f"`dtype` must be a floating point dtype, got {dtype!r}: pass torch.float32, say."
        )


def check_transformed(rows: int, **tensors: Any) -> None:
    """Require embeddings `(*, N, D)` of the same N >= `rows` images, which broadcast."""
    for name, z in tensors.items():
        check_floating(name, z)
    (name, first), *others = tensors.items()
    names, leading = name, first.shape[:-2]
    if first.ndim < 2 or first.shape[-2] < rows or first.shape[-1] < 1:
        hint = ": each half of the rows needs two" if rows > 2 else ""
        raise ValueError(
            f"`{name}` must have shape (*, N, D) with N >= {rows} and D >= 1, got "
            f"{tuple(first.shape)}{hint}: pass one row per image."
        )
    for other_name, other in others:
        if first.shape[-2:] != other.shape[-2:]:
            raise ValueError(
                f"`{name}` and `{other_name}` must have the same N and D in their shapes "
                f"(*, N, D), got {tuple(first.shape)} and {tuple(other.shape)}: row i of both "
                "belongs to image i, from the same encoder."
            )
        _same_dtype_and_device(name, first, other_name, other)
        leading = _broadcastable(names, leading, other_name, other.shape[:-2])
        names += f"` and `{other_name}"


def check_count(name: str, value: Any, least: int) -> int:
    """Require an int of at least `least`, and return it."""
    if not _is_int(value) or value < least:
        raise ValueError(f"`{name}` must be an int >= {least}, got {show(value)}.")
    return int(value)


def check_circle(rotations: Any, angles: Any) -> None:
    """Require orthogonal matrices `(T, D, D)` with T >= 2, at angles `(T,)` of uniform distance."""
    check_square(rotations=rotations)
    check_floating("angles", angles)
    if rotations.ndim != 3 or len(rotations) < 2 or angles.shape != rotations.shape[:1]:
        raise ValueError(
            "`rotations` and `angles` must have shapes (T, D, D) and (T,) with T >= 2, got "
            f"{tuple(rotations.shape)} and {tuple(angles.shape)}: pass one rotation per angle."
        )
    _on_device("angles", angles, rotations.device, "`rotations`")
    rotations, angles = rotations.detach(), angles.detach()
    identity = torch.eye(rotations.shape[-1], dtype=rotations.dtype, device=rotations.device)
    deviation = float((rotations.mT @ rotations - identity).abs().max())
    if not deviation <= 0.05:
        raise ValueError(
            "`rotations` must be orthogonal matrices, got an entry of R.mT @ R - I of "
            f"{deviation:.3g}: pass those of fit_rotation(...).rotation."
        )
    turn = 2 * math.pi
    steps = (angles.double() % turn).sort().values
    steps = torch.cat((steps[1:], steps[:1] + turn)) - steps
    if not float((steps * len(angles) / turn - 1).abs().max()) <= 1e-3:
        raise ValueError(
            "`angles` must have uniform distances and fill the circle, in radians, got steps from "
            f"{float(steps.min()):.3g} to {float(steps.max()):.3g}: pass "
            f"2 * torch.pi / {len(angles)} * torch.arange({len(angles)})."
        )


def check_not_recorded(what: str, way_out: str) -> None:
    """Refuse `torch.jit.trace` where it would keep what depends on sizes or values."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise ValueError(
            f"{what} must not be recorded by torch.jit.trace, got a trace, which would return "
            f"wrong numbers for other tensors: {way_out}."
        )


def check_forward_mode_once() -> None:
    """Refuse forward mode within forward mode, for which PyTorch would return zeros."""
    try:
        from torch._C._functorch import TransformType
        from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
    except ImportError:  # a private module: without it, the documentation has to do
        return
    levels = [level.key() for level in retrieve_all_functorch_interpreters()]
    if levels.count(TransformType.Jvp) > 1:
        raise NotImplementedError(
            "second derivatives must use reverse mode once, got forward mode within "
            "forward mode: use torch.func.hessian, or jacrev in place of one jacfwd."
        )


def check_floating(name: str, value: Any) -> None:
    if isinstance(value, (tuple, dict)):
        raise TypeError(
            f"`{name}` must be a torch.Tensor of a floating point dtype, got {show(value)}: pick "
            "one output of the model."
        )
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(
            f"`{name}` must be a torch.Tensor of a floating point dtype, got {show(value)}: pass "
            "the real and the imaginary part as two entries, with torch.view_as_real()."
        )
    if not isinstance(value, Tensor) or not _is_floating(value.dtype):
        raise TypeError(
            f"`{name}` must be a torch.Tensor of a floating point dtype, got {show(value)}: "
            "convert it with torch.as_tensor() or .float()."
        )


def _is_floating(dtype: torch.dtype) -> bool:
    """Tell whether numbers of a dtype can be computed with: those of 8 bits cannot."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _on_device(
    name: str, value: Tensor, device: torch.device, whose: str = "the embeddings"
) -> None:
    if value.device != device:
        raise ValueError(
            f"`{name}` must be on the device of {whose}, {device}, got {value.device}: move it "
            "with .to()."
        )


def _same_dtype_and_device(name: str, first: Tensor, other_name: str, other: Tensor) -> None:
    for what in ("dtype", "device"):
        if getattr(first, what) != getattr(other, what):
            raise ValueError(
                f"`{name}` and `{other_name}` must have the same {what}, got {show(first)} and "
                f"{show(other)}: convert one of them with .to()."
            )


def _broadcastable(name: str, shape: Any, other_name: str, other_shape: Any) -> Any:
    try:
        return torch.broadcast_shapes(shape, other_shape)
    except RuntimeError:
        raise ValueError(
            f"`{name}` and `{other_name}` must have leading dimensions that broadcast, got "
            f"{tuple(shape)} and {tuple(other_shape)}: insert dimensions of 1 with .unsqueeze()."
        ) from None


def _row_weights(weights: Any, name: str, rows: Tensor, names: str, leading: Any) -> None:
    """Require a weight >= 0 for each of the rows `(*, N, D)`, or None."""
    if weights is None:
        return
    check_floating("weights", weights)
    if not weights.ndim or weights.shape[-1] != rows.shape[-2]:
        raise ValueError(
            f"`weights` must have shape (*, {rows.shape[-2]}), got {tuple(weights.shape)}: pass "
            "one weight per row."
        )
    _on_device("weights", weights, rows.device, f"`{name}`")
    _broadcastable(names, leading, "weights", weights.shape[:-1])
    for extreme in (torch.amin, torch.amax):
        value = _read(weights, lambda w, extreme=extreme: float(extreme(w)))  # type: ignore[misc]
        if value is not None and (value < 0 or value == math.inf):
            raise ValueError(
                f"`weights` must be finite and >= 0, got {value}: set a weight to 0 to leave its "
                "row out."
            )


def _length_farthest_from_1(x: Tensor) -> float:
    """Return the length that differs most from 1 among vectors that are finite and not 0."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1)
    least, most = map(float, length.aminmax())
    if not 0 < least <= most < math.inf:
        length = length.masked_fill(~((length > 0) & (length < math.inf)), 1)
        least, most = map(float, length.aminmax())
    return least if 1 - least > most - 1 else most


def _read(x: Tensor, value: Callable[[Tensor], float]) -> float | None:
    """Read a value where this costs nothing: on a CPU, outside of transforms."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return None
    try:
        return value(x.detach())
    except RuntimeError:  # under vmap there is no single value to read
        return None


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)


def _choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        words = " or ".join(map(repr, options))
        raise ValueError(f"`{name}` must be {words}, got {value!r}: choose one of them.")


def show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, (int, float, str)):
        return f"{type(value).__qualname__} {value!r}"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
