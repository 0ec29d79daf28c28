"""How much memory does NT-Xent need at its peak, forward and backward, beyond its inputs?

    python benchmarks/memory.py                            # a table
    python benchmarks/memory.py --csv benchmarks/results/memory-cpu.csv

Each contender runs in a process of its own, once at a small size before it is measured. On a CPU
the peak is that of the resident memory of the process; on CUDA that of the allocator.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from contrastive import SIZES, TEMPERATURE
from measuring import (
    Row,
    leaves,
    megabytes,
    parser,
    printed_by_another_process,
    report,
    start,
)
from rivals import info_nce_rivals

from care_loss.functional import info_nce_loss

CONTENDERS = {  # the largest N that is tried
    "authors": 4096,
    "lightly": 4096,
    "plain autograd": 4096,
    "torch.compile of plain": 8192,
    "care_loss": 32768,
}


def measure(contender: str, n: int, d: int, **tensor: Any) -> float:
    """Return the megabytes of one contender, in this process."""
    ours = partial(info_nce_loss, temperature=TEMPERATURE)
    loss = {**info_nce_rivals(TEMPERATURE), "care_loss": ours}[contender]

    def step(n: int) -> float:
        views = leaves(2, n, d, **tensor)
        return megabytes(lambda: torch.autograd.grad(loss(*views), views), tensor["device"])

    step(64)
    if contender.startswith("torch.compile"):
        step(n)  # to compile
    return step(n)


def measure_all(options: argparse.Namespace) -> Iterator[Row]:
    for n, d in SIZES[: 1 if options.quick else None]:
        for contender in [name for name, most in CONTENDERS.items() if n <= most]:
            found = printed_by_another_process(__file__, options, "--one", contender, n, d)
            yield {"N": n, "D": d, "contender": contender, "MB": f"{float(found):.1f}"}


def main() -> None:
    accepted = parser(__doc__)
    accepted.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = accepted.parse_args()
    tensor = start(options)
    if options.one:
        contender, n, d = options.one
        print(measure(contender, int(n), int(d), **tensor))
        return
    print(f"{'N':>6} {'D':>4}  {'':<26}{'MB':>8}")
    report(options, measure_all(options), "{N:>6} {D:>4}  {contender:<26}{MB:>8}")


if __name__ == "__main__":
    main()
