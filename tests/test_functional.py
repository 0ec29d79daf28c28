"""Values of the losses: against the reference, in every dtype, at the edges of the formats."""

import contextlib
import math
import unittest.mock
from functools import partial

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from losses import IDS, LOSSES, by_ids, relative_errors, value_and_grad
from strategies import orthogonal
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from care_loss.functional import (
    alignment_loss,
    equivariance_loss,
    info_nce_loss,
    uniformity_loss,
)

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
TEMPERATURES = [0.5, 0.07, 0.02, 0.005]


def random_shapes(count=200, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        n, d = int(rng.integers(2, 34)), int(rng.integers(1, 40))
        yield rng.standard_normal((2, n, d)), int(rng.integers(1, n + 3)), rng.uniform(0.05, 1.0)


def tensors(pair, dtype, device):
    return torch.from_numpy(pair).to(device, dtype)


def assert_close(loss, expected, tolerance, atol=1e-15):
    np.testing.assert_allclose(loss.cpu().double().numpy(), expected, rtol=tolerance, atol=atol)


# Values of InfoNCE and the equivariance loss


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_info_nce_is_the_authors_formula_for_200_random_shapes(dtype, device):
    for pair, _, temperature in random_shapes():
        z1, z2 = tensors(pair, dtype, device)
        expected = reference.info_nce(z1.cpu(), z2.cpu(), temperature)
        loss = info_nce_loss(z1, z2, temperature=temperature, reduction="none")
        assert loss.dtype == dtype
        assert_close(loss, expected, TOLERANCE[dtype])
        mean = info_nce_loss(z1, z2, temperature=temperature)
        assert_close(mean, expected.mean(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", ["mean", "authors"])
def test_equivariance_is_the_authors_formula_for_200_random_shapes(scale, dtype, device):
    for pair, chunks, _ in random_shapes():
        z1, z2 = tensors(pair, dtype, device)
        expected = reference.equivariance(z1.cpu(), z2.cpu(), chunks, scale)
        loss = equivariance_loss(z1, z2, chunks=chunks, scale=scale, reduction="none")
        assert loss.shape == (min(chunks, len(z1) // 2),)
        # Products of rows are rounded by eps, before their difference is squared.
        factor = 1 if scale == "mean" else 2 * len(z1)
        atol = 8 * torch.finfo(dtype).eps * np.sqrt(factor * expected)
        error = np.abs(loss.cpu().double().numpy() - expected)
        assert (error <= TOLERANCE[dtype] * expected + atol).all()
        mean = equivariance_loss(z1, z2, chunks=chunks, scale=scale)
        assert_close(mean, expected.mean(), TOLERANCE[dtype], atol.mean())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_info_nce_with_a_queue_is_the_formula_of_moco(dtype, device):
    for pair, k, temperature in random_shapes(50):
        z1, z2 = tensors(pair, dtype, device)
        queue = torch.randn(k, z1.shape[-1], dtype=dtype, device=device)
        expected = reference.info_nce_with_queue(z1.cpu(), z2.cpu(), queue.cpu(), temperature)
        loss = info_nce_loss(z1, z2, temperature=temperature, negatives=queue, reduction="none")
        assert_close(loss, expected, TOLERANCE[dtype])
        mean = info_nce_loss(z1, z2, temperature=temperature, negatives=queue)
        assert_close(mean, expected.mean(), TOLERANCE[dtype])


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.05, 0.005])
def test_info_nce_of_samples_that_are_opposite_or_whose_views_are(temperature, device):
    # The sum is 2 exp(-2/t) of the positive, far below it, or 1 + exp(2/t) times it, far above.
    e = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64, device=device)
    for z2 in (e, -e):
        loss = info_nce_loss(e, z2, temperature=temperature, reduction="none")
        assert_close(loss, reference.info_nce(e.cpu(), z2.cpu(), temperature), 1e-12, atol=0)


def test_a_queue_may_have_another_dtype(device):
    z1, z2, queue = torch.randn(3, 8, 16, device=device)
    expected = info_nce_loss(z1, z2, negatives=queue.half().float())
    torch.testing.assert_close(info_nce_loss(z1, z2, negatives=queue.half()), expected)
    expected = info_nce_loss(z1.bfloat16().float(), z2.bfloat16().float(), negatives=queue)
    loss = info_nce_loss(z1.bfloat16(), z2.bfloat16(), negatives=queue.double())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.1])
