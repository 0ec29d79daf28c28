"""Similarities: rotation, scale and translation together, for every input that can be drawn."""

import math

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rotations import EPS, assert_orthogonal, booleans, close, normal, problems
from strategies import orthogonal, seeds
from test_errors import assert_refused
from test_errors_geometry import FITS, WEIGHTS, Z
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, vmap

from care_loss.rotation import SimilarityFit, fit_rotation, fit_similarity

special_or_not = pytest.mark.parametrize("special", [False, True], ids=["O", "SO"])
scaled_or_not = pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "rigid"])
# Rows and dimensions: with every number of directions that no difference of rows reaches.
sizes = pytest.mark.parametrize(
    ("n", "d"), [(1, 1), (1, 3), (2, 2), (2, 3), (4, 3), (5, 3), (2, 4), (3, 4)]
)


def rows(n, d, device, *batch):
    return torch.randn(2, *batch, n, d, dtype=torch.float64, device=device).unbind()


def mapped(fit, x):
    return fit.scale[..., None, None] * x @ fit.rotation + fit.translation[..., None, :]


def objective(fit, x, y, w=None):
    squared = (mapped(fit, x) - y).square().sum(-1)
    return (squared if w is None else w * squared).sum(-1)


def without_gap(special=False, scaled=True):
    """The results that have derivatives, as a function of rows and weights."""

    def results(x, y, w=None):
        fit = fit_similarity(x, y, weights=w, special=special, scaled=scaled)
        return (*fit[:3],) if scaled else (fit.rotation, fit.translation)

    return results


# What is fitted


@given(problems(), booleans, booleans)
def test_agrees_with_the_reference_where_it_is_unique(problem, special, scaled):
    x, y = problem
    w = 0.5 + normal(len(x), seed=1).abs()
    fit = fit_similarity(x, y, weights=w, special=special, scaled=scaled)
    assume(fit.gap > 1e-3)
    expected = reference.fit_similarity(x.numpy(), y.numpy(), w.numpy(), special, scaled)
    # For one dimension, the formula of a rotation proper may give a negative scale.
    assume(expected[1] > 0)
    for found, value in zip(fit[:3], expected, strict=True):
        close(found, torch.as_tensor(value, dtype=torch.float64), 1e-10)


@given(problems(), booleans, seeds, st.sampled_from([1e-3, 0.1, 10.0]), booleans)
def test_no_competitor_does_better(problem, special, seed, step, scaled):
    x, y = problem
    n, d = x.shape
    w = normal(n, seed=seed).abs()
    fit = fit_similarity(x + 3, y - 1, weights=w, special=special, scaled=scaled)
    best = objective(fit, x + 3, y - 1, w)
    skew, shift = normal(d, d, seed=seed), step * normal(d, seed=seed + 1)
    turned = fit.rotation @ torch.linalg.matrix_exp(step * (skew - skew.mT))
    factor = math.exp(step * normal(1, seed=seed + 2).item()) if scaled else 1.0
    for rotation, scale, translation in (
        (turned, fit.scale, fit.translation),
        (fit.rotation, fit.scale * factor, fit.translation),
        (fit.rotation, fit.scale, fit.translation + shift),
        (turned, fit.scale * factor, fit.translation + shift),
        (torch.eye(d).to(x), torch.ones(()).to(x), shift),
    ):
        other = fit._replace(rotation=rotation, scale=scale, translation=translation)
        assert best <= objective(other, x + 3, y - 1, w) + 1e-11 * (1 + best)


@given(problems(), booleans, booleans)
def test_it_is_orthogonal_and_the_residual_is_that_of_the_map(problem, special, scaled):
    x, y = problem
    fit = fit_similarity(x, y, special=special, scaled=scaled)
    assert_orthogonal(fit.rotation, special)
    assert fit.scale >= 0
    assert 0 <= fit.gap <= 2
    error = (objective(fit, x, y) / len(x)).sqrt()
    close(fit.residual, error, 1e-12 * (1 + x.abs().max() + y.abs().max()).item())


