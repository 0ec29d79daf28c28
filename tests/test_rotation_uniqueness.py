"""Rotations: which one is returned where several fit equally well."""

import math

import pytest
import reference
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from rotations import (
    EPS,
    assert_orthogonal,
    booleans,
    close,
    counts,
    normal,
    objective,
    problems,
)
from strategies import orthogonal, seeds

from care_loss import _polar
from care_loss.rotation import (
    fit_rotation,
    nearest_orthogonal,
    random_orthogonal,
)


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
    monkeypatch.setattr(_polar, "_by_lapack", lambda _: False)
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
    monkeypatch.setattr(_polar, "_by_lapack", lambda _: False)
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


@pytest.mark.parametrize("special", [False, True])
def test_few_rows_go_to_a_subspace_that_is_orthogonal_to_theirs(special):
    identity = torch.eye(8, dtype=torch.float64)
    x, y = identity[:3], identity[3:6]
    fit = fit_rotation(x, y, special=special)
    torch.testing.assert_close(x @ fit.rotation, y, rtol=0, atol=1e-14)
    torch.testing.assert_close(fit.rotation @ fit.rotation.mT, identity, rtol=0, atol=1e-14)
    torch.testing.assert_close(identity[6:] @ fit.rotation, identity[6:], rtol=0, atol=1e-14)
