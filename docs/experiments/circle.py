"""Does an embedding in two dimensions become a circle that a group turns?

    python docs/experiments/circle.py    # five seeds; writes build/experiments

"Upright" are shapes with a marker, so that all have a common upright orientation; the brightness is
the nuisance. The shapes of "sprites" have no marker, and "hues" are patches of photographs. In the
plane, the statistic of the paper applies: the variance over images of the cosine between the
embeddings before and after one turn. It is 0 if this turns all embeddings by the same angle, and
also if it moves none of them. The equivariance loss of unrelated embeddings is about 2 / D, so the
weight of 10 in 16 dimensions becomes one of 1.25 in two.
"""

from functools import partial
from pathlib import Path

import torch
from common import (
    COMPARED,
    DIM,
    WEIGHT,
    Group,
    Row,
    colour,
    each_seed,
    embed,
    measure,
    measured,
    options,
)
from groups import hues, pose, sprites, upright
from matplotlib.figure import Figure
from photos import wrap
from representation import GRID, representation
from torch import nn

from care_loss.metrics import cosine_spread

MADE = {"upright": upright, "sprites": sprites, "hues": hues}
DRAWN = 100


@torch.no_grad()
def spread(encoder: nn.Module, group: Group) -> dict[str, object]:
    """Return the statistic of the paper."""
    (turn,) = group.circles
    z = embed(encoder, group.testing)
    turned = torch.stack([embed(encoder, turn(group.testing, angle)) for angle in GRID[1:]])
    return {
        "cosine spread": f"{cosine_spread(z, turned).mean():.3g}",
        "cosine spread, shuffled": f"{cosine_spread(z, turned, shuffled=True).mean():.3g}",
    }


@torch.no_grad()
def angles(encoder: nn.Module, group: Group) -> dict[str, object]:
    """Return the orientations of some images, and the angles of their embeddings."""
    some = group.testing[:DRAWN]
    x, y = embed(encoder, some).unbind(-1)
    return {
        name: " ".join(f"{angle:.0f}" for angle in wrap(values).rad2deg().tolist())
        for name, values in (("orientations", pose(some)[:, 0]), ("angles", torch.atan2(y, x)))
    }


def draw(rows: list[Row], path: Path) -> None:
    """Draw the angles of embeddings against the orientations of their images, of one seed."""
    figure = Figure(figsize=(11, 5.5))
    panels = figure.subplots(2, len(COMPARED) // 2, sharex=True, sharey=True).flat
    found = {row["arm"]: row for row in rows}
    for ax, arm in zip(panels, COMPARED, strict=True):
        if arm in found:
            x, y = (
                [float(value) for value in found[arm][column].split()]
                for column in ("orientations", "angles")
            )
            ax.plot(x, y, ".", color=colour(arm))
        ax.set(title=arm, xticks=[-180, 0, 180], yticks=[-180, 0, 180])
        ax.grid()
    figure.supxlabel("orientation of the image (degrees)")
    figure.supylabel("angle of the embedding")
    figure.savefig(path)
    print("Wrote", path)


def main() -> None:
    found = options(__doc__, steps=300, seeds=[1, 2, 3, 4, 5], group=list(MADE), arm=COMPARED)
    for name in found.group:
        asked = [measure, representation, spread] + [angles] * (name == "upright")
        run = partial(measured, MADE[name], found.arm, asked, dim=2, weight=WEIGHT * 2 / DIM)
        results = each_seed(f"circle-{name}", found, run)
        if name == "upright":
            draw(results[0], found.output / "circle.png")


if __name__ == "__main__":
    main()
