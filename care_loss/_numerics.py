"""The precision to compute in, and how to keep PyTorch from changing it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 for half types, else that of `x`."""
    return torch.promote_types(x.dtype, torch.float32)


def exact(x: Tensor) -> Tensor:
    """Return `x` in float64, or in float32 on Apple's GPUs, which have no float64.

    Products in float32 may be rounded further without our asking: to TF32 on CUDA, to 16 bits in a
    backward under autocast.
    """
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def savable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors, and copies of those that were made under `inference_mode`.

    Autograd cannot save these for the backward, and `detach` does not change that.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensors
    return tuple(x.clone() if x.is_inference() else x for x in tensors)


def without_autocast(z: Tensor) -> AbstractContextManager[object]:
    """Compute in the dtypes of the code. Meta tensors, which compute nothing, know no autocast."""
    if z.is_meta or not torch.is_autocast_enabled(z.device.type):
        return nullcontext()
    return torch.autocast(z.device.type, enabled=False)


def normal(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str | None
) -> Tensor:
    """Draw from the normal distribution, in the dtype of :func:`exact`."""
    dtype = exact(torch.empty(0, device=device)).dtype
    if generator is None:  # torch.compile takes dynamic shapes only where no generator is named
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def use_operator() -> bool:
    """Whether a compiler takes operators of this package as they are, in place of what they do.

    What is exported consists of PyTorch's operators, so that it loads without this package, and
    transforms of `torch.func` go through these.
    """
    exporting = getattr(torch.compiler, "is_exporting", None)  # torch 2.6 cannot tell
    if exporting is None or not torch.compiler.is_compiling() or exporting():
        return False
    return not torch._C._are_functorch_transforms_active()


def function(plain: type[Function], with_forward_mode: type[Function]) -> Any:
    """Choose the Function: torch.compile does not trace those that have a forward mode."""
    return plain if torch.compiler.is_compiling() else with_forward_mode


def with_value(x: Tensor, value: Tensor) -> Tensor:
    """Return a value with the gradient of `x`.

    The two are near each other, or equal: their difference is exact, and so is the sum.
    """
    return x + (value - x).detach()


def refuse_nested_forward_mode() -> None:
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
