"""Rotations: what a fit is and what it depends on, for every input that can be drawn."""

import math

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rotations import (
    EPS,
    assert_optimal,
    assert_orthogonal,
    booleans,
    close,
    matrices,
    normal,
    objective,
    problems,
)
from strategies import orthogonal, seeds

from care_loss.metrics._measures import linear_fit
from care_loss.rotation import (
    RotationFit,
    fit_rotation,
    nearest_orthogonal,
)

# What is fitted


@given(problems(), booleans)
def test_a_fit_is_orthogonal_and_optimal(problem, special):
    x, y = problem
    r, residual, gap = fit_rotation(x, y, special=special)
    assert_orthogonal(r, special)
    assert_optimal(x.mT @ y, r, special)
    scale = x.abs().max() + y.abs().max()
    close(residual, (objective(x, y, r) / len(x)).sqrt(), 1e-12 * scale.item() + 1e-15)
    assert 0 <= gap <= 2


@given(matrices(), booleans)
def test_the_nearest_orthogonal_matrix_is_orthogonal_and_optimal(m, special):
    r = nearest_orthogonal(m, special=special)
    assert_orthogonal(r, special)
    assert_optimal(m, r, special)


@given(problems(), booleans, seeds, st.sampled_from([1e-3, 0.1, 10.0]))
def test_no_competitor_does_better(problem, special, seed, step):
    x, y = problem
    d = x.shape[1]
    r = fit_rotation(x, y, special=special).rotation
    skew = normal(d, d, seed=seed)
    near = r @ torch.linalg.matrix_exp(step * (skew - skew.mT))
    far = orthogonal(d, seed, reflect=not special)
    best = objective(x, y, r)
    for competitor in (near, far) if d > 1 or not special else (near,):
        assert best <= objective(x, y, competitor) + 1e-12 * (1 + best)


@given(problems(), booleans)
def test_a_planted_rotation_is_found_to_the_perturbation_bound(problem, special):
    # ||R - R~|| <= 2 ||dM|| / (s_D + s~_D) over O(D), 4 ||dM|| / (s_1 gap + s~_1 gap~) over SO(D)
    x, _ = problem
    d = x.shape[1]
    planted = orthogonal(d, 3)
    for noise in (0.0, 1e-9, 1e-4, 1e-1):
        y = x @ planted + noise * normal(*x.shape, seed=4)
        exact, found = (fit_rotation(x, z, special=special) for z in (x @ planted, y))
        m, m_found = x.mT @ x @ planted, x.mT @ y
        scale = torch.linalg.matrix_norm(m, 2), torch.linalg.matrix_norm(m_found, 2)
        assume(exact.gap > 0)
        spread = scale[0] * exact.gap + scale[1] * found.gap
        bound = 4 * ((m - m_found).norm() + 20 * d * EPS * scale[0]) / spread
        assert (found.rotation - planted).norm() <= bound + 1e-14


@given(problems(), booleans)
def test_the_residual_is_zero_where_a_rotation_is_planted(problem, special):
    x, _ = problem
    fit = fit_rotation(x, x @ orthogonal(x.shape[1], 3), special=special)
    assert fit.residual <= 1e-13 * x.norm()


@given(problems(), booleans)
def test_agrees_with_the_reference_where_it_is_unique(problem, special):
    x, y = problem
    fit = fit_rotation(x, y, special=special)
    assume(fit.gap > 1e-3)
    expected = reference.fit_rotation(x.numpy(), y.numpy(), [1.0] * len(x), special)
    close(fit.rotation, torch.from_numpy(expected), 1e-11)


@given(problems(min_n=2))
def test_agrees_with_scipy(problem):
    procrustes = pytest.importorskip("scipy.linalg").orthogonal_procrustes
    align = pytest.importorskip("scipy.spatial.transform").Rotation.align_vectors
    x, y = problem
    fit = fit_rotation(x, y)
    if fit.gap > 1e-3:
        close(fit.rotation, torch.from_numpy(procrustes(x.numpy(), y.numpy())[0]), 1e-11)
    x, y = (torch.nn.functional.pad(z[:, :3], (0, 3 - z[:, :3].shape[1])) for z in (x, y))
    fit = fit_rotation(x, y, special=True)
    if fit.gap > 1e-3:
        found, _ = align(y.numpy(), x.numpy())
        close(fit.rotation, torch.from_numpy(found.as_matrix()).mT, 1e-7)


