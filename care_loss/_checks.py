"""Every sentence an argument error can say: *requirement, got X: what to do*.

The checks read types, shapes, dtypes, devices and Python numbers, never the values of a tensor:
reading those would make the host wait for the device at every step.
"""

import math
from typing import Any

import torch
from torch import Tensor


def embeddings(*, at_least: int = 2, **tensors: Any) -> None:
    """Require floating point tensors of one shape `(*, N, D)`, one dtype and one device."""
    (first_name, first), *others = tensors.items()
    for name, z in tensors.items():
        _floating(name, z)
    if first.ndim < 2 or first.shape[-2] < at_least or first.shape[-1] < 1:
        hint = "embeddings are rows, and a row alone has no other to form a pair with"
        raise ValueError(
            f"`{first_name}` must have shape (*, N, D) with N >= {at_least} and D >= 1, "
            f"got {tuple(first.shape)}: {hint}."
        )
    for name, z in others:
        for what in ("shape", "dtype", "device"):
            one, other = getattr(first, what), getattr(z, what)
            if one != other:
                one, other = (tuple(one), tuple(other)) if what == "shape" else (one, other)
                raise ValueError(
                    f"`{first_name}` and `{name}` must have the same {what}, got {one} and "
                    f"{other}: make both views of the same samples, with one encoder."
                )


def queue(negatives: Any, z: Tensor) -> None:
    """Require negatives of shape `(K, D)` beside embeddings `z` of shape `(*, N, D)`."""
    _floating("negatives", negatives)
    if negatives.ndim != 2 or negatives.shape[0] < 1 or negatives.shape[1] != z.shape[-1]:
        raise ValueError(
            f"`negatives` must have shape (K, D) with K >= 1 and D = {z.shape[-1]} as the anchors "
            f"have, got {tuple(negatives.shape)}: store one negative a row."
        )
    if negatives.device != z.device:
        raise ValueError(
            f"`negatives` must be on the device of the anchors, {z.device}, got "
            f"{negatives.device}: move it with .to()."
        )


def chunks(value: Any, n: int, device: torch.device) -> None:
    """Require a number of chunks, or one integer id for each of `n` rows."""
    if not isinstance(value, Tensor):
        chunk_count(value)
    elif value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            f"`chunks` given as ids must be an integer tensor, got {value.dtype}: "
            "rows with one id form a chunk; convert the ids with .long()."
        )
    elif value.shape != (n,):
        raise ValueError(
            f"`chunks` given as ids must have shape ({n},), one id a row, got "
            f"{tuple(value.shape)}: give every row an id, or an int for contiguous chunks."
        )
    elif value.device != device:
        raise ValueError(
            f"`chunks` given as ids must be on the device of the rows, {device}, got "
            f"{value.device}: move the ids with .to()."
        )