def test_info_nce_is_lightlys(temperature, lightly_loss, device):
    for n, d in [(2, 3), (17, 128), (256, 64)]:
        z1, z2 = torch.randn(2, n, d, device=device)
        theirs = lightly_loss.NTXentLoss(temperature=temperature)(z1, z2)
        torch.testing.assert_close(
            info_nce_loss(z1, z2, temperature=temperature), theirs, rtol=1e-5, atol=0
        )


# Chunks and ids


@pytest.mark.parametrize("scale", ["mean", "authors"])
@pytest.mark.parametrize(
    "ids", [[0, 0, 0, 1, 1, 1], [5, -3, 5, 5, -3, 9], [0, 1, 0, 2, 3, 0], [7] * 6]
)
@pytest.mark.parametrize("are_read", [True, False])
def test_ids_name_the_rows_of_a_chunk_and_single_rows_are_ignored(ids, scale, are_read, device):
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64, device=device)
    expected = reference.equivariance_by_id(z1.cpu(), z2.cpu(), ids, scale)
    with contextlib.nullcontext() if are_read else unreadable_ids():
        loss = equivariance_loss(z1, z2, chunks=torch.tensor(ids, device=device), scale=scale)
    assert_close(loss, expected, 1e-12)
    if 9 in ids:  # alone: it may contain anything
        z1[ids.index(9)] = torch.nan
        z1.requires_grad_()
        with contextlib.nullcontext() if are_read else unreadable_ids():
            loss = equivariance_loss(z1, z2, chunks=torch.tensor(ids, device=device), scale=scale)
        assert_close(loss.detach(), expected, 1e-12)
        assert torch.autograd.grad(loss, z1)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_may_have_any_integer_dtype(dtype, device):
    z1, z2 = torch.randn(2, 6, 4, device=device)
    ids = torch.tensor([0, 0, 1, 1, 2, 2], dtype=dtype, device=device)
    torch.testing.assert_close(
        equivariance_loss(z1, z2, chunks=ids), equivariance_loss(z1, z2, chunks=3)
    )


def test_ids_that_are_all_unique_are_an_error_or_give_nan(device):
    z1, z2 = torch.randn(2, 6, 4, device=device)
    with pytest.raises(ValueError, match="not the index of the sample"):
        equivariance_loss(z1, z2, chunks=torch.arange(6))
    with unreadable_ids():
        assert equivariance_loss(z1, z2, chunks=torch.arange(6, device=device)).isnan()


def test_ids_on_the_cpu_serve_embeddings_anywhere(device):
    z1, z2 = torch.randn(2, 11, 4, device=device)
    found = equivariance_loss(z1, z2, chunks=IDS)
    with unreadable_ids():
        torch.testing.assert_close(found, equivariance_loss(z1, z2, chunks=IDS.to(device)))


@pytest.mark.parametrize("shuffled", [False, True])
def test_ids_cost_the_products_within_chunks_only(shuffled):
    # 64 rows in chunks of 4 need 2 x 16 products of 4 x 4, not one of 64 x 64.
    ids = torch.arange(64) // 4
    ids = ids[torch.randperm(64)] if shuffled else ids
    sizes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "mm" in function.__name__:
                sizes.append(result.numel())
            return result

    with Products():
        equivariance_loss(*torch.randn(2, 64, 8), chunks=ids)
    assert sum(sizes) == 2 * 16 * 4 * 4


