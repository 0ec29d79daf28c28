"""Draw the results of the benchmarks, and fit how time and memory grow.

    python benchmarks/figures.py    # writes docs/speed.png, docs/ratios.png and results/growth.csv

It reads the files in benchmarks/results. `ratios.png` has every rival in every size that was timed,
those that are faster than care_loss too.

Growth is the slope of the line through the logarithms, by least squares, from 1,024 rows on: 2 for
a quantity that is proportional to the square of N, 1 for one that is proportional to N.
"""

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from measuring import Row, write_csv

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs"
matplotlib.style.use(PAGE / "style.mplstyle")
STYLES = {
    "authors": "C3o-",
    "lightly": "C1s-",
    "plain autograd": "C5v-",
    "torch.compile of plain": "C2^-",
    "care_loss": "C0D-",
    "matrix products alone": "C4:",
}
MARKS = {  # of the rivals; those without one are floors, or forms of care_loss
    "authors": "C3o",
    "lightly": "C1s",
    "plain autograd": "C5v",
    "torch.compile of plain": "C2^",
    "pytorch-metric-learning": "C1*",
    "open_clip": "C4P",
    "open_clip, local_loss": "C4X",
    "SVD": "C5v",
    "roma": "C3h",
    "acos, clamped": "C5v",
    "geoopt": "C1p",
}
Curves = dict[str, list[tuple[float, float]]]
Size = tuple[str, list[dict[str, str]]]  # a label, and the rows that were timed at this size


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
    figure = Figure(figsize=(13, 4))
    axes = figure.subplots(1, 3)
    for axis, (found, x, y) in zip(axes, panels, strict=True):
        for contender, points in found.items():
            axis.loglog(*zip(*points, strict=True), STYLES[contender], label=contender, ms=4)
        axis.set(xlabel=x, ylabel=y)
        axis.grid()
    axes[2].invert_xaxis()
    axes[0].legend(fontsize=8)
    figure.suptitle("NT-Xent with embeddings of 128 dimensions in float32, one CPU thread")
    figure.savefig(path)


def timed(name: str, title: str, *keys: str, **wanted: str) -> list[Size]:
    """Return the sizes at which a rival was timed."""
    sizes = defaultdict(list)
    for row in read(name):
        if all(row[key] == value for key, value in wanted.items()):
            sizes[tuple(row[key] for key in keys)].append(row)
    return [
        (f"{title} {' × '.join(size)}", rows)
        for size, rows in sizes.items()
        if any(row["contender"] in MARKS for row in rows)
    ]


def draw_ratios(path: Path) -> None:
    backward = {"direction": "forward and backward"}
    lines = [
        *timed("contrastive-cpu.csv", "InfoNCE", "N", "D"),
        *timed("equivariance-cpu.csv", "equivariance", "N", "D", "chunks"),
        *timed("care-cpu.csv", "CARE", "N", "D", "chunks"),
        *timed("distributed-cpu.csv", "processes × rows:", "W", "N"),
        *timed("procrustes-cpu.csv", "fit of a rotation", "B", "N", "D", **backward),
        *timed("sphere-cpu.csv", "distance", "N", "D", **backward),
    ]
    figure = Figure(figsize=(9, 11))
    axis = figure.subplots()
    labelled = set()
    for place, (_, rows) in enumerate(lines):
        (ours,) = [float(row["ms"]) for row in rows if row["contender"] == "care_loss"]
        for row in rows:
            name = row["contender"]
            if name in MARKS:
                label = "" if name in labelled else name
                axis.plot(float(row["ms"]) / ours, place, MARKS[name], ms=7, label=label)
                labelled.add(name)
    axis.axvline(1, color="C0", lw=2)
    axis.axvspan(0.05, 1, color="C3", alpha=0.12, lw=0)
    axis.set(xscale="log", xlim=(0.1, 3000), ylim=(len(lines) - 0.5, -0.5))
    axis.set_yticks(range(len(lines)), [label for label, _ in lines])
    axis.set_xlabel("time of the other / time of care_loss (left of the line, the other is faster)")
    axis.grid()
    axis.legend(loc="center right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=PAGE / "speed.png")
    parser.add_argument("--ratios", type=Path, default=PAGE / "ratios.png")
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
    draw_ratios(options.ratios)


if __name__ == "__main__":
    main()
