"""The sphere: means of points."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spheres import close, dims, point, tangent
from strategies import orthogonal, seeds

from care_loss.sphere import (
    expmap,
    frechet_mean,
    geodesic_distance,
    logmap,
    random_uniform,
    slerp,
)


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
