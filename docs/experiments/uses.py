"""What can be done with an embedding that a group rotates?

    python docs/experiments/uses.py    # five seeds; writes build/experiments

Rotations of the embedding are fitted to 72 angles on half of the held-out images. With them, three
questions are asked about the other half, and the halves change places:

* pose: two states of an image are given. Which angle lies between them? It is that whose rotation
  takes one embedding nearest to the other.
* retrieval: an image in another state is looked for among 25 images, by the cosine, and by the
  largest cosine after any of the fitted rotations.
* prediction: how high does the embedding of a turned image rank, by its distance from the rotated
  embedding, among those of all images that were turned alike (MRR and hits@k)?

For rotations of space, the angles are those about one axis. The pose is then asked for once more,
with an unknown axis: as the best of 2048 random rotations of space.
"""

import math
from functools import partial

import torch
from common import COMPARED, Group, draw_arms, each_seed, embed, measured, options
from groups import GROUPS, TEMPLATES, rotate
from matplotlib.figure import Figure
from photos import fit_rotations, wrap
from torch import Tensor, nn

from care_loss.metrics import transformed_retrieval
from care_loss.rotation import random_orthogonal, rotation_distance

ANGLES, DRAWS = 72, 8
GRID = 2 * math.pi / ANGLES * torch.arange(ANGLES, dtype=torch.float64)
HALVES = slice(0, None, 2), slice(1, None, 2)  # which have different images
OF_SPACE, ROTATIONS = ("clouds", "molecules", "proteins"), 2048


def found_among(queries: Tensor, gallery: Tensor) -> float:
    """Return how often the best of the gallery, in T rotations `(T, n, D)`, is the right one."""
    best = (queries @ gallery.mT).amax(0)
    return (best.argmax(-1) == torch.arange(len(queries))).double().mean().item()


@torch.no_grad()
def pose_in_space(encoder: nn.Module, group: Group) -> dict[str, object]:
    """Ask for the rotation of space between two states of a cloud, about any axis."""
    tried, asked = (
        random_orthogonal(3, batch_shape=(count,), special=True)
        for count in (ROTATIONS, len(group.testing))
    )
    z, z_asked = embed(encoder, group.testing), embed(encoder, rotate(group.testing, asked))
    few = group.testing[: 2 * TEMPLATES]  # two states of each
    turned = torch.stack([embed(encoder, rotate(few, rotation)) for rotation in tried])
    errors, floors = [], []
    for fit, score in (HALVES, HALVES[::-1]):
        rotations = fit_rotations(z[: len(few)][fit], turned[:, fit])
        # The cosine of z R and w is the sum of the entries of R times those of the matrix z^T w.
        pairs = z[score].unsqueeze(-1) * z_asked[score].unsqueeze(-2)
        best = (pairs.flatten(1) @ rotations.flatten(1).mT).argmax(-1)
        errors.append(rotation_distance(tried[best], asked[score]).rad2deg())
        distances = rotation_distance(tried.unsqueeze(0), asked[score].unsqueeze(1))
        floors.append(distances.amin(-1).rad2deg())
    error = torch.cat(errors)
    return {
        "any axis, mean": f"{error.mean():.1f}",
        "any axis, median": f"{error.median():.1f}",
        "any axis, nearest": f"{torch.cat(floors).mean():.1f}",
    }


@torch.no_grad()
def turned_states(encoder: nn.Module, group: Group) -> tuple[Tensor, ...]:
    """Return the embeddings of images, and what they are compared with.

    These are their embeddings under all angles `(T, N, D)`, and the random angles `(N,)` that are
    asked for, one for each image, with the embeddings of the images under these.
    """
    images, turn = group.testing, group.circles[0]
    turned = torch.stack([embed(encoder, turn(images, angle)) for angle in GRID])
    asked = 2 * math.pi * torch.rand(len(images), dtype=torch.float64)
    each = zip(images.split(1), asked, strict=True)
    z_asked = torch.cat([embed(encoder, turn(image, angle)) for image, angle in each])
    return embed(encoder, images), turned, asked, z_asked


@torch.no_grad()
def measure(encoder: nn.Module, group: Group) -> dict[str, object]:
    z, turned, asked, z_asked = turned_states(encoder, group)
    errors, plain, aligned = [], [], []
    for fit, score in (HALVES, HALVES[::-1]):
        rotated = z[score] @ fit_rotations(z[fit], turned[:, fit])
        nearest = torch.linalg.vector_norm(rotated - z_asked[score], dim=-1).argmin(0)
        errors.append(wrap(GRID[nearest] - asked[score]).abs().rad2deg())
        states = TEMPLATES // 2
        for some in range(0, len(z) // 2, states):  # each image in one of its states
            rows = slice(some, some + states)
            plain.append(found_among(z_asked[score][rows], z[score][rows].unsqueeze(0)))
            aligned.append(found_among(z_asked[score][rows], rotated[:, rows]))
    drawn = torch.randperm(ANGLES)[:DRAWS]
    among = transformed_retrieval(z.expand(DRAWS, -1, -1), turned[drawn], special=True)
    error = torch.cat(errors)
    return {
        "pose, mean": f"{error.mean():.1f}",
        "pose, median": f"{error.median():.1f}",
        "found by cosine": f"{sum(plain) / len(plain):.3f}",
        "found after rotations": f"{sum(aligned) / len(aligned):.3f}",
        "MRR": f"{among.mrr.mean():.3f}",
        "hits@1": f"{among.hits[:, 0].mean():.3f}",
        "hits@5": f"{among.hits[:, 1].mean():.3f}",
    }


def main() -> None:
    found = options(__doc__, steps=300, seeds=[1, 2, 3, 4, 5], group=list(GROUPS), arm=COMPARED)
    figure = Figure(figsize=(11, 3.2))
    panels = figure.subplots(1, len(found.group), sharey=True, squeeze=False)[0]
    for ax, name in zip(panels, found.group, strict=True):
        asked = [measure, pose_in_space] if name in OF_SPACE else [measure]
        run = partial(measured, GROUPS[name], found.arm, asked)
        seeds = each_seed(f"uses-{name}", found, run)
        draw_arms(ax, [row for rows in seeds for row in rows], "pose, mean", chance=90)
        ax.set(title=name, xlabel="error (degrees)", xlim=(0, 100), xticks=[0, 45, 90])
    panels[0].invert_yaxis()
    path = found.output / "uses.png"
    figure.savefig(path)
    print("Wrote", path)


if __name__ == "__main__":
    main()
