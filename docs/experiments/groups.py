"""Data on which a group acts exactly, each with an encoder."""

import warnings
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
from care_loss.sphere import normalize

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
        z: Tensor = head(features.sum(1) / there.sum(1, keepdim=True).clamp_min(1))
        return z


def draw_clouds() -> tuple[Tensor, ...]:
    """Return clouds for training and for measuring."""
    place = torch.randn(2 * TEMPLATES, POINTS, 3)
    kind = torch.eye(KINDS)[torch.randint(KINDS, (2 * TEMPLATES, POINTS))]
    return torch.cat((place - place.mean(1, keepdim=True), kind), -1).chunk(2)


def clouds() -> Group:
    return group(*draw_clouds(), turn, own_turns, jitter, DeepSets, *AXES)


# Augmentations that cannot act as rotations of the embedding: a crop, which removes points beyond a
# plane, has no inverse, and the powers of a stretch along an axis have no bound.


def crop(clouds: Tensor, direction: Tensor) -> Tensor:
    """Remove the points that lie further than half a unit from the origin in a direction."""
    beyond = (clouds[..., :3] * direction).sum(-1, keepdim=True) > 0.5
    return clouds.masked_fill(beyond, 0)


def stretch(clouds: Tensor, direction: Tensor) -> Tensor:
    """Double the distances along a direction."""
    along = (clouds[..., :3] * direction).sum(-1, keepdim=True) * direction
    return torch.cat((clouds[..., :3] + along, clouds[..., 3:]), -1)


def not_a_group(change: Callable[[Tensor, Tensor], Tensor]) -> Group:
    """Return clouds that are changed in a random direction, which is the same for all or not."""

    def directed(clouds: Tensor, count: int) -> Tensor:
        return change(clouds, normalize(torch.randn(count, 1, 3)))

    return group(
        *draw_clouds(),
        lambda some: directed(some, 1),
        lambda some: directed(some, len(some)),
        jitter,
        DeepSets,
    )


# Shapes of infinite dSprites: the upright shape, and a channel that starts with its pose, in which
# the encoder draws it. So two rotations in succession are exactly that by the sum of the angles.
SEEN = 32  # pixels of the side of a picture that the convolutions see


def draw_shapes(size: int, **options: object) -> tuple[Tensor, ...]:
    """Return upright shapes for training and for measuring, `(n, 2, size, size)` each."""
    from idsprites import InfiniteDSprites  # which draws from NumPy's generator

    np.random.seed(int(torch.randint(2**31, ())))  # noqa: NPY002
    dataset = InfiniteDSprites(
        img_size=size,
        dataset_size=2 * TEMPLATES,
        color_range=["white"],
        scale_range=[1.0],
        orientation_range=[0.0],
        position_x_range=[0.5],
        position_y_range=[0.5],
        background_color="black",
        grayscale=True,
        **options,
    )
    shapes = torch.as_tensor(np.stack([image for image, _ in dataset]))
    return torch.cat((shapes, torch.zeros_like(shapes)), 1).chunk(2)


def pose(images: Tensor) -> Tensor:
    """Return the angle, the logarithm of the scale, x and y of each image `(n, 4)`."""
    return images[:, -1, 0, :4]


def move(images: Tensor, by: Tensor) -> Tensor:
    """Add to the poses of images, the same to all `(1, 4)`, or to each its own `(n, 4)`."""
    moved = images.clone()
    moved[:, -1, 0, :4] += by.to(images)
    return moved


def draw(images: Tensor, size: int) -> Tensor:
    """Draw images `(n, C + 1, H, W)` in their poses, as pictures `(n, C, size, size)`."""
    angle, log_scale, x, y = pose(images).unbind(-1)
    # A grid says where in the upright image a point of the picture is, so the pose is inverted.
    c, s = torch.stack((angle.cos(), angle.sin())) * torch.exp(-log_scale)
    matrix = torch.stack((c, -s, s * y - c * x, s, c, -s * x - c * y), -1).view(-1, 2, 3)
    upright = images[:, :-1]
    grid = F.affine_grid(matrix, [*upright.shape[:2], size, size], align_corners=False)
    return F.grid_sample(upright, grid, align_corners=False)


def brightness(images: Tensor) -> Tensor:
    """Multiply each image by a brightness of its own."""
    factor = 0.6 + 0.8 * torch.rand(len(images), 1, 1, 1)
    return torch.cat((factor * images[:, :-1], images[:, -1:]), 1)


class ConvNet(nn.Sequential):
    """Draw the shapes in their poses, and map them by four convolutions and a projection head.

    The head sees means over `places` times `places` parts of a picture: over the whole picture,
    little would be left of where a shape is.
    """

    def __init__(self, dim: int, width: int = 8, places: int = 1) -> None:
        layers: list[nn.Module] = []
        for i, o in pairwise([1, width, 2 * width, 4 * width, 8 * width]):
            layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(places), nn.Flatten()]
        layers += [nn.Linear(places**2 * o, o, bias=False), nn.BatchNorm1d(o), nn.ReLU()]
        super().__init__(*layers, nn.Linear(o, dim))

    def forward(self, images: Tensor) -> Tensor:
        z: Tensor = super().forward(F.adaptive_avg_pool2d(draw(images, images.shape[-1]), SEEN))
        return z


