"""Draw the results of contrastive.py, memory.py and precision.py, and fit how time and memory grow.

    python benchmarks/figures.py    # reads benchmarks/results, writes docs/speed.png and growth.csv

Growth is the slope of the line through the logarithms, by least squares, from 1,024 rows on: 2 for
a quantity that is proportional to the square of N, 1 for one that is proportional to N.
"""

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from measuring import Row, write_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs"
STYLES = {
    "authors": "C3o-",
    "lightly": "C1s-",
    "plain autograd": "C7v-",
    "torch.compile of plain": "C2^-",
    "care_loss": "C0D-",
    "matrix products alone": "k:",
}
Curves = dict[str, list[tuple[float, float]]]


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def curves(rows: list[dict[str, str]], x: str, y: str, **wanted: str) -> Curves:
    """Return the points of each contender, from the rows that have what is wanted.

    Points that a logarithmic plot cannot show are left out: NaN, and memory too small to be seen.
    """
    found = defaultdict(list)
    for row in rows:
        wanted_row = all(row[key] == value for key, value in wanted.items())
        if wanted_row and row["contender"] in STYLES and 0 < float(row[y]) < math.inf:
            found[row["contender"]].append((float(row[x]), float(row[y])))
    return dict(found)


def slope(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the slope of the logarithms from N = 1024 on, and the range of N."""
    n, y = np.array([point for point in sorted(points) if point[0] >= 1024]).T
    return float(np.polyfit(np.log(n), np.log(y), 1)[0]), n[0], n[-1]


def growth(quantities: dict[str, Curves]) -> list[Row]:
    rows: list[Row] = []
    for quantity, found in quantities.items():
        for contender, points in found.items():
            if sum(n >= 1024 for n, _ in points) > 1:
                exponent, low, high = slope(points)
                row: Row = {"quantity": quantity, "contender": contender}
                rows.append(row | {"from": int(low), "to": int(high), "slope": f"{exponent:.2f}"})
    return rows


def draw(time: Curves, memory: Curves, errors: Curves, path: Path) -> None:
    panels = [
        (time, "N, rows of a view", "ms, forward and backward"),
        (memory, "N, rows of a view", "MB at the peak, beyond the inputs"),
        (errors, "temperature", "relative error of the gradient"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (found, x, y) in zip(axes, panels, strict=True):
        for contender, points in found.items():
            axis.loglog(*zip(*points, strict=True), STYLES[contender], label=contender, ms=4)
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[2].invert_xaxis()
    axes[0].legend(fontsize=8)
    figure.suptitle("NT-Xent with embeddings of 128 dimensions in float32, one CPU thread")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=PAGE / "speed.png")
    parser.add_argument("--csv", type=Path, default=RESULTS / "growth.csv")
    options = parser.parse_args()
    time = curves(read("contrastive-cpu.csv"), "N", "ms", D="128")
    memory = curves(read("memory-cpu.csv"), "N", "MB", D="128")
    errors = curves(read("precision-cpu.csv"), "at", "gradient", loss="InfoNCE")
    rows = growth({"time": time, "memory": memory})
    for row in rows:
        print("{quantity:<8}{contender:<24}{from:>6} to {to:>6}: {slope}".format(**row))
    write_csv(options.csv, rows)
    draw(time, memory, errors, options.figure)


if __name__ == "__main__":
    main()
