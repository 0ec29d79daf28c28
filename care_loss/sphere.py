"""Unit vectors along the last dimension."""

import torch
from torch import Tensor


def normalize(x: Tensor) -> Tensor:
    r"""Scale every vector to unit length.

    .. math:: x \mapsto x / \lVert x \rVert

    A zero vector stays zero and gets a gradient of exactly 0. Lengths may be anything the dtype can
    hold: no value overflows or underflows on the way (`F.normalize` turns float16 rows of length
    256 and more into zeros). A vector that contains NaN or an infinity becomes NaN.

    Args:
        x: Vectors of any floating point dtype, `(*, D)`.

    Returns:
        Unit vectors in the dtype of `x`, computed in float32 at least, `(*, D)`.

    Example:
        >>> normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e30, 4e30]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000],
                [0.6000, 0.8000]])
    """
    y = x.to(_computed_in(x))
    # x/‖x‖ does not change when x is divided by a constant, and the largest entry may be treated
    # as one: it brings every sum of squares into [1, D]. Dividing a zero row by infinity makes both
    # the row and its gradient exactly 0.
    largest = y.detach().abs().amax(-1, keepdim=True)
    y = y / torch.where(largest == 0, torch.inf, largest)
    # Only zero rows are below 1, so the clamp changes nothing else.
    length = y.square().sum(-1, keepdim=True).clamp_min(1).sqrt()
    return (y / length).to(x.dtype)


def _computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 for half types, else that of `x`."""
    return torch.promote_types(x.dtype, torch.float32)


def _exact(x: Tensor) -> Tensor:
    """Return `x` in float64, or in float32 on Apple's GPUs, which have no float64.

    Products in float32 may be rounded further without our asking: to TF32 on CUDA, to 16 bits in a
    backward under autocast.
    """
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)
