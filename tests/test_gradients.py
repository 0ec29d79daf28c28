"""Derivatives: against differences, against each other, and finite where they are delicate."""

import pytest
import torch
from losses import LOSSES
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, jvp, vjp

from care_loss.functional import (
    alignment_loss,
    equivariance_loss,
    info_nce_loss,
    uniformity_loss,
)
from care_loss.sphere import normalize

PAIR_LOSSES = LOSSES | {
    "info_nce, cold": lambda z1, z2: info_nce_loss(z1, z2, temperature=0.05),
    "info_nce, values": lambda z1, z2: info_nce_loss(z1, z2, reduction="none"),
    "info_nce, queue": lambda z1, z2: info_nce_loss(z1, z1.flip(0), negatives=z2),
    "equivariance, ragged": lambda z1, z2: equivariance_loss(z1, z2, chunks=4, reduction="none"),
    "equivariance, authors": lambda z1, z2: equivariance_loss(z1, z2, chunks=2, scale="authors"),
    "uniformity, t 0.5": lambda z1, z2: uniformity_loss(z1) * uniformity_loss(z2, t=0.5),
    "alignment, alpha 3": lambda z1, z2: alignment_loss(z1, z2, alpha=3),
    "normalize": lambda z1, z2: normalize(z1) * normalize(z2),
}
every_loss = pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES)


def pair(device, n=6, d=3, dtype=torch.float64):
    return torch.randn(2, n, d, dtype=dtype, device=device, requires_grad=True).unbind()


@every_loss
def test_gradients_are_those_of_differences(loss, device):
    assert gradcheck(loss, pair(device), check_forward_ad=True)


@every_loss
def test_second_derivatives_are_those_of_differences(loss, device):
    assert gradgradcheck(loss, pair(device))


@every_loss
def test_forward_mode_equals_reverse_mode(loss, device):
    z1, z2 = pair(device)
    for argnums in (0, 1):
        forward, reverse = jacfwd(loss, argnums)(z1, z2), jacrev(loss, argnums)(z1, z2)
        torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-12)


@every_loss
def test_forward_over_reverse_equals_reverse_over_reverse(loss, device):
    z1, z2 = (z.detach() for z in pair(device, n=6, d=2))

    def gradient(z):
        value, pull = vjp(lambda z: loss(z, z2), z)
        return pull(torch.ones_like(value))[0]

    step = torch.randn_like(z1)
    _, forward = jvp(gradient, (z1,), (step,))
    _, pull = vjp(gradient, z1)
    torch.testing.assert_close(forward, pull(step)[0], rtol=1e-8, atol=1e-11)  # symmetric


DELICATE = {
    "equal views": lambda z: (z, z),
    "all rows coincide": lambda z: (z[:1].expand_as(z), z[:1].expand_as(z)),
    "opposite views": lambda z: (z, -z),
    "a zero row": lambda z: (z * (torch.arange(len(z)) > 0).to(z)[:, None], z.flip(0)),
    "all rows zero": lambda z: (0 * z, 0 * z),
}


@pytest.mark.parametrize("delicate", DELICATE.values(), ids=DELICATE)
@every_loss
def test_first_and_second_derivatives_are_finite_at_delicate_points(loss, delicate, device):
    z1, z2 = (z.detach().clone().requires_grad_() for z in delicate(pair(device)[0]))
    value = loss(z1, z2)
    first = torch.autograd.grad(value.sum(), (z1, z2), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (z1, z2))
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in (*first, *second))


def test_the_gradient_is_zero_at_zero_loss_and_the_curvature_is_not(device):
    z1 = pair(device, n=8, d=3)[0].detach()
    z2 = z1[:, [1, 2, 0]].clone().requires_grad_()  # a permutation of the axes
    (grad,) = torch.autograd.grad(equivariance_loss(z1, z2), z2, create_graph=True)
    assert grad.abs().max() < 1e-15
    step = torch.randn_like(z2)
    (curvature,) = torch.autograd.grad((grad * step).sum(), z2)
    assert (curvature * step).sum() > 1e-3


def test_alignment_is_curved_where_the_views_coincide(device):
    z1 = pair(device)[0].detach()
    z2 = z1.clone().requires_grad_()
    (grad,) = torch.autograd.grad(alignment_loss(z1, z2), z2, create_graph=True)
    step = torch.randn_like(z2)
    (curvature,) = torch.autograd.grad((grad * step).sum(), z2)
    assert (curvature * step).sum() > 1e-3


@pytest.mark.parametrize("loss", [info_nce_loss, equivariance_loss, alignment_loss])
def test_gradients_point_along_the_sphere(loss, device):
    z1, z2 = pair(device)
    for z, grad in zip((z1, z2), torch.autograd.grad(loss(z1, z2), (z1, z2)), strict=True):
        assert grad.norm() > 1e-3
        assert (z * grad).sum(-1).abs().max() < 1e-14


def test_one_step_downhill_lowers_each_loss(device):
    for loss in (info_nce_loss, equivariance_loss, alignment_loss):
        z1, z2 = pair(device, n=32, d=8)
        value = loss(z1, z2)
        (grad,) = torch.autograd.grad(value, z1)
        assert loss(z1 - 0.1 * grad / grad.norm(), z2) < value
