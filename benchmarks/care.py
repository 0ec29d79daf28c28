"""How long does the whole CARE loss take, forward and backward, against the authors' arithmetic?

    python benchmarks/care.py                            # a table
    python benchmarks/care.py --csv benchmarks/results/care-cpu.csv

The contenders take turns, and each round gives a ratio to the authors' time in the same round, so
that other work on the machine slows all of them alike. The table has medians over rounds, and the
quartiles of the ratio.
"""

from collections.abc import Callable
from typing import Any

import torch
from measuring import Row, parser, ratio_columns, report, start, take_turns
from rivals import authors, plain_equivariance, plain_info_nce, products
from torch import Tensor

from care_loss import CAREloss

TEMPERATURE, WEIGHT = 0.5, 0.01
SIZES = [  # rows, dimensions, chunks
    (256, 128, 16),  # the CIFAR-10 recipe
    (250, 128, 16),  # chunks of two sizes (the authors' code drops the last 10 rows)
    (256, 128, 1),
    (1024, 128, 16),
    (1024, 512, 64),
    (4096, 128, 16),
]
Contender = Callable[[Tensor], Tensor]


def contenders(n: int, chunks: int, device: str) -> dict[str, Contender]:
    loss = CAREloss(
        temperature=TEMPERATURE, equivariance_weight=WEIGHT, chunks=chunks, scale="authors"
    )
    ids = torch.arange(n, device=device) * chunks // n
    settings = (TEMPERATURE, WEIGHT, chunks)

    def plain(views: Tensor) -> Tensor:
        z1, z2, e1, e2 = views
        authors_scale = 2 * (n // chunks - 1)
        equivariance = plain_equivariance(e1, e2, chunks) * authors_scale
        return plain_info_nce(z1, z2, TEMPERATURE) + WEIGHT * equivariance

    return {
        "authors": lambda views: authors(views, *settings),
        "plain autograd": plain,
        "torch.compile of plain": torch.compile(plain, fullgraph=True),
        "care_loss": lambda views: loss(*views),
        "care_loss, chunks as ids": lambda views: loss(*views, chunks=ids),
        "torch.compile of care_loss": torch.compile(lambda views: loss(*views), fullgraph=True),
        "torch.compile, chunks as ids": torch.compile(
            lambda views: loss(*views, chunks=ids), fullgraph=True
        ),
        "matrix products alone": lambda views: products(
            views[:, : views.shape[1] // chunks * chunks], *settings
        ),
    }


def measure(n: int, d: int, chunks: int, rounds: int, **tensor: Any) -> list[Row]:
    views = torch.randn(4, n, d, **tensor, requires_grad=True)
    calls = {
        name: lambda loss=loss: torch.autograd.grad(loss(views), views)
        for name, loss in contenders(n, chunks, tensor["device"]).items()
    }
    seconds = take_turns(calls, rounds)
    return [
        {"N": n, "D": d, "chunks": chunks, "contender": name}
        | ratio_columns(times, seconds["authors"])
        for name, times in seconds.items()
    ]


def main() -> None:
    options = parser(__doc__, rounds=9).parse_args()
    tensor = start(options)
    print(f"{'N':>5} {'D':>4} {'chunks':>6}  {'':<28}{'ms':>9}  ratio to the authors'")
    sizes = SIZES[: 1 if options.quick else None]
    rows = (row for size in sizes for row in measure(*size, options.rounds, **tensor))
    line = (
        "{N:>5} {D:>4} {chunks:>6}  {contender:<28}{ms:>9}  {ratio} ({ratio_low} to {ratio_high})"
    )
    report(options, rows, line)


if __name__ == "__main__":
    main()
