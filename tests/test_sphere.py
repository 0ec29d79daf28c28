"""The sphere: unit rows, distances, random points and what holds for every function."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spheres import ANGLES, DTYPES, EPS, close, pairs, point, tangent
from strategies import seeds

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
    for result in every(x.expand(2, 3, 4), y)[1:] + every(y, x.expand(2, 3, 4))[1:]:
        assert result.shape[:2] == (2, 3)
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