@given(problems(), st.sampled_from([1e-6, 0.3, 1.0, 1e6]), seeds, booleans)
def test_a_planted_similarity_is_found(problem, scale, seed, special):
    x, _ = problem
    q, t = orthogonal(x.shape[1], seed, reflect=not special), normal(x.shape[1], seed=seed)
    y = scale * x @ q + t
    fit = fit_similarity(x, y, special=special)
    size = y.abs().max()
    assert fit.residual <= 1e-13 * size + 1e-300
    assert (mapped(fit, x) - y).abs().max() <= 1e-12 * size
    assume(fit.gap > 1e-3)
    # The digits of the differences that the rounding of `y` leaves.
    tolerance = 1e-11 * (1 + 1 / scale) / fit.gap.item()
    close(fit.rotation, q, tolerance)
    close(fit.scale / scale, torch.ones(()).double(), tolerance)


@given(problems(min_n=2))
def test_agrees_with_scipy(problem):
    align = pytest.importorskip("scipy.spatial.transform").Rotation.align_vectors
    disparity = pytest.importorskip("scipy.spatial").procrustes
    x, y = problem
    centred = [z - z.mean(0) for z in (x, y)]
    assume(min(z.norm() for z in centred) > 1e-6)
    # The disparity is the sum of squared errors, for a target whose sum of squares is 1.
    *_, expected = disparity(y.numpy(), x.numpy())
    fit = fit_similarity(x, y)
    assert objective(fit, x, y) / centred[1].norm() ** 2 == pytest.approx(expected, abs=1e-12)
    x, y = (torch.nn.functional.pad(z[:, :3], (0, 3 - z[:, :3].shape[1])) for z in (x, y))
    fit = fit_similarity(x, y, special=True, scaled=False)
    if fit.gap > 1e-3:
        found, _ = align((y - y.mean(0)).numpy(), (x - x.mean(0)).numpy())
        close(fit.rotation, torch.from_numpy(found.as_matrix()).mT, 1e-7)


@given(problems(), booleans)
def test_the_rotation_is_that_of_the_centred_rows(problem, special):
    x, y = problem
    centred = fit_rotation(x - x.mean(0), y - y.mean(0), special=special)
    for scaled in (True, False):
        fit = fit_similarity(x, y, special=special, scaled=scaled)
        if fit.gap > 1e-3:
            close(fit.rotation, centred.rotation, 1e-10)
            close(fit.gap, centred.gap, 1e-10)


@given(problems(), booleans)
def test_equal_rows_give_the_identity_exactly(problem, special):
    x, _ = problem
    assume(len(x) > 1)
    assume((x - x[0]).any())
    for scaled in (True, False):
        fit = fit_similarity(x, x, special=special, scaled=scaled)
        assert torch.equal(fit.rotation, torch.eye(x.shape[1]).to(x))
        assert fit.scale == 1
        assert not fit.translation.any()
        assert fit.residual == 0


def test_rows_proportional_over_a_line_have_a_scale_of_at_least_0():
    x = normal(7, 1)
    assert fit_similarity(x, -2 * x).scale.item() == pytest.approx(2)
    fit = fit_similarity(x, 5 - 2 * x, special=True)
    assert fit.rotation == 1
    assert fit.scale == 0
    close(fit.translation, 5 - 2 * x.mean(0))


# Few rows, and rows without spread


