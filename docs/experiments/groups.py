"""Data on which a group acts exactly, each with an encoder."""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Group, Transform, read
from torch import Tensor, nn

from care_loss.rotation import random_orthogonal

TEMPLATES, COPIES = 50, 8


def group(
    training: Tensor,
    others: Tensor,
    turn: Transform,
    own_turns: Transform,
    ordinary: Transform,
    network: Callable[[int], nn.Module],
    *circles: Callable[[Tensor, Tensor], Tensor],
) -> Group:
    """Return a group with some images for training, and with others for measuring."""
    identity = torch.arange(len(others)).repeat(COPIES)

    def batch(n: int) -> Tensor:
        return own_turns(training[torch.randint(len(training), (n,))])

    testing = ordinary(own_turns(others[identity]))
    return Group(batch, testing, identity, turn, own_turns, ordinary, network, circles)


# SO(3) on clouds of points of several kinds: coordinates, then the kind as zeros and a one. Points
# of no kind are not there.
POINTS, KINDS, JITTER = 8, 4, 0.1


def rotate(clouds: Tensor, rotation: Tensor) -> Tensor:
    return torch.cat((clouds[..., :3] @ rotation, clouds[..., 3:]), -1)


def turn(clouds: Tensor) -> Tensor:
    """Rotate all clouds by one random rotation of space."""
    return rotate(clouds, random_orthogonal(3, special=True))


def own_turns(clouds: Tensor) -> Tensor:
    """Rotate each cloud by a rotation of its own."""
    return rotate(clouds, random_orthogonal(3, batch_shape=(len(clouds),), special=True))


def rotate_about(axis: Tensor, clouds: Tensor, angle: Tensor) -> Tensor:
    """Rotate all clouds about an axis, by an angle."""
    x, y, z = axis / torch.linalg.vector_norm(axis)
    o = torch.zeros(())
    generator = torch.stack([o, z, -y, -z, o, x, y, -x, o]).view(3, 3)
    return rotate(clouds, torch.linalg.matrix_exp(angle.to(clouds) * generator))


# Conjugate rotations have the same eigenvalues, so all axes must show the same multiplicities.
AXES = [
    partial(rotate_about, torch.tensor(axis)) for axis in ([1.0, 0, 0], [0, 1.0, 0], [1.0, 1, 1])
]


def jitter(clouds: Tensor) -> Tensor:
    """Move each point a little."""
    noise = JITTER * torch.randn(*clouds.shape[:-1], 3)
    return torch.cat((clouds[..., :3] + noise, clouds[..., 3:]), -1)


class DeepSets(nn.Sequential):
    """The mean over points of a network of each point, and a projection head."""

    def __init__(self, dim: int, width: int = 64) -> None:
        def layers(*sizes: int) -> list[nn.Module]:
            return [
                layer
                for i, o in pairwise(sizes)
                for layer in (nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.ReLU())
            ]

        self.width = width
        super().__init__(
            nn.Sequential(*layers(3 + KINDS, width, width)),
            nn.Sequential(*layers(width, width), nn.Linear(width, dim)),
        )

    def forward(self, clouds: Tensor) -> Tensor:
        points, head = self
        there = clouds[..., 3:].any(-1)
        features = torch.zeros(*there.shape, self.width)
        features[there] = points(clouds[there])
        z: Tensor = head(features.sum(1) / there.sum(1, keepdim=True))
        return z


def clouds() -> Group:
    place = torch.randn(2 * TEMPLATES, POINTS, 3)
    kind = torch.eye(KINDS)[torch.randint(KINDS, (2 * TEMPLATES, POINTS))]
    templates = torch.cat((place - place.mean(1, keepdim=True), kind), -1)
    return group(*templates.chunk(2), turn, own_turns, jitter, DeepSets, *AXES)


# SO(2) on shapes of infinite dSprites: the upright shape, and a channel with the angle, by which
# the encoder rotates it. So two rotations in succession are exactly that by the sum of the angles.
SIZE = 64


def in_plane(images: Tensor, angle: Tensor) -> Tensor:
    """Add an angle, one for all or one for each image, to those of images `(n, 2, SIZE, SIZE)`."""
    return torch.stack((images[:, 0], images[:, 1] + angle.to(images).view(-1, 1, 1)), 1)


def turn_in_plane(images: Tensor) -> Tensor:
    return in_plane(images, 2 * torch.pi * torch.rand(1))


def own_turns_in_plane(images: Tensor) -> Tensor:
    return in_plane(images, 2 * torch.pi * torch.rand(len(images)))


