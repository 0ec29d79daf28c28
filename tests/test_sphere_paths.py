"""The sphere: exponential and logarithm, paths, and tangent vectors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spheres import ANGLES, EPS, close, dims, ends, pairs, point, tangent
from strategies import seeds

from care_loss.sphere import (
    expmap,
    geodesic_distance,
    logmap,
    parallel_transport,
    random_uniform,
    slerp,
    tangent_projection,
)

# expmap and logmap


@given(pairs(st.one_of(st.floats(0.0, 3.0), ends)), seeds)
def test_expmap_and_logmap_are_inverse(pair, seed):
    x, y, angle = pair
    v = logmap(x, y)
    close(v.norm().item(), angle)
    close(x @ v, x.new_zeros(()))
    close(expmap(x, v), y)
    v = angle * tangent(x, seed)
    close(logmap(x, expmap(x, v)), v, 1e-13)


@pytest.mark.parametrize("angle", [1e-7, *ANGLES])
def test_expmap_and_logmap_are_inverse_in_float32(angle, device):
    for dim in (2, 3, 128):
        x = point(dim, batch_shape=(50,))
        v = angle * tangent(x)
        y = expmap(x, v)
        x, v, y = (z.float().to(device) for z in (x, v, y))
        torch.testing.assert_close(expmap(x, logmap(x, y)), y, rtol=0, atol=1e-5)
        torch.testing.assert_close(logmap(x, expmap(x, v)), v, rtol=0, atol=1e-5)


@given(dims, seeds)
def test_at_the_point_itself_the_derivatives_are_identities_and_projections(dim, seed):
    x = point(dim, seed)
    identity = torch.eye(dim, dtype=x.dtype)
    projection = identity - x.outer(x)
    assert torch.equal(expmap(x, torch.zeros_like(x)), x)
    assert not logmap(x, x).any()
    jacobian = torch.autograd.functional.jacobian
    close(jacobian(expmap, (x, torch.zeros_like(x)))[1], identity)
    close(jacobian(logmap, (x, x))[1], projection)
    close(jacobian(logmap, (x, x))[0], -projection)
    squared_distance = torch.func.hessian(lambda y: logmap(x, y).square().sum())(x)
    close(squared_distance, 2 * projection)
    assert torch.func.hessian(lambda v: expmap(x, v).sum())(torch.zeros_like(x)).isfinite().all()


@given(dims, seeds, st.sampled_from([-2 * EPS, 0.0, 2 * EPS]))
def test_antipodes_are_joined_by_a_shortest_path(dim, seed, rounding):
    x = point(dim, seed).requires_grad_()
    y = -x.detach() * (1 + rounding)
    v = logmap(x, y)
    close(v.norm().item(), math.pi)
    close(x @ v, x.new_zeros(()))
    close(expmap(x, v), y)
    middle = slerp(x, y, 0.5)
    close(middle.norm().item(), 1.0)
    close(expmap(x, v / 2), middle)
    smallest = x.abs().argmin()
    assert smallest == middle.argmax()  # as documented
    assert middle[smallest] > 0
    carried = parallel_transport(x, y, v)
    close(carried, -logmap(y, middle) * 2)
    for result in (v, middle, carried, geodesic_distance(x, y)):
        (grad,) = torch.autograd.grad(result.sum(), x, retain_graph=True)
        assert grad.isfinite().all()


# slerp


@given(pairs(), st.sampled_from([-1.5, 0.0, 0.25, 0.5, 1.0, 3.0]))
def test_slerp_has_unit_norm_and_constant_speed(pair, t):
    x, y, angle = pair
    z = slerp(x, y, t)
    close(z.norm().item(), 1.0)
    close(slerp(x, y, 0), x)
    close(slerp(x, y, 1), y)
    close(slerp(y, x, 1 - t), z)
    close(expmap(x, t * logmap(x, y)), z, 1e-13)
    step = 0.1
    further = slerp(x, y, t + step)
    close(geodesic_distance(z, further).item(), step * angle)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slerp_of_nearly_parallel_points(dtype, device):
    x = point(16)
    y = (math.cos(1e-7) * x + math.sin(1e-7) * tangent(x)).to(dtype)
    x = x.to(dtype)
    t = torch.linspace(-1, 2, 13, dtype=dtype)
    z = slerp(x.to(device), y.to(device), t.to(device)).cpu()
    straight = x.double() + t.double().unsqueeze(-1) * (y.double() - x.double())
    # An arc differs from its chord by a square of the angle.
    close(z.double(), straight, 4 * torch.finfo(dtype).eps + 2e-14)
    assert (z.double().norm(dim=-1) - 1).abs().max() <= 4 * torch.finfo(dtype).eps


def test_slerp_agrees_with_scipy():
    spatial = pytest.importorskip("scipy.spatial")
    for angle in (1e-3, 0.5, 2.0, 3.0):
        x = point(5)
        y = math.cos(angle) * x + math.sin(angle) * tangent(x)
        t = torch.linspace(0, 1, 7, dtype=x.dtype)
        expected = torch.from_numpy(spatial.geometric_slerp(x.numpy(), y.numpy(), t.numpy()))
        close(slerp(x, y, t), expected, 1e-12)


def test_the_position_broadcasts_with_the_leading_dimensions(device):
    x, y = random_uniform(3, batch_shape=(2, 4), device=device)
    t = torch.tensor([0.0, 0.1, 0.5, 2.0], device=device, requires_grad=True)
    rows = slerp(x, y, t)
    for i in range(4):
        torch.testing.assert_close(rows[i], slerp(x[i], y[i], t[i].item()))
    assert slerp(x, y, t.unsqueeze(-1)).shape == (4, 4, 3)
    assert torch.autograd.grad(rows[:, 0].sum(), t)[0].all()
    assert torch.equal(slerp(x, y, torch.tensor(0.5, dtype=torch.float64)), slerp(x, y, 0.5))


# tangent vectors


@given(dims, seeds)
def test_a_projection_is_tangent_and_idempotent(dim, seed):
    x = point(dim, seed)
    v = torch.randn(dim, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    projected = tangent_projection(x, v)
    close(x @ projected, x.new_zeros(()))
    close(tangent_projection(x, projected), projected)
    close(v @ projected, projected @ projected)
    assert not torch.equal(projected, v)


@given(pairs(), seeds)
def test_parallel_transport_keeps_inner_products_and_carries_the_path(pair, seed):
    x, y, angle = pair
    v, w = (3 * tangent(x, seed + i) for i in range(2))
    carried_v, carried_w = parallel_transport(x, y, v), parallel_transport(x, y, w)
    # Where x + y is short, its direction is known to fewer digits.
    tolerance = 1e-14 + 10 * EPS / max(EPS, math.cos(angle / 2))
    close(y @ carried_v, x.new_zeros(()), tolerance)
    close(carried_v @ carried_w, v @ w)
    close(parallel_transport(x, y, logmap(x, y)), -logmap(y, x), tolerance)
    close(parallel_transport(y, x, carried_v), v, tolerance)
    close(parallel_transport(x, x, v), v)
