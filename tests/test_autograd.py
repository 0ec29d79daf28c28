"""The losses with gradients by hand: against the plain composition, which is their meaning."""

import unittest.mock
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from care_loss._autograd import gram_gap, paths, queue
from care_loss._autograd import info_nce as kernel
from care_loss.functional import equivariance_loss, info_nce_loss


def plain(loss, *inputs):
    """Evaluate a loss as the plain composition."""
    with unittest.mock.patch("care_loss.functional.use_autograd_function", return_value=False):
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


@pytest.mark.parametrize(("n", "d"), [(2, 8), (3, 8), (16, 16), (16, 64)])
def test_rows_coincide_above_a_mean_cosine_of_one_chunk(n, d):
    simplex = torch.eye(n, d) - torch.eye(n, d).mean(0)
    simplex = simplex / simplex.norm(dim=-1, keepdim=True)
    rotation = torch.linalg.qr(torch.randn(d + 1, d + 1)).Q
    for above in (-0.01, 0.01):
        cosine = gram_gap.MAX_MEAN_COSINE + above
        inner = (cosine * (n - 1) + 1) / n  # the squared length of the mean of n such rows
        chunks = torch.cat((simplex, torch.zeros(n, 1)), -1).repeat(40, 1, 1)
        chunks[7] = torch.cat(((1 - inner) ** 0.5 * simplex, torch.full((n, 1), inner**0.5)), -1)
        assert gram_gap._nearly_coincide(chunks @ rotation) == (above > 0)


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


