"""Rotations: what a fit is, where it is unique and where not, for every input that can be drawn."""

import math

import pytest
import reference
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import orthogonal, seeds

from care_loss import rotation
from care_loss.rotation import (
    fit_rotation,
    nearest_orthogonal,
    random_orthogonal,
    rotation_angles,
    rotation_distance,
)

EPS = torch.finfo(torch.float64).eps
booleans = st.booleans()
dims = st.integers(1, 8)
counts = st.integers(1, 12)
RELATIONS = ["planted", "noisy", "unrelated", "equal", "opposite", "mirrored", "invariant"]


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def spectra(draw, dim):
    """Singular values: well apart, repeated, tiny or zero."""
    values = st.sampled_from([0.0, 1e-9, 1e-3, 0.5, 1.0, 1.0, 1.5, 2.0])
    s = draw(st.lists(values, min_size=dim, max_size=dim))
    return torch.tensor(sorted(s, reverse=True), dtype=torch.float64)


@st.composite
def matrices(draw, dim=None):
    """Square matrices of drawn spectra, orientation and scale."""
    dim = draw(dims) if dim is None else dim
    seed, reflect = draw(seeds), draw(booleans)
    m = (orthogonal(dim, seed) * draw(spectra(dim))) @ orthogonal(dim, seed + 1, reflect=reflect)
    return m * draw(st.sampled_from([1.0, 1e-12, 1e12]))


@st.composite
def problems(draw, min_n=1, max_d=8, relations=RELATIONS):
    """Rows of drawn rank and what they are mapped to."""
    d = draw(st.integers(1, max_d))
    n = draw(st.integers(min_n, max(min_n, 12)))
    rank = draw(st.integers(0, min(n, d)))
    seed = draw(seeds)
    x = normal(n, rank, seed=seed) @ normal(rank, d, seed=seed + 1)
    relation = draw(st.sampled_from(relations))
    q = orthogonal(d, seed + 2, reflect=draw(booleans))
    y = {
        "planted": x @ q,
        "noisy": x @ q + 0.1 * normal(n, d, seed=seed + 3),
        "unrelated": normal(n, d, seed=seed + 3),
        "equal": x,
        "opposite": -x,
        "mirrored": torch.cat((-x[:, :1], x[:, 1:]), -1),
        "invariant": x[:1].expand(n, d),
    }[relation]
    return x, y


def objective(x, y, r, w=None):
    squared = (x @ r - y).square().sum(-1)
    return (squared if w is None else w * squared).sum(-1)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_orthogonal(r, special, tolerance=8 * EPS):
    d = r.shape[-1]
    identity = torch.eye(d, dtype=r.dtype, device=r.device)
    assert ((r.mT @ r - identity).norm(dim=(-2, -1)) <= tolerance * math.sqrt(d)).all()
    if special:
        assert (torch.linalg.det(r) > 0.5).all()


def assert_optimal(m, r, special):
    """No orthogonal matrix is nearer to m, as is seen from R'M without any decomposition of m."""
    h = r.mT @ m
    scale = m.norm()
    # Where a direction is turned into its opposite, its plane is known to eps times a condition.
    assert (h - h.mT).norm() <= (1e-10 if special else 100 * EPS) * scale
    low = torch.linalg.eigvalsh((h + h.mT) / 2)
    if special and len(low) > 1:
        assert low[0] + low[1] >= -100 * EPS * scale
    elif not special:
        assert low[0] >= -100 * EPS * scale


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


# Where the fit is not unique


@st.composite
def singular(draw):
    """Matrices whose singular values are 0 or far from it, so that the limit is reached early."""
    d = draw(st.integers(2, 7))
    s = draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, 1.0, 1.7]), min_size=d, max_size=d))
    seed, reflect = draw(seeds), draw(booleans)
    s = torch.tensor(s, dtype=torch.float64)
    return (orthogonal(d, seed) * s) @ orthogonal(d, seed + 1, reflect=reflect)


