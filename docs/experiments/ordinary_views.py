"""Must what shall rotate the embedding stay out of the ordinary views?

    python docs/experiments/ordinary_views.py    # five seeds; writes build/experiments

Groups that act exactly: the rotations of space on clouds of points, on molecules and on fragments
of proteins, whose views jitter the points; those of the plane on shapes of infinite dSprites, whose
views change the brightness; and those of the hue on patches of photographs, whose views are crops
and flips. Twelve arms are trained from the same weights, and see equally many images. The weight of
the equivariance loss is that of the demonstration, and was not chosen for these data. As a second
part, CARE with four and with three forwards is trained with other weights; `--part arms` leaves it
out.
"""

import statistics
from collections import defaultdict
from functools import partial

import torch
from common import (
    FOUR,
    THREE,
    WEIGHT,
    WITHOUT,
    Row,
    arms,
    draw_arms,
    each_seed,
    measure,
    options,
    placebo,
    trained,
)
from groups import GROUPS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WEIGHTS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def run(name: str, part: str, seed: int, steps: int) -> list[dict[str, object]]:
    """Train all arms, or two with other weights, and measure them and the untrained encoder."""
    torch.manual_seed(seed)
    group = GROUPS[name]()
    runs = [(arm, WEIGHT) for arm in arms(group, WEIGHT)]
    if part == "weights":
        runs = [(arm, w) for arm in (FOUR, THREE) for w in WEIGHTS if w != WEIGHT]
    encoders = trained(group, runs, seed, steps)
    return [label | measure(encoder, group) for label, encoder in encoders]


def draw_gap_ratios(ax: Axes, rows: list[Row]) -> None:
    ax.set_xscale("log")
    draw_arms(ax, rows, "gap_ratio", chance=1)
    ax.invert_yaxis()
    ax.set(xlabel="gap ratio", xlim=(0.01, 2))


def draw_weights(ax: Axes, rows: list[Row]) -> None:
    """Draw the gap ratios of all seeds and their means, against the weight."""
    for arm, colour, style in ((FOUR, "C3", "o"), (THREE, "C0", "D")):
        found = defaultdict(list)
        for row in rows:
            if row["arm"] == arm:
                found[float(row["weight"])].append(row)
        weights = sorted(found)
        ratios = [[float(row["gap_ratio"]) for row in found[weight]] for weight in weights]
        ax.loglog(weights, list(map(statistics.mean, ratios)), f"{style}-", color=colour, label=arm)
        for weight, some in zip(weights, ratios, strict=True):
            ax.loglog([weight] * len(some), some, style, color=colour, ms=3, alpha=0.6)
        collapsed = [w for w in weights if max(float(row["mean_norm"]) for row in found[w]) > 0.5]
        means = [statistics.mean(ratios[weights.index(weight)]) for weight in collapsed]
        ax.loglog(
            collapsed, means, "x", color="C5", ms=12, label="" if arm == THREE else "collapsed"
        )
    for arm, colour in ((placebo(THREE), "C1"), (WITHOUT, "C5")):
        ratios_of_arm = [float(row["gap_ratio"]) for row in rows if row["arm"] == arm]
        ax.axhline(statistics.mean(ratios_of_arm), color=colour, ls="--", lw=1.5, label=arm)
    ax.set(xlabel="weight of the equivariance loss", ylabel="gap ratio")
    ax.grid()
    ax.legend(fontsize=8)


PANELS = {"arms": draw_gap_ratios, "weights": draw_weights}


def main() -> None:
    found = options(
        __doc__,
        steps=300,
        seeds=[1, 2, 3, 4, 5],
        group=list(GROUPS),
        part=list(PANELS),
    )
    for name in found.group:
        figure = Figure(figsize=(11 if "weights" in found.part else 5.5, 4))
        rows: list[Row] = []
        for number, (part, draw) in enumerate(PANELS.items(), 1):
            if part == "arms" or part in found.part:  # the arms are in both panels
                for seed in each_seed(f"{part}-{name}", found, partial(run, name, part)):
                    rows += seed
                draw(figure.add_subplot(1, 2 if "weights" in found.part else 1, number), rows)
        figure.suptitle(name)
        path = found.output / f"ordinary_views-{name}.png"
        figure.savefig(path)
        print("Wrote", path)


if __name__ == "__main__":
    main()
