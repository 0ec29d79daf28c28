"""Multiplicities of a representation, rounded to integers."""

import torch
from torch import Tensor


def nearest_counts(multiplicity: Tensor, d: int) -> Tensor:
    """Return the integers with the least sum of absolute differences over all D directions.

    Each term of the sum is convex in its count. So it is enough to start with frequency 0 only, and
    to give two of its directions to the best other frequency while that lessens the sum.
    """
    counts = torch.zeros_like(multiplicity)
    counts[0] = d
    for _ in range(d // 2):
        difference = multiplicity - counts
        gain = 2 * (difference.abs() - (difference - 1).abs())
        gain += difference[0].abs() - (difference[0] + 2).abs()
        gain[0] = 0
        if gain.max() <= 0:
            break
        counts[0] -= 2
        counts[gain.argmax()] += 1
    return counts.long()
