"""What do the ways of saying which rows form a chunk cost?

    python benchmarks/chunks.py                            # a table
    python benchmarks/chunks.py --csv benchmarks/results/chunks-cpu.csv

The equivariance loss, forward and backward, with the chunks given as a number, as `shared_views`
returns them, as ids in order or shuffled, and as ids that are not read (as under `vmap`, or on a
GPU), which need the full N x N Gram matrices. Times are ratios to the number in the same round.
"""

from typing import Any
from unittest.mock import patch

import torch
from measuring import (
    RATIO,
    Row,
    leaves,
    parser,
    ratio_columns,
    report,
    start,
    take_turns,
)
from torch import Tensor

from care_loss.functional import equivariance_loss
from care_loss.views import shared_views

SIZES = [  # rows, dimensions, chunks
    (256, 128, 16),
    (250, 128, 16),  # chunks of two sizes
    (4096, 128, 16),
    (4096, 128, 64),
]


def measure(n: int, d: int, chunks: int, rounds: int, **tensor: Any) -> list[Row]:
    views = leaves(2, n, d, **tensor)
    returned = shared_views(torch.zeros(n, 1), lambda x: x, chunks=chunks).chunks
    ids = torch.cat(
        [torch.full((len(p),), k) for k, p in enumerate(torch.arange(n).tensor_split(chunks))]
    )
    named: dict[str, int | Tensor] = {
        "a number": chunks,
        "what shared_views returns": returned,
        "ids in order": ids,
        "ids shuffled": ids[torch.randperm(n)],
    }

    def step(chunks: int | Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(equivariance_loss(*views, chunks=chunks), views)

    def unread() -> tuple[Tensor, ...]:
        with patch("care_loss._chunks.layout_of_ids", side_effect=RuntimeError):
            return step(ids)

    calls = {name: lambda chunks=chunks: step(chunks) for name, chunks in named.items()}
    seconds = take_turns(calls | {"ids that are not read": unread}, rounds)
    return [
        {"N": n, "D": d, "chunks": chunks, "given as": name}
        | ratio_columns(times, seconds["a number"])
        for name, times in seconds.items()
    ]


def main() -> None:
    options = parser(__doc__, rounds=9).parse_args()
    tensor = start(options)
    sizes = SIZES[: 1 if options.quick else None]
    rows = (row for size in sizes for row in measure(*size, options.rounds, **tensor))
    line = "N = {N}, D = {D}, {chunks} chunks: {given as:<28}{ms:>9} ms  "
    report(options, rows, line + RATIO)


if __name__ == "__main__":
    main()
