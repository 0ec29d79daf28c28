"""Orthogonal matrices: random ones, their angles and distances."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rotations import (
    EPS,
    assert_orthogonal,
    booleans,
    close,
    normal,
)
from strategies import orthogonal, seeds

from care_loss.rotation import (
    random_orthogonal,
    rotation_angles,
    rotation_distance,
)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_random_matrices_are_orthogonal_and_uniform(dim, special, device):
    count = 20_000
    r = random_orthogonal(
        dim, batch_shape=(count,), special=special, dtype=torch.float64, device=device
    )
    assert_orthogonal(r, special)
    # Moments of the Haar measure: E r_ij = 0, E r_ij^2 = 1/D, and E (tr R)^2 = 1, up to the one
    # element of SO(1) and the doubled characters of SO(2).
    error = 5 / math.sqrt(count)
    if dim > 1:
        assert r.mean(0).abs().max() <= error
    assert (r.square().mean(0) - 1 / dim).abs().max() <= error
    trace = r.diagonal(dim1=-2, dim2=-1).sum(-1)
    expected = 2 if special and dim == 2 else 1
    assert abs(trace.square().mean() - expected) <= 4 * error
    fixed = orthogonal(dim, 3).to(device)  # invariant under a shift of the group
    assert (r @ fixed).pow(3).mean(0).sub(r.pow(3).mean(0)).abs().max() <= 2 * error
    dets = torch.linalg.det(r)
    assert special or abs(dets.mean()) <= error


def test_random_matrices_obey_their_generator(device):
    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return random_orthogonal(4, batch_shape=(2, 3), generator=generator, device=device)

    state = torch.get_rng_state()
    first = draw(1)
    assert first.shape == (2, 3, 4, 4)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert random_orthogonal(3, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert random_orthogonal(3, batch_shape=(0,)).shape == (0, 3, 3)


def block_rotation(angles, d, seed):
    """A rotation with the given principal angles."""
    r = torch.eye(d, dtype=torch.float64)
    for k, angle in enumerate(angles):
        c, s = math.cos(angle), math.sin(angle)
        r[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = torch.tensor(
            [[c, s], [-s, c]], dtype=torch.float64
        )
    q = orthogonal(d, seed)
    return q.mT @ r @ q


angles = st.one_of(
    st.floats(0, math.pi),
    st.sampled_from([0.0, 1e-12, 1e-8, 1e-4, 1.0, math.pi / 2, math.pi - 1e-8, math.pi]),
)


@given(st.lists(angles, max_size=4), booleans, seeds)
def test_angles_are_found_near_0_and_pi_and_where_they_repeat(drawn, odd, seed):
    d = max(2 * len(drawn) + odd, 1)
    expected = torch.tensor(sorted(drawn, reverse=True), dtype=torch.float64)
    r = block_rotation(drawn, d, seed)
    found = rotation_angles(r)
    assert found.shape == (d // 2,)
    assert (found - expected).abs().max() <= 10 * EPS * math.sqrt(d) if drawn else True
    single = rotation_angles(r.float())
    assert not drawn or (single - expected).abs().max() <= 10 * 2**-23 * math.sqrt(d)


@given(st.integers(1, 7), seeds)
def test_angles_of_what_is_no_rotation_are_nan(d, seed):
    assert rotation_angles(orthogonal(d, seed, reflect=True)).isnan().all()
    if d > 1:
        assert rotation_angles(2 * orthogonal(d, seed)).isnan().all()
        q = orthogonal(d, seed)
        for pair in ((q, 2 * q), (2 * q, q / 2), (q, q * torch.nan)):
            assert rotation_distance(*pair).isnan()


@given(st.integers(1, 7), seeds, booleans, booleans)
def test_the_distance_does_not_change_under_the_group(d, seed, reflect, special):
    r1, r2 = orthogonal(d, seed, reflect=reflect), orthogonal(d, seed + 1, reflect=reflect)
    a = orthogonal(d, seed + 2, reflect=special)
    distance = rotation_distance(r1, r2)
    for left, right in ((a @ r1, a @ r2), (r1 @ a, r2 @ a), (r2, r1), (r1.mT, r2.mT)):
        close(rotation_distance(left, right), distance, 1e-12)
    assert 0 <= distance <= math.pi * math.sqrt(d // 2) + 1e-12
    assert rotation_distance(r1, r1) <= 1e-13
    assert rotation_distance(r1, orthogonal(d, seed, reflect=not reflect)) == math.inf


@given(st.integers(2, 7), seeds)
def test_the_distance_is_a_metric_and_the_length_of_the_logarithm(d, seed):
    r1, r2, r3 = (orthogonal(d, seed + k) for k in range(3))
    assert (
        rotation_distance(r1, r3) <= rotation_distance(r1, r2) + rotation_distance(r2, r3) + 1e-12
    )
    skew = normal(d, d, seed=seed)
    skew = (skew - skew.mT) / (skew - skew.mT).norm()  # no principal angle beyond pi
    turned = r1 @ torch.linalg.matrix_exp(2 * skew)
    close(rotation_distance(r1, turned), torch.tensor(2 / math.sqrt(2)).double(), 1e-7)
