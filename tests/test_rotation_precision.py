"""Rotations: shapes, dtypes, and how exact a fit is."""

import math

import pytest
import torch
from hypothesis import given
from rotations import (
    booleans,
    close,
    normal,
    problems,
)
from strategies import orthogonal

from care_loss.rotation import (
    fit_rotation,
    nearest_orthogonal,
    rotation_angles,
)


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
