"""The losses under torch.compile, vmap and the Jacobians of torch.func."""

import shutil
from functools import partial
from unittest.mock import patch

import pytest
import torch
from losses import IDS, LOSSES
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from care_loss import CAREloss, EquivarianceLoss, InfoNCELoss
from care_loss._chunks import TRACERS_KNOW
from care_loss.functional import equivariance_loss, info_nce_loss, uniformity_loss
from care_loss.rotation import fit_rotation, fit_similarity, nearest_orthogonal

deep = pytest.mark.deep
needs_a_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler"
)
ALL = LOSSES | {"CAREloss": CAREloss(chunks=4, shared_views=True).forward}
every_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL)


def on_both_backends(cases, *, inductor, aot_eager=None):
    """Named cases on both backends; on each, those that are not in its sample are deep."""
    samples = {"aot_eager": cases if aot_eager is None else aot_eager, "inductor": inductor}
    found = []
    for backend, sample in samples.items():
        for name, case in cases.items():
            marks = [needs_a_compiler] * (backend == "inductor") + [deep] * (name not in sample)
            found.append(pytest.param(case, backend, id=f"{name}-{backend}", marks=marks))
    return found


@pytest.fixture(autouse=True)
def _no_compiled_code_left():
    torch.compiler.reset()


def value_and_grad(loss, z1, z2):
    z1, z2 = z1.detach().requires_grad_(), z2.detach().requires_grad_()
    value = loss(z1, z2)
    return value.detach(), *torch.autograd.grad(value, (z1, z2), materialize_grads=True)


@pytest.mark.parametrize(
    ("loss", "backend"), on_both_backends(ALL, inductor={"CAREloss", "uniformity", "alignment"})
)
def test_compiles_as_one_graph_forward_and_backward(loss, backend, device, dtype):
    z1, z2 = torch.randn(2, 11, 5, device=device).to(dtype)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    torch.testing.assert_close(value_and_grad(compiled, z1, z2), value_and_grad(loss, z1, z2))