# SO(2) on shapes without a marker of their orientation.


def in_plane(images: Tensor, angle: Tensor) -> Tensor:
    """Rotate images by an angle, one for all or one for each image."""
    return move(images, F.pad(angle.view(-1, 1), (0, 3)))


def turn_in_plane(images: Tensor) -> Tensor:
    return in_plane(images, 2 * torch.pi * torch.rand(1))


def own_turns_in_plane(images: Tensor) -> Tensor:
    return in_plane(images, 2 * torch.pi * torch.rand(len(images)))


def sprites() -> Group:
    shapes = draw_shapes(2 * SEEN, orientation_marker=False)
    return group(*shapes, turn_in_plane, own_turns_in_plane, brightness, ConvNet, in_plane)


# Shapes whose right half is grey, so that all have a common upright orientation. Their scale and
# place may vary as well, and either act with the rotation, or are nuisances. Places are in units
# of half a side of the picture.
SPREAD = torch.tensor([torch.pi, 0.5, 0.25, 0.25])
NUISANCE, HALVED = torch.tensor([0, 1, 1, 1]), torch.tensor([1, 0.5, 0.5, 0.5])


def poses(n: int, spread: Tensor = SPREAD) -> Tensor:
    """Return random poses `(n, 4)`, each value between minus its spread and its spread."""
    return spread * (2 * torch.rand(n, 4) - 1)


def marked(turn: Transform, own_turns: Transform, ordinary: Transform) -> Group:
    shapes = draw_shapes(SEEN, orientation_marker_color="gray")
    network = partial(ConvNet, places=2)
    return group(*shapes, turn, own_turns, ordinary, network, in_plane)


def upright() -> Group:
    """Return a group of rotations; the brightness is the nuisance."""
    return marked(turn_in_plane, own_turns_in_plane, brightness)


def orientations() -> Group:
    """Return a group of rotations; scale, place and brightness are nuisances."""

    def ordinary(images: Tensor) -> Tensor:
        return brightness(move(images, poses(len(images), SPREAD * NUISANCE)))

    return marked(turn_in_plane, own_turns_in_plane, ordinary)


def similarities() -> Group:
    """Return a group of rotations, scales and shifts; the brightness is the nuisance."""

    def turn(images: Tensor) -> Tensor:
        return move(images, poses(1, SPREAD * HALVED))

    def own_turns(images: Tensor) -> Tensor:
        return move(images, poses(len(images), SPREAD * HALVED))

    return marked(turn, own_turns, brightness)


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


# SO(3) on fragments of proteins: the alpha carbons of 64 residues in succession, of the 50 proteins
# of the benchmark TS50, which come with the tests of MDAnalysis. A unit of length is 6 angstroms.
FRAGMENT = 64
CLASSES = {  # by the side chain: nonpolar, polar, negative, positive
    "ALA GLY ILE LEU MET PHE PRO TRP VAL": 0,
    "ASN CYS GLN SER THR TYR": 1,
    "ASP GLU": 2,
    "ARG HIS LYS": 3,
}


@cache
def fragments() -> list[Tensor]:
    """Return all fragments of each protein, `(n, 64, 7)`, centred."""
    import MDAnalysis  # which takes a second
    import MDAnalysisTests

    kind = {name: number for names, number in CLASSES.items() for name in names.split()}
    found = []
    for path in sorted((Path(MDAnalysisTests.__file__).parent / "data/dssp").glob("?????.pdb.gz")):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unknown element")  # of atoms that are not used
            residues = MDAnalysis.Universe(path, to_guess=()).select_atoms("name CA")
        kinds = torch.eye(KINDS)[[kind[name] for name in residues.resnames]]
        protein = torch.cat((torch.from_numpy(residues.positions) / 6, kinds), -1)
        clouds = protein.unfold(0, FRAGMENT, 1).mT.clone()
        clouds[..., :3] -= clouds[..., :3].mean(1, keepdim=True)
        found.append(clouds)
    return found


def proteins() -> Group:
    """Return a group that is measured on both ends of long proteins, and trained on others."""
    found = fragments()
    order = torch.randperm(len(found)).tolist()
    ends_apart = [number for number in order if len(found[number]) > FRAGMENT]
    measured = ends_apart[: TEMPLATES // 2]
    training = torch.cat([found[number] for number in order if number not in measured])
    others = torch.cat([found[number][[0, -1]] for number in measured])
    return group(training, others, turn, own_turns, jitter, DeepSets, *AXES)


GROUPS: dict[str, Callable[[], Group]] = {"clouds": clouds, "sprites": sprites, "hues": hues}
GROUPS |= {"molecules": molecules, "proteins": proteins}
NOT_GROUPS: dict[str, Callable[[], Group]] = {
    "crops": partial(not_a_group, crop),
    "stretches": partial(not_a_group, stretch),
}
MARKED = {"orientations": orientations, "similarities": similarities}
