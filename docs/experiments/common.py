"""What the experiments share: seeds that can be resumed, and results as files."""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.style
import torch
from tqdm import tqdm

HERE = Path(__file__).parent
RESULTS = HERE / "results"
Row = dict[str, str]
matplotlib.style.use(HERE.parent / "style.mplstyle")


def options(question: str, *, steps: int, seeds: int) -> argparse.Namespace:
    """Return the options that experiments share, for a script that asks the given question."""
    parser = argparse.ArgumentParser(description=question.splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps, help="training steps of an arm")
    parser.add_argument("--seed", type=int, nargs="+", default=list(range(seeds)))
    parser.add_argument("--output", type=Path, default=Path("build/experiments"))
    parser.add_argument("--again", action="store_true", help="run seeds that have a result, too")
    found = parser.parse_args()
    if found.steps < 1:
        parser.error(f"--steps must be at least 1, got {found.steps}")
    if len(set(found.seed)) < len(found.seed):
        parser.error(f"--seed must not name a seed twice, got {found.seed}")
    return found


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def each_seed(
    name: str, options: argparse.Namespace, run: Callable[[int, int], list[dict[str, object]]]
) -> list[list[Row]]:
    """Run the seeds that have no result yet, write theirs, and return the rows of all.

    A result is written when its seed is done, so a run that was stopped goes on where it was.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in tqdm(options.seed, desc=name, unit="seed"):
        path = options.output / f"{name}-seed{seed}.csv"
        if options.again or not path.exists():
            origin = {"steps": options.steps, "torch": torch.__version__}
            rows = [row | origin for row in run(seed, options.steps)]
            unfinished = path.with_suffix(".part")
            with unfinished.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            unfinished.replace(path)
        rows = read(path)
        if rows[0]["steps"] != str(options.steps):
            sys.exit(
                f"{path} was written with --steps {rows[0]['steps']}, got {options.steps}: "
                "give --again to replace it, or another --output."
            )
        found.append(rows)
    return found