@special_or_not
@pytest.mark.parametrize(("n", "d"), [(2, 3), (3, 5), (4, 5), (8, 40)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_what_is_orthogonal_to_all_differences_stays(n, d, special, offset, device):
    x, y = (z + offset for z in rows(n, d, device))
    fit = fit_similarity(x, y, special=special)
    both = torch.cat((x[1:] - x[0], y[1:] - y[0]))
    _, s, vh = torch.linalg.svd(both)
    free = vh[len(s) :]
    torch.testing.assert_close(free @ fit.rotation, free)
    assert (fit.rotation - torch.eye(d).to(x)).norm() <= 2 * math.sqrt(2 * n - 2) + 1e-9
    assert fit.gap == 0


@special_or_not
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 4), (3, 4), (6, 4)])
@pytest.mark.parametrize("value", [0.1, 1e8, 1e-200])
def test_rows_without_spread_have_scale_0_and_finite_gradients(n, d, value, special, device):
    x, y = rows(n, d, device)
    x = value * x[:1].expand(n, d)
    for scaled, source, target in ((True, x, y), (False, x, y), (True, y, x), (False, y, x)):
        leaves = [z.clone().requires_grad_() for z in (source, target)]
        w = (0.5 + torch.rand(n, dtype=torch.float64, device=device)).requires_grad_()
        fit = fit_similarity(*leaves, weights=w, special=special, scaled=scaled)
        assert fit.scale == (0 if scaled else 1)
        assert torch.equal(fit.rotation, torch.eye(d).to(x))
        source_mean, target_mean = ((w[:, None] * z).sum(0) / w.sum() for z in leaves)
        translation = target_mean if scaled else target_mean - source_mean
        torch.testing.assert_close(fit.translation, translation)
        g = torch.randn(d, dtype=torch.float64, device=device)
        for other in leaves if source is x else ():
            found, expected = (
                torch.autograd.grad(z @ g, other, retain_graph=True, materialize_grads=True)[0]
                for z in (fit.translation, translation)
            )
            torch.testing.assert_close(found, expected)
        if scaled and source is x:
            found = torch.autograd.grad(fit.scale, leaves, retain_graph=True)
            assert not any(g.any() for g in found)
        total = sum(z.pow(3).sum() for z in fit[:3])
        grads = torch.autograd.grad(total, (*leaves, w), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), (*leaves, w))
        assert all(g.isfinite().all() for g in (*grads, *second))


# What it does not depend on


@given(problems(), booleans, seeds)
def test_follows_similarities_of_source_and_target(problem, special, seed):
    x, y = problem
    d = x.shape[1]
    a, b = orthogonal(d, seed), orthogonal(d, seed + 1)
    s, t = normal(d, seed=seed + 2), normal(d, seed=seed + 3)
    fit = fit_similarity(x, y, special=special)
    assume(fit.gap > 1e-3)
    moved = fit_similarity(3 * x @ a + s, 0.5 * y @ b + t, special=special)
    close(moved.rotation, a.mT @ fit.rotation @ b, 1e-9)
    close(moved.scale, fit.scale / 6, 1e-9)
    close(mapped(moved, 3 * x @ a + s), 0.5 * mapped(fit, x) @ b + t, 1e-9)
    close(moved.residual, fit.residual / 2, 1e-9)


@given(problems(), booleans, st.sampled_from([1e-300, 1e-170, 1e-12, 1e12, 1e300]))
def test_the_unit_of_the_rows_does_not_matter(problem, special, unit):
    x, y = problem
    for scaled in (True, False):
        fit = fit_similarity(x, y, special=special, scaled=scaled)
        other = fit_similarity(unit * x, unit * y, special=special, scaled=scaled)
        close(other.gap, fit.gap, 1e-9)
        close(other.residual / unit, fit.residual, 1e-9)
        if fit.gap > 1e-3:
            close(other.rotation, fit.rotation, 1e-9)
            close(other.scale, fit.scale, 1e-9)
            close(other.translation / unit, fit.translation, 1e-9)
    small = fit_similarity(x, unit * y, special=special)
    close(small.scale / unit, fit_similarity(x, y, special=special).scale, 1e-9)


@given(problems(), booleans, seeds)
def test_a_weight_of_2_is_a_duplicated_row(problem, special, seed):
    x, y = problem
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(0, 4, (len(x),), generator=generator).double()
    assume(w.any())
    repeated = [z.repeat_interleave(w.long(), 0) for z in (x, y)]
    for scaled in (True, False):
        fit = fit_similarity(x, y, weights=w, special=special, scaled=scaled)
        copies = fit_similarity(*repeated, special=special, scaled=scaled)
        close(fit.residual, copies.residual, 1e-9)
        close(fit.scale, copies.scale, 1e-9)
        if fit.gap > 1e-3:
            close(fit.rotation, copies.rotation, 1e-9)
            close(fit.translation, copies.translation, 1e-9)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
