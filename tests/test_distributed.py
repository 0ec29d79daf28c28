"""Gathering, in real processes."""

import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from care_loss import CAREloss, InfoNCELoss
from care_loss.distributed import all_gather
from care_loss.functional import info_nce_loss

WORLD, ROWS = 3, 6


def rows():
    generator = torch.Generator().manual_seed(0)
    shape = (2, WORLD, ROWS, 5)  # view, process, row, dimension
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def process(rank, init_method):
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=WORLD)
    warnings.simplefilter("error")  # pytest's filter does not reach this process
    try:
        z = rows()
        x = z[0]
        gathered = all_gather(x[rank])
        assert torch.equal(gathered, x.flatten(0, 1))
        same = all_gather(x[rank], process_group=dist.group.WORLD)
        assert torch.equal(same, gathered)

        members = [1, 2]  # a group in which ranks are other than in the world
        group = dist.new_group(members)
        if rank in members:
            part = x[rank].clone().requires_grad_()
            of_group = all_gather(part, process_group=group)
            assert torch.equal(of_group, x[members].flatten(0, 1))
            weights = torch.arange(2.0 * ROWS, dtype=x.dtype)[:, None]
            (weights * of_group).sum().backward()
            own = weights.unflatten(0, (2, ROWS))[members.index(rank)]
            torch.testing.assert_close(part.grad, 2 * own.expand_as(part))  # from both members

        everything = z.flatten(1, 2).requires_grad_()
        expected_loss = info_nce_loss(*everything)
        expected_loss.backward()
        expected_grad = everything.grad.unflatten(1, (WORLD, ROWS))[:, rank]

        mine = z[:, rank].clone().requires_grad_()
        loss = InfoNCELoss(gather_distributed=True)(*mine)
        loss.backward()
        torch.testing.assert_close(loss, expected_loss)
        # DDP divides what the processes computed by their number.
        torch.testing.assert_close(mine.grad / WORLD, expected_grad, rtol=1e-12, atol=1e-15)

        # So it is with second derivatives, here a product of the Hessian with a vector.
        v = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).reshape_as(z)
        everything = z.flatten(1, 2).requires_grad_()
        (grad,) = torch.autograd.grad(info_nce_loss(*everything), everything, create_graph=True)
        (expected,) = torch.autograd.grad((grad * v.flatten(1, 2)).sum(), everything)
        mine = z[:, rank].clone().requires_grad_()
        second = InfoNCELoss(gather_distributed=True)(*mine)
        (grad,) = torch.autograd.grad(second, mine, create_graph=True)
        (product,) = torch.autograd.grad((grad / WORLD * v[:, rank]).sum(), mine)
        expected = expected.unflatten(1, (WORLD, ROWS))[:, rank]
        torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-13)

        # One row per process is enough where others have more.
        one = z[:, rank, :1].clone().requires_grad_()
        expected = info_nce_loss(*z[:, :, 0])
        torch.testing.assert_close(InfoNCELoss(gather_distributed=True)(*one), expected)

        # Without gathering each process contrasts its own rows, initialised or not.
        alone = InfoNCELoss()(*z[:, rank])
        torch.testing.assert_close(alone, info_nce_loss(*z[:, rank]))
        assert not torch.isclose(alone, loss)

        # The equivariance loss is the same with and without.
        care = [CAREloss(chunks=2, shared_views=True, gather_distributed=g) for g in (True, False)]
        parts = [module.forward_components(*z[:, rank]) for module in care]
        torch.testing.assert_close(parts[0].equivariance, parts[1].equivariance)
        torch.testing.assert_close(parts[0].base, expected_loss)
    finally:
        dist.destroy_process_group()


def test_processes_have_the_loss_and_the_gradient_of_one(tmp_path):
    mp.spawn(process, args=(f"file://{tmp_path}/rendezvous",), nprocs=WORLD)


def test_without_a_process_group_gathering_is_the_identity():
    x = torch.randn(3, 4)
    assert all_gather(x) is x
