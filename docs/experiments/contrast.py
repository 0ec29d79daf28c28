"""Which loss makes a group rotate the embedding: CARE's, or a contrast through fitted rotations?

    python docs/experiments/contrast.py    # five seeds; writes build/experiments

The data, the networks and the number of images are those of the ordinary views. What shall rotate
is left out of the ordinary views in all arms but SimCLR with it. Compared are CARE with
three forwards, the contrast with what a rotation predicts that was fitted to other rows, and the
same with a general linear map, the form of EbC (Schmidt et al., NeurIPS 2025); each has a placebo.

Crops and stretches of clouds are there for what happens if an augmentation cannot act as a
rotation: crops have no inverse, and powers of a stretch have no bound. The second part, "settings",
trains the rotation contrast with several numbers of chunks and temperatures, on a seed that the
arms do not use; the third, "bases", with other losses in place of InfoNCE; the fourth, "fits", with
polar factors by products of matrices alone, as a GPU would like them. Trained encoders are
kept in the output folder, so that --again measures them anew, without training; uses.py measures
what they can be used for.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from common import (
    DIM,
    HALVES,
    THREE,
    WITH,
    WITHOUT,
    Arm,
    Group,
    Row,
    Transform,
    draw_arms,
    each_seed,
    measure,
    measured,
    options,
    placebo,
)
from common import arms as arms_of_care
from groups import GROUPS, NOT_GROUPS
from matplotlib.figure import Figure
from torch import Tensor, nn

from care_loss import RotationContrastLoss
from care_loss.functional import info_nce_loss
from care_loss.sphere import normalize
from care_loss.views import augment_chunks

CHUNKS, TEMPERATURE = 4, 0.5
RIDGE, TEMPERATURE_OF_DISTANCES = 1e-3, 0.1  # of the contrast through linear maps
ROTATION = ["rotation contrast", placebo("rotation contrast")]
LINEAR = ["linear contrast", placebo("linear contrast")]
MAIN = [WITH, WITHOUT, THREE, placebo(THREE), *ROTATION]
ARMS = [*MAIN, *LINEAR, "rotation contrast, O(D)"]
FEWER = [WITHOUT, THREE, *ROTATION]
TRAINED = {  # what is trained, by the dimension of the embedding
    "clouds": {16: ARMS, 64: FEWER, 128: FEWER},
    "molecules": {16: ARMS, 64: FEWER},
    "proteins": {16: MAIN, 64: FEWER},
    "sprites": {16: [*MAIN, LINEAR[0]], 64: FEWER},
    "hues": {16: FEWER, 64: FEWER},
    **{name: {16: MAIN} for name in NOT_GROUPS},
}
SETTINGS = [f"{chunks} chunks, {TEMPERATURE}" for chunks in (2, 4, 8, 16)]
SETTINGS += [f"{CHUNKS} chunks, {temperature}" for temperature in (0.1, 1.0)]
BASES = ["Barlow Twins", "VICReg", "MoCo"]
BARLOW_TWINS, QUEUE, MOMENTUM = 5e-3, 2048, 0.99
FITS = {  # steps of Newton and Schulz, and the precision of the products
    "products, 6 steps": (6, torch.float32),
    "products, 12 steps": (12, torch.float32),
    "products, 24 steps": (24, torch.float32),
    "products in bfloat16, 12 steps": (12, torch.bfloat16),
}
PARTS = ["arms", "settings", "bases", "fits"]
WITH_BASES = {"clouds": [16, 64]}
CHOSEN_ON, CHOSEN_FOR = [11], {"clouds": [16, 64], "molecules": [16, 64], "sprites": [16]}


def linear_contrast(z: Tensor, z_turned: Tensor, chunks: int) -> Tensor:
    """Contrast turned embeddings with predictions by a linear map of the other half of a chunk.

    The map is fitted by least squares with a ridge, and similarity is minus the squared distance.
    """
    u, v = (normalize(x).unflatten(0, (chunks, -1)) for x in (z, z_turned))
    ridge = RIDGE * torch.eye(u.shape[-1])
    predicted = torch.empty_like(u)
    for fitted, moved in (HALVES, HALVES[::-1]):
        source, target = u[:, fitted], v[:, fitted]
        gram = source.mT @ source / source.shape[1] + ridge
        linear = torch.linalg.solve(gram, source.mT @ target / source.shape[1])
        predicted[:, moved] = u[:, moved] @ linear
    distances = torch.cdist(predicted.flatten(0, 1), v.flatten(0, 1)).square()
    return nn.functional.cross_entropy(
        -distances / TEMPERATURE_OF_DISTANCES, torch.arange(len(distances))
    )


def fitted_by_products(
    z: Tensor, z_turned: Tensor, chunks: int, steps: int, dtype: torch.dtype
) -> Tensor:
    """Return the rotation contrast over O(D), with polar factors by products of matrices.

    A step brings singular values s in (0, 1] nearer to 1: they become (3 s - s³) / 2.
    """
    u, v = (normalize(x).unflatten(0, (chunks, -1)) for x in (z, z_turned))
    predicted = torch.empty_like(u)
    for fitted, moved in (HALVES, HALVES[::-1]):
        cross = u[:, fitted].mT @ v[:, fitted]
        factor = (cross / torch.linalg.matrix_norm(cross, keepdim=True)).to(dtype)
        for _ in range(steps):
            factor = 1.5 * factor - 0.5 * factor @ (factor.mT @ factor)
        predicted[:, moved] = u[:, moved] @ factor.to(u.dtype)
    return info_nce_loss(predicted.flatten(0, 1), v.flatten(0, 1), temperature=TEMPERATURE)


def barlow_twins(prediction: Tensor, z_turned: Tensor) -> Tensor:
    """Make the correlations of the coordinates of both the identity (Zbontar et al., ICML 2021)."""
    a, b = ((x - x.mean(0)) / x.std(0) for x in (prediction, z_turned))
    error = a.mT @ b / len(a) - torch.eye(a.shape[-1])
    return error.diagonal().square().sum() + BARLOW_TWINS * error.square().sum()


def vicreg(prediction: Tensor, z_turned: Tensor) -> Tensor:
    """Keep variances up and covariances down (Bardes et al., ICLR 2022), for rows of length √D."""
    views = [x.shape[-1] ** 0.5 * normalize(x) for x in (prediction, z_turned)]
    invariance = nn.functional.mse_loss(*views)
    variance = sum((1 - (x.var(0) + 1e-4).sqrt()).relu().mean() for x in views) / 2
    covariances = [x.mT.cov().fill_diagonal_(0).square().sum() / x.shape[-1] for x in views]
    return 25 * invariance + 25 * variance + sum(covariances)


class MoCo:
    """An arm whose turned views are embedded by a moving average of the encoder, with a queue."""

    def __init__(self, group: Group) -> None:
        self.group, self.queue = group, torch.empty(0)
        self.key_encoder: nn.Module | None = None
        self.criterion = RotationContrastLoss(base_loss=self.base_loss)

    def base_loss(self, prediction: Tensor, key: Tensor) -> Tensor:
        queue = self.queue if len(self.queue) else torch.randn_like(key)
        loss = info_nce_loss(prediction, key, temperature=TEMPERATURE, negatives=queue)
        self.queue = torch.cat([key, self.queue])[:QUEUE]
        return loss

    def __call__(self, encoder: nn.Module, x: Tensor) -> Tensor:
        key_encoder = self.key_encoder = self.key_encoder or deepcopy(encoder).requires_grad_(False)
        for key, query in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
            key.lerp_(query.detach(), 1 - MOMENTUM)
        turned, chunks = augment_chunks(self.group.ordinary(x), self.group.turn, chunks=CHUNKS)
        z = encoder(self.group.ordinary(x))
        return self.criterion(z, key_encoder(turned), chunks=chunks)


def arms(group: Group, weight: float) -> dict[str, Arm]:
    """Return the arms by name. A placebo is the same with a turn of its own for each image."""
    found = arms_of_care(group, weight)

    def contrast(turn: Transform, loss_of: Callable[..., Tensor], chunks: int = CHUNKS) -> Arm:
        def loss(encoder: nn.Module, x: Tensor) -> Tensor:
            # The turns of placebos share nothing, so views are made without the check that they do.
            turned, _ = augment_chunks(group.ordinary(x), turn, chunks=chunks, check=False)
            return loss_of(encoder(group.ordinary(x)), encoder(turned), chunks=chunks)

        return Arm(2, loss)

    special = RotationContrastLoss(temperature=TEMPERATURE)
    free = RotationContrastLoss(temperature=TEMPERATURE, special=False)
    for name, loss in ((ROTATION, special), (LINEAR, linear_contrast)):
        for arm, turn in zip(name, (group.turn, group.own_turns), strict=True):
            found[arm] = contrast(turn, loss)
    found["rotation contrast, O(D)"] = contrast(group.turn, free)
    for setting in SETTINGS:
        chunks, temperature = setting.split(" chunks, ")
        loss = RotationContrastLoss(temperature=float(temperature))
        found[setting] = contrast(group.turn, loss, int(chunks))
    for name, base in (("Barlow Twins", barlow_twins), ("VICReg", vicreg)):
        found[name] = contrast(group.turn, RotationContrastLoss(base_loss=base))
    found["MoCo"] = Arm(2, MoCo(group))
    for name, (steps, dtype) in FITS.items():
        by_products = partial(fitted_by_products, steps=steps, dtype=dtype)
        found[name] = contrast(group.turn, by_products)
    return found


def draw_all(rows: dict[str, list[Row]], path: Path) -> None:
    """Draw the gap ratios of all arms, in a panel for each group."""
    figure = Figure(figsize=(11, 3.2))
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for ax, (name, some) in zip(panels, rows.items(), strict=True):
        ax.set_xscale("log")
        draw_arms(ax, some, "gap_ratio", chance=1, names=["untrained", *ARMS])
        ax.set(title=name, xlabel="gap ratio", xlim=(0.005, 2))
    panels[0].invert_yaxis()  # and with it those of all panels
    figure.savefig(path)
    print("Wrote", path)


def main() -> None:
    found = options(
        __doc__,
        steps=300,
        seeds=[1, 2, 3, 4, 5],
        part=PARTS,
        group=list(TRAINED),
        dim=["16", "64", "128"],
        arm=ARMS,
    )
    shown = {}
    for name in found.group:
        runs = [("arms", dim, names, found.seed) for dim, names in TRAINED[name].items()]
        runs += [("settings", dim, SETTINGS, CHOSEN_ON) for dim in CHOSEN_FOR.get(name, [])]
        for part, names in (("bases", BASES), ("fits", list(FITS))):
            runs += [(part, dim, names, found.seed) for dim in WITH_BASES.get(name, [])]
        for part, dim, names, seeds in runs:
            if part not in found.part or str(dim) not in found.dim:
                continue
            names = [arm for arm in names if arm in found.arm or part != "arms"]
            run = partial(
                measured,
                (GROUPS | NOT_GROUPS)[name],
                names,
                [measure],
                dim=dim,
                make_arms=arms,
                kept=found.output / "encoders" / name,
            )
            file = f"contrast-{name}" if part == "arms" else f"contrast-{part}-{name}"
            some = argparse.Namespace(**vars(found) | {"arm": names, "seed": seeds})
            results = each_seed(file, some, run, dim=dim)
            if part == "arms" and dim == DIM:
                shown[name] = [row for rows in results for row in rows]
    if shown:
        draw_all(shown, found.output / "contrast.png")


if __name__ == "__main__":
    main()
