"""Rows predicted by rotations that fit other rows, and the loss that contrasts the predictions."""

import copy
import inspect
import json
import pickle
import warnings

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import orthogonal, seeds
from torch import nn
from torch.func import vmap

from care_loss import RotationContrastLoss, functional
from care_loss._chunks import members
from care_loss.functional import (
    alignment_loss,
    cross_fitted,
    equivariance_loss,
    info_nce_loss,
)
from care_loss.metrics import equivariance_report
from care_loss.rotation import fit_rotation
from care_loss.sphere import normalize
from care_loss.views import augment_chunks

FLOAT64 = torch.float64
IDS = torch.tensor([4, 9, 4, 4, 9, 9, 4, 9, 4, 9, 9, 4, 9])  # six rows, and seven
CUTS = {  # of 13 rows, with their ids
    "one chunk": (1, torch.zeros(13)),
    "two chunks": (2, torch.arange(13) // 7),
    "three chunks": (3, torch.tensor([0] * 5 + [1] * 4 + [2] * 4)),
    "ids": (IDS, IDS),
}
every_cut = pytest.mark.parametrize(("chunks", "ids"), CUTS.values(), ids=CUTS)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=FLOAT64, generator=torch.Generator().manual_seed(seed))


def planted(sizes, d, seed=0, reflect=False):
    """Rows, and the same under one orthogonal map per chunk."""
    z = normal(sum(sizes), d, seed=seed)
    maps = [orthogonal(d, seed + k, reflect=reflect) for k in range(len(sizes))]
    parts = [part @ q for part, q in zip(z.split(sizes), maps, strict=True)]
    return z, torch.cat(parts)


# Values


@pytest.mark.parametrize("special", [True, False])
@every_cut
def test_the_value_is_that_of_a_loop(chunks, ids, special):
    z, turned = normal(2, 13, 2)
    expected = reference.cross_fitted(z, turned, ids, special)
    found = cross_fitted(z, turned, chunks=chunks, special=special)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 4), seeds)
