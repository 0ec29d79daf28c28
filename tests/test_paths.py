"""Which path computes a loss: every kind of call, shape and setting gets its own."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from care_loss._autograd import paths
from care_loss._numerics import exact, normal
from care_loss.functional import info_nce_loss

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_ordinary_calls_have_a_gradient_by_hand_and_transforms_have_none():
    x = torch.ones(2)
    seen = []

    def record(x):
        seen.append(paths.use_autograd_function(x, 0.5))
        return 2 * x

    record(x)
    assert seen.pop()
    torch.func.vmap(record)(x)
    make_fx(record)(x)
    torch.jit.trace(record, x, check_trace=False)
    torch.compile(record, backend="eager")(x)
    with forward_ad.dual_level():
        record(forward_ad.make_dual(x, x))
        assert not paths.use_autograd_function(x, forward_ad.make_dual(x, x))
    assert not any(seen)


@pytest.mark.parametrize("d", [1, 3, 128])
def test_chunks_are_long_above_four_rows_for_each_dimension(d):
    assert not paths.is_long(4 * d, d)
    assert paths.is_long(4 * d + 1, d)


def test_products_are_kept_up_to_a_number_of_rows_of_the_device():
    for device, most in ((CPU, 1024), (GPU, 8192)):
        assert paths.is_dense(most, device)
        assert not paths.is_dense(most + 1, device)


def test_values_decide_only_where_they_can_be_read_at_no_cost():
    assert paths.reads_values(torch.ones(1))
    assert not paths.reads_values(torch.ones(1, device="meta"))


def test_tiles_are_larger_for_threads_and_for_devices_that_are_no_cpu():
    threads = torch.get_num_threads()
    try:
        for number, expected in ((1, paths.TILE_ON_CPU), (2, paths.TILE_OF_THREADS)):
            torch.set_num_threads(number)
            assert paths.tile(CPU) == expected
            assert paths.tile(GPU) == paths.TILE
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("m", "height", "width"), [(7, 2, 3), (8, 4, 4), (9, 3, 20), (5, 9, 2)])
def test_tiles_have_each_pair_once_on_or_above_the_diagonal(m, height, width):
    count = torch.zeros(m, m, dtype=torch.long)
    for rows, columns, below in paths.tiles_of_triangle(m, height, width):
        tile = count[rows, columns]
        assert tile.shape[0] <= height
        assert tile.shape[1] <= width
        tile += 1
        # The columns from there on are to be mirrored below the diagonal.
        assert 0 <= below <= tile.shape[1]
        count[columns, rows][below:] += 1
    assert count.eq(1).all()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_rounded_where_pytorch_was_permitted_to(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert paths.products_are_rounded() == (precision != "highest")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
def test_exact_is_float64_but_on_the_gpus_that_have_none(device):
    with FakeTensorMode():
        expected = torch.float32 if device == "mps" else torch.float64
        assert exact(torch.empty(2, device=device)).dtype == expected
        assert normal((3,), None, device).dtype == expected


def test_a_gradient_is_needed_where_autograd_records_one():
    x, y = torch.ones(2), torch.ones(2, requires_grad=True)
    assert paths.need_gradient(x, y, 0.5)
    assert not paths.need_gradient(x, 0.5)
    with torch.no_grad():
        assert not paths.need_gradient(y)


def test_the_plain_gradients_have_derivatives():
    x, y = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64)
    first, none = paths.plain_gradients(info_nce_loss, (x, y), (True, False), one)
    expected = torch.autograd.grad(info_nce_loss(x, y), x)[0]
    assert none is None
    torch.testing.assert_close(first, expected)
    assert torch.autograd.grad(first.square().sum(), x)[0].abs().sum() > 0
