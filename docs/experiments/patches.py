"""Patches of photographs on which two groups act: the hue, and rotations of the plane."""

import torch
from common import Group
from groups import TEMPLATES, draw, group, move, own_turns_in_plane, turn_in_plane
from photos import load_patches, network, random_angles, turn_hue
from torch import Tensor, nn

SEEN, WIDTH = 16, 8  # pixels of the side that the convolutions see, and their first channels


def colours(images: Tensor, angle: Tensor) -> Tensor:
    """Turn the hue of images whose last channel has their pose."""
    return torch.cat((turn_hue(images[:, :3], angle), images[:, 3:]), 1)


def hue(images: Tensor) -> Tensor:
    return colours(images, random_angles())


def own_hues(images: Tensor) -> Tensor:
    return colours(images, random_angles(len(images)))


def both(images: Tensor) -> Tensor:
    return turn_in_plane(hue(images))


def own_both(images: Tensor) -> Tensor:
    return own_turns_in_plane(own_hues(images))


def crop(images: Tensor) -> Tensor:
    """Give each patch a brightness, a size and a place; the disc that is seen stays inside it."""
    bright = (0.6 + 0.8 * torch.rand(len(images), 1, 1, 1)) * images[:, :3]
    low, high = torch.tensor([[0, 0.2, -0.1, -0.1], [0, 0.5, 0.1, 0.1]])
    by = low + (high - low) * torch.rand(len(images), 4)
    return move(torch.cat((bright, images[:, 3:]), 1), by)


class Disc(nn.Module):
    """Draw a disc of each patch in its pose, and map it by the network of the demonstration."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.network = network(dim, WIDTH)
        place = torch.linspace(-1, 1, SEEN + 1)[:-1] + 1 / SEEN
        self.register_buffer("disc", (place.square() + place.square()[:, None] <= 1).float())

    def forward(self, images: Tensor) -> Tensor:
        z: Tensor = self.network(draw(images, SEEN) * self.disc)
        return z


def patches() -> Group:
    """Return patches of photographs; batches of half the size train in half the time."""
    with torch.random.fork_rng():
        pair = load_patches()
    training, testing = (torch.cat((x, torch.zeros_like(x[:, :1])), 1) for x in pair)
    others = testing[torch.randperm(len(testing))[:TEMPLATES]]
    found = group(training, others, both, own_both, crop, Disc)
    return found._replace(batch=lambda n: found.batch(n // 2))
