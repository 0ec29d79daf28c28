"""Can several augmentations rotate the embedding at once?

    python docs/experiments/several.py    # five seeds; writes build/experiments

Patches of photographs are shown in a random hue and at a random angle. Both are groups, and the
embedding shall keep both: an equivariance loss for each of them, or one for their composition. The
place, the size and the brightness of the crop are nuisances of the ordinary views. An equivariance
report measures the hue, the rotation, and both in succession; and the rotation of the embedding
that is fitted to both in succession is compared with the product of the rotations that are fitted
to each of them.
"""

from functools import partial

import torch
from common import (
    CHUNKS,
    Arm,
    Group,
    Transform,
    draw_arms,
    each_seed,
    embed,
    measured,
    nearest,
    options,
)
from groups import in_plane, own_turns_in_plane, turn_in_plane
from matplotlib.figure import Figure
from patches import both, colours, hue, own_both, own_hues, patches
from photos import random_angles
from torch import Tensor, nn

from care_loss import EquivarianceLoss, InfoNCELoss
from care_loss.metrics import composition_error, equivariance_report, invariance_error, wahba_error
from care_loss.views import augment_chunks

MEASURED = 100  # images of the report, two states of each patch
TEMPERATURE, RATE = 0.1, 5e-3
PAIRS = 8  # of a turn of the hue and a rotation, for the products
ARMS = ["SimCLR with both", "SimCLR without both", "hue only", "rotation only"]
ARMS += ["separate views", "placebo of separate views"]
ARMS += ["composed view", "placebo of composed view"]


def arms(group: Group, weight: float) -> dict[str, Arm]:
    """Return the arms by name: each shared view has its own equivariance loss and weight."""
    info_nce, equivariance = InfoNCELoss(TEMPERATURE), EquivarianceLoss()

    def simclr(turns: Transform) -> Arm:
        def loss(encoder: nn.Module, x: Tensor) -> Tensor:
            return info_nce(*(encoder(turns(group.ordinary(x))) for _ in range(2)))

        return Arm(2, loss)

    def care(*augmentations: Transform) -> Arm:
        def loss(encoder: nn.Module, x: Tensor) -> Tensor:
            x1, x2 = group.ordinary(x), group.ordinary(x)
            z1 = encoder(x1)
            total = info_nce(z1, encoder(x2))
            for augmentation in augmentations:
                # The turns of placebos share nothing, so views are made without the check.
                turned, chunks = augment_chunks(x1, augmentation, chunks=CHUNKS, check=False)
                total = total + weight * equivariance(z1, encoder(turned), chunks=chunks)
            return total

        return Arm(2 + len(augmentations), loss)

    return {
        "SimCLR with both": simclr(own_both),
        "SimCLR without both": simclr(lambda images: images),
        "hue only": care(hue),
        "rotation only": care(turn_in_plane),
        "separate views": care(hue, turn_in_plane),
        "placebo of separate views": care(own_hues, own_turns_in_plane),
        "composed view": care(both),
        "placebo of composed view": care(own_both),
    }


CHANGES: dict[str, Transform] = {"hue": hue, "rotation": turn_in_plane, "both": both}


def report(encoder: nn.Module, group: Group) -> dict[str, object]:
    """Return the main figures of the hue, of the rotation and of both."""
    images = group.testing[:MEASURED]
    found = equivariance_report(encoder, images, CHANGES, samples=8, progress=False)
    row: dict[str, object] = {}
    for name in CHANGES:
        row[f"{name}, verdict"] = found.row(name).verdict
        for key in ("gap_ratio", "share_above_chance", "displacement"):
            row[f"{name}, {key}"] = f"{found.row(name).figures[key].mean:.4g}"
    for key in ("effective_rank", "mean_norm"):
        row[key] = f"{found.row('both').figures[key].mean:.4g}"
    return row


@torch.no_grad()
def products(encoder: nn.Module, group: Group) -> dict[str, object]:
    """Return the shares of the displacement by both that products of rotations explain."""
    z = embed(encoder, group.testing)
    found = []
    for _ in range(PAIRS):
        turns, angles = random_angles(), random_angles()
        turned = colours(group.testing, turns)
        states = turned, in_plane(group.testing, angles), in_plane(turned, angles)
        found.append(torch.stack([embed(encoder, images) for images in states]))
    a, b, ab = torch.stack(found, 1)
    errors = {
        "fitted": wahba_error(z.expand_as(ab), ab),
        "product": composition_error(z.expand_as(ab), a, b, ab),
        "swapped": composition_error(z.expand_as(ab), b, a, ab),
        "others": composition_error(z.expand_as(ab), a.roll(1, 0), b.roll(1, 0), ab),
    }
    moved = invariance_error(z.expand_as(ab), ab).square().sum()
    shares = {key: 1 - error.square().sum() / moved for key, error in errors.items()}
    accuracy = nearest(z, group.identity)
    return {key: f"{share:.4g}" for key, share in shares.items()} | {"kNN": f"{accuracy:.3f}"}


def main() -> None:
    found = options(__doc__, steps=200, seeds=[1, 2, 3, 4, 5], arm=ARMS)
    run = partial(measured, patches, found.arm, [report, products], make_arms=arms, rate=RATE)
    rows = [row for seed in each_seed("several", found, run) for row in seed]
    figure = Figure(figsize=(11, 3.2))
    for ax, change in zip(figure.subplots(1, len(CHANGES), sharey=True), CHANGES, strict=True):
        draw_arms(ax, rows, f"{change}, gap_ratio", chance=1)
        ax.set(title=change, xlabel="gap ratio", xlim=(0, 1.4))
    figure.axes[0].invert_yaxis()  # and with it those of all panels
    path = found.output / "several.png"
    figure.savefig(path)
    print("Wrote", path)


if __name__ == "__main__":
    main()
