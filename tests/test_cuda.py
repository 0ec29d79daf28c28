"""Steps that a GPU can record: the same operations for any data, and graphs that replay them."""

from copy import deepcopy

import pytest
import torch
from test_functional import SYNCHRONISING, Operations
from torch import nn

from care_loss import CAREloss


def step_operations(n, chunks, seed, device):
    """The operations of a step, and the shapes and strides of what they are given."""
    views = torch.randn(4, n, 128, generator=torch.Generator().manual_seed(seed)).to(device)
    views.requires_grad_()
    with Operations() as operations:
        CAREloss(chunks=chunks)(*views).backward()
    return operations.names


@pytest.mark.parametrize(("n", "chunks"), [(256, 16), (250, 16)])
def test_a_step_dispatches_the_same_operations_whatever_the_data(n, chunks, device, as_on_a_gpu):
    first = step_operations(n, chunks, 0, device)
    assert first == step_operations(n, chunks, 1, device)
    assert not SYNCHRONISING & set(first)


def test_a_step_dispatches_the_same_operations_for_any_rows_and_equal_chunks(device):
    first = step_operations(256, 16, 0, device)
    for n, chunks in ((128, 16), (64, 2), (256, 64), (448, 7)):
        assert step_operations(n, chunks, 0, device) == first


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("graphs are of CUDA: run with --device cuda")
    return device


def training(device):
    """A small encoder, its optimizer, batches of four views, and the loss of a step."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).to(device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    batches = torch.randn(6, 4, 64, 32, device=device)
    criterion = CAREloss(chunks=8)

    def loss(views):
        return criterion(*(encoder(view) for view in views))

    return encoder, optimizer, batches, loss


def losses_of_eager_steps(device):
    _, optimizer, batches, loss = training(device)
    found = []
    for views in batches:
        optimizer.zero_grad()
        value = loss(views)
        value.backward()
        optimizer.step()
        found.append(value.detach())
    return torch.stack(found)


def test_a_captured_step_trains_as_an_eager_one(cuda):
    expected = losses_of_eager_steps(cuda)
    encoder, optimizer, batches, loss = training(cuda)
    start = deepcopy(encoder.state_dict())
    static = batches[0].clone()

    def step():
        optimizer.zero_grad(set_to_none=False)
        value = loss(static)
        value.backward()
        optimizer.step()
        return value

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()
    encoder.load_state_dict(start)
    found = []
    for views in batches:
        static.copy_(views)
        graph.replay()
        found.append(value.detach().clone())
    torch.testing.assert_close(torch.stack(found), expected)


def test_a_step_compiled_into_graphs_trains_as_an_eager_one(cuda):
    expected = losses_of_eager_steps(cuda)
    _, optimizer, batches, loss = training(cuda)
    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    found = []
    for views in batches:
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        value = compiled(views)
        value.backward()
        optimizer.step()
        found.append(value.detach().clone())
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-5)
