"""Actions of the circle: the time of a fit, of a pose and of invariants, beside bare products.

    python benchmarks/actions.py --threads 2 --csv benchmarks/results/actions-cpu.csv

A fit is compared with what it cannot do without: the products of all turned rows with those that
they were, in float64, and a decomposition of each. A pose and invariants are compared with two
products of the rows with a matrix D x D.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measuring import RATIO, Row, parser, ratio_columns, report, start, take_turns

from care_loss.actions import CircleAction, fit_circle
from care_loss.rotation import random_orthogonal

TURNING = [4, 3, 2, 1]  # multiplicities of the frequencies 1, 2, … in units of D / 25
NOISE = 0.05


def example(turns: int, n: int, d: int) -> tuple[CircleAction, list[torch.Tensor]]:
    """Return an action, and embeddings that it turns, their turned ones and the angles."""
    counts = [m * d // 25 for m in TURNING]
    action = CircleAction(random_orthogonal(d), [d - 2 * sum(counts), *counts])
    angles = 2 * torch.pi / turns * torch.arange(turns)
    z = torch.randn(n, d)
    turned = action.apply(z, angles.unsqueeze(-1))
    return action, [z, turned + NOISE * torch.randn_like(turned), angles]


def measure(options: argparse.Namespace) -> Iterator[Row]:
    turns, n, d, pairs = (12, 100, 8, 100) if options.quick else (72, 2000, 128, 10_000)
    action, found = example(turns, n, d)
    z, z_turned, _ = found

    def bare() -> None:
        source = z.double()
        torch.linalg.svd(torch.stack([source.mT @ turned.double() for turned in z_turned]))

    x, y, matrix = torch.randn(pairs, d), torch.randn(pairs, d), torch.randn(d, d)
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        f"fit, {turns} turns of {n} rows": {
            "products and decompositions": bare,
            "care_loss": lambda: fit_circle(*found),
        },
        f"{pairs} rows": {
            "two products": lambda: x @ matrix @ matrix,
            "pose": lambda: action.pose(x, y),
            "invariants": lambda: action.invariants(x),
        },
    }
    for task, contenders in calls.items():
        seconds = take_turns(contenders, options.rounds)
        for name, times in seconds.items():
            floor = next(iter(seconds.values()))
            yield {"task": task, "D": d, "contender": name} | ratio_columns(times, floor)


def main() -> None:
    options = parser(__doc__, rounds=5).parse_args()
    start(options)
    report(options, measure(options), "{task:<28}{contender:<30}{ms:>10}  " + RATIO)


if __name__ == "__main__":
    main()
