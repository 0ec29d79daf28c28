"""Derivatives of rotations: right where they exist, finite where they do not."""

import math

import pytest
import torch
from strategies import orthogonal
from test_transforms import deep, on_both_backends
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap

from care_loss.rotation import (
    fit_rotation,
    nearest_orthogonal,
    random_orthogonal,
    rotation_angles,
    rotation_distance,
)

special = pytest.mark.parametrize("special", [False, True], ids=["O", "SO"])
# Rows and dimensions: with every number of directions that no row reaches.
sizes = pytest.mark.parametrize(
    ("n", "d"), [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (5, 3), (2, 5)]
)


def rows(n, d, device, *batch):
    return torch.randn(2, *batch, n, d, dtype=torch.float64, device=device).unbind()


def rotation(special):
    return lambda x, y, w=None: fit_rotation(x, y, weights=w, special=special).rotation


@special
@sizes
def test_gradients_are_those_of_differences(n, d, special, device):
    x, y = (z.requires_grad_() for z in rows(n, d, device))
    w = (0.5 + torch.rand(n, dtype=torch.float64, device=device)).requires_grad_()
    assert gradcheck(rotation(special), (x, y, w), check_forward_ad=True, check_batched_grad=True)


@special
@sizes
def test_second_derivatives_are_those_of_differences(n, d, special, device):
    x, y = (z.requires_grad_() for z in rows(n, d, device))
    assert gradgradcheck(rotation(special), (x, y))


@special
@pytest.mark.parametrize("d", [1, 2, 4])
def test_the_nearest_matrix_has_the_derivatives_of_differences(d, special, device):
    m = torch.randn(3, d, d, dtype=torch.float64, device=device, requires_grad=True)
    function = lambda m: nearest_orthogonal(m, special=special)  # noqa: E731
    assert gradcheck(function, m, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, m)


@special
@pytest.mark.parametrize(("n", "d"), [(2, 5), (7, 4)])
def test_forward_and_reverse_mode_agree_to_second_order(n, d, special, device):
    x, y = rows(n, d, device)
    function = rotation(special)
    torch.testing.assert_close(jacfwd(function)(x, y), jacrev(function)(x, y))

    def gradient(x):
        value, pull = vjp(lambda x: function(x, y).pow(3).sum(), x)
        return pull(torch.ones_like(value))[0]

    step = torch.randn_like(x)
    _, forward = jvp(gradient, (x,), (step,))
    torch.testing.assert_close(forward, vjp(gradient, x)[1](step)[0])
    full = hessian(lambda x: function(x, y).pow(3).sum())(x)
    torch.testing.assert_close(torch.einsum("ijkl,kl->ij", full, step), forward)


def test_forward_mode_within_forward_mode_is_refused(device):
    x, y = rows(7, 4, device)
    with pytest.raises(NotImplementedError, match="must use reverse mode once, got forward mode"):
        jacfwd(jacfwd(lambda x: fit_rotation(x, y).rotation))(x)
    function = lambda x: fit_rotation(x, y).rotation[0, 1]  # noqa: E731
    torch.testing.assert_close(jacrev(jacfwd(function))(x), jacfwd(jacrev(function))(x))


@special
@pytest.mark.parametrize(("n", "d"), [(2, 5), (7, 4)])
def test_vmap_is_a_loop(n, d, special, device):
    x, y = rows(n, d, device, 3)
    w = torch.rand(3, n, dtype=torch.float64, device=device)
    function = rotation(special)
    each = [function(*item) for item in zip(x, y, w, strict=True)]
    torch.testing.assert_close(vmap(function)(x, y, w), torch.stack(each))
    jacobians = [jacrev(function)(*item) for item in zip(x, y, w, strict=True)]
    torch.testing.assert_close(vmap(jacrev(function))(x, y, w), torch.stack(jacobians))
    torch.testing.assert_close(vmap(jacfwd(function))(x, y, w), torch.stack(jacobians))
    one_target = vmap(function, in_dims=(0, None))(x, y[0])
    torch.testing.assert_close(one_target[2], function(x[2], y[0]))


def test_vmap_of_measures_is_a_loop(device):
    r = random_orthogonal(4, batch_shape=(5,), dtype=torch.float64, device=device)
    for dim in (0, 1):
        moved = r.movedim(0, dim)
        angles = vmap(rotation_angles, in_dims=dim)(moved)
        torch.testing.assert_close(angles, rotation_angles(r), equal_nan=True)
        distances = vmap(rotation_distance, in_dims=(dim, None))(moved, r[0])
        torch.testing.assert_close(distances, rotation_distance(r, r[0]))


def test_negative_weights_are_nan_where_they_cannot_be_read(device):
    x, y = rows(7, 4, device, 2)
    w = torch.ones(2, 7, dtype=torch.float64, device=device)
    w[1, 3] = -1
    found = vmap(rotation(False))(x, y, w)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


