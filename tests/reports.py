"""Encoders and transformations whose report is known."""

from functools import partial

import torch
from torch import nn

from care_loss.metrics import equivariance_report
from care_loss.sphere import normalize

FLOAT64 = torch.float64
quiet = partial(equivariance_report, progress=False)


def points(n, d, seed=0, dtype=FLOAT64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def turn(images):
    """One random rotation for all images `(n, D)`; its distribution does not matter."""
    d = images.shape[1]
    # Drawn on the CPU, so that it is the same rotation for images on any device.
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=images.dtype, device="cpu"))[0]
    rotation[:, 0] *= torch.linalg.det(rotation).sign()
    return images @ rotation.to(images.device)


def plane_turn(images):
    """One random angle for all images `(n, 2)`."""
    angle = 2 * torch.pi * torch.rand((), dtype=images.dtype)
    c, s = angle.cos(), angle.sin()
    return images @ torch.stack([c, s, -s, c]).view(2, 2)


def flip(images):
    return -images


# Each draw, "equivariant but for" so much: the encoder sees the turned points and some noise of its
# own. It is a function of the points, so that shared and unshared draws meet the same encoder.
class Noisy(nn.Module):
    """Map points to themselves plus a share of an unrelated function of them."""

    def __init__(self, share, d=4):
        super().__init__()
        self.share = share
        generator = torch.Generator().manual_seed(1)
        self.first = torch.randn(d, 64, generator=generator, dtype=FLOAT64) * 3
        self.last = torch.randn(64, d, generator=generator, dtype=FLOAT64)

    def forward(self, x):
        other = normalize(torch.sin(x @ self.first + 1) @ self.last)
        return (1 - self.share) * normalize(x) + self.share * other


IMAGES = points(20, 4)