@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.Tensor.requires_grad_])
def test_a_learned_temperature_compiles_as_one_graph(kind, device, dtype):
    z1, z2 = torch.randn(2, 11, 5, device=device).to(dtype)
    loss = CAREloss(temperature=kind(torch.tensor(0.2, device=device)), chunks=4, shared_views=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for number in (0.2, 0.3):
        with torch.no_grad():
            loss.temperature.fill_(number)
        values = [f(z1, z2) for f in (compiled, loss)]
        found, expected = (torch.autograd.grad(value, loss.temperature) for value in values)
        torch.testing.assert_close(values[0], values[1])
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1  # a step of the optimizer compiles nothing again


free_sizes = pytest.mark.skipif(not TRACERS_KNOW, reason="torch records for some sizes only")
exported = pytest.mark.skipif(
    torch.__version__ < (2, 9), reason="older tracers add guards on sizes"
)


@free_sizes
@pytest.mark.parametrize(
    ("loss", "sizes"),
    [
        (CAREloss(chunks=3, shared_views=True), (16, 16, 14, 15, 13, 16)),
        (EquivarianceLoss(chunks=8), (16, 16, 14, 15, 13, 16, 2, 3)),
        pytest.param(CAREloss(chunks=8, shared_views=True), (16, 14, 13, 2, 3), marks=deep),
    ],
    ids=["CAREloss-3", "EquivarianceLoss-8", "CAREloss-8"],
)
def test_an_int_compiles_into_few_graphs_for_all_sizes(loss, sizes, device):
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for n in sizes:
        z1, z2 = torch.randn(2, n, 5, device=device)
        torch.testing.assert_close(value_and_grad(compiled, z1, z2), value_and_grad(loss, z1, z2))
    assert backend.frame_count <= 3


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunks", [1, 3, 4])
def test_chunks_of_any_number_of_rows_are_those_of_eager_mode(chunks, reduction):
    for n in range(2, 14):
        z1, z2 = torch.randn(2, 2, n, 5, dtype=torch.float64)
        loss = partial(equivariance_loss, chunks=chunks, reduction=reduction, scale="authors")
        expected = value_and_grad(lambda *z, f=loss: f(*z).sin().sum(), z1, z2)
        with patch("care_loss._chunks.has_free_size", return_value=True):
            found = value_and_grad(lambda *z, f=loss: f(*z).sin().sum(), z1, z2)
        torch.testing.assert_close(found, expected)


TRACED = {
    "equivariance": lambda x, y: equivariance_loss(x, y, chunks=3),
    "info_nce": lambda x, y: info_nce_loss(x, y),
    "uniformity": lambda x, y: uniformity_loss(x),
    "fit_rotation": lambda x, y: fit_rotation(x, y, special=True).rotation,
    "fit_similarity": lambda x, y: fit_similarity(x, y, special=True).translation,
    "nearest_orthogonal": lambda x, y: nearest_orthogonal(x.mT @ y),
}
STRICT = ("equivariance", "fit_rotation")  # the sample that dynamo traces


class Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


@exported
@pytest.mark.parametrize(
    ("name", "strict"),
    [
        *((name, False) for name in TRACED),
        *((name, True) for name in STRICT),
        *(pytest.param(name, True, marks=deep) for name in TRACED if name not in STRICT),
    ],
)
def test_export_follows_the_number_of_rows(name, strict):
    x, y = torch.randn(2, 8, 5)
    n = torch.export.Dim("n", min=6, max=4096)  # two rows for each chunk, and no few rows to fit
    sizes = {"x": {0: n}, "y": {0: n}}
    module = Called(TRACED[name])
    program = torch.export.export(module, (x, y), dynamic_shapes=sizes, strict=strict).module()
    for n in (6, 7, 12, 40):
        x, y = torch.randn(2, n, 5)
        torch.testing.assert_close(program(x, y), module(x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("name", TRACED)
def test_make_fx_records_what_has_derivatives(name, mode):
    def gradient(x, y):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(TRACED[name](x, y).square().sum(), x)[0]

    x, y = torch.randn(2, 8, 5)
    recorded = make_fx(gradient, tracing_mode=mode)(x, y)
    assert not [node for node in recorded.graph.nodes if "out" in node.kwargs]
    x, y = torch.randn(2, 8, 5)
    torch.testing.assert_close(recorded(x, y), gradient(x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [InfoNCELoss(0.2), EquivarianceLoss(3, reduction="none")],  # CAREloss is compiled above
    ids=lambda module: type(module).__name__,
)
def test_modules_compile_and_follow_the_size_of_the_batch(module, device):
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (12, 12, 7, 30):
        z1, z2 = torch.randn(2, n, 4, device=device)
        torch.testing.assert_close(compiled(z1, z2), module(z1, z2))


@pytest.mark.parametrize(
    "loss", [EquivarianceLoss(3), InfoNCELoss()], ids=lambda loss: type(loss).__name__
)
def test_compiles_under_autocast(loss, device):
    z1, z2 = torch.randn(2, 11, 5, device=device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")

    def under_autocast(z1, z2):
        with torch.autocast(device.type, torch.bfloat16):
            return compiled(z1, z2)

    value, *grads = value_and_grad(under_autocast, z1, z2)
    expected, *expected_grads = value_and_grad(loss, z1, z2)
    torch.testing.assert_close(value, expected)
    for grad_, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad_ - expected_grad).norm() <= 1e-6 * expected_grad.norm()


def test_compiles_with_ids_and_four_tensors(device):
    loss = CAREloss(chunks=3)
    compiled = torch.compile(loss.forward_components, fullgraph=True, backend="aot_eager")
    tensors = torch.randn(4, 11, 5, device=device)
    ids = IDS.to(device)
    expected = loss.forward_components(*tensors, chunks=ids)
    torch.testing.assert_close(tuple(compiled(*tensors, chunks=ids)), tuple(expected))


@every_loss
def test_vmap_is_a_loop(loss, device):
    z1, z2 = torch.randn(2, 4, 11, 5, dtype=torch.float64, device=device)
    each = torch.stack([loss(a, b) for a, b in zip(z1, z2, strict=True)])
    torch.testing.assert_close(vmap(loss)(z1, z2), each)


def test_vmap_over_temperatures(device):
    z1, z2 = torch.randn(2, 11, 5, dtype=torch.float64, device=device)
    temperatures = torch.tensor([0.05, 0.5, 1.0], dtype=torch.float64, device=device)
    losses = vmap(lambda t: info_nce_loss(z1, z2, temperature=t))(temperatures)
    each = [info_nce_loss(z1, z2, temperature=t.item()) for t in temperatures]
    torch.testing.assert_close(losses, torch.stack(each))


@every_loss
def test_gradients_of_torch_func_are_those_of_autograd(loss, device):
    z1, z2 = torch.randn(2, 11, 5, dtype=torch.float64, device=device)
    _, expected, _ = value_and_grad(loss, z1, z2)
    torch.testing.assert_close(grad(loss)(z1, z2), expected)
    torch.testing.assert_close(jacrev(loss)(z1, z2), expected)
    batch = z1.expand(3, -1, -1), z2.expand(3, -1, -1)
    torch.testing.assert_close(vmap(grad(loss))(*batch), expected.expand(3, -1, -1))


def test_modules_have_no_state_for_functional_call(device):
    z1, z2 = torch.randn(2, 11, 5, device=device)
    module = CAREloss(chunks=3, shared_views=True)
    torch.testing.assert_close(functional_call(module, {}, (z1, z2)), module(z1, z2))