FITS = {"O-2-5": (2, 5, False), "SO-2-5": (2, 5, True), "O-7-4": (7, 4, False)}
FITS["SO-7-4"] = (7, 4, True)


@pytest.mark.parametrize(
    ("fit", "backend"),
    on_both_backends(FITS, aot_eager={"O-2-5", "SO-7-4"}, inductor={"SO-2-5"}),
)
def test_compiles_as_one_graph_forward_and_backward(fit, backend, device, dtype):
    torch.compiler.reset()
    n, d, special = fit
    x, y = (z.to(dtype) for z in rows(n, d, device, 3))
    # Items whose fit is not unique take the branches that depend on values.
    x[1] = 0
    x[2], y[2] = torch.eye(n, d, device=device), -torch.eye(n, d, device=device)
    x.requires_grad_()
    compiled = torch.compile(
        lambda x, y: fit_rotation(x, y, special=special), fullgraph=True, backend=backend
    )
    found, expected = compiled(x, y), fit_rotation(x, y, special=special)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(fit.rotation.pow(3).sum(), x)[0] for fit in (found, expected)]
    torch.testing.assert_close(*grads)


MANY, FEW = ((12, 4), (9, 5)), ((5, 8), (4, 7))


@pytest.mark.parametrize(
    ("sizes", "special"),
    [(MANY, True), (MANY, False), (FEW, True), pytest.param(FEW, False, marks=deep)],
    ids=["many-SO", "many-O", "few-SO", "few-O"],
)
def test_compiles_once_for_all_sizes(sizes, special, device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fit_rotation, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for n, d in sizes:
        x, y = torch.randn(2, n, d, device=device)
        expected = fit_rotation(x, y, special=special)
        for a, b in zip(compiled(x, y, special=special), expected, strict=True):
            torch.testing.assert_close(a, b)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]  # nothing is compiled for the second size


@pytest.mark.parametrize("function", [rotation_angles, lambda r: rotation_distance(r, r.mT)])
def test_measures_compile_for_all_sizes(function, device):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, d in ((3, 4), (2, 5)):
        r = random_orthogonal(d, batch_shape=(n,), device=device)
        torch.testing.assert_close(compiled(r), function(r), equal_nan=True)


def test_shapes_are_known_without_values():
    x = torch.empty(7, 3, 5, device="meta")
    for n in (3, 2):
        fit = fit_rotation(x[:, :n], x[:, :n], special=True)
        assert fit.rotation.shape == (7, 5, 5)
    assert random_orthogonal(4, special=True, device="meta").shape == (4, 4)
    assert rotation_angles(fit.rotation).shape == (7, 2)


# Where singular values repeat


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("d", [2, 16, 64])
def test_the_gradient_at_a_multiple_of_a_rotation_has_a_closed_form(d, scale, device):
    # At M = c Q it is (G - Q G'Q) / (2 c).
    q = orthogonal(d, 0).to(device)
    g = torch.randn(d, d, dtype=torch.float64, device=device)
    for is_special in (False, True):
        m = (scale * q).requires_grad_()
        (grad,) = torch.autograd.grad(
            nearest_orthogonal(m, special=is_special), m, g, create_graph=True
        )
        expected = (g - q @ g.mT @ q) / (2 * scale)
        assert (grad - expected).norm() <= 1e-13 * expected.norm()
        (second,) = torch.autograd.grad((scale * grad).pow(3).sum(), m)
        assert second.isfinite().all()
        assert second.any()


def test_second_derivatives_are_right_at_a_multiple_of_a_rotation(device):
    q = (2 * orthogonal(3, 0)).to(device).requires_grad_()
    assert gradcheck(nearest_orthogonal, q)
    assert gradgradcheck(nearest_orthogonal, q)


@special
def test_the_jacobian_has_singular_values_2_over_sums(special, device):
    s = torch.tensor([3.0, 2.0, 2.0, 0.5], dtype=torch.float64, device=device)
    signed = s.clone()
    signed[-1] *= -1 if special else 1  # the determinant below is negative
    m = (orthogonal(4, 0).to(device) * s) @ orthogonal(4, 1, reflect=True).to(device)
    jacobian = jacrev(lambda m: nearest_orthogonal(m, special=special))(m).reshape(16, 16)
    sums = signed + signed[:, None]
    expected = (2 / sums)[torch.ones(4, 4, dtype=torch.bool).triu(1)].sort(descending=True).values
    found = torch.linalg.svdvals(jacobian)
    torch.testing.assert_close(found[:6], expected)
    assert found[6:].max() < 1e-12


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize(("n", "d"), [(2, 5), (7, 4)])
@special
def test_the_gradient_scales_with_the_inverse_of_the_scale(n, d, scale, special, device):
    x, y = rows(n, d, device)
    grads = [
        torch.autograd.grad(rotation(special)(z, y).pow(3).sum(), z)[0]
        for z in (x.clone().requires_grad_(), (scale * x).requires_grad_())
    ]
    torch.testing.assert_close(scale * grads[1], grads[0], rtol=1e-9, atol=1e-12)