def test_planted_rotations_are_predicted_exactly(count, d, more, seed):
    n = count * 2 * d + more
    sizes = [n // count + (k < n % count) for k in range(count)]
    z, turned = planted(sizes, d, seed)
    found = cross_fitted(3 * z, turned / 7, chunks=count)
    torch.testing.assert_close(found, normalize(turned), rtol=0, atol=1e-11)


def test_reflections_are_predicted_over_all_orthogonal_maps_only():
    z, turned = planted([17, 16], 4, reflect=True)
    found = cross_fitted(z, turned, chunks=2, special=False)
    torch.testing.assert_close(found, normalize(turned), rtol=0, atol=1e-12)
    assert (cross_fitted(z, turned, chunks=2) - normalize(turned)).norm(dim=-1).mean() > 0.1


@every_cut
def test_no_row_is_predicted_by_a_fit_that_has_seen_it(chunks, ids):
    z, turned = normal(2, 13, 2)
    jacobian = torch.func.jacrev(lambda v: cross_fitted(z, v, chunks=chunks))(turned)
    sizes = jacobian.abs().sum((1, 3))  # how the prediction of row i depends on the target j
    for rows in members(chunks, 13):
        for i, row in enumerate(rows):
            for j in range(13):
                other = [k for k, at in enumerate(rows) if at == j]
                depends = bool(other) and (other[0] - i) % 2 == 1
                assert (sizes[row, j] > 1e-6) == depends
                assert depends or sizes[row, j] == 0


def test_the_order_of_chunks_and_of_rows_in_halves_changes_nothing():
    z, turned = normal(2, 13, 2)
    expected = cross_fitted(z, turned, chunks=IDS)
    one, other = (torch.nonzero(chunk == IDS).flatten() for chunk in (4, 9))
    for order in (
        torch.cat((other, one)),  # chunks
        torch.stack((one, other[:-1]), 1).flatten().tolist() + other[-1:].tolist(),
        torch.cat((one[[2, 5, 0, 3, 4, 1]], other[[4, 1, 2, 5, 6, 3, 0]])),  # rows in halves
        torch.cat((one.roll(1), other)),  # even and odd rows, where there are as many
    ):
        found = cross_fitted(z[order], turned[order], chunks=IDS[order])
        torch.testing.assert_close(found, expected[order], rtol=0, atol=1e-14)
    names = torch.where(IDS == 4, 700, -3)
    torch.testing.assert_close(cross_fitted(z, turned, chunks=names), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_an_int_means_the_chunks_of_the_views(chunks):
    z = normal(14, 2)
    turned, made = augment_chunks(z, lambda x: x @ orthogonal(2, len(x)), chunks=chunks)
    parts = torch.arange(14).tensor_split(chunks)
    ids = torch.cat([torch.full_like(part, k) for k, part in enumerate(parts)])
    torch.testing.assert_close(cross_fitted(z, turned, chunks=made), normalize(turned))
    torch.testing.assert_close(cross_fitted(z, turned, chunks=ids), normalize(turned))


@every_cut
def test_leading_dimensions_are_batches(chunks, ids):
    z, turned = normal(2, 3, 2, 13, 2)
    found = cross_fitted(z, turned, chunks=chunks)
    for i in range(3):
        for j in range(2):
            one = cross_fitted(z[i, j], turned[i, j], chunks=chunks)
            torch.testing.assert_close(found[i, j], one, rtol=0, atol=1e-14)
    assert cross_fitted(z[:0], turned[:0], chunks=chunks).shape == (0, 2, 13, 2)


# What right predictions mean


@given(st.integers(2, 8), st.integers(1, 8), st.booleans(), seeds)
def test_right_predictions_are_those_of_one_rotation_of_halves_that_span_the_same(
    d, rank, special, seed
):
    rank = min(rank, d)
    rows = normal(2 * d + 2, rank, seed=seed) @ orthogonal(d, seed)[:rank]
    turned = rows @ orthogonal(d, seed + 1, reflect=not special)
    found = cross_fitted(rows, turned, chunks=1, special=special)
    assert (found - normalize(turned)).abs().max() < 1e-7
    # With one row of another half's span changed, no single map relates all rows.
    turned[0] = -turned[0]
    found = cross_fitted(rows, turned, chunks=1, special=special)
    assert (found - normalize(turned)).abs().max() > 0.1
    assert equivariance_loss(rows, turned) > 1e-4


def test_halves_that_span_different_subspaces_may_be_predicted_wrongly():
    rows = torch.zeros(8, 4, dtype=FLOAT64)
    rows[::2, :2], rows[1::2, 2:] = normal(2, 4, 2)
    turned = rows @ orthogonal(4, 5)
    assert equivariance_loss(rows, turned) < 1e-25  # one rotation relates all rows
    assert (cross_fitted(rows, turned, chunks=1) - normalize(turned)).norm(dim=-1).max() > 0.1


def test_a_fit_explains_its_own_rows_whatever_they_are():
    rows, turned = orthogonal(16, 0)[:8], orthogonal(16, 1)[:8]
    assert fit_rotation(rows, turned, special=True).residual < 1e-12
    missed = cross_fitted(rows, turned, chunks=1) - turned
    assert missed.norm(dim=-1).mean() > 1  # of orthogonal rows: 1.4


def test_zero_rows_and_nan_stay_where_they_are():
    z, turned = normal(2, 16, 2)
    z[1] = 0
    found = cross_fitted(z, turned, chunks=2)
    assert found[1].tolist() == [0, 0]
    torch.testing.assert_close(found[2:].norm(dim=-1), torch.ones(14, dtype=FLOAT64))
    leaves = z.clone().requires_grad_()
    cross_fitted(leaves, turned, chunks=2).sin().sum().backward()
    assert leaves.grad[1].tolist() == [0, 0]
    assert leaves.grad.isfinite().all()
    broken = z.clone()
    broken[3] = torch.nan
    nan = cross_fitted(broken, turned, chunks=2).isnan().all(-1)
    assert nan.nonzero().flatten().tolist() == [0, 2, 3, 4, 6]  # what its half predicts, and itself
    expected = found[~nan]
    torch.testing.assert_close(cross_fitted(broken, turned, chunks=2)[~nan], expected)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_also_under_autocast(half, device):
    z, turned = (x.to(device, half) for x in planted([32, 32], 8))
    found = cross_fitted(z, turned, chunks=2)
    assert found.dtype == torch.float32
    expected = cross_fitted(z.double(), turned.double(), chunks=2).float()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(cross_fitted(z, turned, chunks=2), found)
    loss = RotationContrastLoss(chunks=2)(z, turned)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce_loss(found, turned.float()))


def test_float32_predicts_planted_rotations_to_rounding(device):
    z, turned = (x.to(device, torch.float32) for x in planted([40] * 4, 16))
    found = cross_fitted(z, turned, chunks=4)
    assert found.dtype == torch.float32
    assert (found - normalize(turned)).abs().max() < 2e-7


# Derivatives


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("chunks", [1, 2, IDS[:11]], ids=["one chunk", "two chunks", "ids"])
def test_gradients_of_both_orders(chunks, special):
    z, turned = (x.clone().requires_grad_() for x in normal(2, 11, 2, seed=1))

    def f(x, y):
        return cross_fitted(x, y, chunks=chunks, special=special)

    assert torch.autograd.gradcheck(f, (z, turned))
    assert torch.autograd.gradgradcheck(f, (z, turned))


def test_gradients_where_the_fits_are_perfect():
    z, turned = (x.requires_grad_() for x in planted([12], 3))
    turned = turned.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: cross_fitted(x, y, chunks=1), (z, turned))
    loss = RotationContrastLoss(chunks=1, base_loss=alignment_loss)
    for gradient in torch.autograd.grad(loss(z, turned), (z, turned)):
        assert gradient.abs().max() < 1e-12  # the minimum


