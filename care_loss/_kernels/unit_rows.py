"""Unit rows, and the derivative of making them."""

import torch
from torch import Tensor


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows `(*, D)` scaled to unit length, and their lengths `(*, 1)`, infinite for zeros.

    A row of zeros stays 0 and gets a gradient of exactly 0.
    """
    # x/‖x‖ does not change when x is divided by a constant, and the largest entry may be treated
    # as one: it brings every sum of squares into [1, D]. Dividing a zero row by infinity makes both
    # the row and its gradient exactly 0.
    largest = x.detach().abs().amax(-1, keepdim=True)
    largest.masked_fill_(largest == 0, torch.inf)
    y = x / largest
    # Only zero rows are below 1, so the clamp changes nothing else.
    length = y.square().sum(-1, keepdim=True).clamp_min(1).sqrt()
    return y / length, largest * length


def gradient_of_rows(gradient: Tensor, unit: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient with respect to rows from that with respect to their unit rows.

    Also returns the inner products of unit rows and gradients `(*, 1)`.
    """
    along = (unit * gradient).sum(-1, keepdim=True)
    return torch.addcmul(gradient, unit, along, value=-1).div_(length), along
