"""Which rows form a chunk: the one rule, for the losses and for the views."""

import torch
from torch import Tensor


def runs(chunks: int, n: int) -> list[tuple[int, int]]:
    """Cut `n >= 2` rows into contiguous chunks with the boundaries of `torch.tensor_split`.

    Returns one or two pairs (how many chunks, of how many rows each), the longer chunks first.
    At most `n // 2` chunks are made, so that every chunk has two rows or more.

    >>> runs(3, 11), runs(8, 13)
    ([(2, 4), (1, 3)], [(1, 3), (5, 2)])
    """
    chunks = min(chunks, n // 2)
    rows, longer = n // chunks, n % chunks
    return [(k, m) for k, m in ((longer, rows + 1), (chunks - longer, rows)) if k]


def split(z: Tensor, chunks: int) -> list[Tensor]:
    """Cut rows `(*, N, D)` into one or two stacks of equally long chunks `(*, k, n, D)`."""
    cut = runs(chunks, z.shape[-2])
    stacks = z.split([k * m for k, m in cut], dim=-2)
    return [stack.unflatten(-2, run) for stack, run in zip(stacks, cut, strict=True)]


def ids(chunks: int | Tensor, n: int, device: torch.device) -> Tensor:
    """Return the chunk id of each of `n` rows, shape `(n,)`: 0, 0, 0, 1, 1, ... for an int."""
    if isinstance(chunks, Tensor):
        return chunks
    lengths = [m for k, m in runs(chunks, n) for _ in range(k)]
    numbers = torch.arange(len(lengths), device="cpu")  # whatever the default device is
    return numbers.repeat_interleave(torch.tensor(lengths, device="cpu")).to(device)


def members(ids: Tensor) -> list[Tensor]:
    """Return the row numbers of each chunk in turn. Reads the ids: for views, never for losses."""
    return [(ids == chunk).nonzero().squeeze(-1) for chunk in ids.unique()]