@pytest.mark.parametrize(("n", "chunks"), [(13, 8), (3, 2), (2, 100)])
def test_a_batch_too_small_for_its_chunks_gets_half_as_many_as_rows(n, chunks, device):
    z1, z2 = torch.randn(2, n, 4, device=device)
    small = equivariance_loss(z1, z2, chunks=chunks, reduction="none")
    torch.testing.assert_close(small, equivariance_loss(z1, z2, chunks=n // 2, reduction="none"))
    assert small.shape == (n // 2,)


# Uniformity and alignment


@pytest.mark.parametrize("t", [2.0, 0.5])
def test_uniformity_is_wang_and_isolas(t, device):
    for pair, _, _ in random_shapes(50):
        z, _ = tensors(pair, torch.float64, device)
        assert_close(uniformity_loss(z, t=t), reference.uniformity(z.cpu(), t), 1e-12)


def test_uniformity_takes_a_zero_row_for_the_centre(device):
    z = torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=device)
    torch.testing.assert_close(uniformity_loss(z), torch.tensor(-2.0, device=device))


@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_uniformity_keeps_its_digits_near_collapse(spread, device):
    z = 1 + spread * torch.randn(64, 16, device=device)
    result, truth = value_and_grad(uniformity_loss, z), value_and_grad(uniformity_loss, z.double())
    assert truth[0] < 0
    assert max(relative_errors(result, truth)) < 1e-6


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3])
def test_alignment_is_wang_and_isolas(alpha, device):
    for pair, _, _ in random_shapes(50):
        z1, z2 = tensors(pair, torch.float64, device)
        expected = reference.alignment(z1.cpu(), z2.cpu(), alpha)
        assert_close(alignment_loss(z1, z2, alpha=alpha), expected, 1e-12)


@contextlib.contextmanager
def unreadable_ids():
    """Ids cannot be read, as under vmap, or must not be, as on a GPU."""
    with unittest.mock.patch("care_loss._chunks.layout_of_ids", side_effect=RuntimeError):
        yield


def by_ids_unread(z1, z2):
    with unreadable_ids():
        return by_ids(z1, z2)


ALL = LOSSES | {"equivariance by ids, not read": by_ids_unread}
every_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL)


# Leading dimensions


@every_loss
def test_leading_dimensions_are_batches_of_their_own(loss, device):
    z1, z2 = torch.randn(2, 2, 3, 11, 5, dtype=torch.float64, device=device)
    each = [loss(z1[i, j], z2[i, j]) for i in range(2) for j in range(3)]
    torch.testing.assert_close(loss(z1, z2), torch.stack(each).mean())


@pytest.mark.parametrize("patches", [2, 49, 196])
def test_equivariance_of_patches_is_gram_anchoring(patches, device):
    student, teacher = torch.randn(2, 5, patches, 12, dtype=torch.float64, device=device)
    student.requires_grad_(), teacher.requires_grad_()

    def gram_anchoring(student, teacher):
        grams = [F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT for x in (student, teacher)]
        return F.mse_loss(*grams)  # over all entries, the diagonal included

    loss = equivariance_loss(student, teacher.detach()) * (patches - 1) / patches
    expected = gram_anchoring(student, teacher.detach())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    )


@pytest.mark.parametrize(("n", "d"), [(2, 3), (7, 16), (40, 5)])
def test_equivariance_of_image_and_text_is_the_in_modal_term_of_cyclip(n, d, device):
    image, text = torch.randn(2, n, d, dtype=torch.float64, device=device)
    expected = reference.in_modal_consistency(image.cpu(), text.cpu())
    assert_close((n - 1) * equivariance_loss(image, text, chunks=1), expected, 1e-12)
    assert_close(equivariance_loss(image, text, scale="authors") / 2, expected, 1e-12)


def test_the_number_of_images_does_not_change_the_number_of_operations(device, as_on_a_gpu):
    def detached(z1, z2):
        return equivariance_loss(z1, z2.detach())

    few, many = (len(operations(detached, b, 7, 4, device=device)) for b in (1, 300))
    assert few == many


def test_leading_dimensions_lead_the_values(device):
    z1, z2 = torch.randn(2, 2, 3, 11, 5, device=device)
    assert info_nce_loss(z1, z2, reduction="none").shape == (2, 3, 2, 11)
    assert info_nce_loss(z1, z2, negatives=z1[0, 0], reduction="none").shape == (2, 3, 11)
    gaps = equivariance_loss(z1, z2, chunks=4, reduction="none")
    assert gaps.shape == (2, 3, 4)
    torch.testing.assert_close(
        gaps[1, 2], equivariance_loss(z1[1, 2], z2[1, 2], chunks=4, reduction="none")
    )


