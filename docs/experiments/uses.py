"""What can be done with an embedding that a group rotates?

    python docs/experiments/uses.py    # five seeds; writes build/experiments

The action of the group is fitted on half of the held-out images, and used on the other half; then
the halves change places. For rotations of space, it is fitted twice: as that of the turns about one
axis, and as that of all rotations.

* Pose: two states of an image are given. Which angle lies between them, or which rotation? For
  comparison, the angle is also that of 72, to each of which a rotation is fitted by itself, whose
  rotation takes one embedding nearest to the other.
* Identity: kNN and a linear probe ask which image is shown, from the embedding, from its
  invariants, and from its canonical state. Then an image in another state is looked for among 25
  images: by the cosine of the embeddings, by that of the invariants, and by the distance after
  the action has brought each of the 25 nearest to it.
* Prediction: how high does the embedding of a turned image rank, by its distance from the rotated
  embedding, among those of all images that were turned alike (MRR and hits@1)?

Encoders that contrast.py has trained in the same output folder are not trained again.
"""

import math
import warnings
from functools import partial

import torch
from common import FOUR, HALVES, Group, draw_arms, each_seed, embed, measured, nearest, options
from contrast import MAIN, arms
from groups import GROUPS, TEMPLATES, rotate
from matplotlib.figure import Figure
from photos import fit_rotations, wrap
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from care_loss.actions import CircleAction, SO3Action, fit_circle, fit_so3
from care_loss.metrics import transformed_retrieval
from care_loss.rotation import random_orthogonal, rotation_distance
from care_loss.sphere import normalize

ARMS = [*MAIN, FOUR]
ANGLES, ROTATIONS, DRAWS = 72, 144, 8
GRID = 2 * math.pi / ANGLES * torch.arange(ANGLES, dtype=torch.float64)
OF_SPACE = "clouds", "molecules", "proteins"
SHOWN = 5  # frequencies; of degrees, all are shown


def turned(encoder: nn.Module, group: Group, angles: Tensor) -> Tensor:
    """Return the embeddings of all images under all angles, `(T, N, D)`."""
    act = group.circles[0]
    return torch.stack([embed(encoder, act(group.testing, angle)) for angle in angles])


def each_turned(encoder: nn.Module, group: Group, angles: Tensor) -> Tensor:
    """Return the embeddings of all images, each under an angle of its own, `(N, D)`."""
    act, images = group.circles[0], group.testing.split(1)
    return embed(encoder, torch.cat([act(x, a) for x, a in zip(images, angles, strict=True)]))


def probe(features: Tensor, identity: Tensor) -> float:
    """Return how often a linear probe, trained on half of the states, names the image in others."""
    training = torch.arange(len(features)) < len(features) // 2
    scaled = (features - features[training].mean(0)) / features[training].std(0).clamp_min(1e-12)
    model = LogisticRegression(max_iter=2000).fit(scaled[training], identity[training])
    return float(model.score(scaled[~training], identity[~training]))


def found_among(scores: Tensor) -> float:
    """Return how often the highest score of query i `(n, n)` is that of image i."""
    return (scores.argmax(-1) == torch.arange(len(scores))).double().mean().item()


def identified(
    action: CircleAction | SO3Action, z: Tensor, z_asked: Tensor, identity: Tensor
) -> dict[str, float]:
    """Return how often images are recognised in another state, by several features."""
    result = {}
    features = {"embedding": torch.nn.Identity(), "invariants": action.invariants}
    features["canonical"] = action.canonical
    for name, feature in features.items():
        result[f"kNN, {name}"] = nearest(feature(z), identity)
        result[f"probe, {name}"] = probe(feature(z), identity)
    images = TEMPLATES // 2
    found: dict[str, list[float]] = {"embedding": [], "invariants": [], "aligned": []}
    for one, other in zip(z.split(images), z_asked.split(images), strict=True):
        for name in ("embedding", "invariants"):
            a, b = (normalize(features[name](x)) for x in (one, other))
            found[name].append(found_among(b @ a.mT))
        asked = other.unsqueeze(1)
        distance = torch.linalg.vector_norm(action.interpolate(one, asked, 1.0) - asked, dim=-1)
        found["aligned"].append(found_among(-distance))
    means = {f"found, {name}": sum(values) / len(values) for name, values in found.items()}
    return result | means


