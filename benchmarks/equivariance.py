"""How long does the equivariance loss take, forward and backward, in its forms?

    python benchmarks/equivariance.py                            # a table
    python benchmarks/equivariance.py --csv benchmarks/results/equivariance-cpu.csv

The sizes have short chunks, chunks of two sizes, long chunks (more than four times as long as the
dimension) and the patches of many images, where each image is a batch of its own. The contenders
take turns, and ratios are to the authors' time in the same round. The floor is the matrix products
of the direct form alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from measuring import (
    Row,
    leaves,
    parser,
    ratio_columns,
    report,
    start,
    take_turns,
)
from rivals import authors_equivariance, equivariance_products, plain_equivariance

from care_loss.functional import equivariance_loss

SIZES = [  # rows, dimensions, chunks
    (256, 128, 16),
    (250, 128, 16),  # chunks of two sizes (the rivals drop the last 10 rows)
    (1024, 128, 8),
    (4096, 128, 8),
    (4096, 512, 16),
    (16384, 128, 16),
    (8192, 64, 4),
    (256 * 196, 128, 256),  # the patches of 256 images, as in Gram anchoring
]


def measure(n: int, d: int, chunks: int, rounds: int, **tensor: Any) -> list[Row]:
    views = leaves(2, n, d, **tensor)
    equal = [z.detach()[: n // chunks * chunks] for z in views]
    losses: dict[str, Callable[..., Any]] = {
        "authors": lambda z1, z2: authors_equivariance(z1, z2, chunks),
        "plain autograd": lambda z1, z2: plain_equivariance(z1, z2, chunks),
        "torch.compile of plain": torch.compile(
            lambda z1, z2: plain_equivariance(z1, z2, chunks), fullgraph=True
        ),
        "care_loss": lambda z1, z2: equivariance_loss(z1, z2, chunks=chunks),
        "torch.compile of care_loss": torch.compile(
            lambda z1, z2: equivariance_loss(z1, z2, chunks=chunks), fullgraph=True
        ),
    }
    if n % chunks == 0:
        losses["care_loss, a leading dimension"] = lambda z1, z2: equivariance_loss(
            z1.unflatten(0, (chunks, -1)), z2.unflatten(0, (chunks, -1))
        )
        losses["care_loss, second view detached"] = lambda z1, z2: equivariance_loss(
            z1, z2.detach(), chunks=chunks
        )
    calls: dict[str, Callable[[], Any]] = {
        name: lambda loss=loss: torch.autograd.grad(loss(*views), views, allow_unused=True)
        for name, loss in losses.items()
    }
    calls["matrix products alone"] = lambda: equivariance_products(*equal, chunks=chunks)
    seconds = take_turns(calls, rounds)
    return [
        {"N": n, "D": d, "chunks": chunks, "contender": name}
        | ratio_columns(times, seconds["authors"])
        for name, times in seconds.items()
    ]


def main() -> None:
    options = parser(__doc__, rounds=7).parse_args()
    tensor = start(options)
    print(f"{'N':>6} {'D':>4} {'chunks':>6}  {'':<32}{'ms':>9}  ratio to the authors'")
    sizes = SIZES[: 1 if options.quick else None]
    rows = (row for size in sizes for row in measure(*size, options.rounds, **tensor))
    line = (
        "{N:>6} {D:>4} {chunks:>6}  {contender:<32}{ms:>9}  {ratio} ({ratio_low} to {ratio_high})"
    )
    report(options, rows, line)


if __name__ == "__main__":
    main()