# Where the fit is not unique


DEGENERATE = {
    "equal rows of both": lambda x: (x, x.clone()),
    "one row repeated": lambda x: (x[:1].expand_as(x), x[-1:].expand_as(x)),
    "zeros": lambda x: (0 * x, 0 * x),
    "zeros in the target": lambda x: (x, 0 * x),
    "a zero row": lambda x: (x * (torch.arange(len(x)) > 0).to(x)[:, None], x.flip(0)),
    "opposite rows": lambda x: (x, -x),
    "a mirror": lambda x: (x, x * (1 - 2 * (torch.arange(x.shape[1]) == 0).to(x))),
    "orthogonal rows": lambda x: (torch.eye(*x.shape).to(x), torch.eye(*x.shape).to(x).roll(1, 1)),
}


@pytest.mark.parametrize("degenerate", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 6), (3, 4), (4, 4), (6, 4)])
@special
def test_first_and_second_derivatives_are_finite_at_degenerate_points(
    n, d, degenerate, special, device
):
    for dtype in (torch.float64, torch.float32):
        x, y = degenerate(torch.randn(n, d, dtype=dtype, device=device))
        x, y = (z.detach().clone().requires_grad_() for z in (x, y))
        value = fit_rotation(x, y, special=special).rotation
        first = torch.autograd.grad(value.pow(3).sum(), (x, y), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))
        assert all(g.isfinite().all() for g in (value, *first, *second))


@pytest.mark.parametrize(("n", "d"), [(1, 4), (2, 6), (3, 6), (16, 24), (3, 4), (8, 4)])
@special
def test_the_gradient_at_equal_inputs_is_that_nearby(n, d, special, device):
    # The value is exactly the identity there. Its derivative is not that of a constant.
    x = torch.randn(n, d, dtype=torch.float64, device=device)
    g = torch.randn(d, d, dtype=torch.float64, device=device)

    def gradients(x, y):
        x, y = (z.clone().requires_grad_() for z in (x, y))
        rotation = fit_rotation(x, y, special=special).rotation
        return torch.autograd.grad((rotation * g).sum(), (x, y))

    at_equal = gradients(x, x)
    nearby = gradients(x, x + 1e-7 * torch.randn_like(x))
    for found, expected in zip(at_equal, nearby, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.norm().item())
        assert expected.norm() > 0.01


def test_the_gradient_is_zero_along_what_turns_freely(device):
    # The nearest rotations to a reflection form a circle or a sphere. In float32 the singular
    # values are equal but for rounding: reciprocals of their differences would be 1e6 and more.
    for d in (2, 3, 6):
        for seed in range(20):
            m = orthogonal(d, seed, reflect=True).float().to(device).requires_grad_()
            g = torch.randn(d, d, device=device)
            (grad,) = torch.autograd.grad(nearest_orthogonal(m, special=True), m, g)
            assert grad.norm() <= 2 * g.norm()
            (grad,) = torch.autograd.grad(fit_rotation(m, m.detach() @ m.detach()).rotation, m, g)
            assert grad.norm() <= 4 * g.norm()


def test_the_gradient_of_an_equivariant_model_is_right(device):
    # Autograd through svd is NaN at these points. A small step against the gradient must help.
    q, target = orthogonal(8, 0).to(device), orthogonal(8, 1).to(device)

    def loss(x, y):
        return (fit_rotation(x, y).rotation - target).square().sum()

    for n in (3, 20):
        x = torch.randn(n, 8, dtype=torch.float64, device=device)
        y = (x @ q).requires_grad_()
        (grad,) = torch.autograd.grad(loss(x, y), y)
        step = 1e-6 / grad.norm()
        gain = (loss(x, y) - loss(x, y - step * grad)).item()
        assert gain == pytest.approx((step * grad.square().sum()).item(), rel=1e-3)


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=deep) for k in (1, 2))])
def test_adam_reaches_a_random_rotation_from_rank_one(seed, device):
    d = 6
    target = orthogonal(d, seed).to(device)
    m = torch.ones(d, d, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([m], lr=0.1)
    for _ in range(500):
        loss = (nearest_orthogonal(m, special=True) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-6


def test_only_the_rotation_carries_a_gradient(device):
    x, y = (z.requires_grad_() for z in rows(7, 4, device))
    for fit in (fit_rotation(x, y), fit_rotation(x[:2], y[:2])):
        assert fit.rotation.requires_grad
        assert not fit.residual.requires_grad
        assert not fit.gap.requires_grad


def test_the_backward_of_a_batch_of_64_needs_less_than_a_gigabyte(device):
    m = torch.randn(64, 64, 64, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nearest_orthogonal(m).sum().backward()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(storages.values()) < 16 * 64**3 * 8  # a few matrices for each of the batch
    assert m.grad.isfinite().all()
    assert math.isfinite(m.grad.norm())