@pytest.mark.parametrize("n", [3, 12])
@scaled_or_not
def test_a_row_of_weight_0_may_hold_anything_and_gets_gradient_0(n, garbage, scaled, device):
    x, y = rows(n + 1, 6, device)
    x[-1], y[-1, 0] = garbage, -garbage
    w = torch.rand(n + 1, dtype=torch.float64, device=device)
    w[-1] = 0
    x, y, w = (z.requires_grad_() for z in (x, y, w))
    fit = fit_similarity(x, y, weights=w, scaled=scaled)
    without = fit_similarity(x[:-1], y[:-1], weights=w[:-1], scaled=scaled)
    for a, b in zip(fit, without, strict=True):
        torch.testing.assert_close(a, b)
    total = fit.rotation.pow(3).sum() + fit.scale + fit.translation.sum()
    grads = torch.autograd.grad(total, (x, y, w))
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[-1].any() for g in grads)
    assert all(g[0].any() for g in grads)


@special_or_not
@pytest.mark.parametrize(("n", "d"), [(2, 6), (9, 3)])
def test_without_any_weight_the_source_is_ignored(n, d, special, device):
    x, y = (z.requires_grad_() for z in rows(n, d, device))
    w = torch.zeros(n, dtype=torch.float64, device=device, requires_grad=True)
    for scaled in (True, False):
        fit = fit_similarity(x, y, weights=w, special=special, scaled=scaled)
        assert torch.equal(fit.rotation, torch.eye(d).to(x))
        assert fit.scale == (0 if scaled else 1)
        assert not fit.translation.any()
        assert fit.residual == fit.gap == 0
        grads = torch.autograd.grad(sum(z.sum() for z in fit[:3]), (x, y, w))
        assert all(g.isfinite().all() for g in grads)


# Precision, dtypes and shapes


@special_or_not
@pytest.mark.parametrize(("n", "d"), [(12, 3), (4, 4), (3, 8)])
def test_a_mean_far_from_the_origin_costs_no_digits_of_the_differences(n, d, special, device):
    x, q = torch.randn(n, d, device=device), orthogonal(d, 0).float().to(device)
    # Numbers of float32 whose differences are exact: a shift by a power of two keeps their bits.
    x = (x * 2**9).round() / 2**9
    far = x + 2**13
    y = x.double() @ q.double()
    near_fit = fit_similarity(x.double(), y, special=special)
    far_fit = fit_similarity(far.double(), y + 1e4, special=special)
    close(far_fit.rotation, near_fit.rotation, 1e-10)
    close(far_fit.scale, near_fit.scale, 1e-10)
    single = fit_similarity(far, y.float(), special=special)
    torch.testing.assert_close(single.rotation.double(), near_fit.rotation, rtol=0, atol=5e-6)
    torch.testing.assert_close(single.scale.double(), near_fit.scale, rtol=0, atol=5e-6)
    wide = SimilarityFit(*(z.double() for z in single))
    error = (mapped(wide, far.double()) - y).norm(dim=-1).max()
    assert error <= torch.finfo(torch.float32).eps * single.translation.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_translation_makes_up_for_the_rounding_of_rotation_and_scale(dtype, device):
    # What the mean is multiplied by is rounded. In a float64 product, that is no error.
    x = (torch.randn(200, 16, device=device) + (1e4 if dtype == torch.float32 else 100)).to(dtype)
    y = (x.double() @ orthogonal(16, 0).to(device)).to(dtype)
    fit = fit_similarity(x, y)
    wide = SimilarityFit(*(z.double() for z in fit))
    error = (objective(wide, x.double(), y.double()) / len(x)).sqrt()
    assert error <= 1.2 * fit.residual


