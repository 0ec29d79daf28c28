"""Checks of arguments that several modules need, in the form *requirement, got X: what to do*.

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
        check_same_dtype_and_device(name, first, other_name, other)


def check_rows(x: Any) -> None:
    """Require a tensor of rows."""
    if not isinstance(x, Tensor) or not x.ndim:
        raise ValueError(
            f"`x` must have shape (N, ...), got {show(x)}: gather a single value as x[None]."
        )


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
        check_on_device("chunks", value, device)
    return value


def as_chunk_count(value: Any) -> int:
    """Require a number of chunks, and return it as an int."""
    if is_int(value) and value >= 1:
        return value if type(value) is int else int(value)
    array = hasattr(value, "__array__") and not isinstance(value, Tensor) and not is_int(value)
    if array or isinstance(value, (list, tuple)):
        raise TypeError(
            f"`chunks` given as ids must be a torch.Tensor, got {show(value)}: convert the ids "
            "with torch.as_tensor(), and pass them in the call, with their batch."
        )
    raise ValueError(
        f"`chunks` must be an int >= 1, got {show(value)}: pass the number of chunks to cut a "
        "batch into. Ids of rows are a tensor, and belong in the call, with their batch."
    )


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


def as_temperature(value: Any, device: torch.device | None = None) -> float | Tensor:
    """Require a temperature > 0, a number or a tensor without dimensions, and return it.

    Where the value of a tensor is not read, one that is not above 0 becomes NaN. Without a device,
    that of the embeddings is not known yet.
    """
    if not isinstance(value, Tensor):
        return as_number("temperature", value)
    if value.ndim or not value.is_floating_point():
        raise ValueError(
            f"`temperature` must be a number or a floating point tensor of shape (), got "
            f"{show(value)}: one temperature serves all rows."
        )
    if device is not None and value.device.type != "cpu":  # a single number may stay there
        check_on_device("temperature", value, device)
    number = read_on_cpu(value, float)
    if number is None:
        return torch.where(value > 0, value, torch.nan)
    if number <= 0:
        raise ValueError(
            f"`temperature` must be > 0, got {number:.3g}: where it is learned, learn its "
            "logarithm and pass .exp()."
        )
    return value


def as_number(name: str, value: Any, *, or_zero: bool = False) -> float:
    """Require a finite number > 0, or >= 0, and return it as a Python number."""
    if not is_real(value) or not (0 < value < math.inf or (or_zero and value == 0)):
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
        check_same_dtype_and_device(name, first, other_name, other)
        as_broadcast(name, first.shape[:-2], other_name, other.shape[:-2])


def check_sample(dim: Any, batch_shape: Any, generator: Any, dtype: Any) -> None:
    """Require a dimension >= 1, sizes >= 0, a generator or None, and a floating point dtype."""
    if not is_int(dim) or dim < 1:
        raise ValueError(f"`dim` must be an int >= 1, got {show(dim)}: pass the dimension D.")
    is_shape = isinstance(batch_shape, (tuple, list))
    if not is_shape or not all(is_int(size) and size >= 0 for size in batch_shape):
        raise ValueError(
            f"`batch_shape` must be a tuple of ints >= 0, got {batch_shape!r}: pass (n,) for n "
            "samples."
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"`generator` must be a torch.Generator or None, got {show(generator)}: pass "
            "torch.Generator(device).manual_seed(seed)."
        )
    if not isinstance(dtype, torch.dtype) or not is_floating(dtype):
        raise TypeError(
            f"`dtype` must be a floating point dtype, got {dtype!r}: pass torch.float32, say."
        )


def check_count(name: str, value: Any, least: int) -> int:
    """Require an int of at least `least`, and return it."""
    if not is_int(value) or value < least:
        raise ValueError(f"`{name}` must be an int >= {least}, got {show(value)}.")
    return int(value)


def check_not_recorded(what: str, way_out: str) -> None:
    """Refuse `torch.jit.trace` where it would keep what depends on sizes or values."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise ValueError(
            f"{what} must not be recorded by torch.jit.trace, got a trace, which would return "
            f"wrong numbers for other tensors: {way_out}."
        )


def check_floating(name: str, value: Any) -> None:
    """Require a tensor of a dtype that can be computed with."""
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
    if not isinstance(value, Tensor) or not is_floating(value.dtype):
        raise TypeError(
            f"`{name}` must be a torch.Tensor of a floating point dtype, got {show(value)}: "
            "convert it with torch.as_tensor() or .float()."
        )


def is_floating(dtype: torch.dtype) -> bool:
    """Tell whether numbers of a dtype can be computed with: those of 8 bits cannot."""
    return dtype.is_floating_point and dtype.itemsize > 1


def check_on_device(
    name: str, value: Tensor, device: torch.device, whose: str = "the embeddings"
) -> None:
    """Require a tensor on the device of others."""
    if value.device != device:
        raise ValueError(
            f"`{name}` must be on the device of {whose}, {device}, got {value.device}: move it "
            "with .to()."
        )


def check_same_dtype_and_device(name: str, first: Tensor, other_name: str, other: Tensor) -> None:
    """Require two tensors of one dtype on one device."""
    for what in ("dtype", "device"):
        if getattr(first, what) != getattr(other, what):
            raise ValueError(
                f"`{name}` and `{other_name}` must have the same {what}, got {show(first)} and "
                f"{show(other)}: convert one of them with .to()."
            )


def as_broadcast(name: str, shape: Any, other_name: str, other_shape: Any) -> Any:
    """Require leading dimensions that broadcast, and return their common shape."""
    try:
        return torch.broadcast_shapes(shape, other_shape)
    except RuntimeError:
        raise ValueError(
            f"`{name}` and `{other_name}` must have leading dimensions that broadcast, got "
            f"{tuple(shape)} and {tuple(other_shape)}: insert dimensions of 1 with .unsqueeze()."
        ) from None


def check_row_weights(weights: Any, name: str, rows: Tensor, names: str, leading: Any) -> None:
    """Require a weight >= 0 for each of the rows `(*, N, D)`, or None."""
    if weights is None:
        return
    check_floating("weights", weights)
    if not weights.ndim or weights.shape[-1] != rows.shape[-2]:
        raise ValueError(
            f"`weights` must have shape (*, {rows.shape[-2]}), got {tuple(weights.shape)}: pass "
            "one weight per row."
        )
    check_on_device("weights", weights, rows.device, f"`{name}`")
    as_broadcast(names, leading, "weights", weights.shape[:-1])
    for extreme in (torch.amin, torch.amax):
        value = read_on_cpu(weights, lambda w, extreme=extreme: float(extreme(w)))  # type: ignore[misc]
        if value is not None and (value < 0 or value == math.inf):
            raise ValueError(
                f"`weights` must be finite and >= 0, got {value}: set a weight to 0 to leave its "
                "row out."
            )


def read_on_cpu(x: Tensor, value: Callable[[Tensor], float]) -> float | None:
    """Read a value where this costs nothing: on a CPU, outside of transforms."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return None
    try:
        return value(x.detach())
    except RuntimeError:  # under vmap there is no single value to read
        return None


def is_int(value: Any) -> bool:
    """Tell whether a value is an integer, of Python or of NumPy, and no bool."""
    return isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Tell whether a value is a real number, and no bool."""
    return isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)


def _choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        words = " or ".join(map(repr, options))
        raise ValueError(f"`{name}` must be {words}, got {value!r}: choose one of them.")


def show(value: Any) -> str:
    """Return what an error says of a value: its type, and its shape or number."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, (int, float, str)):
        return f"{type(value).__qualname__} {value!r}"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
