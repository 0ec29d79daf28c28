"""Fits of similarities: time beside the textbook, roma, and the fit of the rotation alone.

    python benchmarks/similarity.py --csv benchmarks/results/similarity-cpu.csv

All get float32 points. care_loss computes in float64, the others in float32.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from failures import SIMILARITIES
from measuring import Row, provenance, ratio_columns, take_turns, write_csv

from care_loss.rotation import fit_rotation

SIZES = [(4096, 8, 3), (1024, 64, 3), (64, 128, 16)]
FLOOR = "care_loss, the rotation alone"


def measure(b: int, n: int, d: int, rounds: int) -> list[Row]:
    """Return a row for each contender and direction, as ratios to the textbook forward."""
    source, target = torch.randn(2, b, n, d)
    leaf = source.clone().requires_grad_()
    fits: dict[str, Callable[..., Any]] = {
        FLOOR: lambda x, y: (fit_rotation(x, y, special=True).rotation,),
        **SIMILARITIES,
    }
    calls: dict[str, Callable[[], Any]] = {}
    for name, fit in fits.items():
        calls[f"{name}|forward"] = lambda fit=fit: fit(source, target)
        calls[f"{name}|forward and backward"] = lambda fit=fit: torch.autograd.grad(
            sum(x.square().sum() for x in fit(leaf, target)), leaf
        )
    seconds = take_turns(calls, rounds)
    rows: list[Row] = []
    for key, times in seconds.items():
        contender, _, direction = key.partition("|")
        row: Row = {"B": b, "N": n, "D": d, "contender": contender, "direction": direction}
        rows.append(row | ratio_columns(times, seconds["Umeyama with autograd|forward"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="how often the contenders take turns")
    parser.add_argument("--quick", action="store_true", help="one small size and two rounds")
    parser.add_argument("--csv", type=Path, help="write the results here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for size in [(32, 16, 3)] if options.quick else SIZES:
        for row in measure(*size, rounds=2 if options.quick else options.rounds):
            rows.append(row | provenance("cpu"))
            print(
                "{B:>6}{N:>5}{D:>4}  {contender:<32}{direction:<22}{ms:>10}  {ratio}".format(**row)
            )
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