def test_the_gap_counts_the_rounding_of_rows_far_from_the_origin(device):
    # Points of a plane in space. In float32, rounding takes them out of it by 5e-4.
    cloud = normal(20, 3).float().to(device)
    far = ((normal(20, 2) @ orthogonal(3, 0)[:2]) + 1e4).float().to(device)
    for pair in ((cloud, far), (far, cloud), (far, far)):
        assert fit_similarity(*pair).gap == 0
        assert fit_similarity(*pair, special=True).gap > 0.05
    assert fit_similarity(cloud, cloud + 1e4).gap > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 40])
def test_half_types_are_computed_in_more_and_cast_back(n, dtype, device):
    x, y = torch.randn(2, n, 16, device=device).to(dtype)
    fit, wide = fit_similarity(x, y), fit_similarity(x.float(), y.float())
    assert fit.rotation.dtype == fit.scale.dtype == fit.translation.dtype == dtype
    assert fit.residual.dtype == fit.gap.dtype == torch.float32
    for found, expected in zip(fit[:2], wide[:2], strict=True):
        torch.testing.assert_close(found, expected.to(dtype))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(fit.translation.float(), wide.translation, atol=tolerance, rtol=0)
    torch.testing.assert_close(fit.residual, wide.residual)


@special_or_not
@scaled_or_not
@pytest.mark.parametrize("n", [2, 9])
def test_leading_dimensions_broadcast(n, scaled, special, device, dtype):
    x = torch.randn(3, 1, n, 5, device=device).to(dtype)
    y = torch.randn(2, n, 5, device=device).to(dtype)
    w = torch.rand(4, 1, 1, n, device=device).to(dtype)
    fit = fit_similarity(x, y, weights=w, special=special, scaled=scaled)
    assert fit.rotation.shape == (4, 3, 2, 5, 5)
    assert fit.translation.shape == (4, 3, 2, 5)
    assert fit.scale.shape == fit.residual.shape == fit.gap.shape == (4, 3, 2)
    one = fit_similarity(x[2, 0], y[1], weights=w[3, 0, 0], special=special, scaled=scaled)
    for a, b in zip(fit, one, strict=True):
        torch.testing.assert_close(a[3, 2, 1], b, rtol=1e-4, atol=1e-4)


@scaled_or_not
@pytest.mark.parametrize("n", [2, 9])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_nan_in_one_item_stays_in_it(garbage, n, scaled, device):
    x, y = rows(n, 5, device, 3)
    expected = fit_similarity(x, y, scaled=scaled)
    x[1, -1, 2] = garbage
    x.requires_grad_()
    fit = fit_similarity(x, y, scaled=scaled)
    for name, found in fit._asdict().items():
        torch.testing.assert_close(found[[0, 2]], getattr(expected, name)[[0, 2]])
        if scaled or name != "scale":
            assert found[1].isnan().all()
    total = sum(z[[0, 2]].sum() for z in (fit.rotation, fit.translation))
    assert torch.autograd.grad(total, x)[0][[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 5), (3, 0, 9, 5)])