# Precision


@every_loss
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(loss, half, device):
    z1, z2 = torch.randn(2, 11, 5, device=device).to(half)
    value = loss(z1, z2)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(z1.float(), z2.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@every_loss
def test_autocast_changes_nothing(loss, dtype, device):
    z1, z2 = torch.randn(2, 11, 5, device=device).to(dtype)
    with torch.autocast(device.type, torch.bfloat16):
        inside = loss(z1, z2)
    assert torch.equal(inside, loss(z1, z2))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("noise", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("queue", [False, True])
def test_info_nce_is_finite_at_low_temperatures(dtype, temperature, noise, queue, device):
    z1 = torch.randn(32, 64, device=device).to(dtype)
    z2 = z1 + noise * torch.randn_like(z1)
    if noise == 0:
        z2[:4] = z1[:4] = z1[0]  # coinciding rows too
    z1.requires_grad_(), z2.requires_grad_()
    negatives = torch.cat((z1, z2)).detach() if queue else None
    loss = info_nce_loss(z1, z2, temperature=temperature, negatives=negatives)
    loss.backward()
    for value in (loss, z1.grad, z2.grad):
        assert value.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02, 0.0125])
def test_info_nce_keeps_its_digits_where_positives_are_near(temperature, device):
    # Pairs with cosine 0.9, all else spread out: the sum is dominated by the positive.
    z1 = F.normalize(torch.randn(64, 128, dtype=torch.float64, device=device), dim=-1)
    other = F.normalize(torch.randn(64, 128, dtype=torch.float64, device=device), dim=-1)
    z2 = 0.9 * z1 + math.sqrt(1 - 0.81) * other
    assert abs(F.cosine_similarity(z1, z2).mean() - 0.9) < 0.02

    def loss(z1, z2):
        return info_nce_loss(z1, z2, temperature=temperature)

    z1, z2 = z1.float(), z2.float()
    truth = value_and_grad(loss, z1.double(), z2.double())
    assert max(relative_errors(value_and_grad(loss, z1, z2), truth)) < 1e-4

    def cross_entropy(z1, z2):
        z = F.normalize(torch.cat((z1, z2)), dim=-1)
        logits = (z @ z.mT / temperature).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(128, device=device).roll(64))

    if temperature <= 0.02:  # the test can tell: the usual form has lost everything here
        assert min(relative_errors(value_and_grad(cross_entropy, z1, z2), truth)) > 0.1


def nearly_rotated(device, n=256, d=128, noise=1e-3):
    u = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1)
    step = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1)
    return u.to(device), (u @ orthogonal(d, seed=0) + noise * step).to(device)


@pytest.mark.parametrize("autocast", ["off", "forward", "forward and backward"])
def test_equivariance_keeps_its_digits_near_its_minimum(autocast, device):
    u, v = nearly_rotated(device)

    def loss(u, v):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast == "forward"):
            return equivariance_loss(u, v, chunks=16)

    with torch.autocast(device.type, torch.bfloat16, enabled=autocast == "forward and backward"):
        result = value_and_grad(loss, u.float(), v.float())
    value, grad = relative_errors(result, value_and_grad(loss, u, v))
    assert value < 1e-3
    assert grad < 2e-3


# Rows of zeros, of extreme length, and broken ones


@every_loss
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_zero_row_gives_a_finite_loss_and_a_zero_gradient(loss, dtype, device):
    z = torch.randn(2, 11, 5, device=device).to(dtype)
    z[0, 2] = z[1, 4] = 0
    z.requires_grad_()
    value = loss(*z)
    (grad,) = torch.autograd.grad(value, z)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert not grad[0, 2].any()
    assert not grad[1, 4].any()
    assert grad[0, 3].any()