def brightness(images: Tensor) -> Tensor:
    """Multiply each shape by a brightness of its own."""
    factor = 0.6 + 0.8 * torch.rand(len(images), 1, 1)
    return torch.stack((images[:, 0] * factor, images[:, 1]), 1)


class ConvNet(nn.Sequential):
    """Rotate the shapes, and map them by four convolutions and a projection head."""

    def __init__(self, dim: int, width: int = 8) -> None:
        layers: list[nn.Module] = []
        for i, o in pairwise([1, width, 2 * width, 4 * width, 8 * width]):
            layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layers += [nn.Linear(o, o, bias=False), nn.BatchNorm1d(o), nn.ReLU(), nn.Linear(o, dim)]
        super().__init__(*layers)

    def forward(self, images: Tensor) -> Tensor:
        angle = images[:, 1, 0, 0]
        c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        matrix = torch.stack((c, -s, zero, s, c, zero), -1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, [len(images), 1, SIZE, SIZE], align_corners=False)
        rotated = F.grid_sample(images[:, :1], grid, align_corners=False)
        z: Tensor = super().forward(F.avg_pool2d(rotated, 2))
        return z


def sprites() -> Group:
    from idsprites import InfiniteDSprites  # which draws from NumPy's generator

    np.random.seed(int(torch.randint(2**31, ())))  # noqa: NPY002
    dataset = InfiniteDSprites(
        img_size=SIZE,
        dataset_size=2 * TEMPLATES,
        color_range=["white"],
        scale_range=[1.0],
        orientation_range=[0.0],
        position_x_range=[0.5],
        position_y_range=[0.5],
        orientation_marker=False,
        background_color="black",
        grayscale=True,
    )
    shapes = torch.as_tensor(np.stack([image for image, _ in dataset]))
    upright = torch.cat((shapes, torch.zeros_like(shapes)), 1)
    return group(
        *upright.chunk(2), turn_in_plane, own_turns_in_plane, brightness, ConvNet, in_plane
    )


# The hue of patches of photographs, a rotation of RGB about the grey axis, as in the demonstration.


def hues() -> Group:
    import photos  # which takes a second

    with torch.random.fork_rng():
        training, testing = photos.load_patches()
    others = testing[torch.randperm(len(testing))[:TEMPLATES]]
    ordinary = photos.crop_and_flip()
    turns = photos.one_turn, photos.own_turns
    return group(training, others, *turns, ordinary, photos.network, photos.turn_hue)


# SO(3) on the heavy atoms of molecules: conformers of molecules of PubChem, the examples of a table
# of patterns that comes with rdkit. One unit of length is 3 angstroms.
ATOMS, ELEMENTS = range(6, 33), {"C": 0, "N": 1, "O": 2}  # all others are of the fourth kind


@cache
def conformers() -> Tensor:
    """Return a conformer of each molecule, centred; every seed has the same."""
    from rdkit import Chem, RDConfig, RDLogger
    from rdkit.Chem import rdDistGeom

    RDLogger.DisableLog("rdApp.*")
    table = "NIBRSubstructureFilters/SubstructureFilter_HitTriaging_wPubChemExamples.csv"
    patterns = read(Path(RDConfig.RDContribDir) / table)
    examples = {pattern[f"EX{number}"] for pattern in patterns for number in range(1, 6)}
    found = []
    for smiles in sorted(examples):
        molecule = Chem.MolFromSmiles(max(smiles.split("."), key=len))  # without its salt
        if molecule is None or molecule.GetNumHeavyAtoms() not in ATOMS:
            continue
        full = Chem.AddHs(molecule)
        if rdDistGeom.EmbedMolecule(full, maxAttempts=2, randomSeed=0) < 0:
            continue
        heavy = Chem.RemoveAllHs(full)
        place = torch.tensor(heavy.GetConformer().GetPositions()).float() / 3
        kinds = [ELEMENTS.get(atom.GetSymbol(), 3) for atom in heavy.GetAtoms()]
        cloud = torch.zeros(ATOMS[-1], 3 + KINDS)
        cloud[: len(place)] = torch.cat((place - place.mean(0), torch.eye(KINDS)[kinds]), -1)
        found.append(cloud)
    return torch.stack(found)


def molecules() -> Group:
    found = conformers()[torch.randperm(len(conformers()))]
    others, training = found[:TEMPLATES], found[TEMPLATES:]
    return group(training, others, turn, own_turns, jitter, DeepSets, *AXES)


GROUPS: dict[str, Callable[[], Group]] = {"clouds": clouds, "sprites": sprites, "hues": hues}
GROUPS |= {"molecules": molecules}