def summary(
    fits: list[CircleAction] | list[SO3Action], errors: list[Tensor], prefix: str = ""
) -> dict[str, object]:
    """Return what both fits are, and the errors of the pose in degrees."""
    error = torch.cat(errors).rad2deg()
    explained, free = (
        torch.stack([getattr(fit, name) for fit in fits]).mean()
        for name in ("explained", "explained_free")
    )
    return {
        f"{prefix}multiplicities": " ".join(map(str, fits[0].multiplicity[:SHOWN].tolist())),
        f"{prefix}explained": f"{explained:.3f}",
        f"{prefix}explained, free": f"{free:.3f}",
        f"{prefix}pose, mean": f"{error.mean():.1f}",
        f"{prefix}pose, median": f"{error.median():.1f}",
    }


def means(results: list[dict[str, float]]) -> dict[str, object]:
    return {name: f"{sum(r[name] for r in results) / len(results):.3f}" for name in results[0]}


@torch.no_grad()
def about_one_axis(encoder: nn.Module, group: Group, *, identify: bool) -> dict[str, object]:
    """Fit the action of the turns by an angle, and use it."""
    z, z_turned = embed(encoder, group.testing), turned(encoder, group, GRID)
    asked = 2 * math.pi * torch.rand(len(z), dtype=torch.float64)
    z_asked = each_turned(encoder, group, asked)
    fits, errors, by_grid, identities = [], [], [], []
    for fit, score in (HALVES, HALVES[::-1]):
        action = fit_circle(z[fit], z_turned[:, fit], GRID)
        pose = action.pose(z[score], z_asked[score]).element
        fits.append(action)
        errors.append(wrap(pose - asked[score]).abs())
        rotated = z[score] @ fit_rotations(z[fit], z_turned[:, fit])
        best = torch.linalg.vector_norm(rotated - z_asked[score], dim=-1).argmin(0)
        by_grid.append(wrap(GRID[best] - asked[score]).abs().rad2deg())
        if identify:
            some = z[score], z_asked[score], group.identity[score]
            identities.append(identified(action, *some))
    among = transformed_retrieval(
        z.expand(DRAWS, -1, -1), z_turned[torch.randperm(ANGLES)[:DRAWS]], special=True
    )
    grid = torch.cat(by_grid)
    return {
        **summary(fits, errors),
        "72 fits, mean": f"{grid.mean():.1f}",
        "72 fits, median": f"{grid.median():.1f}",
        **(means(identities) if identify else {}),
        "MRR": f"{among.mrr.mean():.3f}",
        "hits@1": f"{among.hits[:, 0].mean():.3f}",
    }


@torch.no_grad()
def about_any_axis(encoder: nn.Module, group: Group) -> dict[str, object]:
    """Fit the action of all rotations of space, and use it."""
    images = group.testing
    rotations, asked = (
        random_orthogonal(3, batch_shape=(count,), special=True)
        for count in (ROTATIONS, len(images))
    )
    z, z_asked = embed(encoder, images), embed(encoder, rotate(images, asked))
    z_turned = torch.stack([embed(encoder, rotate(images, rotation)) for rotation in rotations])
    fits, errors, identities = [], [], []
    for fit, score in (HALVES, HALVES[::-1]):
        action = fit_so3(z[fit], z_turned[:, fit], rotations)
        pose = action.pose(z[score], z_asked[score]).element
        fits.append(action)
        errors.append(rotation_distance(pose, asked[score].double()))
        identities.append(identified(action, z[score], z_asked[score], group.identity[score]))
    return summary(fits, errors, "any axis: ") | means(identities)


def main() -> None:
    found = options(__doc__, steps=300, seeds=[1, 2, 3, 4, 5], group=list(GROUPS), arm=ARMS)
    figure = Figure(figsize=(11, 3.2))
    panels = figure.subplots(1, len(found.group), sharey=True, squeeze=False)[0]
    warnings.filterwarnings("ignore", "the action that|fit_.* found")  # controls do not turn
    for ax, name in zip(panels, found.group, strict=True):
        of_space = name in OF_SPACE
        asked = [partial(about_one_axis, identify=not of_space)]
        asked += [about_any_axis] if of_space else []
        kept = found.output / "encoders" / name
        run = partial(measured, GROUPS[name], found.arm, asked, make_arms=arms, kept=kept)
        seeds = each_seed(f"uses-{name}", found, run)
        draw_arms(ax, [row for rows in seeds for row in rows], "pose, mean", chance=90)
        ax.set(title=name, xlabel="error (degrees)", xlim=(0, 100), xticks=[0, 45, 90])
    panels[0].invert_yaxis()
    path = found.output / "uses.png"
    figure.savefig(path)
    print("Wrote", path)


if __name__ == "__main__":
    main()
