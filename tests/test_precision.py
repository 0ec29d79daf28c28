"""Rounding: at most twice that of the formula in float32, judged by float64, on every path.

A formula in float32 converts half types first. Errors are root mean squares over draws: that of a
single draw may be 0 by chance.
"""

import itertools
import math
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from losses import PLAIN, plain_equivariance, relative_errors, value_and_grad

from care_loss._autograd import paths
from care_loss.functional import equivariance_loss, info_nce_loss
from care_loss.rotation import random_orthogonal
from care_loss.sphere import normalize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_turn(*choices):
    """All combinations; of each of the others, one value of the last choice in turn is not deep."""
    *others, last = map(list, choices)
    found = []
    for places in itertools.product(*(range(len(values)) for values in others)):
        chosen = [values[place] for values, place in zip(others, places, strict=True)]
        for place, value in enumerate(last):
            marks = [pytest.mark.deep] * (place != sum(places) % len(last))
            found.append(pytest.param(*chosen, value, marks=marks))
    return found


def assert_rounds_at_most_twice_as_much(loss, plain, draw, draws):
    ours, theirs, rounding = [], [], []
    for _ in range(draws):
        views = draw()
        truth = value_and_grad(plain, *(z.double() for z in views))
        ours.append(relative_errors(value_and_grad(loss, *views), truth))
        theirs.append(relative_errors(value_and_grad(plain, *(z.float() for z in views)), truth))
        rounding.append([2**-24, rounding_to(views[0].dtype, truth[1])])
    ours, theirs, rounding = (np.square(x).mean(0) ** 0.5 for x in (ours, theirs, rounding))
    assert (ours <= 2 * theirs + rounding).all()


def rounding_to(dtype, x):
    """What rounding to a dtype, with its subnormal numbers, may change `x` by, relative to it."""
    limits = torch.finfo(dtype)
    subnormal = limits.smallest_normal * limits.eps * math.sqrt(x.numel())
    return limits.eps / 2 + subnormal / 2 / x.norm().item()


@pytest.mark.parametrize(
    ("name", "noise", "shape", "dtype"),
    in_turn(PLAIN, [1.0, 1e-2], [(16, 8), (64, 128), (256, 32)], DTYPES),
)
def test_every_loss_rounds_little(name, noise, shape, dtype, device):
    plain, loss = PLAIN[name]

    def draw():
        z = torch.randn(shape, device=device)
        return z.to(dtype), (z + noise * torch.randn_like(z)).to(dtype)

    assert_rounds_at_most_twice_as_much(loss, plain, draw, draws=48)


TEMPERATURES = [1, 0.5, 0.1, 0.05, 0.02, 1 / 64, 0.0125, 0.005]


@pytest.mark.parametrize(
    ("temperature", "shape", "dtype"),
    in_turn(TEMPERATURES, [(63, 128), (256, 32), (128, 9)], DTYPES),
)
def test_info_nce_rounds_little_at_every_temperature(temperature, shape, dtype, device):
    assert paths.is_dense(2 * shape[0], device)
    assert_info_nce_rounds_little(shape, dtype, temperature, device, draws=24)


MANY = [((1025, 32), torch.float32, temperature) for temperature in TEMPERATURES]
MANY += [((1025, 32), dtype, temperature) for dtype in DTYPES[1:] for temperature in (0.5, 0.005)]
MANY += [((1200, 9), torch.float32, temperature) for temperature in (0.5, 0.005)]
MANY_DEEP = [0, 2, 4, 6, 9, 10, 12]  # places: each dtype, both shapes and both ends are left
MANY = [
    pytest.param(*case, marks=[pytest.mark.deep] * (place in MANY_DEEP))
    for place, case in enumerate(MANY)
]


@pytest.mark.parametrize(("shape", "dtype", "temperature"), MANY)
def test_info_nce_of_many_rows_rounds_little(shape, dtype, temperature, device):
    with patch("care_loss._autograd.info_nce.is_dense", return_value=False):
        assert_info_nce_rounds_little(shape, dtype, temperature, device, draws=8)


@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_info_nce_with_a_learned_temperature_rounds_little(temperature, device):
    temperature = torch.tensor(temperature, device=device)
    assert_info_nce_rounds_little((256, 32), torch.float32, temperature, device, draws=24)


def assert_info_nce_rounds_little(shape, dtype, temperature, device, draws, negatives=None):
    loss = partial(info_nce_loss, temperature=temperature, negatives=negatives)

    def plain(z1, z2):
        with patch("care_loss.functional.use_autograd_function", return_value=False):
            return loss(z1, z2)

    def draw():
        z1 = torch.randn(shape, device=device)
        z2 = z1 + torch.randn_like(z1)
        z1[1] = 0
        return z1.to(dtype), z2.to(dtype)

    assert_rounds_at_most_twice_as_much(loss, plain, draw, draws)


EQUIVARIANCE = {  # rows, dimensions, chunks, and whether chunks are long
    "even": (256, 32, 16, False),
    "ragged": (250, 128, 16, False),
    "one": (300, 64, 1, True),
    "long, ragged": (1001, 16, 3, True),
    "long, few dimensions": (67, 4, 2, True),
}


def plain_equivariance_of_chunks(z1, z2, chunks):
    pairs = zip(z1.tensor_split(chunks), z2.tensor_split(chunks), strict=True)
    return torch.stack([plain_equivariance(u, v) for u, v in pairs]).mean()


