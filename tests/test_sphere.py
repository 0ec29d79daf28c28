"""The sphere: identities for every input that can be drawn, references in extended precision."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import orthogonal, seeds

from care_loss.sphere import (
    expmap,
    frechet_mean,
    geodesic_distance,
    logmap,
    normalize,
    parallel_transport,
    random_uniform,
    slerp,
    tangent_projection,
)

EPS = torch.finfo(torch.float64).eps
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ANGLES = [1e-4, 3e-4, 1e-3, 0.01, 0.1, 0.5, 1.0, math.pi / 2, 2.0, 2.5, 2.9, 3.0]
# Distances from 0 and from pi; at 0.19934 and 0.63246 a series takes over.
ends = st.sampled_from([0.0, 1e-12, 1e-7, 1e-4, 0.1, 0.1993, 0.1994, 0.6324, 0.6325])
angles = st.one_of(st.floats(0.1, 3.0), ends, ends.map(lambda end: math.pi - end))
dims = st.integers(2, 8)


def point(dim, seed=0, dtype=torch.float64, batch_shape=()):
    generator = torch.Generator().manual_seed(seed)
    return random_uniform(dim, batch_shape=batch_shape, generator=generator, dtype=dtype)


def tangent(x, seed=1):
    """A unit tangent vector at each point."""
    generator = torch.Generator().manual_seed(seed ^ 0x5EED)  # not the numbers of the points
    normal = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    # Twice, in case that little is left after the first time.
    return normalize(tangent_projection(x, normalize(tangent_projection(x, normal))))


@st.composite
def pairs(draw, angles=angles, dim=None):
    """Two points at a drawn angle, in float64."""
    d = draw(dims) if dim is None else dim
    x = point(d, draw(seeds))
    angle = draw(angles)
    return x, math.cos(angle) * x + math.sin(angle) * tangent(x, draw(seeds)), angle


def close(a, b, tolerance=1e-14):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# normalize


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_length_become_unit_rows(dtype, device):
    limits = torch.finfo(dtype)
    directions = torch.randn(3, 64, dtype=torch.float64, device=device)
    directions /= directions.norm(dim=-1, keepdim=True)
    lengths = torch.tensor(
        [0.9 * limits.max, 1.0, 64 * limits.tiny], dtype=torch.float64, device=device
    )
    unit = normalize((lengths[:, None] * directions).to(dtype))
    assert unit.dtype == dtype
    # the shortest row has been rounded to subnormal numbers before it arrives
    torch.testing.assert_close(unit[:2].double(), directions[:2], rtol=4 * limits.eps, atol=0)
    assert (unit.double().norm(dim=-1) - 1).abs().max() < 4 * limits.eps


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_rows_have_the_derivative_of_ordinary_ones(size, device):
    x = torch.tensor([3.0, 4.0], device=device)
    (expected,) = torch.autograd.functional.jacobian(normalize, (x,))
    (found,) = torch.autograd.functional.jacobian(normalize, (x * size,))
    torch.testing.assert_close(found * size, expected)


def test_a_zero_row_stays_zero_with_gradient_zero(device):
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], device=device, requires_grad=True)
    unit = normalize(x)
    unit.backward(torch.ones_like(x))
    assert not unit[0].any()
    assert not x.grad[0].any()
    assert x.grad[1].any()


def test_leading_dimensions_are_free_and_may_be_empty(device):
    x = torch.randn(2, 3, 5, device=device)
    assert torch.equal(normalize(x)[1, 2], normalize(x[1, 2]))
    assert normalize(x[:0]).shape == (0, 3, 5)


# geodesic_distance


def exact_angle(x, y):
    """The angle between two vectors as they are, in 40 digits."""
    with mpmath.workdps(40):
        x, y = ([mpmath.mpf(value) for value in z.tolist()] for z in (x, y))
        x, y = ([value / mpmath.norm(z) for value in z] for z in (x, y))
        apart = mpmath.norm([a - b for a, b in zip(x, y, strict=True)])
        along = mpmath.norm([a + b for a, b in zip(x, y, strict=True)])
        return 2 * mpmath.atan2(apart, along)


def relative_error(found, expected):
    return float(abs(mpmath.mpf(found.item()) - expected) / expected)


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("dim", [2, 3, 16, 128])
def test_angles_are_accurate(dim, angle, device):
    for seed in range(3):
        x = point(dim, seed)
        y = math.cos(angle) * x + math.sin(angle) * tangent(x)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
            # Rounded unit vectors, and vectors that were normalised in that precision.
            for x_, y_ in ((x.to(dtype), y.to(dtype)), (1.7 * x, 2.9 * y)):
                x_, y_ = (normalize(z.to(dtype)) if z.norm() > 1.1 else z for z in (x_, y_))
                found = geodesic_distance(x_.to(device), y_.to(device))
                assert relative_error(found, exact_angle(x_, y_)) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_of_half_types_are_those_of_their_rounded_directions(dtype):
    # Rounding to 16 bits changes lengths by as much as these angles.
    for seed in range(20):
        x = point(4, seed)
        y = math.cos(0.01) * x + math.sin(0.01) * tangent(x)
        x, y = x.to(dtype), y.to(dtype)
        expected = exact_angle(x.double(), y.double())
        assert abs(geodesic_distance(x, y).item() - expected) <= torch.finfo(dtype).eps * 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 3, 100])
def test_equal_points_are_at_distance_0_and_antipodes_at_pi(dim, dtype, device):
    x = random_uniform(dim, batch_shape=(50,), dtype=dtype, device=device)
    assert not geodesic_distance(x, x).any()
    assert (geodesic_distance(x, -x).double() - math.pi).abs().max() <= 4 * torch.finfo(dtype).eps
    leaf = x.clone().requires_grad_()
    for y in (x, -x):
        (grad,) = torch.autograd.grad(geodesic_distance(leaf, y).sum(), leaf)
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nearly_antipodal_points_are_nearly_pi_apart(dtype):
    x = point(8, dtype=torch.float64)
    for end in (1e-3, 1e-6, 1e-8):
        y = (-math.cos(end) * x + math.sin(end) * tangent(x)).to(dtype)
        expected = exact_angle(x.to(dtype), y)
        assert (
            relative_error(geodesic_distance(x.to(dtype), y), expected)
            <= 2 * torch.finfo(dtype).eps
        )
    assert geodesic_distance(x, -x * (1 + 4 * EPS)) == math.pi


@given(pairs())
def test_distances_are_the_planted_angles_and_symmetric(pair):
    x, y, angle = pair
    found = geodesic_distance(x, y)
    assert abs(found.item() - angle) <= 4 * EPS + 1e-14 * angle
    assert found == geodesic_distance(y, x)
    assert 0 <= found <= math.pi


@given(pairs(), seeds, st.booleans())
def test_the_triangle_inequality(pair, seed, between):
    x, y, _ = pair
    z = slerp(x, y, 0.3) if between else point(len(x), seed)
    assert geodesic_distance(x, y) <= geodesic_distance(x, z) + geodesic_distance(z, y) + 8 * EPS


@given(pairs(st.one_of(st.floats(0.1, 3.0), st.sampled_from([1e-4, math.pi - 1e-4]))))
def test_the_gradient_is_the_unit_tangent_vector_that_leads_away(pair):
    x, y, angle = pair
    x.requires_grad_(), y.requires_grad_()
    at_x, at_y = torch.autograd.grad(geodesic_distance(x, y), (x, y))
    x, y = x.detach(), y.detach()
    close(at_x.norm().item(), 1.0)
    close(at_y.norm().item(), 1.0)
    # Directions are as exact as the shorter of x - y and x + y.
    tolerance = 20 * EPS / math.sin(angle)
    close(at_x, -logmap(x, y) / angle, tolerance)
    close(at_y, -logmap(y, x) / angle, tolerance)
    close(x @ at_x, x.new_zeros(()), tolerance)


@pytest.mark.parametrize("angle", [1e-7, *ANGLES, math.pi - 1e-4, math.pi - 1e-6])
def test_gradients_and_logarithms_of_float32_points_are_those_of_float64(angle, device):
    for dim in (2, 3, 64):
        x = point(dim, batch_shape=(100,))
        y = (math.cos(angle) * x + math.sin(angle) * tangent(x)).float().to(device)
        x = x.float().to(device)
        gradients = []
        for dtype in (torch.float32, torch.float64):
            leaves = [normalize(z.to(dtype)) if dtype == torch.float64 else z for z in (x, y)]
            leaves = [z.detach().clone().requires_grad_() for z in leaves]
            distances = geodesic_distance(*leaves)
            gradients.append(torch.autograd.grad(distances.sum(), leaves))
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
        if angle < 3.1:
            length = logmap(x, y).double().norm(dim=-1)
            torch.testing.assert_close(length, distances.detach(), rtol=1e-6, atol=0)


def test_zero_vectors_have_finite_distances():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    distances = geodesic_distance(x.unsqueeze(1), x)
    close(distances, torch.tensor([[0.0, math.pi / 2], [math.pi / 2, 0.0]]), 1e-7)
    (grad,) = torch.autograd.grad(distances.sum(), x)
    assert grad.isfinite().all()


def test_keepdim_keeps_the_last_dimension():
    x, y = point(4, batch_shape=(2, 1)), point(4, batch_shape=(3,))
    distances = geodesic_distance(x, y, keepdim=True)
    assert distances.shape == (2, 3, 1)
    assert torch.equal(distances.squeeze(-1), geodesic_distance(x, y))


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


# frechet_mean


def objective_gradient(mean, x, weights=None):
    w = torch.ones_like(x[..., 0]) if weights is None else weights
    w = w / w.sum(-1, keepdim=True)
    return (w.unsqueeze(-1) * logmap(mean.unsqueeze(-2), x)).sum(-2).norm(dim=-1)


@st.composite
def clouds(draw, radius=1.2):
    """Points within a radius of their mean, in two opposite groups or all around."""
    d, n = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    mean = point(d, draw(seeds))
    v = tangent(mean.expand(n, d), draw(seeds))
    if draw(st.booleans()):
        v = v[:1].expand(n, d)  # the directions across these converge slowest
    v = radius * draw(st.sampled_from([1e-6, 0.1, 0.5, 1.0])) * v
    return mean, torch.cat((expmap(mean, v), expmap(mean, -v)))


@given(clouds())
def test_the_mean_of_symmetric_clouds_is_their_centre(cloud):
    mean, x = cloud
    close(frechet_mean(x), mean, 1e-12)


@given(seeds, dims, st.integers(1, 9), st.floats(0.01, 1.2), st.booleans())
def test_the_gradient_of_the_objective_vanishes(seed, dim, n, radius, weighted):
    generator = torch.Generator().manual_seed(seed)
    v = tangent(point(dim, seed).expand(n, dim), seed + 1)
    v = v * radius * torch.rand(n, 1, generator=generator, dtype=v.dtype)
    x = expmap(point(dim, seed), v)
    weights = torch.rand(n, generator=generator, dtype=v.dtype) if weighted else None
    mean = frechet_mean(x, weights=weights)
    if geodesic_distance(mean, x).max() <= 1.2:
        assert objective_gradient(mean, x, weights) <= 1e-12
        single = frechet_mean(x.float(), weights=weights)
        assert objective_gradient(single.double(), x.float().double(), weights) <= 1e-6
    q = orthogonal(dim, seed, reflect=True)
    close(frechet_mean(x @ q, weights=weights), mean @ q, 1e-10)


@pytest.mark.parametrize("angle", [0.0, 1e-7, 0.1, 1.0, 2.0, 3.0, 3.1])
def test_the_mean_of_two_points_is_on_the_path_between_them(angle):
    x = point(5)
    y = math.cos(angle) * x + math.sin(angle) * tangent(x)
    both = torch.stack((x, y))
    close(frechet_mean(both), slerp(x, y, 0.5), 1e-13)
    weights = torch.tensor([1.0, 3.0], dtype=x.dtype)
    close(frechet_mean(both, weights=weights), slerp(x, y, 0.75), 1e-13)
    close(frechet_mean(both, weights=4 * weights), slerp(x, y, 0.75), 1e-13)


@pytest.mark.parametrize("radius", [0.5, 1.0, 1.2])
def test_the_slowest_mean_within_the_radius_is_exact(radius):
    # Two opposite groups, and a little that draws the mean across the line between them.
    mean, u, v = torch.eye(3, dtype=torch.float64)
    x = torch.stack((expmap(mean, radius * u), expmap(mean, -radius * u), expmap(mean, v)))
    weights = torch.tensor([1.0, 1.0, 1e-3], dtype=x.dtype)
    assert objective_gradient(frechet_mean(x, weights=weights), x, weights) <= 1e-14


def test_farther_out_the_mean_converges_at_the_documented_rate():
    # Two opposite groups at 1.4: an error across them shrinks by 1 - 1.364 · 1.4 cot 1.4 = 0.67.
    mean, x = torch.eye(3, dtype=torch.float64)[0], torch.eye(3, dtype=torch.float64)[1]
    x = torch.stack((expmap(mean, 1.4 * x), expmap(mean, -1.4 * x), expmap(mean, 0 * x)))
    x[2] = expmap(mean, torch.tensor([0.0, 0.0, 1.4], dtype=x.dtype))
    weights = torch.tensor([1.0, 1.0, 0.1], dtype=x.dtype)
    assert objective_gradient(frechet_mean(x, weights=weights), x, weights) < 0.67**32
    assert objective_gradient(frechet_mean(x, weights=weights), x, weights) > 1e-14


def test_where_the_mean_is_not_unique_it_is_finite(device):
    x = random_uniform(5, device=device)
    torch.testing.assert_close(frechet_mean(torch.stack((x, -x))), slerp(x, -x, 0.5))
    octahedron = torch.cat((torch.eye(3), -torch.eye(3))).to(device)
    assert abs(frechet_mean(octahedron).norm().item() - 1) < 1e-6
    assert frechet_mean(torch.tensor([[1.0], [-1.0]], device=device)).isfinite().all()


def test_means_are_batched_and_have_no_gradient(device):
    x = random_uniform(4, batch_shape=(3, 1, 6), device=device).requires_grad_()
    weights = torch.rand(2, 6, device=device)
    mean = frechet_mean(x, weights=weights)
    assert mean.shape == (3, 2, 4)
    assert not mean.requires_grad
    torch.testing.assert_close(mean[2, 1], frechet_mean(x[2, 0], weights=weights[1]))
    assert frechet_mean(x[:0]).shape == (0, 1, 4)


def test_of_antipodes_of_unequal_weight_the_heavier_is_nearer(device):
    x = random_uniform(5, device=device)
    both, weights = torch.stack((x, -x)), torch.tensor([1.0, 3.0], device=device)
    torch.testing.assert_close(frechet_mean(both, weights=weights), slerp(x, -x, 0.75))
    with_another = torch.cat((torch.ones_like(x).unsqueeze(0), both))
    for heavier, t in ((3.0, 0.75), (1.0, 0.5)):
        weights = torch.tensor([0.0, 1.0, heavier], device=device)
        torch.testing.assert_close(frechet_mean(with_another, weights=weights), slerp(x, -x, t))


def test_only_directions_and_ratios_of_weights_matter(device):
    x = random_uniform(4, batch_shape=(6,), dtype=torch.float64, device=device)
    x = x + 2 * x[:1]  # in a ball, where the mean converges
    weights = torch.rand(6, dtype=torch.float64, device=device)
    expected = frechet_mean(x, weights=weights)
    scaled = torch.tensor([[1e3], [1e-3], [1.0], [1.0], [2.0], [1e9]], device=device) * x
    torch.testing.assert_close(frechet_mean(scaled, weights=weights), expected)
    for scale in (1e-300, 1e308):
        torch.testing.assert_close(frechet_mean(x, weights=scale * weights), expected)
    with_zero = torch.cat((torch.zeros_like(x[:1]), x))
    torch.testing.assert_close(frechet_mean(with_zero), frechet_mean(x))


def test_points_of_weight_0_are_ignored(device):
    x = random_uniform(4, batch_shape=(6,), device=device)
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0, 1.0], device=device)
    expected = frechet_mean(x[weights > 0], weights=weights[weights > 0])
    x[2], x[4] = torch.nan, 1e30
    torch.testing.assert_close(frechet_mean(x, weights=weights), expected)
    assert frechet_mean(x, weights=torch.zeros(6, device=device)).isnan().all()


# random_uniform


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 3, 128, 2048])
def test_samples_have_unit_norm(dim, dtype, device):
    x = random_uniform(dim, batch_shape=(100,), dtype=dtype, device=device)
    assert x.dtype == dtype
    assert (x.double().norm(dim=-1) - 1).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dim", [1, 2, 3, 16, 128, 2048])
def test_moments_are_those_of_the_uniform_distribution(dim, device):
    # Seven statistics in six dimensions at 4 standard errors each: were the seed drawn anew, one
    # run in 400 would fail. E x1² = 1/D, E x1⁴ = 3/(D(D+2)), E x1²x2² = 1/(D(D+2)).
    n = 20_000 if dim < 1000 else 2_000
    x = random_uniform(
        dim,
        batch_shape=(n,),
        generator=torch.Generator(device).manual_seed(7),
        dtype=torch.float64,
        device=device,
    )
    first, last = x[:, 0], x[:, -1]
    fourth = 3 / (dim * (dim + 2))
    expected = {
        "mean": (first, 0),
        "mean of the last": (last, 0),
        "mean of all": (x.sum(-1), 0),
        "second moment": (first.square(), 1 / dim),
        "fourth moment": (first.pow(4), fourth),
        "product": (first * last, 0 if dim > 1 else 1),
        "product of squares": (first.square() * last.square(), fourth / 3 if dim > 1 else 1),
    }
    for name, (values, moment) in expected.items():
        error = (values.mean() - moment).abs().item()
        assert error <= 4 * values.std().item() / math.sqrt(n) + 1e-12, name


def test_the_generator_gives_all_the_randomness(device):
    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return random_uniform(5, batch_shape=(3,), generator=generator, device=device)

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    x = random_uniform(5)
    torch.manual_seed(3)
    assert torch.equal(random_uniform(5), x)


# dtypes, shapes and transforms


def flow(x, y):
    """Return every differentiable function of the module, of two points."""
    v = logmap(x, y)
    return (
        normalize(3 * x),
        geodesic_distance(x, y, keepdim=True),
        slerp(x, y, 0.3),
        expmap(x, tangent_projection(x, y)),
        v,
        parallel_transport(x, y, v),
    )


def every(x, y):
    return (*flow(x, y), frechet_mean(torch.stack(torch.broadcast_tensors(x, y), -2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype, device):
    x, y = random_uniform(16, batch_shape=(2, 20), dtype=dtype, device=device)
    for found, expected in zip(every(x, y), every(x.float(), y.float()), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-6, atol=1e-2)
    v = logmap(x, y)
    assert torch.equal(v, logmap(x.float(), y.float()).to(dtype))


def test_leading_dimensions_broadcast(device):
    x = random_uniform(4, batch_shape=(2, 1), device=device)
    y = random_uniform(4, batch_shape=(3,), device=device)
    assert all(result.shape[:-1] == (2, 3) for result in every(x, y)[1:])
    one = every(x[1, 0], y[2])
    for all_, single in zip(every(x.expand(2, 3, 4), y.expand(2, 3, 4)), one, strict=True):
        torch.testing.assert_close(all_[1, 2], single)
    for result in every(x[:0], y):
        assert result.shape[0] == 0


def test_gradcheck(device):
    x, y = point(4, 0, batch_shape=(3,)).to(device), point(4, 1, batch_shape=(3,)).to(device)
    for inputs in ((x, y), (x[:1], y), (x, x + 0.1 * (y - x))):
        leaves = [normalize(z).requires_grad_() for z in inputs]
        assert torch.autograd.gradcheck(flow, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(flow, leaves)
    smooth = lambda x, y: (slerp(x, y, 0.3), logmap(x, y), parallel_transport(x, y, y))  # noqa: E731
    leaves = [x.requires_grad_(), x.detach().clone().requires_grad_()]
    assert torch.autograd.gradcheck(smooth, leaves)
    assert torch.autograd.gradgradcheck(smooth, leaves)


def test_forward_and_reverse_mode_agree():
    x, y = point(3, 0), point(3, 1)

    def distance(y):
        return geodesic_distance(x, y)

    hessian = torch.func.jacrev(torch.func.jacrev(distance))(y)
    close(torch.func.hessian(distance)(y), hessian)
    close(torch.func.jacrev(torch.func.jacfwd(distance))(y), hessian)
    with pytest.raises(NotImplementedError, match="must use reverse mode once, got forward"):
        torch.func.jacfwd(torch.func.jacfwd(distance))(y)


def test_vmap(device):
    x, y = random_uniform(4, batch_shape=(2, 5), device=device)
    expected = every(x, y)
    for found, one in zip(torch.vmap(every)(x, y), expected, strict=True):
        torch.testing.assert_close(found, one)
    for found, one in zip(torch.vmap(every, (None, 0))(x[0], y), every(x[0], y), strict=True):
        torch.testing.assert_close(found, one.expand_as(found))
    total = torch.func.grad(lambda x, y: sum(part.sum() for part in flow(x, y)))
    found = torch.vmap(total)(x, y)
    torch.testing.assert_close(found[0], total(x[0], y[0]))


def test_compile_in_one_graph(device):
    torch.compiler.reset()
    x, y = random_uniform(4, batch_shape=(2, 5), device=device)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (compiled, flow):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        results = call(*leaves)
        gradients.append((*results, *torch.autograd.grad(sum(r.sum() for r in results), leaves)))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
    mean = torch.compile(frechet_mean, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(mean, frechet_mean(x))
    between = torch.compile(slerp, fullgraph=True, backend="eager")
    draw = torch.compile(
        lambda z: random_uniform(3, batch_shape=z.shape), fullgraph=True, backend="eager"
    )
    for n in range(3, 6):  # numbers and sizes that change become symbols
        torch.testing.assert_close(between(x, y, 1 / n), slerp(x, y, 1 / n))
        assert draw(torch.zeros(n)).shape == (n, 3)


def test_autocast_changes_nothing(device):
    x, y = random_uniform(4, batch_shape=(2, 5), device=device)
    expected = every(x, y)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = every(x, y)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_nan_stays_in_its_row(device):
    x, y = random_uniform(4, batch_shape=(2, 3), device=device)
    expected = every(x, y)
    x[1, 0] = torch.nan
    for found, before in zip(every(x, y), expected, strict=True):
        assert found[1].isnan().any()
        assert torch.equal(found[[0, 2]], before[[0, 2]])
