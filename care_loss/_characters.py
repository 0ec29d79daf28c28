"""Multiplicities of a representation, rounded to integers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def nearest_counts(multiplicity: Tensor, sizes: Sequence[int], d: int) -> Tensor:
    """Return the integers >= 0 with the least sum of absolute differences over all D directions.

    A part of so many directions counts that often in the sum, and the first part, of size 1, takes
    the directions that are left. A count above `ceil(multiplicity)` gains nothing: one less brings
    the own term nearer by its size, and the first term away by its size at most. Sums for all
    numbers of directions that are used are carried from one part to the next.
    """
    first, *others = multiplicity.tolist()
    least = torch.full((d + 1,), math.inf, dtype=torch.float64, device="cpu")
    least[0] = 0
    chosen = []
    for m, size in zip(others, sizes[1:], strict=True):
        sums = []
        for count in range(max(0, min(math.ceil(m), d // size)) + 1):
            before = least[: d + 1 - count * size] + size * abs(m - count)
            sums.append(torch.cat((least.new_full((count * size,), math.inf), before)))
        least, choice = torch.stack(sums).min(0)
        chosen.append(choice)
    left = d - torch.arange(d + 1, device="cpu")
    used = int((least + (first - left).abs()).argmin())
    counts = []
    for choice, size in zip(reversed(chosen), reversed(sizes), strict=False):
        counts.append(int(choice[used]))
        used -= counts[-1] * size
    counts = [d - sum(c * s for c, s in zip(counts, reversed(sizes), strict=False)), *counts[::-1]]
    return torch.tensor(counts, device=multiplicity.device)
