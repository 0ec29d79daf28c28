"""Measures of equivariance: against the definitions, and on embeddings whose answer is known."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import orthogonal, seeds

from care_loss import metrics
from care_loss.functional import equivariance_loss
from care_loss.metrics._measures import across_halves, distance, linear_fit, permutation, unit_rows
from care_loss.rotation import random_orthogonal
from care_loss.sphere import normalize

FLOAT64 = torch.float64


def linear_error(z, moved, *, shuffled=False):
    u, v = unit_rows(shuffled, z, moved)
    return distance(across_halves(linear_fit(z), u, v), v)


PAIRS = {
    "wahba_error": metrics.wahba_error,
    "wahba_error, in sample": lambda *z, **k: metrics.wahba_error(*z, held_out=False, **k),
    "equivariance_error": metrics.equivariance_error,
    "relative_equivariance": metrics.relative_equivariance,
    "invariance_error": metrics.invariance_error,
    "rotation_share": metrics.rotation_share,
    "cosine_spread": metrics.cosine_spread,
    "mrr": lambda *z, **k: metrics.transformed_retrieval(*z, **k).mrr,
    "hits": lambda *z, **k: metrics.transformed_retrieval(*z, **k).hits,
    "linear_error": linear_error,
}
ERRORS = ("wahba_error", "wahba_error, in sample", "equivariance_error")
booleans = st.booleans()


def normal(*shape, seed=0, dtype=FLOAT64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planted(n, d, noise, seed, *, reflect=False):
    """Unit rows, and the same under one orthogonal map, with noise of this norm per row."""
    z, r = normalize(normal(n, d, seed=seed)), orthogonal(d, seed, reflect=reflect)
    return z, z @ r + noise / d**0.5 * normal(n, d, seed=seed + 1)


def close(a, b, tolerance=1e-10):
    a, b = (torch.as_tensor(x, dtype=FLOAT64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-12)


# Definitions


@given(st.integers(4, 20), st.integers(2, 6), st.floats(0.01, 3), seeds, booleans, booleans)
def test_each_measure_is_its_definition(n, d, noise, seed, shuffled, special):
    assume(n // 2 > d)  # else the fit is not unique, and the reference has another
    z, moved = planted(n, d, noise, seed)
    order = permutation(n).numpy() if shuffled else None
    u, v = reference.paired(z, moved, order)
    options = {"shuffled": shuffled}
    wahba = reference.wahba_error(z, moved, order, special)
    close(metrics.wahba_error(z, moved, special=special, **options).item(), wahba, 1e-6)
    identity = reference.distance(u, v)
    close(metrics.invariance_error(z, moved, **options).item(), identity)
    share = 1 - (wahba / identity) ** 2
    close(metrics.rotation_share(z, moved, special=special, **options).item(), share, 1e-6)
    gap, gamma = metrics.equivariance_error, metrics.relative_equivariance
    close(gap(z, moved, **options).item(), reference.equivariance_of_chunk(u, v))
    relative = reference.relative_equivariance(z, moved, order)
    close(gamma(z, moved, **options).item(), relative)
    cosines = [a @ b for a, b in zip(u, v, strict=True)]
    close(metrics.cosine_spread(z, moved, **options).item(), np.var(cosines))
    ranks = reference.ranks(z, moved, order)
    mrr, hits = metrics.transformed_retrieval(z, moved, **options)
    close(mrr.item(), np.mean(1 / ranks))
    close(hits, torch.tensor([np.mean(ranks <= 1), np.mean(ranks <= 5)], dtype=FLOAT64))


@given(st.integers(12, 20), seeds, booleans)
def test_composition_is_its_definition(n, seed, shuffled):
    z, *moved = (normal(n, 3, seed=seed + k) for k in range(4))
    order = permutation(n).numpy() if shuffled else None
    u = reference.paired(z, z, order)[0]
    a, b, ab = (reference.unit(x) for x in moved)
    expected = reference.distance(reference.held_out(u, a, b), ab)
    close(metrics.composition_error(z, *moved, shuffled=shuffled).item(), expected, 1e-6)


# Equivariance and noise


@given(st.integers(2, 16), st.floats(1, 4), seeds, booleans)
def test_an_equivariant_encoder_has_no_error(d, ratio, seed, reflect):
    n = max(4, math.ceil(2 * d * ratio))
    z, moved = planted(n, d, 0, seed, reflect=reflect)
    assert metrics.wahba_error(z, moved) < 1e-10
    assert metrics.equivariance_error(z, moved) < 1e-10
    assert metrics.relative_equivariance(z, moved) < 1e-10
    assert metrics.rotation_share(z, moved) > 1 - 1e-10
    assert metrics.transformed_retrieval(z, moved).mrr == 1
    assert linear_error(z, moved) < 1e-6  # a square matrix of random rows can be ill-conditioned
    second = orthogonal(d, seed + 5)
    assert metrics.composition_error(z, moved, z @ second, moved @ second) < 1e-10


def test_a_reflection_is_no_rotation_of_so():
    z, moved = planted(64, 4, 0, 0, reflect=True)
    assert metrics.wahba_error(z, moved) < 1e-12
    assert metrics.wahba_error(z, moved, special=True) > 0.3
    assert metrics.rotation_share(z, moved, special=True) < 0.9
    assert metrics.transformed_retrieval(z, moved, special=True).mrr < 0.9
    error = metrics.composition_error(z, moved, moved, z @ orthogonal(4, 0), special=True)
    assert error > 0.3


@settings(max_examples=15)
@given(st.integers(2, 12), seeds)
def test_errors_grow_with_noise(d, seed):
    n = 20 * d
    values = [planted(n, d, noise, seed) for noise in (0, 0.1, 0.3, 1.0)]
    for name in (*ERRORS, "linear_error", "relative_equivariance"):
        found = [PAIRS[name](*pair).item() for pair in values]
        if name == "relative_equivariance":  # noise alone also moves the rows, which it divides by
            assume(metrics.invariance_error(*values[0]) > 1)
        assert found == sorted(found), name
    shares = [metrics.rotation_share(*pair).item() for pair in values]
    assert shares == sorted(shares, reverse=True)
    mrr = [metrics.transformed_retrieval(*pair).mrr.item() for pair in values]
    assert mrr == sorted(mrr, reverse=True)


# What changes no measure


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("name", PAIRS)
@given(data=st.data())
def test_one_change_of_basis_changes_no_measure(name, shuffled, data):
    n, d, seed = data.draw(st.integers(4, 24)), data.draw(st.integers(1, 6)), data.draw(seeds)
    # Without a unique fit, "nearest to the identity" does not mean the same in another basis.
    assume(n // 2 > d)
    z, moved = planted(n, d, data.draw(st.floats(0, 2)), seed)
    basis = orthogonal(d, seed + 9)
    before = PAIRS[name](z, moved, shuffled=shuffled)
    after = PAIRS[name](z @ basis, moved @ basis, shuffled=shuffled)
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-7, equal_nan=True)


@given(st.integers(12, 20), seeds, booleans)
def test_one_change_of_basis_does_not_change_compositions(n, seed, shuffled):
    views, basis = normal(4, n, 4, seed=seed), orthogonal(4, seed)
    before = metrics.composition_error(*views, shuffled=shuffled)
    close(metrics.composition_error(*(views @ basis), shuffled=shuffled), before, 1e-6)


@given(st.integers(1, 12), st.integers(1, 8), seeds)
def test_one_change_of_basis_changes_neither_rank_nor_mean(n, d, seed):
    z = normal(n, d, seed=seed)
    basis = orthogonal(d, seed)
    for measure in (metrics.effective_rank, metrics.mean_norm):
        close(measure(z), measure(z @ basis))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("n", "d"), [(9, 3), (24, 5), (7, 16)])
def test_leading_dimensions_are_a_loop(name, shuffled, n, d):
    z, moved = normal(n, d), normal(2, 3, n, d, seed=1)
    batched = PAIRS[name](z, moved, shuffled=shuffled)
    for i in range(2):
        for j in range(3):
            close(batched[i, j], PAIRS[name](z, moved[i, j], shuffled=shuffled))
    both = PAIRS[name](normal(3, n, d, seed=2), moved, shuffled=shuffled)
    close(both[1, 2], PAIRS[name](normal(3, n, d, seed=2)[2], moved[1, 2], shuffled=shuffled))


@pytest.mark.parametrize("name", PAIRS)
def test_no_transformations_have_no_measures(name):
    found = PAIRS[name](normal(8, 3), normal(0, 8, 3))
    assert found.shape[:1] == (0,)


def test_leading_dimensions_of_compositions_and_of_one_tensor_are_a_loop():
    z, a, b, ab = normal(9, 3), *(normal(2, 9, 3, seed=k) for k in range(3))
    batched = metrics.composition_error(z, a, b, ab)
    close(batched[1], metrics.composition_error(z, a[1], b[1], ab[1]))
    for measure in (metrics.effective_rank, metrics.mean_norm):
        close(measure(a)[1], measure(a[1]))


@pytest.mark.parametrize("name", PAIRS)
def test_measures_are_float64_without_gradient_and_ignore_lengths(name):
    z, moved = planted(40, 4, 0.3, 0)
    expected = PAIRS[name](z, moved)
    z32, moved32 = (x.float().requires_grad_() for x in (z, moved))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = PAIRS[name](z32, moved32)
    assert found.dtype == FLOAT64
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    close(PAIRS[name](3 * z, 0.5 * moved), expected)
    assert PAIRS[name](z.bfloat16(), moved.bfloat16()).dtype == FLOAT64


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("n", "d"), [(40, 4), (20, 16)])
def test_measures_of_embeddings_on_a_device_are_those_on_the_cpu(name, n, d, device):
    z, moved = planted(n, d, 0.3, 0)
    for shuffled in (False, True):
        expected = PAIRS[name](z, moved, shuffled=shuffled)
        found = PAIRS[name](z.to(device), moved.to(device), shuffled=shuffled)
        assert found.device.type == device.type
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-8)


def test_other_measures_on_a_device_are_those_on_the_cpu(device):
    views = normal(4, 40, 4)
    found = metrics.composition_error(*views.to(device))
    close(found.cpu(), metrics.composition_error(*views), 1e-6)
    for measure in (metrics.effective_rank, metrics.mean_norm):
        close(measure(views.to(device)).cpu(), measure(views))
    theta = 2 * math.pi / 12 * torch.arange(12, dtype=FLOAT64)
    turns = representation([1, 2], 1, theta)
    found = metrics.frequencies(turns.to(device), theta.to(device))
    assert found.multiplicity.device.type == found.deviation.device.type == device.type
    close(found.multiplicity.cpu(), metrics.frequencies(turns, theta).multiplicity)


# Chance level


@pytest.mark.parametrize("n", [16, 64, 257, 1024])
def test_unrelated_embeddings_are_at_chance_level(n):
    # Of 8 pairs, so that the spread of a pair of 16 rows is not what is tested.
    d = 32
    z, moved = normal(8, n, d), normal(8, n, d, seed=1)
    assert metrics.wahba_error(z, moved).mean().item() == pytest.approx(2**0.5, rel=0.03)
    share = metrics.rotation_share(z, moved).mean()
    assert (share - metrics.rotation_share(z, moved, shuffled=True).mean()).abs() < 0.05
    gap = metrics.equivariance_error(z, moved).mean()
    assert gap.item() == pytest.approx(2 / d, rel=0.1)


def test_in_sample_fits_are_small_on_unrelated_embeddings_and_held_out_ones_are_not():
    z, moved = normal(64, 128), normal(64, 128, seed=1)
    assert metrics.wahba_error(z, moved, held_out=False) < 0.6
    assert metrics.wahba_error(z, moved) > 1.3


@pytest.mark.parametrize("name", ["rotation_share", "wahba_error", "equivariance_error", "mrr"])
def test_shuffled_rows_lose_what_a_rotation_explained(name):
    z, moved = planted(400, 8, 0.1, 0)
    unrelated = PAIRS[name](z, normal(400, 8, seed=7)).item()
    assert PAIRS[name](z, moved, shuffled=True).item() == pytest.approx(unrelated, abs=0.15)
    assert abs(PAIRS[name](z, moved).item() - unrelated) > 0.2


@given(st.integers(2, 200))
def test_the_permutation_moves_every_row_and_is_the_same_each_time(n):
    order = permutation(n)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert (order != torch.arange(n)).all()
    state = torch.get_rng_state()
    assert torch.equal(order, permutation(n))
    assert torch.equal(state, torch.get_rng_state())


def test_images_that_are_sorted_by_angle_are_shuffled_all_the_same():
    angle = 2 * torch.pi / 100 * torch.arange(100, dtype=FLOAT64)
    circle = torch.stack([angle.cos(), angle.sin()], -1)  # where a shift of rows is a rotation
    assert metrics.wahba_error(circle, circle, shuffled=True) > 1


# Extreme input


def test_the_identity_and_constant_embeddings_have_defined_results():
    z = normal(20, 4)
    assert metrics.wahba_error(z, z) == 0
    assert metrics.equivariance_error(z, z) == 0
    assert metrics.invariance_error(z, z) == 0
    assert metrics.rotation_share(z, z).isnan()
    assert metrics.relative_equivariance(z, z).isnan()
    constant = torch.ones(20, 4)
    assert metrics.wahba_error(constant, constant) == 0
    mrr, hits = metrics.transformed_retrieval(constant, constant)
    assert mrr == pytest.approx(2 / 21)  # all rows share the mean rank, 10.5
    assert hits.tolist() == [0, 0]
    assert metrics.mean_norm(constant).item() == pytest.approx(1)
    assert metrics.effective_rank(constant).item() == pytest.approx(1)


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "linear_error"])  # of reports
def test_nan_in_one_item_gives_nan_there_only(name):
    z, moved = normal(2, 12, 3), normal(2, 12, 3, seed=1)
    moved[0, 5, 1] = torch.nan
    found = PAIRS[name](z, moved)
    assert found[0].isnan().all()
    close(found[1], PAIRS[name](z[1], moved[1]))
    assert metrics.effective_rank(moved).isnan().tolist() == [True, False]
    assert metrics.mean_norm(moved).isnan().tolist() == [True, False]


def test_many_float32_rows_are_compared_as_exactly_as_float32_can():
    # Unit rows are rounded by 6e-8, each by itself, where a row differs by 1e-3.
    z, moved = planted(600, 16, 1e-3, 0)
    found = metrics.equivariance_error(z.float(), moved.float())
    expected = metrics.equivariance_error(z.float().double(), moved.float().double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert expected.item() == pytest.approx(equivariance_loss(z, moved).item(), rel=1e-3)


def test_few_float32_rows_are_compared_in_float64():
    z, moved = (x.float() for x in planted(40, 16, 1e-4, 0))
    expected = metrics.equivariance_error(z.double(), moved.double())
    close(metrics.equivariance_error(z, moved), expected)


def test_retrieval_of_many_rows_is_made_in_parts(monkeypatch):
    z, moved = planted(50, 4, 0.5, 0)
    whole = metrics.transformed_retrieval(z, moved)
    monkeypatch.setattr("care_loss.metrics._measures.MAX_SCORES", 120)
    for a, b in zip(whole, metrics.transformed_retrieval(z, moved), strict=True):
        close(a, b)


def test_a_homomorphism_composes_and_a_broken_one_does_not():
    a, b = orthogonal(6, 1), orthogonal(6, 2)
    z = normal(100, 6)
    assert metrics.composition_error(z, z @ a, z @ b, z @ a @ b) < 1e-12
    assert metrics.composition_error(z, z @ a, z @ b, z @ b @ a) > 0.5  # the order matters
    assert metrics.composition_error(z, z @ a, z @ b, z @ orthogonal(6, 3)) > 0.5


# Rank and frequencies


def test_effective_rank_counts_dimensions():
    z = torch.zeros(60, 10, dtype=FLOAT64)
    z[:, :4] = torch.eye(4, dtype=FLOAT64).repeat(15, 1)
    assert metrics.effective_rank(z).item() == pytest.approx(4)


def representation(planes, constant, theta):
    blocks = []
    for k in planes:
        c, s = torch.cos(k * theta), torch.sin(k * theta)
        blocks.append(torch.stack([c, s, -s, c], -1).view(-1, 2, 2))
    blocks += [torch.ones(len(theta), 1, 1, dtype=FLOAT64)] * constant
    return torch.stack([torch.block_diag(*[b[t] for b in blocks]) for t in range(len(theta))])


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.integers(0, 3),
    st.sampled_from([11, 12, 24]),
    seeds,
)
def test_frequencies_are_those_of_a_planted_representation(planes, constant, count, seed):
    generator = torch.Generator().manual_seed(seed)
    offset = torch.rand((), generator=generator, dtype=FLOAT64) * 10
    order = torch.randperm(count, generator=generator)
    theta = 2 * math.pi / count * order.to(FLOAT64) + offset
    rotations = representation(planes, constant, theta)
    basis = random_orthogonal(rotations.shape[-1], generator=generator, dtype=FLOAT64)
    multiplicity, deviation = metrics.frequencies(basis.mT @ rotations @ basis, theta)
    wanted = torch.bincount(torch.tensor(planes), minlength=count // 2 + 1).to(FLOAT64)
    wanted[0] = 2 * wanted[0] + constant
    torch.testing.assert_close(multiplicity, wanted, atol=1e-10, rtol=0)
    assert deviation < 1e-6  # an eigenvalue that repeats moves by the root of the rounding


def test_the_highest_frequency_of_an_even_grid_is_counted_once():
    theta = 2 * math.pi / 8 * torch.arange(8, dtype=FLOAT64)
    found = metrics.frequencies(representation([4, 1], 0, theta), theta)
    close(found.multiplicity, torch.tensor([0, 1, 0, 0, 1], dtype=FLOAT64))
    assert found.deviation < 1e-7
    between = metrics.frequencies(representation([1], 0, theta + math.pi / 8), theta + math.pi / 8)
    close(between.multiplicity, torch.tensor([0, 1, 0, 0, 0], dtype=FLOAT64))


def test_frequencies_of_rotations_that_are_no_representation_deviate():
    generator = torch.Generator().manual_seed(0)
    rotations = random_orthogonal(8, batch_shape=(24,), generator=generator, dtype=FLOAT64)
    theta = 2 * math.pi / 24 * torch.arange(24, dtype=FLOAT64)
    assert metrics.frequencies(rotations, theta).deviation > 0.2
    turns = representation([1, 2, 1], 2, theta)
    assert metrics.frequencies(turns, theta, shuffled=True).deviation > 0.2
    still = torch.eye(8, dtype=FLOAT64).expand(24, 8, 8)  # which any order of angles fits
    assert metrics.frequencies(still, theta, shuffled=True).deviation == 0


Z = normal(8, 3)
TURNS = torch.eye(3).repeat(4, 1, 1)
GRID = 2 * math.pi / 4 * torch.arange(4)
BAD = {
    "one row": (metrics.invariance_error, (Z[:1], Z[:1]), {}, r"N >= 2 and D >= 1, got \(1, 3\)"),
    "three rows in two halves": (
        metrics.wahba_error,
        (Z[:3], Z[:3]),
        {},
        r"N >= 4 and D >= 1, got \(3, 3\): each half of the rows needs two",
    ),
    "another number of rows": (
        metrics.rotation_share,
        (Z, Z[:7]),
        {},
        r"`z` and `z_transformed` must have the same N and D .* got \(8, 3\) and \(7, 3\)",
    ),
    "another dtype": (metrics.equivariance_error, (Z, Z.float()), {}, "must have the same dtype"),
    "leading dimensions that do not fit": (
        metrics.cosine_spread,
        (Z.expand(2, 8, 3), Z.expand(3, 8, 3)),
        {},
        "leading dimensions that broadcast",
    ),
    "leading dimensions of which two do not fit": (
        metrics.composition_error,
        (Z, Z.expand(2, 8, 3), Z.expand(3, 8, 3), Z),
        {},
        "`z` and `z_a` and `z_b` must have leading dimensions that broadcast",
    ),
    "one of four": (metrics.composition_error, (Z, Z, Z, Z[:, :2]), {}, "`z` and `z_ab` must have"),
    "a vector": (metrics.effective_rank, (Z[0],), {}, r"must have shape \(\*, N, D\)"),
    "no rows": (metrics.mean_norm, (Z[:0],), {}, r"N >= 1 and D >= 1, got \(0, 3\)"),
    "a matrix for each of two angles": (
        metrics.frequencies,
        (TURNS, GRID[:2]),
        {},
        r"must have shapes \(T, D, D\) and \(T,\) with T >= 2, got \(4, 3, 3\) and \(2,\)",
    ),
    "angles in degrees": (
        metrics.frequencies,
        (TURNS, GRID.rad2deg()),
        {},
        "`angles` must have uniform distances and fill the circle, in radians",
    ),
    "half the circle": (metrics.frequencies, (TURNS, GRID / 2), {}, "fill the circle"),
    "matrices that are not orthogonal": (
        metrics.frequencies,
        (2 * TURNS, GRID),
        {},
        "`rotations` must be orthogonal matrices, got an entry .* of 3",
    ),
    "NaN": (metrics.frequencies, (TURNS * torch.nan, GRID), {}, "must be orthogonal matrices"),
}
BAD_TYPES = {
    "a list": (metrics.mean_norm, ([1.0],), {}, "`z` must be a torch.Tensor"),
    "integers": (metrics.wahba_error, (Z.long(), Z.long()), {}, "`z` must be a torch.Tensor of a"),
    "a word": (metrics.wahba_error, (Z, Z), {"special": "yes"}, "`special` must be True or False"),
    "a number": (metrics.wahba_error, (Z, Z), {"shuffled": 3}, "`shuffled` must be True or False"),
}


@pytest.mark.parametrize("case", [*BAD, *BAD_TYPES])
def test_bad_input_has_a_clear_error(case):
    function, arguments, options, message = (BAD | BAD_TYPES)[case]
    with pytest.raises(ValueError if case in BAD else TypeError, match=message):
        function(*arguments, **options)
