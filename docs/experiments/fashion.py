"""Fashion-MNIST: pictures of ten kinds of clothes, all upright, that can be drawn in any pose.

On Debian, `apt-get install dataset-fashion-mnist` brings the four files. Elsewhere, put those of
https://github.com/zalandoresearch/fashion-mnist into the folder `build/fashion-mnist`.
"""

import gzip
import sys
from pathlib import Path

import torch
from common import Group
from groups import brightness, draw, group, in_plane, move, own_turns_in_plane, turn_in_plane
from patches import both, own_both, own_hues
from photos import network as convolutions
from torch import Tensor, nn

FOLDERS = Path("build/fashion-mnist"), Path("/usr/share/datasets/fashion-mnist")
WIDTH = 8  # channels of the first convolution; the backbone has 8 times as many outputs


def read_idx(path: Path) -> Tensor:
    """Return the bytes of a file of the format IDX: its number of dimensions, sizes and values."""
    with gzip.open(path) as file:
        content = bytearray(file.read())
    start = 4 + 4 * content[3]
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(sizes)


def load(part: str) -> tuple[Tensor, Tensor]:
    """Return the images `(n, 2, 28, 28)`, whose last channel is their pose, and their classes."""
    for folder in FOLDERS:
        if folder.exists():
            images = read_idx(folder / f"{part}-images-idx3-ubyte.gz").unsqueeze(1) / 255
            labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz").long()
            return torch.cat((images, torch.zeros_like(images)), 1), labels
    sys.exit(
        f"Fashion-MNIST must be in {FOLDERS[0]} or {FOLDERS[1]}, and neither is there: "
        "apt-get install dataset-fashion-mnist, or put its four files into the first."
    )


class Draw(nn.Module):
    """Draw images in their poses, in three channels."""

    def forward(self, images: Tensor) -> Tensor:
        return draw(images, images.shape[-1]).expand(-1, 3, -1, -1)


def narrow(dim: int) -> nn.Module:
    """Return the network of the demonstration, half as wide."""
    # Convolutions of few channels take half the time in this memory format.
    return convolutions(dim, WIDTH).to(memory_format=torch.channels_last)


def network(dim: int) -> nn.Module:
    """Return what draws the images, a backbone and a head."""
    return nn.Sequential(Draw(), *narrow(dim))


def jiggle(images: Tensor) -> Tensor:
    """Give each image a brightness, a size and a place of its own."""
    low, high = torch.tensor([[0, -0.1, -0.1, -0.1], [0, 0.2, 0.1, 0.1]])
    return move(brightness(images), low + (high - low) * torch.rand(len(images), 4))


def augment(images: Tensor, draws: int) -> Tensor:
    """Crop and flip images, and change contrast and brightness: `draws` is 1, or one per image.

    These are the augmentations of SimCLR and CARE, as far as grey images have them: there is no
    colour to jitter or to remove. A crop is square, and has 20 to 100 % of the area.
    """
    side = (0.2 + 0.8 * torch.rand(draws)).sqrt()
    place = (1 - 1 / side) * (2 * torch.rand(2, draws) - 1)
    by = torch.stack((torch.zeros(draws), -side.log(), *place), -1)
    flipped, contrast, bright = torch.rand(3, draws, 1, 1, 1)
    upright, pose = images.split([images.shape[1] - 1, 1], 1)
    upright = torch.where(flipped < 0.5, upright.flip(-1), upright)
    mean = upright.mean((1, 2, 3), keepdim=True)
    upright = (0.6 + 0.8 * bright) * (mean + (0.6 + 0.8 * contrast) * (upright - mean))
    return move(torch.cat((upright, pose), 1), by)


def coloured(images: Tensor) -> Tensor:
    """Make grey images red; they have three channels then, beside that of their pose."""
    return torch.cat((images[:, :1], 0.3 * images[:, :1], 0.3 * images[:, :1], images[:, 1:]), 1)


def in_one_state(found: Group, training: Tensor) -> Group:
    """Return a group whose images for training are as they are, not in random states."""
    return found._replace(batch=lambda n: training[torch.randint(len(training), (n,))])


def published(training: Tensor, others: Tensor) -> Group:
    """Return the setting of the paper: all views have all augmentations."""

    def shared(images: Tensor) -> Tensor:
        return augment(images, 1)

    def own(images: Tensor) -> Tensor:
        return augment(images, len(images))

    def nothing(images: Tensor) -> Tensor:
        return images

    return in_one_state(group(training, others, shared, own, nothing, network), training)


def rotations(training: Tensor, others: Tensor) -> Group:
    """Return the group of rotations; brightness, size and place are nuisances."""
    turns = turn_in_plane, own_turns_in_plane
    return group(training, others, *turns, jiggle, network, in_plane)


def upright(training: Tensor, others: Tensor) -> Group:
    """Return the same for images that are upright in training: the mistake of newcomers."""
    return in_one_state(rotations(training, others), training)


def crops(training: Tensor, others: Tensor) -> Group:
    """Return crops that shall act as rotations, which they cannot."""
    return published(training, others)._replace(ordinary=brightness)


def hue_ignored(training: Tensor, others: Tensor) -> Group:
    """Return rotations of coloured images, whose hue is one more nuisance."""
    found = rotations(coloured(training), coloured(others))
    return found._replace(ordinary=lambda images: own_hues(jiggle(images)))


def hue_turned(training: Tensor, others: Tensor) -> Group:
    """Return rotations and hues of coloured images, though no task asks for the hue."""
    turns = both, own_both
    return group(coloured(training), coloured(others), *turns, jiggle, network, in_plane)