def test_batches_may_be_empty(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    fit = fit_similarity(x, x)
    assert fit.translation.shape == (*shape[:-2], 5)
    assert fit.scale.shape == shape[:-2]
    assert torch.autograd.grad(fit.translation.sum(), x)[0].shape == shape


# Derivatives and transforms


@special_or_not
@scaled_or_not
@sizes
def test_gradients_are_those_of_differences(n, d, scaled, special, device):
    x, y = (z.requires_grad_() for z in rows(n, d, device))
    w = (0.5 + torch.rand(n, dtype=torch.float64, device=device)).requires_grad_()
    function = without_gap(special, scaled)
    assert gradcheck(function, (x, y, w), check_forward_ad=True, fast_mode=True)


@special_or_not
@pytest.mark.parametrize(("n", "d"), [(3, 2), (5, 3), (3, 4)])
def test_second_derivatives_are_those_of_differences(n, d, special, device):
    x, y = (z.requires_grad_() for z in rows(n, d, device))
    assert gradgradcheck(without_gap(special), (x, y), fast_mode=True)


@pytest.mark.parametrize(("n", "d"), [(3, 5), (7, 4)])
@scaled_or_not
def test_vmap_is_a_loop(n, d, scaled, device):
    x, y = rows(n, d, device, 3)
    w = torch.rand(3, n, dtype=torch.float64, device=device)
    function = without_gap(scaled=scaled)
    each = [function(*item) for item in zip(x, y, w, strict=True)]
    for found, *expected in zip(vmap(function)(x, y, w), *each, strict=True):
        torch.testing.assert_close(found, torch.stack(expected))
    translation = lambda *z: function(*z)[-1]  # noqa: E731
    jacobians = torch.stack([jacrev(translation)(*item) for item in zip(x, y, w, strict=True)])
    torch.testing.assert_close(vmap(jacrev(translation))(x, y, w), jacobians)
    torch.testing.assert_close(vmap(jacfwd(translation))(x, y, w), jacobians)


@pytest.mark.parametrize(("n", "d", "scaled"), [(3, 5, True), (7, 4, False)])
def test_compiles_as_one_graph_forward_and_backward(n, d, scaled, device, dtype):
    torch.compiler.reset()
    x, y = (z.to(dtype) for z in rows(n, d, device, 3))
    w = torch.rand(3, n, device=device)
    x[1] = x[1, :1]  # without spread
    x.requires_grad_()
    call = lambda x, y, w: fit_similarity(x, y, weights=w, special=True, scaled=scaled)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x, y, w), call(x, y, w)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = [
        torch.autograd.grad(fit.rotation.pow(3).sum() + fit.translation.sum(), x)[0]
        for fit in (found, expected)
    ]
    torch.testing.assert_close(*grads)


def test_residual_and_gap_carry_no_gradient(device):
    x, y = (z.requires_grad_() for z in rows(7, 4, device))
    for n in (7, 2):
        fit = fit_similarity(x[:n], y[:n])
        assert all(z.requires_grad for z in fit[:3])
        assert not any(z.requires_grad for z in fit[3:])
    assert not fit_similarity(x, y, scaled=False).scale.requires_grad


def test_a_fit_is_registered_by_gradient_descent_too(device):
    # The minimum over the map, seen as a loss of the source, falls along its gradient.
    x, y = rows(9, 3, device)
    x.requires_grad_()
    fit = fit_similarity(x, y, special=True)
    (grad,) = torch.autograd.grad(objective(fit, x, y), x)
    fixed = SimilarityFit(*(z.detach() for z in fit))
    (envelope,) = torch.autograd.grad(objective(fixed, x, y), x)
    torch.testing.assert_close(grad, envelope)  # the map is stationary


# Errors, and saving


@pytest.mark.parametrize(("pair", "sentence"), FITS.values(), ids=FITS)
def test_bad_rows_to_fit(pair, sentence):
    assert_refused(lambda: fit_similarity(*pair), sentence)


@pytest.mark.parametrize(("weights", "sentence"), WEIGHTS.values(), ids=WEIGHTS)
def test_bad_weights(weights, sentence):
    assert_refused(lambda: fit_similarity(Z, Z, weights=weights), sentence)


@pytest.mark.parametrize("name", ["special", "scaled"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_bad_choices(name, value):
    sentence = f"`{name}` must be True or False, got "
    assert_refused(lambda: fit_similarity(Z, Z, **{name: value}), sentence)


def test_a_fit_is_saved_as_a_dictionary(tmp_path):
    fit = fit_similarity(*torch.randn(2, 8, 4))
    torch.save(fit._asdict(), tmp_path / "fit.pt")
    loaded = SimilarityFit(**torch.load(tmp_path / "fit.pt"))
    assert all(torch.equal(a, b) for a, b in zip(loaded, fit, strict=True))


def test_a_fit_to_equal_means_is_exact_in_float64():
    x = normal(50, 3) + 1e4
    q = orthogonal(3, 0)
    fit = fit_similarity(x, 2 * (x - 1e4) @ q)
    assert abs(fit.scale - 2) <= 1e5 * EPS
