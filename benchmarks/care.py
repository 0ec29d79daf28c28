"""How long does the whole CARE loss take, forward and backward, against the authors' arithmetic?

    python benchmarks/care.py                            # a table
    python benchmarks/care.py --csv benchmarks/results/care-cpu.csv

The contenders take turns, and each round gives a ratio to the authors' time in the same round, so
that other work on the machine slows all of them alike. The table has medians over rounds, and the
quartiles of the ratio.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rivals import authors, products
from torch import Tensor
from torch.utils.benchmark import Timer

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


def measure(n: int, d: int, chunks: int, rounds: int, device: str) -> list[dict[str, object]]:
    views = torch.randn(4, n, d, device=device, requires_grad=True)
    timers = {
        name: Timer(
            "torch.autograd.grad(loss(views), views)",
            globals={"torch": torch, "loss": loss, "views": views},
            num_threads=torch.get_num_threads(),
        )
        for name, loss in contenders(n, chunks, device).items()
    }
    for timer in timers.values():
        timer.timeit(3)
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.blocked_autorange(min_run_time=0.1).median)
    rows: list[dict[str, object]] = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["authors"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "N": n,
                "D": d,
                "chunks": chunks,
                "contender": name,
                "ms": f"{1000 * statistics.median(times):.3f}",
                "ratio": f"{middle:.3f}",
                "ratio_low": f"{low:.3f}",
                "ratio_high": f"{high:.3f}",
            }
        )
    return rows


def provenance(device: str) -> dict[str, object]:
    git = ["git", "describe", "--always", "--dirty"]
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


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
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