# What it does not depend on


@given(problems(), booleans, seeds, booleans)
def test_follows_when_source_and_target_are_rotated(problem, special, seed, reflect):
    # fit(X A, Y B) = A' fit(X, Y) B where the fit is unique
    x, y = problem
    d = x.shape[1]
    fit = fit_rotation(x, y, special=special)
    assume(fit.gap > 1e-3)
    a, b = orthogonal(d, seed, reflect=reflect), orthogonal(d, seed + 1, reflect=reflect)
    close(fit_rotation(x @ a, y @ b, special=special).rotation, a.mT @ fit.rotation @ b, 1e-10)


@given(problems(relations=["planted", "noisy", "unrelated"]), booleans, seeds, booleans)
def test_follows_one_common_rotation_also_where_it_is_not_unique(problem, special, seed, reflect):
    # The distance to the identity does not change: fit(X A, Y A) = A' fit(X, Y) A.
    x, y = problem
    a = orthogonal(x.shape[1], seed, reflect=reflect)
    r = fit_rotation(x, y, special=special).rotation
    turned = fit_rotation(x @ a, y @ a, special=special).rotation
    expected = a.mT @ r @ a
    if not torch.allclose(turned, expected, atol=1e-6):  # a tie, or a value near 0
        close(objective(x @ a, y @ a, turned), objective(x, y, r), 1e-9)
        close(turned.trace(), r.trace(), 1e-6)


@given(problems(relations=["planted", "noisy", "unrelated"]), booleans)
def test_the_inverse_problem_has_the_inverse_map(problem, special):
    x, y = problem
    there, back = fit_rotation(x, y, special=special), fit_rotation(y, x, special=special)
    close(there.gap, back.gap, 1e-9)
    if there.gap > 1e-3:
        close(back.rotation, there.rotation.mT, 1e-10)
    else:
        close(back.rotation.trace(), there.rotation.trace(), 1e-6)


@given(problems(), booleans, seeds)
def test_the_order_of_the_rows_does_not_matter(problem, special, seed):
    x, y = problem
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, shuffled = (
        fit_rotation(x, y, special=special),
        fit_rotation(x[order], y[order], special=special),
    )
    close(shuffled.residual, fit.residual, 1e-9)
    close(shuffled.gap, fit.gap, 1e-9)
    if fit.gap > 1e-3:
        close(shuffled.rotation, fit.rotation, 1e-10)


@given(problems(relations=["planted", "noisy", "unrelated"]), st.integers(1, 4), st.integers(1, 4))
def test_rows_and_columns_of_zeros_change_nothing(problem, rows, columns):
    x, y = problem
    d = x.shape[1]
    r = fit_rotation(x, y).rotation
    padded = [torch.nn.functional.pad(z, (0, columns, 0, rows)) for z in (x, y)]
    expected = torch.block_diag(r, torch.eye(columns, dtype=r.dtype))
    found = fit_rotation(*padded).rotation
    if not torch.allclose(found, expected, atol=1e-6):
        close(found.trace(), expected.trace(), 1e-6)
    close(found[d:, :d], torch.zeros(columns, d, dtype=r.dtype), 1e-9)


@given(problems(), booleans, st.sampled_from([1e-300, 1e-170, 1e-12, 1e12, 1e300]))
def test_the_scale_of_the_rows_does_not_matter(problem, special, scale):
    x, y = problem
    fit, scaled = (fit_rotation(x, z, special=special) for z in (y, scale * y))
    close(scaled.gap, fit.gap)
    if not torch.allclose(scaled.rotation, fit.rotation, atol=1e-7):  # a tie, as for opposite rows
        assert fit.gap == 0
        close(scaled.rotation.trace(), fit.rotation.trace(), 1e-7)
    both = fit_rotation(scale * x, scale * y, special=special)
    close(both.residual / scale, fit.residual)
    with_a_zero = [torch.cat((scale * z, 0 * z[:1])) for z in (x, y)]
    close(fit_rotation(*with_a_zero, special=special).gap, fit.gap, 1e-9)


