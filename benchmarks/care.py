"""How long does the whole CARE loss take, forward and backward, against the authors' arithmetic?

    python benchmarks/care.py                            # a table
    python benchmarks/care.py --csv benchmarks/results/care-cpu.csv

The contenders take turns, and each round gives a ratio to the authors' time in the same round, so
that other work on the machine slows all of them alike. The table has medians over rounds, and the
quartiles of the ratio.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Row, provenance, ratio_columns, take_turns, write_csv
from rivals import authors, products
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
    loss = CAREloss(TEMPERATURE, WEIGHT, chunks=chunks, scale="authors")
    ids = torch.arange(n, device=device) * chunks // n
    settings = (TEMPERATURE, WEIGHT, chunks)
    return {
        "authors": lambda views: authors(views, *settings),
        "care_loss": lambda views: loss(*views),
        "care_loss, chunks as ids": lambda views: loss(*views, chunks=ids),
        "torch.compile of care_loss": torch.compile(lambda views: loss(*views), fullgraph=True),
        "matrix products alone": lambda views: products(
            views[:, : views.shape[1] // chunks * chunks], *settings
        ),
    }


def measure(n: int, d: int, chunks: int, rounds: int, device: str) -> list[Row]:
    views = torch.randn(4, n, d, device=device, requires_grad=True)
    calls = {
        name: lambda loss=loss: torch.autograd.grad(loss(views), views)
        for name, loss in contenders(n, chunks, device).items()
    }
    seconds = take_turns(calls, rounds)
    return [
        {"N": n, "D": d, "chunks": chunks, "contender": name}
        | ratio_columns(times, seconds["authors"])
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--rounds", type=int, default=9, help="how often the contenders take turns")
    parser.add_argument("--quick", action="store_true", help="the first size only")
    parser.add_argument("--csv", type=Path, help="write the results here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'N':>5} {'D':>4} {'chunks':>6}  {'':<28}{'ms':>9}  ratio to the authors'")
    for size in SIZES[: 1 if options.quick else None]:
        for row in measure(*size, rounds=options.rounds, device=options.device):
            rows.append(row | provenance(options.device))
            print(
                "{N:>5} {D:>4} {chunks:>6}  {contender:<28}{ms:>9}  "
                "{ratio} ({ratio_low} to {ratio_high})".format(**row)
            )
            sys.stdout.flush()
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
