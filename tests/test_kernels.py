"""The losses with gradients by hand: against the plain composition, which is their meaning."""

import unittest.mock
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from care_loss._kernels import info_nce as kernel
from care_loss.functional import equivariance_loss, info_nce_loss


def plain(loss, *inputs):
    """Evaluate a loss as the plain composition."""
    with unittest.mock.patch("care_loss.functional.by_hand", return_value=False):
        return loss(*inputs)


def with_gradients(evaluate, loss, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = evaluate(loss, *leaves) if evaluate else loss(*leaves)
    weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=value.device)
    total = (value * weights.view_as(value)).sum() if value.ndim else value
    return [value.detach(), *torch.autograd.grad(total, leaves)]


def assert_is_the_plain_composition(loss, *inputs):
    found, expected = (with_gradients(by, loss, inputs) for by in (None, plain))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13, equal_nan=True)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles with which few rows make many, and no matrix of all products."""
    monkeypatch.setattr(kernel, "is_dense", lambda *_: False)
    monkeypatch.setattr(kernel, "tile", lambda device: (4, 6))


SHAPES = [(2, 3), (5, 4), (2, 3, 7, 3), (13, 5), (1, 16, 2), (0, 6, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_info_nce_is_the_plain_composition(
    shape, temperature, reduction, tiled, learned, device, request
):
    if tiled:
        request.getfixturevalue("small_tiles")
    z1, z2 = torch.randn(2, *shape, dtype=torch.float64, device=device)
    z1[..., :1, :] = 0
    if learned:

        def loss(z1, z2, t):
            return info_nce_loss(z1, z2, temperature=t, reduction=reduction)

        t = torch.tensor(temperature, dtype=torch.float64, device=device)
        assert_is_the_plain_composition(loss, z1, z2, t)
    else:
        loss = partial(info_nce_loss, temperature=temperature, reduction=reduction)
        assert_is_the_plain_composition(loss, z1, z2)


@pytest.mark.parametrize("tile", [(1, 1), (3, 3), (6, 4), (4, 50), (50, 4), (256, 1024)])
def test_tiles_of_any_size_give_the_same(tile, device, monkeypatch, small_tiles):
    monkeypatch.setattr(kernel, "tile", lambda device: tile)
    z1, z2 = torch.randn(2, 11, 3, dtype=torch.float64, device=device)
    assert_is_the_plain_composition(partial(info_nce_loss, reduction="none"), z1, z2)


@pytest.mark.parametrize("n", [512, 513, 1025])
def test_info_nce_of_many_rows_is_the_plain_composition(n, device):
    z1, z2 = torch.randn(2, n, 8, dtype=torch.float64, device=device)
    assert_is_the_plain_composition(info_nce_loss, z1, z2)


@pytest.mark.parametrize("shape", [(12, 2), (3, 26, 2), (2, 3, 13, 5), (0, 6, 3)])
@pytest.mark.parametrize("scale", ["mean", "authors"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_equivariance_is_the_plain_composition(shape, scale, reduction, chunks, device):
    z1, z2 = torch.randn(2, *shape, dtype=torch.float64, device=device)
    z1[..., :1, :] = 0
    loss = partial(equivariance_loss, chunks=chunks, scale=scale, reduction=reduction)
    assert_is_the_plain_composition(loss, z1, z2)


def test_equivariance_by_ids_is_the_plain_composition(device):
    z1, z2 = torch.randn(2, 11, 4, dtype=torch.float64, device=device)
    ids = torch.tensor([0, 1, 0, 2, 1, 1, 3, 3, 0, 2, 4])
    assert_is_the_plain_composition(partial(equivariance_loss, chunks=ids), z1, z2)


@pytest.mark.parametrize("loss", [info_nce_loss, equivariance_loss])
def test_second_derivatives_of_one_tensor_that_is_both_views(loss, device):
    z = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(lambda z: loss(z, z.flip(0)), z)
    assert gradgradcheck(lambda z: loss(z, z.flip(0)), z)
    assert gradgradcheck(lambda z: loss(z, z), z)


@pytest.mark.parametrize("loss", [info_nce_loss, equivariance_loss])
def test_a_view_without_gradient_gets_none(loss, device):
    z1, z2 = torch.randn(2, 6, 3, device=device)
    z1.requires_grad_()
    loss(z1, z2).backward()
    both = [z1.detach().requires_grad_(), z2.clone().requires_grad_()]
    torch.testing.assert_close(z1.grad, torch.autograd.grad(loss(*both), both)[0])
    assert z2.grad is None
    with torch.no_grad():
        assert not loss(z1, z2).requires_grad


def test_long_chunks_of_equal_views_are_never_negative(device):
    for seed in range(20):
        z = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)).to(device)
        rotated = z.roll(1, -1)  # an orthogonal map, exactly
        loss = equivariance_loss(z, rotated)
        assert 0 <= loss < 1e-14
