"""Which loss makes a group rotate the embedding: CARE's, or a contrast through fitted rotations?

    python docs/experiments/contrast.py    # five seeds; writes build/experiments

The data, the networks and the number of images are those of the ordinary views. What shall rotate
is left out of the ordinary views in all arms but "SimCLR with the group". Compared are CARE with
three forwards, the contrast with what a rotation predicts that was fitted to other rows, and the
same with a general linear map, the form of EbC (Schmidt et al., NeurIPS 2025); each has a placebo.

Crops and stretches of clouds are there for what happens if an augmentation cannot act as a
rotation: crops have no inverse, and powers of a stretch have no bound. The second part, "settings",
trains the rotation contrast with several numbers of chunks and temperatures, on a seed that the
arms do not use. Trained encoders are kept in the output folder, so that --again measures them anew,
without training.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import (
    DIM,
    Arm,
    Group,
    Row,
    Transform,
    draw_arms,
    each_seed,
    measure,
    measured,
    nearest,
    options,
)
from common import arms as arms_of_care
from groups import GROUPS, NOT_GROUPS
from matplotlib.figure import Figure
from photos import wrap
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from uses import GRID, HALVES, turned_states

from care_loss import RotationContrastLoss
from care_loss.actions import fit_circle
from care_loss.sphere import normalize
from care_loss.views import augment_chunks

CHUNKS, TEMPERATURE = 4, 0.5
RIDGE, TEMPERATURE_OF_DISTANCES = 1e-3, 0.1  # of the contrast through linear maps
OF_CARE = {"SimCLR with the group": "SimCLR with the group", "SimCLR without": "SimCLR without"}
OF_CARE |= {"CARE, three forwards": "apart", "placebo of CARE": "placebo of apart"}
ROTATION = ["rotation contrast", "placebo of rotation contrast"]
LINEAR = ["linear contrast", "placebo of linear contrast"]
MAIN = [*OF_CARE, *ROTATION]
ARMS = [*MAIN, *LINEAR, "rotation contrast, O(D)"]
FEWER = ["SimCLR without", "CARE, three forwards", *ROTATION]
TRAINED = {  # what is trained, by the dimension of the embedding
    "clouds": {16: ARMS, 64: FEWER},
    "molecules": {16: ARMS, 64: FEWER},
    "sprites": {16: [*MAIN, LINEAR[0]]},
    "hues": {16: FEWER},
    **{name: {16: MAIN} for name in NOT_GROUPS},
}
SETTINGS = [f"{chunks} chunks, {TEMPERATURE}" for chunks in (2, 4, 8, 16)]
SETTINGS += [f"{CHUNKS} chunks, {temperature}" for temperature in (0.1, 1.0)]
FILES = {"arms": "contrast-", "settings": "contrast-settings-"}
CHOSEN_ON, CHOSEN_FOR = [11], {"clouds": [16, 64], "molecules": [16, 64], "sprites": [16]}
SUBSPACE, SHOWN = 0.95, 5
OF_THE_CIRCLE = "sprites", "hues"


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


def arms(group: Group, weight: float) -> dict[str, Arm]:
    """Return the arms by name. A placebo is the same with a turn of its own for each image."""
    of_care = arms_of_care(group, weight)

    def contrast(turn: Transform, loss_of: Callable[..., Tensor], chunks: int = CHUNKS) -> Arm:
        def loss(encoder: nn.Module, x: Tensor) -> Tensor:
            # The turns of placebos share nothing, so views are made without the check that they do.
            turned, _ = augment_chunks(group.ordinary(x), turn, chunks=chunks, check=False)
            return loss_of(encoder(group.ordinary(x)), encoder(turned), chunks=chunks)

        return Arm(2, loss)

    special = RotationContrastLoss(temperature=TEMPERATURE)
    free = RotationContrastLoss(temperature=TEMPERATURE, special=False)
    found = {name: of_care[known] for name, known in OF_CARE.items()}
    for name, loss in ((ROTATION, special), (LINEAR, linear_contrast)):
        for arm, turn in zip(name, (group.turn, group.own_turns), strict=True):
            found[arm] = contrast(turn, loss)
    found["rotation contrast, O(D)"] = contrast(group.turn, free)
    for setting in SETTINGS:
        chunks, temperature = setting.split(" chunks, ")
        loss = RotationContrastLoss(temperature=float(temperature))
        found[setting] = contrast(group.turn, loss, int(chunks))
    return found


def probe(features: Tensor, identity: Tensor) -> float:
    """Return how often a linear probe, trained on half of the states, names the image in others."""
    training = torch.arange(len(features)) < len(features) // 2
    scaled = (features - features[training].mean(0)) / features[training].std(0).clamp_min(1e-12)
    model = LogisticRegression(max_iter=2000).fit(scaled[training], identity[training])
    return float(model.score(scaled[~training], identity[~training]))


@torch.no_grad()
def action(encoder: nn.Module, group: Group, *, invariant: bool) -> dict[str, object]:
    """Fit an action to each half of the held-out images, and use it on the other half.

    It is that of the turns about one axis. Where the group is the circle, its invariants are asked
    for the image that they show, too.
    """
    z, turned, asked, z_asked = turned_states(encoder, group)
    found, errors, uses = [], [], []
    for fit, score in (HALVES, HALVES[::-1]):
        with warnings.catch_warnings():  # which say that controls do not turn
            warnings.simplefilter("ignore", UserWarning)
            fitted = fit_circle(z[fit], turned[:, fit], GRID, subspace=SUBSPACE)
        found.append(fitted)
        pose = fitted.pose(z[score], z_asked[score]).element
        errors.append(wrap(pose - asked[score]).abs().rad2deg())
        features = {"embedding": z[score]}
        if invariant:
            features["invariants"] = fitted.invariants(z[score])
        identity = group.identity[score]
        uses.append(
            {f"kNN, {name}": nearest(x, identity) for name, x in features.items()}
            | {f"probe, {name}": probe(x, identity) for name, x in features.items()}
        )
    error = torch.cat(errors)
    return {
        "multiplicities": " ".join(map(str, found[0].multiplicity[:SHOWN].tolist())),
        "explained": f"{torch.stack([each.explained for each in found]).mean():.3f}",
        "pose, mean": f"{error.mean():.1f}",
        "pose, median": f"{error.median():.1f}",
        **{name: f"{(uses[0][name] + uses[1][name]) / 2:.3f}" for name in uses[0]},
    }


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
        part=list(FILES),
        group=list(TRAINED),
        dim=["16", "64"],
        arm=ARMS,
    )
    shown = {}
    for name in found.group:
        measures = [measure]
        if name in GROUPS:
            measures.append(partial(action, invariant=name in OF_THE_CIRCLE))
        runs = [("arms", dim, names, found.seed) for dim, names in TRAINED[name].items()]
        runs += [("settings", dim, SETTINGS, CHOSEN_ON) for dim in CHOSEN_FOR.get(name, [])]
        for part, dim, names, seeds in runs:
            if part not in found.part or str(dim) not in found.dim:
                continue
            names = [arm for arm in names if arm in found.arm or arm in SETTINGS]
            run = partial(
                measured,
                (GROUPS | NOT_GROUPS)[name],
                names,
                measures,
                dim=dim,
                make_arms=arms,
                kept=found.output / "encoders" / name,
            )
            some = argparse.Namespace(**vars(found) | {"arm": names, "seed": seeds})
            results = each_seed(FILES[part] + name, some, run, dim=dim)
            if part == "arms" and dim == DIM:
                shown[name] = [row for rows in results for row in rows]
    if shown:
        draw_all(shown, found.output / "contrast.png")


if __name__ == "__main__":
    main()