def test_vmap_is_a_loop(device):
    z, turned = normal(2, 3, 13, 2).to(device)
    for chunks in (1, IDS):
        found = vmap(lambda x, y, c=chunks: cross_fitted(x, y, chunks=c))(z, turned)
        torch.testing.assert_close(found, cross_fitted(z, turned, chunks=chunks))


def test_compiles_as_one_graph(device):
    torch.compiler.reset()
    z, turned = torch.randn(2, 22, 4, device=device)
    loss = RotationContrastLoss(chunks=2)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, loss):
        leaves = [x.clone().requires_grad_() for x in (z, turned)]
        value = call(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*results)


def test_ids_leave_compiled_code_and_are_read(device):
    torch.compiler.reset()
    z, turned = torch.randn(2, 13, 2, device=device)
    ids = IDS.to(device)
    compiled = torch.compile(lambda x, y, c: 2 * cross_fitted(x, y, chunks=c), backend="eager")
    torch.testing.assert_close(compiled(z, turned, ids), 2 * cross_fitted(z, turned, chunks=ids))


# Few rows


@pytest.fixture
def _nothing_warned():
    functional._warned.clear()
    yield
    functional._warned.clear()


@pytest.mark.usefixtures("_nothing_warned")
@pytest.mark.parametrize(
    ("n", "chunks", "d", "least"),
    [
        (63, 1, 64, 32),
        (128, 4, 64, 32),
        (128, 4, 16, 32),
        (15, 2, 4, 8),
        (256, 4, 16, 0),
        (256, 4, 64, 0),
        (256, 4, 128, 0),
        (16, 1, 4, 0),
    ],
)
def test_halves_of_few_rows_warn_once(n, chunks, d, least):
    z, turned = torch.randn(2, n, d)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            cross_fitted(z, turned, chunks=chunks)
    assert len(seen) == (least > 0)
    for warning in seen:
        assert f"should have {least} rows or more for embeddings of dimension {d}, got " in str(
            warning.message
        )
        assert str(warning.message).endswith("fewer chunks, a larger batch, or a smaller head.")
        assert warning.filename == __file__


# The module


def test_the_loss_is_info_nce_of_the_predictions(device, dtype):
    z, turned = torch.randn(2, 24, 4, device=device).to(dtype)
    ids = torch.arange(24, device=device) % 3
    for special in (True, False):
        module = RotationContrastLoss(temperature=0.2, chunks=2, special=special)
        for given_, used in ((None, 2), (1, 1), (ids, ids)):
            parts = module.forward_components(z, turned, chunks=given_)
            prediction = cross_fitted(z, turned, chunks=used, special=special)
            expected = info_nce_loss(prediction, turned.to(prediction.dtype), temperature=0.2)
            assert torch.equal(parts.loss, expected)
            assert torch.equal(module(z, turned, chunks=given_), expected)