def chunk_count(value: Any) -> None:
    """Require a number of chunks, as a constructor remembers it."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"`chunks` must be an int >= 1 (for a single batch also a tensor of ids), got "
            f"{_kind(value)}: say how many chunks to cut a batch into."
        )
    if value < 1:
        raise ValueError(
            f"`chunks` must be an int >= 1, got {value}: "
            "1 makes the whole batch one chunk, N // 2 is the most a batch of N rows can have."
        )


def reduction(value: Any, chunks: Any = None) -> None:
    """Require `"mean"` or `"none"`, and `"mean"` where the chunks are ids."""
    _choice("reduction", value, ("mean", "none"))
    if value == "none" and isinstance(chunks, Tensor):
        raise ValueError(
            "`reduction` must be 'mean' when `chunks` are ids, got 'none': how many chunks there "
            "are is known only by reading the ids; give an int to get a value a chunk."
        )


def scale(value: Any) -> None:
    """Require `"mean"` or `"authors"`."""
    _choice("scale", value, ("mean", "authors"))


def temperature(value: Any) -> None:
    """Require a temperature > 0: a number, or a tensor without dimensions."""
    if not isinstance(value, Tensor):
        number("temperature", value, zero=False)
    elif value.ndim or not value.is_floating_point():
        raise ValueError(
            f"`temperature` must be a number or a floating point tensor of shape (), got shape "
            f"{tuple(value.shape)} and {value.dtype}: one temperature serves all rows."
        )


def number(name: str, value: Any, *, zero: bool) -> None:
    """Require a finite Python number, > 0, or >= 0 where `zero` is allowed."""
    requirement = f"`{name}` must be a finite number {'>=' if zero else '>'} 0"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{requirement}, got {_kind(value)}: give a Python float.")
    if not (0 < value < math.inf or (zero and value == 0)):
        raise ValueError(f"{requirement}, got {value}: choose a value in that range.")


def base_loss(value: Any, gather_distributed: bool) -> None:
    """Require a callable base loss that is not asked to gather as well."""
    if value is None:
        return
    if not callable(value):
        raise TypeError(
            f"`base_loss` must be a callable (z1, z2) -> scalar, got {_kind(value)}: "
            "give a loss module or a function, or None for InfoNCE."
        )
    if gather_distributed:
        raise ValueError(
            "`gather_distributed` must be False when `base_loss` is given, got True: it tells "
            "InfoNCE to gather, and InfoNCE is replaced; let the base loss gather for itself."
        )


def scalar(value: Any) -> None:
    """Require that a base loss returned a tensor without dimensions."""
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else _kind(value)
        raise ValueError(
            f"`base_loss` must return a scalar tensor, got {got}: "
            "reduce it inside the callable, for example with .mean()."
        )


def equivariant_pair(first: Any, second: Any, shared_views: bool) -> None:
    """Require both equivariant views, or neither where the ordinary views are chunk-shared."""
    if (first is None) != (second is None):
        missing, given = "equivariant1", "equivariant2"
        if second is None:
            missing, given = given, missing
        raise ValueError(
            f"`equivariant1` and `equivariant2` must be given together, got only `{given}`: "
            f"pass `{missing}` too, or neither with shared_views=True."
        )
    if first is None and not shared_views:
        raise ValueError(
            "`equivariant1` and `equivariant2` must be given unless shared_views=True, got only "
            "`z1` and `z2`: views augmented sample by sample would train a placebo, for no one "
            "rotation follows them. Pass two views whose augmentation is shared by each chunk, or "
            "set shared_views=True if `z1` and `z2` are such views already."
        )


def images(name: str, value: Any) -> None:
    """Require a batch of at least two images in one tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` must be a torch.Tensor of shape (N, ...), got {_kind(value)}: "
            "stack the images first (SharedAugmentCollate takes a list of single images)."
        )
    if value.ndim < 2 or value.shape[0] < 2:
        raise ValueError(
            f"`{name}` must have shape (N, ...) with N >= 2, got {tuple(value.shape)}: "
            "an augmentation is shared by at least two images."
        )


def samples(count: int) -> None:
    """Require a batch of samples that can be cut into chunks."""
    if count < 2:
        raise ValueError(
            f"a batch must hold at least 2 samples, got {count}: an augmentation is shared by at "
            "least two images; set drop_last=True in the DataLoader."
        )


def transformed(value: Any, n: int) -> None:
    """Require that a transform of `n` stacked images returned `n` stacked images."""
    if not isinstance(value, Tensor) or not value.ndim or len(value) != n:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else _kind(value)
        raise ValueError(
            f"`transform` must map a tensor of {n} images to a tensor of {n} images, got {got}: "
            "for a transform of single images use SharedAugmentCollate."
        )


def _floating(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` must be a torch.Tensor, got {_kind(value)}: "
            "convert it with torch.as_tensor()."
        )
    if not value.is_floating_point():
        raise TypeError(
            f"`{name}` must have a floating point dtype, got {value.dtype}: "
            "convert it with .float()."
        )


def _choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        words = " or ".join(map(repr, options))
        raise ValueError(f"`{name}` must be {words}, got {value!r}: choose one of them.")


def _kind(value: Any) -> str:
    kind = type(value)
    if kind.__module__ == "builtins":
        return f"{kind.__qualname__} {value!r}"[:60]
    return f"{kind.__module__}.{kind.__qualname__}"
