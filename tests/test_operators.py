"""The losses as operators: what torch.library asks of them, and what a compiler makes of them."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import care_loss
from care_loss import RotationContrastLoss
from care_loss._autograd import operators
from care_loss._polar import _operator as polar
from care_loss.functional import equivariance_loss, info_nce_loss

CHECKS = "test_schema", "test_autograd_registration", "test_faketensor"
T, QUEUE = torch.tensor(0.3), torch.randn(9, 4)
IDS = torch.tensor([0, 1, 0, 2, 1, 1])
CALLS = {
    "dense": (operators._dense, (None, 0.5, True)),
    "dense, low temperature": (operators._dense, (None, 0.01, True)),
    "dense, learned temperature": (operators._dense, (T, 0.0, True)),
    "dense, no gradient": (operators._dense, (None, 0.5, False)),
    "tiled": (operators._tiled, (None, 0.5)),
    "tiled, learned temperature": (operators._tiled, (T, 0.0)),
    "queue": (operators._of_queue, (None, 0.5, QUEUE, True)),
    "queue, learned temperature": (operators._of_queue, (T, 0.0, QUEUE, True)),
    "chunks": (operators._gram_gap, (None, 2, "mean", True, True)),
    "each chunk": (operators._gram_gap, (None, 2, "authors", False, True)),
    "more chunks than pairs": (operators._gram_gap, (None, 8, "mean", False, True)),
    "ids": (operators._gram_gap, (IDS, 0, "mean", True, True)),
}


@pytest.fixture(autouse=True)
def _no_compiled_code_left():
    torch.compiler.reset()


def values_and_gradients(loss, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    weights = torch.linspace(1, 2, value.numel(), device=value.device).view_as(value)
    return value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 6, 4)])
def test_keeps_what_it_promises_to_compilers(name, shape):
    operator, settings = CALLS[name]
    z1, z2 = (torch.randn(shape).requires_grad_() for _ in range(2))
    derives = "no gradient" not in name
    # Outputs that are parts of the gradient are not differentiated themselves.
    checks = [check for check in CHECKS if derives or check != "test_autograd_registration"]
    opcheck(operator, (z1, z2, *settings), test_utils=checks)


def test_the_backward_of_tiles_keeps_what_it_promises():
    results = operators._tiled(*torch.randn(2, 6, 4), None, 0.5)[1:]
    arguments = *results, None, 0.5, torch.randn(2, 6)
    opcheck(operators._gradient_of_tiled, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3)])
def test_the_polar_factor_keeps_what_it_promises(full, shape):
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    opcheck(polar, (x, full, full, 0.0, 0.0, 0.0, 0), test_utils=("test_schema", "test_faketensor"))


LOSSES = {
    "InfoNCE": info_nce_loss,
    "InfoNCE, each": partial(info_nce_loss, reduction="none", temperature=0.01),
    "queue": partial(info_nce_loss, negatives=torch.randn(20, 5)),
    "queue, each": partial(info_nce_loss, negatives=torch.randn(20, 5), reduction="none"),
    "equivariance": partial(equivariance_loss, chunks=3),
    "equivariance, each": partial(equivariance_loss, chunks=3, reduction="none"),
    "rotation contrast": RotationContrastLoss(chunks=2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_is_eager_at_all_sizes(name):
    loss, backend = LOSSES[name], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    # Halves of the rotation contrast have even lengths or not, and a graph takes long.
    for n in (20, 28, 40) if "contrast" in name else (17, 33, 40):
        z1, z2 = torch.randn(2, n, 5)
        found, expected = (values_and_gradients(f, z1, z2) for f in (compiled, loss))
        torch.testing.assert_close(found, expected)
    assert backend.frame_count <= 2


def test_the_form_follows_the_size():
    compiled = torch.compile(info_nce_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 600):
        z1, z2 = torch.randn(2, n, 5)
        found, expected = (values_and_gradients(f, z1, z2) for f in (compiled, info_nce_loss))
        torch.testing.assert_close(found, expected)


def test_ids_are_read_on_a_cpu():
    loss = partial(equivariance_loss, chunks=torch.arange(12) % 3)
    z1, z2 = torch.randn(2, 12, 4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with patch("care_loss._autograd.gram_gap.compare_by_id", side_effect=AssertionError):
        found = values_and_gradients(compiled, z1, z2)
    torch.testing.assert_close(found, values_and_gradients(loss, z1, z2), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["InfoNCE", "queue", "equivariance"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_second_derivatives_are_refused(name, backend):
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=backend)
    views = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5, requires_grad=True)

    def twice():
        gradients = torch.autograd.grad(compiled(*views), views, create_graph=True)
        torch.autograd.grad(gradients[0].sum(), views)

    with pytest.raises(RuntimeError, match=r"second derivatives|double backward"):
        twice()


def test_a_queue_with_a_gradient_gets_one():
    inputs = torch.randn(6, 4), torch.randn(6, 4), torch.randn(9, 4)
    loss = lambda z1, z2, queue: info_nce_loss(z1, z2, negatives=queue)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (values_and_gradients(f, *inputs) for f in (compiled, loss))
    torch.testing.assert_close(found, expected)
    assert found[-1].abs().max() > 0


def test_exported_programs_load_without_the_package():
    class Loss(torch.nn.Module):
        def forward(self, z1, z2):
            return info_nce_loss(z1, z2) + equivariance_loss(z1, z2, chunks=2)

    program = torch.export.export(Loss(), tuple(torch.randn(2, 8, 4)))
    assert care_loss.__name__ not in program.graph_module.code


def test_transforms_within_compiled_code_are_those_of_eager_mode():
    z1, z2 = torch.randn(2, 8, 4, dtype=torch.float64)
    for loss in (info_nce_loss, equivariance_loss):
        gradient = torch.func.grad(loss)
        compiled = torch.compile(gradient, backend="aot_eager")
        torch.testing.assert_close(compiled(z1, z2), gradient(z1, z2))
