"""Are the rotations of the embedding a representation of the group, and which one?

    python docs/experiments/representation.py    # five seeds; writes build/experiments

A representation of the circle is made of directions that do not move and of planes that turn by
k times the angle. So the multiplicities of the frequencies k are integers. Rotations of the
embedding are fitted to 36 angles about each axis of the group, in the principal subspace of
held-out images, and for several dimensions of the embedding. The intervals come from drawing the
held-out images anew, with replacement.
"""

import math
from functools import partial
from pathlib import Path

import torch
from common import (
    DIM,
    THREE,
    UNIFORMITY,
    WITHOUT,
    Group,
    Row,
    each_seed,
    embed,
    measure,
    measured,
    options,
    placebo,
)
from groups import GROUPS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from photos import fit_rotations, principal_subspace
from torch import Tensor, nn

from care_loss.metrics import frequencies
from care_loss.rotation import rotation_angles

ARMS = [WITHOUT, THREE, placebo(THREE), UNIFORMITY, placebo(UNIFORMITY)]
DIMS = {"clouds": [2, 3, 4, 8, 16, 32, 64], "molecules": [2, 3, 16, 64], "proteins": [2, 3, 16, 64]}
DIMS |= {"sprites": [2, 16, 64], "hues": [2, 16]}
ANGLES, SHOWN, RESAMPLES = 36, 5, 20
GRID = 2 * math.pi / ANGLES * torch.arange(ANGLES, dtype=torch.float64)
HALF = ANGLES // 2 + 1  # a rotation by a negative angle has the same eigen-angles


def multiplicities(z: Tensor, turned: list[Tensor]) -> Tensor:
    """Return those of the first frequencies, for each axis."""
    return torch.stack(
        [frequencies(fit_rotations(z, t), GRID).multiplicity[:SHOWN] for t in turned]
    )


@torch.no_grad()
def representation(encoder: nn.Module, group: Group) -> dict[str, object]:
    """Return the multiplicities and what shows how near they are to a representation."""
    z = embed(encoder, group.testing)
    dim = z.shape[1]
    turned = [
        torch.stack([embed(encoder, act(group.testing, angle)) for angle in GRID])
        for act in group.circles
    ]
    basis = principal_subspace(torch.stack(turned).flatten(0, -2))
    z, turned = z @ basis, [t @ basis for t in turned]
    found = multiplicities(z, turned)
    images = int(group.identity.max()) + 1
    resampled = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(images, (images,))
        rows = torch.cat([(group.identity == image).nonzero()[:, 0] for image in drawn.tolist()])
        resampled.append(multiplicities(z[rows], [t[:, rows] for t in turned]).mean(0))
    rotations = [fit_rotations(z, t) for t in turned]

    def deviation(*, shuffled: bool) -> float:
        return max(frequencies(r, GRID, shuffled=shuffled).deviation.item() for r in rotations)

    def joined(values: Tensor, form: str = ".2f") -> str:
        return " ".join(format(value, form) for value in values.tolist())

    mean = found.mean(0)
    row: dict[str, object] = {
        "subspace": z.shape[1],
        "multiplicities": joined(mean),
        "interval": joined(1.96 * torch.stack(resampled).std(0)),
        "between axes": f"{(found - mean).abs().max():.3f}",
        "from integers": f"{(mean - mean.round()).abs().max():.3f}",
        "deviation": f"{deviation(shuffled=False):.4f}",
        "deviation, shuffled": f"{deviation(shuffled=True):.4f}",
    }
    if dim == DIM:  # that of the figure
        angles = (rotation_angles(r).rad2deg() for r in rotations[0][:HALF])
        row["eigen-angles"] = "; ".join(joined(some, ".0f") for some in angles)
    return row


def draw(ax: Axes, rows: list[Row], arm: str) -> None:
    """Draw the eigen-angles against the angle, a dot for each pair of them and each seed."""
    degrees = GRID[:HALF].rad2deg().tolist()
    for k in range(4):  # the lines of the frequencies, folded into 0 to 180 degrees
        line = [abs((k * angle + 180) % 360 - 180) for angle in range(181)]
        ax.plot(range(181), line, color="C5", lw=0.8, alpha=0.6)
    for row in rows:
        if row["arm"] == arm:
            for angle, found in zip(degrees, row["eigen-angles"].split("; "), strict=True):
                values = [float(value) for value in found.split()]
                ax.plot([angle] * len(values), values, ".", color="C0", ms=3, alpha=0.5)
    ax.set(title=arm, xlabel="θ (degrees)", xticks=[0, 90, 180], yticks=[0, 90, 180])


def draw_all(rows: list[Row], path: Path) -> None:
    figure = Figure(figsize=(11, 3))
    shown = [WITHOUT, placebo(THREE), THREE, UNIFORMITY]
    for ax, arm in zip(figure.subplots(1, 4, sharey=True), shown, strict=True):
        draw(ax, rows, arm)
    figure.axes[0].set_ylabel("eigen-angles (degrees)")
    figure.savefig(path)
    print("Wrote", path)


def main() -> None:
    every = sorted({dim for dims in DIMS.values() for dim in dims})
    found = options(
        __doc__,
        steps=300,
        seeds=[1, 2, 3, 4, 5],
        group=list(GROUPS),
        dim=list(map(str, every)),
        arm=ARMS,
    )
    for name in found.group:
        for dim in DIMS[name]:
            if str(dim) in found.dim:
                run = partial(measured, GROUPS[name], found.arm, [measure, representation], dim=dim)
                results = each_seed(f"representation-{name}", found, run, dim=dim)
                if dim == DIM:
                    rows = [row for seed in results for row in seed]
                    draw_all(rows, found.output / f"representation-{name}.png")


if __name__ == "__main__":
    main()