def test_rows_of_very_different_lengths_count_by_their_products(device):
    x = torch.eye(4, dtype=torch.float64, device=device)
    lengths = torch.tensor([1e-200, 1.0, 1e20, 1e100], dtype=torch.float64, device=device)
    y = x[[1, 2, 3, 0]]
    fit = fit_rotation(lengths[:, None] * x, y / lengths[:, None])
    torch.testing.assert_close(fit.rotation, y)
    assert fit.gap.item() == pytest.approx(2, rel=1e-12)


# Weights


@given(problems(), booleans, seeds)
def test_a_weight_of_2_is_a_duplicated_row(problem, special, seed):
    x, y = problem
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(0, 4, (len(x),), generator=generator).double()
    repeated = [z.repeat_interleave(w.long(), 0) for z in (x, y)]
    fit = fit_rotation(x, y, weights=w, special=special)
    assume(w.any())
    copies = fit_rotation(*repeated, special=special)
    close(fit.residual, copies.residual, 1e-9)
    if fit.gap > 1e-3:
        close(fit.gap, copies.gap, 1e-9)
        close(fit.rotation, copies.rotation, 1e-10)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
@pytest.mark.parametrize("n", [3, 12])
def test_a_row_of_weight_0_may_hold_anything_and_gets_gradient_0(n, garbage, device):
    x, y = torch.randn(2, n + 1, 6, dtype=torch.float64, device=device)
    x[-1], y[-1, 0] = garbage, -garbage
    w = torch.rand(n + 1, dtype=torch.float64, device=device)
    w[-1] = 0
    x, y, w = (z.requires_grad_() for z in (x, y, w))
    fit = fit_rotation(x, y, weights=w)
    without = fit_rotation(x[:-1], y[:-1], weights=w[:-1])
    for a, b in zip(fit, without, strict=True):
        torch.testing.assert_close(a, b)
    grads = torch.autograd.grad(fit.rotation.pow(3).sum(), (x, y, w))
    assert not grads[0][-1].any()
    assert not grads[1][-1].any()
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][0].any()


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("n", "d"), [(2, 6), (6, 6), (9, 3)])
def test_without_any_weight_the_fit_is_the_identity(n, d, special, device):
    x, y = torch.randn(2, n, d, device=device)
    x.requires_grad_()
    w = torch.zeros(n, device=device, requires_grad=True)
    fit = fit_rotation(x, y, weights=w, special=special)
    assert torch.equal(fit.rotation, torch.eye(d, device=device))
    assert fit.residual == 0
    assert fit.gap == 0
    grads = torch.autograd.grad(fit.rotation.pow(3).sum(), (x, w))
    assert all(g.isfinite().all() for g in grads)


def test_a_fit_is_saved_as_a_dictionary(tmp_path):
    fit = fit_rotation(*torch.randn(2, 8, 4))
    torch.save(fit._asdict(), tmp_path / "fit.pt")
    loaded = RotationFit(**torch.load(tmp_path / "fit.pt"))
    assert all(torch.equal(a, b) for a, b in zip(loaded, fit, strict=True))


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("shape", [(8, 5), (3, 4, 9)])
def test_a_decomposition_that_lapack_gives_up_is_tried_in_another_way(failures, shape, monkeypatch):
    """LAPACK's gesdd failed for fits of trained embeddings, whose zeros make many values equal."""
    source, target = torch.randn(2, *shape, dtype=torch.float64)
    expected = fit_rotation(source, target, special=True)
    svd, calls = torch.linalg.svd, []

    def gives_up(x, **options):
        calls.append(x)
        if len(calls) % (failures + 1):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return svd(x, **options)

    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    found = fit_rotation(source, target, special=True)
    assert len(calls) > failures
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_linear_map_that_lapack_gives_up_is_fitted_in_another_way(monkeypatch):
    z, target = torch.randn(2, 8, 5, dtype=torch.float64)
    expected, pinv, calls = linear_fit(z)(z, target), torch.linalg.pinv, []

    def gives_up(x, **options):
        calls.append(x)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return pinv(x, **options)

    monkeypatch.setattr(torch.linalg, "pinv", gives_up)
    torch.testing.assert_close(linear_fit(z)(z, target), expected)
    assert len(calls) == 2