@pytest.mark.parametrize(
    ("case", "noise", "dtype"), in_turn(EQUIVARIANCE, [1, 1e-2, 1e-3, 1e-4], DTYPES)
)
def test_equivariance_rounds_little_near_its_minimum(case, noise, dtype, device):
    n, d, chunks, long = EQUIVARIANCE[case]
    assert paths.is_long(n // chunks, d) == long

    def draw():
        z1, step = F.normalize(torch.randn(2, n, d, dtype=torch.float64, device=device), dim=-1)
        rotation = random_orthogonal(d, dtype=torch.float64, device=device)
        return z1.to(dtype), ((z1 + noise * step) @ rotation).to(dtype)

    assert_rounds_at_most_twice_as_much(
        partial(equivariance_loss, chunks=chunks),
        partial(plain_equivariance_of_chunks, chunks=chunks),
        draw,
        draws=40,
    )


@pytest.mark.parametrize("case", EQUIVARIANCE)
def test_zero_rows_round_little(case, device):
    n, d, chunks, _ = EQUIVARIANCE[case]

    def loss(z1, z2):
        return equivariance_loss(z1, z2, chunks=chunks)

    for _ in range(4):
        z1, z2 = torch.randn(2, n, d, device=device)
        z1[3], z2[-1] = 0, 0
        truth = value_and_grad(loss, z1.double(), z2.double())
        errors = relative_errors(value_and_grad(loss, z1, z2), truth)
        assert max(errors) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [256, 1025])
def test_results_are_the_same_in_every_run(dtype, n, device):
    views = torch.randn(2, n, 24, device=device).to(dtype)
    ids = torch.arange(n) % 5
    for loss in (
        info_nce_loss,
        partial(info_nce_loss, temperature=0.01),
        lambda z1, z2: info_nce_loss(z1, z2, reduction="none").mean(),
        partial(equivariance_loss, chunks=2),
        partial(equivariance_loss, chunks=16),
        partial(equivariance_loss, chunks=ids),
    ):
        first, second = (value_and_grad(loss, *views) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@pytest.fixture(params=["high", "medium", "per backend"])
def rounded_products(request):
    """Allow PyTorch to round the float32 products, by each of its settings."""
    if request.param == "per backend":
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            pytest.skip("this version of PyTorch has one setting only")
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        yield
        torch.backends.cuda.matmul.fp32_precision = before
    else:
        torch.set_float32_matmul_precision(request.param)
        yield
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("case", EQUIVARIANCE)
def test_equivariance_keeps_its_digits_where_products_may_be_rounded(
    case, rounded_products, device
):
    assert paths.products_are_rounded()
    n, d, chunks, _ = EQUIVARIANCE[case]

    def draw():
        z1, step = F.normalize(torch.randn(2, n, d, dtype=torch.float64, device=device), dim=-1)
        rotation = random_orthogonal(d, dtype=torch.float64, device=device)
        return z1.float(), ((z1 + 1e-3 * step) @ rotation).float()

    products = []
    matmul = torch.bmm

    def bmm(a, b):
        products.append(a.dtype)
        return matmul(a, b)

    views = draw()
    with patch("torch.bmm", bmm):
        found = value_and_grad(partial(equivariance_loss, chunks=chunks), *views)
    assert set(products) == {torch.float64}
    truth = value_and_grad(
        partial(plain_equivariance_of_chunks, chunks=chunks), *(z.double() for z in views)
    )
    errors = relative_errors(found, truth)
    assert errors[0] < 5e-5
    assert errors[1] < 1e-3


@pytest.mark.parametrize(
    ("shape", "spread", "precision"),
    in_turn(
        [(64, 128, 2), (64, 8, 2), (256, 8, 2), (250, 16, 4), (256, 128, 16)],
        [1.0, 0.1, 0.01, 0.003, 0.001],
        ["highest", "high"],
    ),
)
def test_rows_that_nearly_coincide_cost_no_digits(shape, spread, precision, device):
    n, d, chunks = shape

    # As in a network at its start, or one that has collapsed. The errors are compared with what
    # rounding the inputs to float32 does.
    def loss(z1, z2):
        return equivariance_loss(z1, z2, chunks=chunks)

    def plain(z):
        with patch("care_loss.functional.use_autograd_function", return_value=False):
            return value_and_grad(loss, *z)

    errors, rounding = [], []
    before = torch.get_float32_matmul_precision()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        centre = normalize(torch.randn(d, dtype=torch.float64, generator=generator))
        z = torch.randn(2, n, d, dtype=torch.float64, generator=generator)
        z = (centre + spread * z / d**0.5).to(device)
        z[0, 3] = 0  # one view of a sample without activations
        rounded = z.float()
        truth = plain(rounded.double())
        torch.set_float32_matmul_precision(precision)
        try:
            errors.append(relative_errors(value_and_grad(loss, *rounded), truth))
        finally:
            torch.set_float32_matmul_precision(before)
        rounding.append(relative_errors(plain(z), truth))
    eps = torch.finfo(torch.float32).eps
    for found, allowed in zip(zip(*errors, strict=True), zip(*rounding, strict=True), strict=True):
        assert max(found) <= 20 * max(allowed) + 20 * eps


@pytest.mark.parametrize(
    ("temperature", "shape", "dtype"), in_turn([1, 0.2, 0.02, 0.005], [(63, 128), (128, 9)], DTYPES)
)
def test_info_nce_of_a_queue_rounds_little(temperature, shape, dtype, device):
    negatives = torch.randn(3000, shape[1], device=device)  # more than one tile
    options = {"temperature": temperature, "negatives": negatives}
    assert_info_nce_rounds_little(shape, dtype, device=device, draws=12, **options)