@given(singular(), booleans)
@example(torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)), True)
def test_the_answer_is_the_limit_of_what_a_pull_towards_the_identity_gives(m, special):
    d = len(m)
    r = nearest_orthogonal(m, special=special)
    eta = 1e-7 * (m.norm() + 1)
    pulled = (m + eta * torch.eye(d, dtype=m.dtype)).numpy()
    limit = torch.from_numpy(reference.nearest_orthogonal(pulled, special))
    if torch.allclose(r, limit, atol=1e-5):
        return
    # Minimisers that tie in their distance to the identity have equal traces.
    close(r.trace(), limit.trace(), 1e-5)
    assert special


@pytest.mark.parametrize("special", [False, True])
def test_zeros_that_were_rounded_to_float32_are_zeros(special, device):
    for seed in range(20):
        s = torch.tensor([1.0, 1.0, 0.7, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
        m = ((orthogonal(7, seed) * s) @ orthogonal(7, seed + 1)).to(device)
        found = nearest_orthogonal(m.float(), special=special).double()
        assert (found - nearest_orthogonal(m, special=special)).abs().max() <= 1e-4


@given(st.integers(3, 9), st.integers(1, 7), seeds, booleans)
def test_few_rows_have_the_limit_too(d, n, seed, special):
    n = min(n, d - 1)
    x, y = normal(n, d, seed=seed), normal(n, d, seed=seed + 1)
    r = fit_rotation(x, y, special=special).rotation
    limit = torch.from_numpy(
        reference.fit_rotation(x.numpy(), y.numpy(), [1.0] * n, special, eta=1e-9)
    )
    m = x.mT @ y
    smallest = torch.linalg.svdvals(m)[n - 1] / m.norm()
    assume(smallest > 1e-3)
    torch.testing.assert_close(r, limit, rtol=0, atol=1e-4)


@given(st.integers(1, 8), counts, booleans, seeds, st.integers(0, 8))
def test_equal_inputs_give_exactly_the_identity(d, n, special, seed, rank):
    for dtype in (torch.float64, torch.float32, torch.float16):
        x = (normal(n, rank, seed=seed) @ normal(rank, d, seed=seed)).to(dtype)
        fit = fit_rotation(x, x.clone(), special=special)
        assert torch.equal(fit.rotation, torch.eye(d, dtype=dtype))
        assert fit.residual == 0


@given(st.integers(2, 9), seeds, st.sampled_from([0.0, 1e-12, 1e-4, 1.0, 2.0, 3.1, math.pi - 1e-5]))
def test_one_vector_takes_the_shortest_way(d, seed, angle):
    u, w = torch.linalg.qr(normal(d, 2, seed=seed)).Q.mT
    v = math.cos(angle) * u + math.sin(angle) * w
    r = fit_rotation(3 * u[None], 2 * v[None], special=True).rotation
    plane = torch.outer(u, w) - torch.outer(w, u)
    expected = torch.linalg.matrix_exp(angle * plane)
    torch.testing.assert_close(r, expected, rtol=0, atol=1e-9)
    # Over O(D) a reflection is nearer to the identity beyond a right angle.
    r = fit_rotation(u[None], v[None]).rotation
    if angle > math.pi / 2:
        h = (u - v) / (u - v).norm()
        expected = torch.eye(d, dtype=u.dtype) - 2 * torch.outer(h, h)
    torch.testing.assert_close(r, expected, rtol=0, atol=1e-9)


@given(
    st.integers(2, 9),
    st.integers(1, 8),
    seeds,
    st.sampled_from([0.0, 1e-15, 1e-11, 1e-9, 1e-7, 1e-4]),
)
def test_a_mirrored_frame_is_reached_by_a_rotation(d, n, seed, angle):
    # Opposite directions, or nearly: the plane of the half turn is free, or hard to see.
    n = min(n, d - 1)
    q = orthogonal(d, seed)
    x, y = q[:n].clone(), q[:n].clone()
    y[0] = -math.cos(angle) * q[0] + math.sin(angle) * q[-1]
    r = fit_rotation(x, y, special=True).rotation
    assert_orthogonal(r, special=True)
    assert objective(x, y, r) <= 1e-14
    assert r.trace().item() == pytest.approx(d - 2 - 2 * math.cos(angle), abs=1e-9)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("n", "d", "rank"), [(2, 4, 1), (3, 6, 1), (4, 8, 2), (16, 32, 4)])
def test_dependent_rows_are_ordinary(n, d, rank, special, device):
    # Rounding may not make a direction of what is missing: the rarest event of many is looked at.
    for dtype in (torch.float64, torch.float32):
        count = 400
        eps = torch.finfo(dtype).eps
        planted = random_orthogonal(d, batch_shape=(count,), dtype=dtype, device=device)
        left = torch.randint(-2, 3, (count, n, rank), dtype=dtype, device=device)
        left[:, 0] = 1
        x = left @ torch.randn(count, rank, d, dtype=dtype, device=device)
        for y in (x @ planted, x.roll(1, -1), -x, x + 1e-7 * torch.randn_like(x)):
            r, residual, gap = fit_rotation(x, y, special=special)
            assert_orthogonal(r.double(), special, tolerance=8 * eps)
            best = torch.linalg.svdvals(x.double().mT @ y.double()).sum(-1)
            scale = x.double().square().sum((-2, -1)) + y.double().square().sum((-2, -1))
            squared = ((x.double() @ r.double() - y.double()).square()).sum((-2, -1))
            excess = squared - (scale - 2 * best)
            assert (excess <= 100 * eps * scale).all()
            assert (gap == 0).all()
            assert residual.isfinite().all()


NOISE = 1000 * EPS  # relative to the largest singular value


def noisy_values(x, **options):
    """A solver whose singular values are wrong, as those of a GPU may be."""
    u, s, vh = SVD(x, **options)
    s = s + NOISE * s[..., :1] * (2 * torch.rand_like(s) - 1)
    return torch.return_types.linalg_svd((u, s.clamp_min(0).sort(-1, descending=True).values, vh))


def noisy_decomposition(x, **options):
    """A solver that decomposes a matrix nearby."""
    e = torch.randn_like(x)
    sizes = (torch.linalg.matrix_norm(z, 2, keepdim=True) for z in (x, e))
    return SVD(x + NOISE * next(sizes) / next(sizes) * e, **options)


def uneven_values(x, **options):
    """A solver that finds the values in the middle, and misses the first and the last by most."""
    u, s, vh = SVD(x, **options)
    off = torch.linspace(NOISE, -NOISE, s.shape[-1], dtype=s.dtype, device=s.device)
    return torch.return_types.linalg_svd((u, (s + off * s[..., :1]).clamp_min(0), vh))


SVD = torch.linalg.svd


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("solver", [noisy_values, noisy_decomposition, uneven_values])
@pytest.mark.parametrize(("n", "d"), [(16, 4), (40, 8), (7, 8), (3, 8), (8, 32)])
def test_a_solver_that_is_not_lapack_makes_no_fit_wrong(n, d, solver, special, device, monkeypatch):
    monkeypatch.setattr(rotation, "_by_lapack", lambda _: False)
    monkeypatch.setattr(torch.linalg, "svd", solver)
    x, other = torch.randn(2, 20, n, d, dtype=torch.float64, device=device)
    u, s, vh = SVD(x, full_matrices=False)
    half = min(n, d) // 2
    low = u[..., :half] * s[..., None, :half] @ vh[..., :half, :]
    graded = u * torch.logspace(0, -18, min(n, d), dtype=x.dtype, device=device) @ vh
    planted = random_orthogonal(d, batch_shape=(20,), dtype=x.dtype, device=device)
    pairs = {"full": (x, x @ planted), "graded": (graded, other), "target": (other, graded)}
    pairs |= {"low": (low, low @ planted), "low, unrelated": (low, other), "equal": (low, low)}
    for name, (source, target) in pairs.items():
        source = source.clone().requires_grad_()
        r, _, gap = fit_rotation(source, target, special=special)
        (gradient,) = torch.autograd.grad(r.square().sum(-1).sin().sum(), source)
        m, r = source.detach().mT @ target, r.detach()
        assert_orthogonal(r, special)
        values = torch.linalg.svdvals(m)
        lost = values.sum(-1) - (r.mT @ m).diagonal(0, -2, -1).sum(-1)
        if special:
            negative = (torch.linalg.slogdet(m).sign < 0) & (values[..., -1] > 0)
            lost = lost - torch.where(negative, 2 * values[..., -1], 0)
        assert (lost <= 10 * NOISE * values.sum(-1)).all()
        if name.startswith("low"):  # the directions without rows are known to be missing
            assert (gap == 0).all()
            assert gradient.abs().max() < 1e4
    assert (r == torch.eye(d, dtype=r.dtype, device=device)).all()  # the last pair was equal


@pytest.mark.parametrize("solver", [noisy_values, noisy_decomposition, uneven_values])
@pytest.mark.parametrize("d", [3, 8, 33])
def test_equal_values_that_a_solver_tells_apart_leave_a_rotation(d, solver, device, monkeypatch):
    m = random_orthogonal(d, batch_shape=(20,), dtype=torch.float64, device=device)
    m = torch.cat((m, m * torch.cat((torch.ones(d // 2), torch.zeros(d - d // 2))).to(m)))
    monkeypatch.setattr(rotation, "_by_lapack", lambda _: False)
    monkeypatch.setattr(torch.linalg, "svd", solver)
    for special in (False, True):
        assert_orthogonal(nearest_orthogonal(m, special=special), special)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 3e-8, 1e-4, 0.1])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_repeated_rows_that_are_nearly_opposite_give_a_rotation(n, angle, device):
    u, w = torch.linalg.qr(torch.randn(300, 6, 2, dtype=torch.float64, device=device)).Q.mT.unbind(
        1
    )
    v = -math.cos(angle) * u + math.sin(angle) * w
    x, y = (z[:, None].expand(300, n, 6) for z in (u, v))
    fit = fit_rotation(x, y, special=True)
    assert_orthogonal(fit.rotation, special=True)
    assert fit.residual.max() <= 3e-8
    expected = 4 - 2 * math.cos(angle)
    assert (fit.rotation.diagonal(dim1=-2, dim2=-1).sum(-1) - expected).abs().max() <= 1e-7


@pytest.mark.parametrize("delta", [0.1, 1e-3, 1e-5, 1e-7, 1.5e-8, 1e-12, 0.0])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
def test_rows_that_turn_by_nearly_half_a_turn_are_fitted_to_rounding(n, every, delta, device):
    d, turned = 2 * n + 4, n if every else 1
    axes = random_orthogonal(d, batch_shape=(50,), dtype=torch.float64, device=device)
    u, t = axes[:, :n], axes[:, :n].clone()
    t[:, :turned] = -math.cos(delta) * u[:, :turned]
    t[:, :turned] += math.sin(delta) * axes[:, n : n + turned]
    # The other rows turn by smaller angles, and the rows are not the axes of the turn.
    small = delta / 10 * torch.randn(50, d, d, dtype=torch.float64, device=device)
    mixed = random_orthogonal(n, batch_shape=(50,), dtype=torch.float64, device=device)
    x, y = mixed @ u, mixed @ t @ torch.linalg.matrix_exp(small - small.mT)
    fit = fit_rotation(x, y, special=True)
    assert_orthogonal(fit.rotation, True)
    assert fit.residual.max() <= 1e-14 * math.sqrt(n)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_a_product_of_zero_gives_the_identity(n, device):
    x = torch.randn(n, 5, device=device)
    for pair in ((x, 0 * x), (0 * x, x), (0 * x, 0 * x)):
        for special in (False, True):
            r, _, gap = fit_rotation(*pair, special=special)
            torch.testing.assert_close(r, torch.eye(5, device=device))
            assert gap == 0


@given(st.integers(3, 9), seeds, st.integers(1, 3), booleans)
def test_rows_that_are_dependent_but_for_rounding_turn_nothing_else(d, seed, rank, special):
    # In float32 the rows have full rank by rounding; the answer is that of the exact rows.
    n = min(d - 2, rank + 2)
    rank = min(rank, n)
    x = normal(n, rank, seed=seed) @ normal(rank, d, seed=seed + 1)
    y = x @ orthogonal(d, seed + 2)
    exact = fit_rotation(x, y, special=special).rotation
    values = torch.linalg.svdvals(x.mT @ y)
    assume(values[rank - 1] > 0.05 * values[0])
    found = fit_rotation(x.float(), y.float(), special=special).rotation.double()
    if (found - exact).abs().max() > 1e-3:
        close(found.trace(), exact.trace(), 1e-3)  # a tie, but for rounding


@pytest.mark.parametrize("n", [1, 2, 3])
def test_axes_that_are_mirrored_are_turned_into_another(n, device):
    x = torch.eye(5, device=device)[:n]
    for k in range(n):
        y = x.clone()
        y[k] *= -1
        fit = fit_rotation(x, y, special=True)
        assert fit.residual <= 1e-6
        assert_orthogonal(fit.rotation.double(), special=True, tolerance=1e-6)
        assert abs(fit.rotation.trace() - 1) <= 1e-6


@given(problems(), booleans)
def test_the_gap_is_that_of_the_singular_values(problem, special):
    x, y = problem
    m = x.mT @ y
    d = m.shape[0]
    s = torch.linalg.svdvals(m)
    s[s <= max(x.shape) * EPS * s[0]] = 0
    if d == 1:
        expected = 2.0 if s[0] > 0 else 0.0
    else:
        sign = torch.linalg.det(m).sign() if special else 1
        expected = (s[-2] + sign * s[-1]) / s[0] if special else 2 * s[-1] / s[0]
    assume(s[0] == 0 or s[s > 0].min() > 1e-10 * s[0])
    gap = fit_rotation(x, y, special=special).gap
    assert gap.item() == pytest.approx(0 if s[0] == 0 else float(expected), abs=1e-12)


def test_the_gap_says_whether_the_fit_is_unique():
    e = torch.eye(3)
    assert fit_rotation(e[:2], e[:2]).gap == 0  # the third axis may be reflected
    assert fit_rotation(e[:2], e[:2], special=True).gap == 1
    assert fit_rotation(e, -e, special=True).gap == 0  # any half turn
    assert fit_rotation(e, -e).gap == 2
    assert fit_rotation(e[:1], e[1:2], special=True).gap == 0


def test_the_gap_counts_small_values_as_0_in_the_dtype_of_the_input(device):
    x = torch.eye(2, device=device)
    y = x * torch.tensor([1.0, 1e-6], device=device)
    assert fit_rotation(x, y).gap.item() == pytest.approx(2e-6)  # max(N, D) eps is 2.4e-7 here
    many = [torch.nn.functional.pad(z, (0, 0, 0, 98)) for z in (x, y)]
    assert fit_rotation(*many).gap == 0  # and 1.2e-5 here
    assert fit_rotation(*(z.double() for z in many)).gap.item() == pytest.approx(2e-6)
    # Each counts as 0 by itself, also where their sum would not.
    x = torch.nn.functional.pad(torch.eye(3, device=device), (0, 0, 0, 97))
    y = x * torch.tensor([1.0, 1e-5, 1e-5], device=device)
    assert fit_rotation(x, y, special=True).gap == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gap_is_0_where_the_smallest_values_tie_but_for_rounding(dtype, device):
    for seed in range(20):
        x, q = orthogonal(4, seed), orthogonal(4, seed + 1, reflect=True)
        x, y = (z.to(dtype).to(device) for z in (x, x @ q))
        assert fit_rotation(x, y, special=True).gap == 0


def test_rounding_in_a_sum_of_many_rows_is_no_direction(device):
    u = torch.randn(1, 4, dtype=torch.float64, device=device)
    q = orthogonal(4, 0).to(device)
    expected = fit_rotation(u, u @ q, special=True).rotation
    for _ in range(10):
        x = torch.randn(50_000, 1, dtype=torch.float64, device=device) @ u
        found = fit_rotation(x, x @ q, special=True).rotation
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n", [2, 4, 9])
@pytest.mark.parametrize("special", [False, True])
def test_products_that_nearly_cancel_leave_no_direction(n, special, device):
    # The rows are multiples of one vector, and their products nearly sum to 0.
    for seed in range(50):
        u = normal(1, 5, seed=seed).to(device)
        c = normal(n, 1, seed=seed + 1).to(device)
        c[-1] = 1e-4 - c[:-1].sum()
        r = fit_rotation(c * u, u.expand(n, 5), special=special).rotation
        torch.testing.assert_close(r, torch.eye(5, dtype=u.dtype, device=device), rtol=0, atol=1e-9)


# Shapes and dtypes


@given(problems(), booleans)
def test_a_batch_is_a_loop(problem, special):
    x, y = problem
    xs = torch.stack((x, 0 * x, -x, x.flip(0)))
    ys = torch.stack((y, y, y, y))
    w = normal(4, len(x), seed=1).abs()
    fits = fit_rotation(xs, ys, weights=w, special=special)
    for k in range(4):
        fit = fit_rotation(xs[k], ys[k], weights=w[k], special=special)
        close(fits.residual[k], fit.residual, 1e-9)
        close(fits.gap[k], fit.gap, 1e-9)
        if fit.gap > 1e-3:
            close(fits.rotation[k], fit.rotation, 1e-10)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("n", [2, 9])
def test_leading_dimensions_broadcast(n, special, device, dtype):
    x = torch.randn(3, 1, n, 5, device=device).to(dtype)
    y = torch.randn(2, n, 5, device=device).to(dtype)
    w = torch.rand(4, 1, 1, n, device=device).to(dtype)
    fit = fit_rotation(x, y, weights=w, special=special)
    assert fit.rotation.shape == (4, 3, 2, 5, 5)
    assert fit.residual.shape == fit.gap.shape == (4, 3, 2)
    one = fit_rotation(x[2, 0], y[1], weights=w[3, 0, 0], special=special)
    for a, b in zip(fit, one, strict=True):
        torch.testing.assert_close(a[3, 2, 1], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [2, 9])
def test_strides_do_not_matter(n, device):
    x, y = torch.randn(2, 5, n, 3, device=device).transpose(1, 3).unbind()  # (3, n, 5)
    y = y[:1].expand(3, n, 5)
    expected = fit_rotation(x.contiguous(), y.contiguous())
    for a, b in zip(fit_rotation(x, y), expected, strict=True):
        torch.testing.assert_close(a, b)
    m = torch.randn(4, 4, device=device)
    torch.testing.assert_close(nearest_orthogonal(m.mT), nearest_orthogonal(m).mT)


@pytest.mark.parametrize("shape", [(0, 2, 5), (0, 9, 5), (3, 0, 9, 5)])
def test_batches_may_be_empty(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    fit = fit_rotation(x, x, special=True)
    assert fit.rotation.shape == (*shape[:-2], 5, 5)
    assert fit.gap.shape == shape[:-2]
    assert torch.autograd.grad(fit.rotation.sum(), x)[0].shape == shape
    assert rotation_angles(fit.rotation.detach()).shape == (*shape[:-2], 2)


SPECTRA = {
    "flat": lambda d: torch.ones(d),
    "gaussian": lambda d: None,
    "linear": lambda d: torch.linspace(0, 1, d),
    "half zero": lambda d: (torch.arange(d) < d / 2).float(),
    "decaying": lambda d: 0.7 ** torch.arange(d),
    "tiny": lambda d: 1e-8 + torch.eye(d)[0],
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        (3, torch.float32),
        (64, torch.float32),
        (384, torch.float32),
        (3, torch.float64),
        (128, torch.float64),
    ],
)
def test_the_promised_precision(spectrum, d, dtype, special, device):
    s = spectrum(d)
    m = normal(d, d)
    if s is not None:
        m = (orthogonal(d, 1) * s.double()) @ orthogonal(d, 2, reflect=True)
    m = m.to(dtype).to(device)
    assert_precise(m, nearest_orthogonal(m, special=special), special)


@pytest.mark.parametrize("special", [False, True])
def test_the_promised_precision_at_1024(special, device):
    m = (
        (orthogonal(1024, 1) * SPECTRA["linear"](1024)) @ orthogonal(1024, 2, reflect=True)
    ).float()
    m = m.to(device)
    assert_precise(m, nearest_orthogonal(m, special=special), special)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("n", "d"), [(16, 128), (64, 1024), (100, 128)])
def test_the_promised_precision_of_few_rows(n, d, special, device):
    x, y = torch.randn(2, n, d, device=device)
    r = fit_rotation(x, y, special=special).rotation
    assert_precise(x.double().mT @ y.double(), r, special)


def assert_precise(m, r, special):
    eps, d = torch.finfo(r.dtype).eps, m.shape[-1]
    # LAPACK's singular values: those of a GPU may be less precise than the fit.
    m, exact = m.cpu(), r.cpu().double()
    assert (exact.mT @ exact - torch.eye(d).to(exact)).norm() <= 8 * eps * math.sqrt(d)
    s = torch.linalg.svdvals(m.double())
    sign, _ = torch.linalg.slogdet(exact)
    if special:
        assert sign == 1
        u, _, vh = torch.linalg.svd(m.double())
        s[-1] *= torch.linalg.slogdet(u).sign * torch.linalg.slogdet(vh).sign
    largest = s[0] if r.dtype == torch.float32 else s.sum()
    assert s.sum() - (exact * m).sum() <= 20 * eps * largest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 40])
def test_half_types_are_computed_in_more_and_cast_back(n, dtype, device):
    x, y = torch.randn(2, n, 16, device=device).to(dtype)
    fit, wide = fit_rotation(x, y), fit_rotation(x.float(), y.float())
    assert fit.rotation.dtype == dtype
    assert fit.residual.dtype == fit.gap.dtype == torch.float32
    torch.testing.assert_close(fit.rotation, wide.rotation.to(dtype))
    torch.testing.assert_close(fit.residual, wide.residual)
    assert nearest_orthogonal(x[:, :3].mT @ x[:, :3]).dtype == dtype


@pytest.mark.parametrize("n", [3, 40])
def test_autocast_and_tf32_change_nothing(n, device):
    x, y = torch.randn(2, n, 16, device=device)
    x.requires_grad_()

    def fit():
        r, residual, gap = fit_rotation(x, y, special=True)
        (grad,) = torch.autograd.grad(r.pow(3).sum(), x)
        return r, residual, gap, grad

    expected = fit()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device.type, torch.bfloat16):
            found = fit()
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [2, 9])
def test_an_item_that_is_not_finite_becomes_nan_alone(n, bad, device):
    x, y = torch.randn(2, 3, n, 5, device=device)
    expected = fit_rotation(x, y)
    for z in (x, y):
        broken = z.clone()
        broken[1, 0, 2] = bad
        broken.requires_grad_()
        fit = fit_rotation(broken, y) if z is x else fit_rotation(x, broken)
        for a, b in zip(fit, expected, strict=True):
            assert a[1].isnan().all()
            torch.testing.assert_close(a[[0, 2]], b[[0, 2]])
        (grad,) = torch.autograd.grad(fit.rotation[[0, 2]].sum(), broken)
        assert grad[[0, 2]].isfinite().all()
    m = torch.randn(2, 4, 4, device=device)
    m[0, 1, 1] = bad
    assert nearest_orthogonal(m)[0].isnan().all()
    assert torch.equal(nearest_orthogonal(m)[1], nearest_orthogonal(m[1]))


# Sampling and measuring


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


def test_a_fit_is_saved_as_a_dictionary(tmp_path):
    fit = fit_rotation(*torch.randn(2, 8, 4))
    torch.save(fit._asdict(), tmp_path / "fit.pt")
    loaded = rotation.RotationFit(**torch.load(tmp_path / "fit.pt"))
    assert all(torch.equal(a, b) for a, b in zip(loaded, fit, strict=True))