@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_the_tiles_of_a_gpu_give_the_plain_composition(temperature, device, monkeypatch):
    gpu, smaller = torch.device("cuda"), 1 if device.type == "cuda" else 16
    height, width = (size // smaller for size in paths.tile(gpu))
    monkeypatch.setattr(kernel, "is_dense", lambda rows, _: paths.is_dense(smaller * rows, gpu))
    monkeypatch.setattr(kernel, "tile", lambda _: (height, width))
    n = (max(height, width) + 2) // 2  # more than one tile of each kind, and a ragged last one
    assert not kernel.is_dense(2 * n, gpu)
    z1, z2 = torch.randn(2, n, 8, dtype=torch.float64, device=device)
    assert_is_the_plain_composition(partial(info_nce_loss, temperature=temperature), z1, z2)


@pytest.mark.parametrize("shape", [(12, 2), (3, 26, 2), (2, 3, 13, 5), (0, 6, 3)])
@pytest.mark.parametrize("scale", ["mean", "authors"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_equivariance_is_the_plain_composition(shape, scale, reduction, chunks, device):
    z1, z2 = torch.randn(2, *shape, dtype=torch.float64, device=device)
    z1[..., :1, :] = 0
    loss = partial(equivariance_loss, chunks=chunks, scale=scale, reduction=reduction)
    assert_is_the_plain_composition(loss, z1, z2)


@pytest.mark.parametrize("shape", [(11, 4), (2, 3, 11, 4), (0, 11, 4)])
@pytest.mark.parametrize("scale", ["mean", "authors"])
@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("tile", [(1, 1), (3, 5), (4, 50), (256, 1024)])
def test_equivariance_by_ids_is_the_plain_composition(
    shape, scale, read, tile, device, monkeypatch
):
    monkeypatch.setattr(gram_gap, "tile", lambda device: tile)
    if not read:
        monkeypatch.setattr("care_loss._chunks.layout", lambda *_: None)
    z1, z2 = torch.randn(2, *shape, dtype=torch.float64, device=device)
    z1[..., :1, :] = 0
    ids = torch.tensor([0, 1, 0, 2, 1, 1, 3, 3, 0, 2, 4])
    assert_is_the_plain_composition(partial(equivariance_loss, chunks=ids, scale=scale), z1, z2)


def test_rows_without_a_partner_do_not_count_where_ids_are_not_read(device, monkeypatch):
    monkeypatch.setattr("care_loss._chunks.layout", lambda *_: None)
    z1, z2 = torch.randn(2, 5, 4, device=device)
    z2[2] = torch.nan
    ids = torch.tensor([0, 0, 1, 2, 2])
    z1.requires_grad_()
    loss = equivariance_loss(z1, z2, chunks=ids)
    (gradient,) = torch.autograd.grad(loss, z1)
    assert loss > 0
    assert gradient[2].eq(0).all()
    assert gradient.isfinite().all()
    assert equivariance_loss(z1, z2, chunks=torch.arange(5)).isnan()


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 7, 4), (0, 6, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("tile", [(1, 1), (3, 5), (256, 1024)])
def test_info_nce_of_a_queue_is_the_plain_composition(
    shape, temperature, reduction, learned, tile, device, monkeypatch
):
    monkeypatch.setattr(queue, "tile", lambda device: tile)
    z1, z2 = torch.randn(2, *shape, dtype=torch.float64, device=device)
    negatives = torch.randn(37, 4, device=device)
    z1[..., :1, :] = 0
    negatives[3] = 0
    options = {"negatives": negatives, "reduction": reduction}
    if learned:
        t = torch.tensor(temperature, dtype=torch.float64, device=device)
        loss = lambda z1, z2, t: info_nce_loss(z1, z2, temperature=t, **options)  # noqa: E731
        assert_is_the_plain_composition(loss, z1, z2, t)
    else:
        loss = partial(info_nce_loss, temperature=temperature, **options)
        assert_is_the_plain_composition(loss, z1, z2)


def test_a_queue_has_second_derivatives_and_its_own_gradient(device):
    z1, z2, negatives = torch.randn(3, 4, 3, dtype=torch.float64, device=device)
    z1.requires_grad_()
    assert gradgradcheck(lambda z: info_nce_loss(z, z2, negatives=negatives), z1)
    negatives.requires_grad_()
    assert gradcheck(lambda x: info_nce_loss(z1, z2, negatives=x), negatives)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_learned_temperature_of_a_half_type_does_not_overflow(dtype, device):
    z1, z2 = torch.randn(2, 200, 512, 4, device=device)
    z1.requires_grad_()
    learned = torch.tensor(0.5, dtype=dtype, device=device)
    found, expected = (
        torch.autograd.grad(info_nce_loss(z1, z2, temperature=t), z1) for t in (learned, 0.5)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [info_nce_loss, equivariance_loss])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpoints(loss, reduction, device):
    def total(z1, z2):
        return loss(z1, z2, reduction=reduction).sum()

    views = [z.requires_grad_() for z in torch.randn(2, 6, 3, device=device).unbind()]
    expected = torch.autograd.grad(total(*views), views)
    found = torch.autograd.grad(checkpoint(total, *views, use_reentrant=False), views)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("temperature", "dtype"),
    [(0.5, torch.float64), (0.01, torch.float64), (0.005, torch.float32)],  # exp(200) is infinite
)
def test_the_rows_of_each_process_have_their_part_of_the_whole(temperature, dtype, small_tiles):
    # Both views of 4, 3 and 6 samples; each anchor has all rows of others as negatives.
    sizes = [8, 6, 12]
    rows = torch.nn.functional.normalize(torch.randn(sum(sizes), 5, dtype=dtype), dim=-1)
    u = rows.clone().double().requires_grad_()
    close = partial(torch.testing.assert_close, check_dtype=False)
    if dtype == torch.float32:
        close = partial(close, rtol=1e-3, atol=1e-2)
    parts, start, partner = [], 0, []
    for size in sizes:
        parts.append(slice(start, start + size))
        partner += [*range(start + size // 2, start + size), *range(start, start + size // 2)]
        start += size
    scores = (u @ u.mT / temperature).fill_diagonal_(-torch.inf)
    expected = scores.logsumexp(-1) - scores[torch.arange(len(u)), partner]
    weights = torch.linspace(0.5, 2, len(u), dtype=u.dtype)
    gradient = torch.autograd.grad((weights * expected).sum(), u)[0]
    found = [kernel.losses_among(rows, own, temperature) for own in parts]
    for own, (losses, total, mass) in zip(parts, found, strict=True):
        close(losses.flatten(), expected[own])
        close(total.flatten(), scores.logsumexp(-1)[own])
        close(mass, 1 - torch.exp(-losses))
    total = torch.cat([total.flatten() for _, total, _ in found])
    for own, (_, _, mass) in zip(parts, found, strict=True):
        ours = kernel.gradient_among(rows, own, temperature, total, mass, weights)
        close(ours, gradient[own])


@pytest.mark.parametrize("weight", [1.0, 1e-8, 1e-20])
def test_small_weights_of_the_loss_do_not_underflow(weight, small_tiles, device):
    z1, z2 = (torch.randn(16) + 0.05 * torch.randn(2, 20, 16)).to(device)
    z1.requires_grad_()
    (expected,) = torch.autograd.grad(info_nce_loss(z1, z2, temperature=1 / 64), z1)
    (found,) = torch.autograd.grad(weight * info_nce_loss(z1, z2, temperature=1 / 64), z1)
    torch.testing.assert_close(found / weight, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [info_nce_loss, equivariance_loss])
def test_any_memory_layout(loss, device):
    z1, z2 = torch.randn(2, 2, 12, 5, 3, dtype=torch.float64, device=device)
    for order in ((0, 3, 1, 2), (2, 0, 1, 3), (3, 2, 1, 0)):
        for reduction in ("mean", "none"):
            views = z1.permute(order), z2.permute(order)
            assert_is_the_plain_composition(partial(loss, reduction=reduction), *views)


@pytest.mark.parametrize("loss", [info_nce_loss, equivariance_loss])
def test_batches_of_gradients(loss, device):
    views = [z.requires_grad_() for z in torch.randn(2, 3, 6, 4, device=device).unbind()]
    values = loss(*views, reduction="none")
    weights = torch.randn(5, *values.shape, device=device)
    found = torch.autograd.grad(values, views, weights, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate(weights):
        expected = torch.autograd.grad(values, views, weight, retain_graph=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[i], theirs)
