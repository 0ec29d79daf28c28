"""Which part of a pose can a linear probe read from the embedding?

    python docs/experiments/probe.py    # five seeds; writes build/experiments

Shapes of infinite dSprites whose right half is grey have an upright orientation, a scale and a
position. Twice, encoders are trained: where rotations, scales and shifts are the group that shall
rotate the embedding, and where rotations alone are the group, and scale and position are nuisances
of the ordinary views. In both, the brightness is a nuisance as well. A least-squares fit then
predicts the cosine and sine of the orientation, those of its double, which half a turn does not
change, the logarithm of the scale, the position and the brightness of unseen shapes from the unit
embeddings.
"""

from functools import partial

import torch
from common import COMPARED, Group, draw_arms, each_seed, embed, measure, measured, options
from groups import MARKED, move, pose, poses
from matplotlib.figure import Figure
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from torch import Tensor, nn

SHOWN = ["orientation", "scale", "position", "brightness"]
STATES = 4  # of each image for measuring


def targets(images: Tensor) -> dict[str, Tensor]:
    angle, log_scale, *place = pose(images).double().unbind(-1)
    return {
        "orientation": torch.stack((angle.cos(), angle.sin()), -1),
        "doubled angle": torch.stack((torch.cos(2 * angle), torch.sin(2 * angle)), -1),
        "scale": log_scale.unsqueeze(-1),
        "position": torch.stack(place, -1),
        "brightness": images[:, 0].double().amax((1, 2)).unsqueeze(-1),
    }


def explained(z: Tensor, target: Tensor, identity: Tensor) -> float:
    """Return R² of a least-squares fit with an intercept, on shapes that it has not seen.

    R² is 1 - sum (target - prediction)² / sum (target - mean)², with the sums and the one mean
    over all rows and outputs.
    """
    halves = PredefinedSplit(identity.numpy() % 2)
    predicted = cross_val_predict(LinearRegression(), z.numpy(), target.numpy(), cv=halves)
    unexplained = (target - torch.as_tensor(predicted).view_as(target)).square().sum()
    return 1 - (unexplained / (target - target.mean()).square().sum()).item()


@torch.no_grad()
def probe(encoder: nn.Module, group: Group) -> dict[str, object]:
    """Return R² of all targets, for held-out images in poses of all sizes."""
    images = group.testing.repeat(STATES, 1, 1, 1)
    images[:, 1] = 0
    images = move(images, poses(len(images)))
    z = embed(encoder, images)
    identity = group.identity.repeat(STATES)
    return {
        name: f"{explained(z, target, identity):.3f}" for name, target in targets(images).items()
    }


def main() -> None:
    found = options(__doc__, steps=300, seeds=[1, 2, 3, 4, 5], group=list(MARKED), arm=COMPARED)
    figure = Figure(figsize=(11, 3.2 * len(found.group)))
    panels = figure.subplots(len(found.group), len(SHOWN), sharey=True, squeeze=False)
    for line, name in zip(panels, found.group, strict=True):
        run = partial(measured, MARKED[name], found.arm, [measure, probe])
        seeds = each_seed(f"probe-{name}", found, run)
        rows = [row for seed in seeds for row in seed]
        for ax, target in zip(line, SHOWN, strict=True):
            draw_arms(ax, rows, target, chance=0)
            ax.set(title=f"{name}: {target}", xlabel="R²", xlim=(-0.2, 1))
    panels[0, 0].invert_yaxis()  # and with it those of all panels
    path = found.output / "probe.png"
    figure.savefig(path)
    print("Wrote", path)


if __name__ == "__main__":
    main()
