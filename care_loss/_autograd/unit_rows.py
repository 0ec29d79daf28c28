"""Unit rows, and the gradient of making them."""

import torch
from torch import Tensor


def largest_entries(x: Tensor) -> Tensor:
    """Return the largest absolute entry of each row, infinite for zeros, `(*, D)` -> `(*, 1)`.

    x/‖x‖ does not change when x is divided by a constant, and this may be treated as one. Divided
    by it, no row overflows: every sum of squares is in [1, D]. A row of zeros, and its gradient,
    become exactly 0.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    return largest.masked_fill_(largest == 0, torch.inf)


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide rows `(*, D)` by their lengths, in place.

    Returns them, and the lengths `(*, 1)`, infinite for rows of zeros.
    """
    largest = largest_entries(x)
    # Only zero rows are below 1, so the clamp changes nothing else.
    length = torch.linalg.vector_norm(x.div_(largest), dim=-1, keepdim=True).clamp_min_(1)
    return x.div_(length), length.mul_(largest)


def gradient_of_rows(gradient: Tensor, unit: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a gradient with respect to unit rows into that with respect to the rows, in place.

    Returns it, and the inner products of unit rows and their gradients, `(*, 1)`.
    """
    along = (unit * gradient).sum(-1, keepdim=True)
    return gradient.addcmul_(unit, along, value=-1).div_(length), along