def test_the_share_is_that_of_the_displacement_on_other_halves():
    z, turned = normal(2, 32, 3)
    loss = RotationContrastLoss(chunks=2)
    parts = loss.forward_components(z.requires_grad_(), turned)
    u, v = (reference.unit(x.detach()) for x in (z, turned))
    p = reference.cross_fitted(z.detach(), turned, np.arange(32) // 16)
    expected = 1 - ((p - v) ** 2).sum() / ((u - v) ** 2).sum()
    assert parts.share.item() == pytest.approx(expected, rel=1e-9)
    assert parts.loss.requires_grad
    assert not parts.share.requires_grad
    assert parts._fields == ("loss", "share")
    z, turned = planted([16, 16], 3)
    assert loss.forward_components(z, turned).share.item() == pytest.approx(1, abs=1e-12)
    for x in (z, z.float()):
        assert loss.forward_components(x, x).share.isnan()  # nothing moves


def test_a_base_loss_takes_the_place_of_info_nce(device, dtype):
    z, turned = torch.randn(2, 24, 4, device=device).to(dtype)

    def base(prediction, target):
        assert prediction.dtype == target.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(prediction, cross_fitted(z, turned, chunks=2))
        assert torch.equal(target, turned.to(target.dtype))
        return (prediction - target).square().sum()

    loss = RotationContrastLoss(chunks=2, base_loss=base)
    assert loss(z, turned).shape == ()
    assert "base_loss=<function" in repr(loss)
    child = RotationContrastLoss(base_loss=nn.CosineEmbeddingLoss())
    assert "(base_loss): CosineEmbeddingLoss()" in repr(child)


def test_the_settings_are_plain_remembered_and_printed():
    names = ["temperature", "chunks", "special", "base_loss", "gather_distributed"]
    parameters = inspect.signature(RotationContrastLoss).parameters
    assert list(parameters) == names
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert [p.default for p in parameters.values()] == [0.5, None, True, None, False]
    config = json.loads('{"temperature": 0.2, "chunks": 2, "special": false}')
    loss = RotationContrastLoss(**config)
    text = (
        "RotationContrastLoss(temperature=0.2, chunks=2, special=False, gather_distributed=False)"
    )
    assert repr(loss) == text
    assert repr(eval(text)) == text
    assert not loss.state_dict()
    z, turned = torch.randn(2, 24, 4)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(z, turned), loss(z, turned))
    loss.special, loss.chunks, loss.temperature = True, 1, 0.1
    expected = RotationContrastLoss(temperature=0.1, chunks=1)
    assert torch.equal(loss(z, turned), expected(z, turned))
    gathering = RotationContrastLoss(temperature=0.1, chunks=1, gather_distributed=True)
    assert torch.equal(gathering(z, turned), expected(z, turned))


def test_a_learned_temperature_gets_a_gradient():
    loss = RotationContrastLoss(temperature=nn.Parameter(torch.tensor(0.2)), chunks=2)
    (learned,) = loss.parameters()
    z, turned = torch.randn(2, 24, 4)
    loss(z, turned).backward()
    t = torch.tensor(0.2, requires_grad=True)
    info_nce_loss(cross_fitted(z, turned, chunks=2), turned, temperature=t).backward()
    assert torch.equal(learned.grad, t.grad)
    assert t.grad != 0


# Training


def turn(points):
    """One angle for all samples of five points in the plane, `(n, 10)`."""
    angle = 2 * torch.pi * torch.rand(())
    c, s = angle.cos(), angle.sin()
    return (points.unflatten(-1, (5, 2)) @ torch.stack([c, s, -s, c]).view(2, 2)).flatten(-2)


def trained(shared):
    """An encoder of jittered points; as placebo, every sample turns by an angle of its own."""
    torch.manual_seed(0)
    layers = [nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)]
    encoder = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(encoder.parameters(), 3e-3)
    loss = RotationContrastLoss(chunks=4)
    for _ in range(150):
        points = torch.randn(128, 10)
        first, second = (points + 0.1 * torch.randn_like(points) for _ in range(2))
        turned, _ = augment_chunks(second, turn, chunks=4)
        if not shared:
            turned = torch.cat([turn(row[None]) for row in second])
        optimizer.zero_grad()
        loss(encoder(first), encoder(turned), chunks=4).backward()
        optimizer.step()
    return encoder


def test_training_makes_the_augmentation_a_rotation():
    points = torch.randn(128, 10, generator=torch.Generator().manual_seed(1))
    figures = [
        equivariance_report(trained(shared), points, {"turn": turn}, samples=8, progress=False)
        .row("turn")
        .figures
        for shared in (True, False)
    ]
    ours, placebo = (found["gap_ratio"].mean for found in figures)
    assert 5 * ours < placebo
    assert figures[0]["rotation_share"].mean > 0.8