@every_loss
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_very_long_and_very_short_rows_are_handled(loss, size, device):
    z1, z2 = torch.randn(2, 11, 5, device=device)
    scaled = (z1 * size).requires_grad_()
    value = loss(scaled, z2)
    (grad,) = torch.autograd.grad(value, scaled)
    plain = z1.clone().requires_grad_()
    torch.testing.assert_close(value, loss(plain, z2), rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(loss(plain, z2), plain)
    torch.testing.assert_close(grad * size, expected, rtol=1e-4, atol=1e-6)


@every_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_give_nan(loss, bad, device):
    z1, z2 = torch.randn(2, 11, 5, device=device)
    for rows, row in ((z1, 0), (z2, 9)):
        good = rows[row, 0].clone()
        rows[row, 0] = bad
        assert loss(z1, z2).isnan()
        rows[row, 0] = good
    assert loss(z1, z2).isfinite()


# Operations


def test_a_learned_temperature_gets_its_gradient(device):
    z1, z2 = torch.randn(2, 8, 4, dtype=torch.float64, device=device)
    temperature = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: info_nce_loss(z1, z2, temperature=t), (temperature,))
    loss = info_nce_loss(z1, z2, temperature=temperature)
    torch.testing.assert_close(loss, info_nce_loss(z1, z2, temperature=0.3))


class Operations(TorchDispatchMode):
    """Record the names of the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        if func._schema.name in ("aten::index", "aten::index_put"):
            masks = [index.dtype == torch.bool for index in args[1] if index is not None]
            self.names.extend(["aten::nonzero"] * any(masks))  # which it calls out of sight
        return func(*args, **(kwargs or {}))


SYNCHRONISING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}


def operations(loss, *shape, device):
    z1, z2 = torch.randn(2, *shape, device=device, requires_grad=True).unbind()
    with Operations() as operations:
        loss(z1, z2).backward()
    return operations.names


def test_synchronising_operations_are_seen(device):
    assert SYNCHRONISING & set(operations(lambda a, b: a.sum() * b.sum().item(), 4, device=device))
    assert SYNCHRONISING & set(operations(lambda a, b: a[b > 0].sum(), 4, device=device))


@every_loss
def test_no_operation_waits_for_the_device(loss, device, as_on_a_gpu):
    names = operations(loss, 11, 5, device=device)
    assert len(names) > 10
    if loss is not by_ids:  # which are read, on the CPU
        assert not SYNCHRONISING & set(names)


def test_the_number_of_operations_is_small_and_does_not_grow_with_chunks_or_rows(device):
    def count(n, chunks):
        each = [
            len(operations(loss, n, 128, device=device))
            for loss in (info_nce_loss, partial(equivariance_loss, chunks=chunks))
        ]
        return tuple(each)

    assert count(8, 2) == count(256, 2) == count(256, 64)
    nce, equivariance = count(256, 16)
    assert nce <= 65
    assert equivariance <= 55
    nce, ragged = count(250, 64)  # chunks of two sizes
    assert (nce, ragged) == count(250, 8)
    assert ragged <= 80


# Rows that coincide, and no values at all


def test_nearly_equal_rows_have_accurate_distances_and_gradients(device):
    z1 = torch.randn(64, 128, device=device)
    z2 = z1 + 1e-7 * torch.randn_like(z1)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [z.to(dtype).requires_grad_() for z in (z1, z2)]
        value = alignment_loss(*leaves, alpha=1)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for found, expected in zip(*results, strict=True):
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 1e-6


@every_loss
def test_no_batch_at_all_has_the_mean_of_nothing(loss, device):
    z1, z2 = torch.randn(2, 0, 11, 5, device=device)
    assert loss(z1, z2).isnan()
    assert info_nce_loss(z1, z2, reduction="none").shape == (0, 2, 11)
    assert equivariance_loss(z1, z2, chunks=3, reduction="none").shape == (0, 3)


@every_loss
def test_fake_tensors_have_the_shape_of_the_loss(loss):
    with FakeTensorMode(allow_non_fake_inputs=True):  # the ids
        z1, z2 = torch.randn(2, 11, 5, requires_grad=True)
        value = loss(z1, z2)
        assert value.shape == ()
        assert torch.autograd.grad(value, z1)[0].shape == z1.shape


@every_loss
def test_meta_tensors_have_the_shape_of_the_loss(loss):
    z1, z2 = torch.randn(2, 11, 5, device="meta", requires_grad=True)
    value = loss(z1, z2)
    assert value.shape == ()
    value.backward()
