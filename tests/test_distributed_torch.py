"""Several processes: compilation, DistributedDataParallel, FSDP and batch normalisation."""

import pytest
import torch
import torch.distributed as dist
from processes import CHUNKS, DIM, LOSSES, ROWS, gradient_of, images, network
from torch.nn.parallel import DistributedDataParallel

from care_loss import CAREloss, InfoNCELoss
from care_loss.distributed import all_gather
from care_loss.functional import info_nce_loss

pytestmark = pytest.mark.xdist_group("processes")  # which start once


def without_gathering(rank, world):
    z1, z2 = torch.randn(2, ROWS, DIM)
    torch.testing.assert_close(InfoNCELoss()(z1, z2), info_nce_loss(z1, z2))
    parts = [
        CAREloss(chunks=2, shared_views=True, gather_distributed=g).forward_components(z1, z2)
        for g in (True, False)
    ]
    assert torch.equal(parts[0].equivariance, parts[1].equivariance)


def test_without_gathering_a_process_contrasts_its_own_rows(two):
    two.run(without_gathering)


def compiled(rank, world):
    z = torch.randn(2, ROWS, DIM).requires_grad_()
    criterion = CAREloss(chunks=2, shared_views=True, gather_distributed=True)
    expected = criterion(*z)
    (expected_grad,) = torch.autograd.grad(expected, z)
    step = torch.compile(lambda z: criterion(*(2 * z)), backend="aot_eager")
    loss = step(z)
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    rows = torch.compile(lambda x: all_gather(2 * x).sum(0), backend="aot_eager")
    assert torch.equal(rows(torch.ones(2, 3)), torch.full((3,), 4.0 * world))


def test_compiled_steps(two):
    two.run(compiled)


def accumulated(rank, world, name):
    """Two steps whose gradients are added, the first of them without a reduction."""
    parts = images(2, [2 * ROWS] * world, torch.float64)
    model = DistributedDataParallel(network(torch.float64))
    first, second = parts[rank].split(ROWS, 1)
    loss_function = LOSSES[name](world)
    with model.no_sync():
        loss_function(*model(first.flatten(0, 1)).unflatten(0, (2, -1))).backward()
    loss_function(*model(second.flatten(0, 1)).unflatten(0, (2, -1))).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    single = network(torch.float64)
    for half in (0, 1):
        views = torch.cat([part.split(ROWS, 1)[half] for part in parts], 1)
        outputs = single(views.flatten(0, 1)).unflatten(0, (2, -1))
        options = {"chunks": world * CHUNKS} if name == "two tensors" else {}
        LOSSES[name](0)(*outputs, **options).backward()
    expected = torch.cat([p.grad.flatten() for p in single.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["InfoNCE", "two tensors"])
def test_accumulated_gradients_are_those_of_the_sum_of_both_losses(name, two):
    two.run(accumulated, name)


def static_graph(rank, world):
    parts = images(2, [ROWS] * world, torch.float64)
    expected, _ = gradient_of(network(torch.float64), "InfoNCE", torch.cat(parts, 1), 0)
    model = DistributedDataParallel(network(torch.float64), static_graph=True)
    for _ in range(3):
        model.zero_grad()
        found, _ = gradient_of(model, "InfoNCE", parts[rank], world)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_a_static_graph(two):
    two.run(static_graph)


def fully_sharded(rank, world):
    from torch.distributed.fsdp import fully_shard

    parts = images(2, [ROWS] * world, torch.float32)
    expected, _ = gradient_of(network(torch.float32), "InfoNCE", torch.cat(parts, 1), 0)
    model = fully_shard(network(torch.float32), mesh=dist.init_device_mesh("cpu", (world,)))
    outputs = model(parts[rank].flatten(0, 1)).unflatten(0, (2, -1))
    InfoNCELoss(gather_distributed=True)(*outputs).backward()
    found = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_fully_sharded_parameters(two):
    two.run(fully_sharded)


def batch_norm(rank, world):
    """Several forwards through one module with batch norm, before one backward."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(5, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, DIM)
    model = DistributedDataParallel(torch.nn.Sequential(*layers))
    criterion = CAREloss(chunks=2, gather_distributed=True)
    for _ in range(3):
        views = torch.randn(4, ROWS, 5) + rank
        criterion(*(model(view) for view in views)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.equal(all_gather(gradient[None]), gradient.expand(world, -1))


def test_several_forwards_with_batch_norm(two):
    two.run(batch_norm)
