"""The losses as functions of two views, for tests of what holds for all of them."""

import torch
import torch.nn.functional as F

from care_loss.functional import (
    alignment_loss,
    equivariance_loss,
    info_nce_loss,
    uniformity_loss,
)

IDS = torch.tensor([0, 1, 0, 2, 1, 1, 3, 3, 0, 2, 4])  # of 11 rows, the last without a partner


def with_a_queue(z1, z2):
    queue = torch.eye(z1.shape[-1], dtype=z1.dtype, device=z1.device)[:3]
    return info_nce_loss(z1, z2, negatives=queue)


def by_ids(z1, z2):
    return equivariance_loss(z1, z2, chunks=IDS[: z1.shape[-2]].to(z1.device))


LOSSES = {
    "info_nce": info_nce_loss,
    "info_nce with a queue": with_a_queue,
    "equivariance": lambda z1, z2: equivariance_loss(z1, z2, chunks=3),
    "equivariance by ids": by_ids,
    "uniformity": lambda z1, z2: uniformity_loss(z1) + uniformity_loss(z2),
    "alignment": alignment_loss,
    "alignment, alpha 1": lambda z1, z2: alignment_loss(z1, z2, alpha=1),
}


# The formulas as one would write them in PyTorch, without any care for rounding.


def plain_info_nce(z1, z2, temperature=0.5):
    z = F.normalize(torch.cat((z1, z2)), dim=-1)
    scores = (z @ z.mT / temperature).fill_diagonal_(-torch.inf)
    n = len(z1)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(scores, partner)


def plain_equivariance(z1, z2):
    u, v = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
    n = len(u)
    gap = (u @ u.mT - v @ v.mT).square().fill_diagonal_(0)
    return gap.sum() / (n * (n - 1))


def plain_uniformity(z1, z2, t=2.0):
    def one(z):
        return torch.pdist(F.normalize(z, dim=-1)).square().mul(-t).exp().mean().log()

    return one(z1) + one(z2)


def plain_alignment(z1, z2, alpha=2):
    u, v = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
    return (u - v).norm(dim=-1).pow(alpha).mean()


PLAIN = {  # a formula, and the loss that computes it
    "info_nce": (plain_info_nce, info_nce_loss),
    "equivariance": (plain_equivariance, equivariance_loss),
    "uniformity": (plain_uniformity, LOSSES["uniformity"]),
    "alignment": (plain_alignment, alignment_loss),
    "alignment, alpha 1": (lambda z1, z2: plain_alignment(z1, z2, 1), LOSSES["alignment, alpha 1"]),
}


def value_and_grad(loss, *rows):
    leaves = [z.detach().requires_grad_() for z in rows]
    value = loss(*leaves)
    return value.detach().double(), torch.cat(torch.autograd.grad(value, leaves)).double()


def relative_errors(result, truth):
    """Errors of a value and a gradient, each relative to the true one."""
    return [((a - b).norm() / b.norm()).item() for a, b in zip(result, truth, strict=True)]
