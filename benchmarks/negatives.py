"""How long does InfoNCE with a queue of negatives take, forward and backward, and how much memory?

    python benchmarks/negatives.py --csv benchmarks/results/negatives-cpu.csv

The queue is MoCo's of 65,536 rows, and only the queries have a gradient. The floor are the two
products of that: the scores, and their weighted sum of the rows of the queue. Memory is that at the
peak beyond the inputs, each contender in a process of its own. Ratios are to the floor.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from measuring import (
    RATIO,
    Row,
    megabytes,
    parser,
    printed_by_another_process,
    ratio_columns,
    report,
    start,
    take_turns,
)
from torch import Tensor
from torch.nn.functional import normalize

from care_loss.functional import info_nce_loss

TEMPERATURE, ROWS = 0.2, 65_536
SIZES = [(256, 128), (1024, 128), (256, 512)]  # queries, dimensions
FLOOR = "matrix products alone"


def calls(n: int, d: int, **tensor: Any) -> dict[str, Callable[[], Any]]:
    queue = normalize(torch.randn(ROWS, d, **tensor), dim=-1)
    query, key = torch.randn(2, n, d, **tensor).unbind()
    query.requires_grad_()
    learned = torch.tensor(TEMPERATURE, device=tensor["device"])

    def ours(temperature: float | Tensor = TEMPERATURE) -> Tensor:
        return info_nce_loss(query, key, temperature=temperature, negatives=queue)

    def plain() -> Tensor:
        with patch("care_loss.functional.use_autograd_function", return_value=False):
            return ours()

    def moco() -> Tensor:
        """Concatenate the scores of positives and of the queue, as MoCo does."""
        u, v = normalize(query, dim=-1), normalize(key, dim=-1)
        scores = torch.cat(((u * v).sum(-1, keepdim=True), u @ queue.mT), -1)
        first = torch.zeros(n, dtype=torch.long, device=query.device)
        return F.cross_entropy(scores / TEMPERATURE, first)

    def floor() -> Tensor:
        u = query.detach()
        return u @ queue.mT @ queue

    losses = {
        "care_loss": ours,
        "care_loss, learned temperature": lambda: ours(learned),
        "torch.compile of care_loss": torch.compile(ours, fullgraph=True, dynamic=False),
        "plain autograd": plain,
        "MoCo's form": moco,
    }
    found: dict[str, Callable[[], Any]] = {
        name: lambda loss=loss: torch.autograd.grad(loss(), query) for name, loss in losses.items()
    }
    return found | {FLOOR: floor}


def measure(options: argparse.Namespace, n: int, d: int, **tensor: Any) -> Iterator[Row]:
    seconds = take_turns(calls(n, d, **tensor), options.rounds)
    for name, times in seconds.items():
        memory = float(printed_by_another_process(__file__, options, "--one", name, n, d))
        row: Row = {"N": n, "D": d, "contender": name, "MB": f"{memory:.0f}"}
        yield row | ratio_columns(times, seconds[FLOOR])


def main() -> None:
    accepted = parser(__doc__, rounds=9)
    accepted.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = accepted.parse_args()
    tensor = start(options)
    if options.one:
        name, n, d = options.one
        call = calls(int(n), int(d), **tensor)[name]
        call()  # to compile, say
        print(megabytes(call, options.device))
        return
    print(f"{'N':>5} {'D':>4}  {'':<31}{'MB':>6}{'ms':>10}  ratio to the products")
    sizes = SIZES[: 1 if options.quick else None]
    rows = (row for size in sizes for row in measure(options, *size, **tensor))
    report(options, rows, "{N:>5} {D:>4}  {contender:<31}{MB:>6}{ms:>10}  " + RATIO)


if __name__ == "__main__":
    main()
