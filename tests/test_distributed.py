"""Several processes: their gradient is that of one."""

import pytest
import torch
import torch.distributed as dist
from processes import CHUNKS, DIM, LOSSES, ROWS, WRONG, gradient_of, images, network
from torch.nn.parallel import DistributedDataParallel

from care_loss import CAREloss, InfoNCELoss, RotationContrastLoss, distributed
from care_loss.distributed import all_gather, assert_seeds_differ
from care_loss.functional import info_nce_loss

pytestmark = pytest.mark.xdist_group("processes")  # which start once


# The gradient


def compare(rank, world, name, dtype):
    """Return how far gradient and loss of the processes are from those of one."""
    count = 4 if name == "four tensors" else 2
    parts = images(count, [ROWS] * world, dtype)
    expected, expected_loss = gradient_of(network(dtype), name, torch.cat(parts, 1), 0)
    found, loss = gradient_of(DistributedDataParallel(network(dtype)), name, parts[rank], world)
    if isinstance(LOSSES.get(name, lambda _: None)(world), CAREloss):
        dist.all_reduce(loss)  # the equivariance losses differ between processes
        loss /= world
    error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    return error.item(), ((loss - expected_loss) / expected_loss).abs().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_one_process(name, dtype, processes):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for error, error_of_loss in processes.run(compare, name, dtype):
        assert error < tolerance
        assert error_of_loss < tolerance


@pytest.mark.parametrize("name", WRONG)
def test_other_ways_to_gather_fail_this_test(name, two):
    for error, error_of_loss in two.run(compare, name, torch.float64):
        assert error > 0.1
        assert (error_of_loss > 1e-3) == (name != "own rows put back")  # a right loss tells nothing


# Every kind of call


def of_all(views, loss_function):
    """The loss of one process with all rows, and the gradients of the rows of each process."""
    everything = torch.cat(views, 1).requires_grad_()
    loss = loss_function(*everything)
    loss.sum().backward()
    return loss.detach(), everything.grad.split([part.shape[1] for part in views], 1)


def assert_loss_and_gradient(rank, world, sizes, dtype=torch.float64, rtol=1e-12, **settings):
    views = [part.clone() for part in images(2, sizes, dtype)]
    expected, gradients = of_all(views, lambda z1, z2: info_nce_loss(z1, z2, **settings))
    mine = views[rank].clone().requires_grad_()
    loss = distributed.info_nce_loss(*mine, **settings)
    loss.sum().backward()
    assert loss.dtype == expected.dtype
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-15)
    scale = gradients[rank].abs().max().item()
    torch.testing.assert_close(mine.grad / world, gradients[rank], rtol=rtol, atol=rtol * scale)


def calls(rank, world):
    uneven = [3 + 2 * k for k in range(world)]
    for sizes in ([ROWS] * world, [1] * world, uneven, uneven[::-1]):
        if sum(sizes) < 2:
            continue
        for settings in (
            {},
            {"reduction": "none"},
            {"temperature": 0.05},
            {"temperature": 0.01},  # exponentials of scores would overflow
            {"temperature": torch.tensor(0.2, dtype=torch.float64)},
        ):
            assert_loss_and_gradient(rank, world, sizes, **settings)
    # Longer than one tile of the kernel, in rows and in columns.
    assert_loss_and_gradient(rank, world, [300, 700, 129, 1][:world], rtol=1e-11)
    assert_loss_and_gradient(rank, world, [ROWS] * world, torch.float32, rtol=2e-6)


def test_every_kind_of_call_equals_that_of_one_process(processes):
    processes.run(calls)


def half_precision(rank, world, dtype):
    views = images(2, [ROWS] * world, dtype)
    expected = info_nce_loss(*torch.cat(views, 1).float())
    mine = views[rank].clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distributed.info_nce_loss(*mine)
    loss.backward()
    assert loss.dtype == torch.float32
    assert mine.grad.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_sent_as_it_is_and_computed_in_float32(dtype, two):
    two.run(half_precision, dtype)


def learned_temperature(rank, world):
    views = images(2, [ROWS] * world, torch.float64)
    whole = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    info_nce_loss(*torch.cat(views, 1), temperature=whole).backward()
    own = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    distributed.info_nce_loss(*views[rank], temperature=own).backward()
    dist.all_reduce(own.grad)
    torch.testing.assert_close(own.grad / world, whole.grad, rtol=1e-12, atol=0)


def test_the_gradient_of_a_learned_temperature(processes):
    processes.run(learned_temperature)


class WithItsLoss(torch.nn.Module):
    """An encoder and a loss with a temperature that is learned, for DDP to wrap."""

    def __init__(self, gather):
        super().__init__()
        self.encoder = network(torch.float64)
        learned = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        self.loss = CAREloss(temperature=learned, shared_views=True, gather_distributed=gather)

    def forward(self, x1, x2, chunks):
        z1, z2 = self.encoder(torch.cat((x1, x2))).chunk(2)
        return self.loss(z1, z2, chunks=chunks)


def training_with_a_learned_temperature(rank, world):
    parts = images(2, [ROWS] * world, torch.float64)
    one, several = WithItsLoss(False), DistributedDataParallel(WithItsLoss(True))
    for _ in range(3):
        for model, x, chunks in (
            (one, torch.cat(parts, 1), world * CHUNKS),
            (several, parts[rank], CHUNKS),
        ):
            model.zero_grad()
            model(*x, chunks).backward()
            torch.optim.SGD(model.parameters(), lr=0.01).step()
    for p, q in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-13)
    assert abs(one.loss.temperature - 0.2) > 1e-3


def test_a_module_with_a_learned_temperature_is_trained_as_in_one_process(two):
    two.run(training_with_a_learned_temperature)


def contrast_of_rotations(rank, world):
    """The gradient of a model, and the loss, in several processes and in one with all chunks."""
    parts = images(2, [3 * ROWS] * world, torch.float64)
    one, several = network(torch.float64), DistributedDataParallel(network(torch.float64))
    found = []
    for model, x, chunks, gather in (
        (one, torch.cat(parts, 1), world * CHUNKS, False),
        (several, parts[rank], CHUNKS, True),
    ):
        z, turned = model(x.flatten(0, 1)).chunk(2)
        loss = RotationContrastLoss(chunks=chunks, gather_distributed=gather)(z, turned)
        loss.backward()
        found.append((loss.detach(), *(p.grad for p in model.parameters())))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)


def test_the_contrast_of_rotations_is_that_of_one_process(two):
    two.run(contrast_of_rotations)


def weighted(rank, world):
    """One weight for each anchor, the same on all processes."""
    views = images(2, [ROWS] * world, torch.float64)
    weights = torch.linspace(0, 1, 2 * ROWS * world, dtype=torch.float64).view(2, -1)

    def loss_function(z1, z2):
        return (weights * info_nce_loss(z1, z2, reduction="none")).sum()

    _, gradients = of_all(views, loss_function)
    mine = views[rank].clone().requires_grad_()
    (weights * distributed.info_nce_loss(*mine, reduction="none")).sum().backward()
    torch.testing.assert_close(mine.grad / world, gradients[rank], rtol=1e-12, atol=1e-14)


def test_weights_of_anchors(processes):
    processes.run(weighted)


def second_derivatives(rank, world, sizes):
    views = images(2, sizes, torch.float64)
    v = [torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view_as(part) for part in views]
    everything = torch.cat(views, 1).requires_grad_()
    (grad,) = torch.autograd.grad(info_nce_loss(*everything), everything, create_graph=True)
    (expected,) = torch.autograd.grad((grad * torch.cat(v, 1)).sum(), everything)
    mine = views[rank].clone().requires_grad_()
    loss = distributed.info_nce_loss(*mine)
    (grad,) = torch.autograd.grad(loss, mine, create_graph=True)
    (product,) = torch.autograd.grad((grad / world * v[rank]).sum(), mine)
    expected = expected.split(sizes, 1)[rank]
    torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("more", [0, 3])
def test_second_derivatives_are_those_of_one_process(more, two):
    two.run(second_derivatives, [ROWS, ROWS + more])


def forward_mode(rank, world):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        z = forward_ad.make_dual(torch.randn(4, 3), torch.randn(4, 3))
        with pytest.raises(RuntimeError, match="forward"):
            distributed.info_nce_loss(z, z)


def test_forward_mode_is_refused(two):
    two.run(forward_mode)


# Gathering


def gathering(rank, world):
    x = torch.arange(world * 6, dtype=torch.float64).view(world, 2, 3)
    assert torch.equal(all_gather(x[rank]), x.flatten(0, 1))
    assert torch.equal(all_gather(x[rank], process_group=dist.group.WORLD), x.flatten(0, 1))
    for dtype in (torch.bool, torch.int32, torch.bfloat16, torch.complex64):
        assert torch.equal(all_gather(x[rank].to(dtype)), x.flatten(0, 1).to(dtype))
    rows = [torch.full((k, 2), float(k)) for k in range(world)]  # one of them has none
    assert torch.equal(all_gather(rows[rank]), torch.cat(rows))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(all_gather(rows[rank].half()), torch.cat(rows).half())
    assert torch.equal(all_gather(x[rank].mT), x.mT.flatten(0, 1))  # not contiguous
    # The backward sums over processes, here with another weight on each.
    for part in (x[rank], rows[rank].double()):
        part = part.clone().requires_grad_()
        gathered = all_gather(part)
        ((rank + 1) * gathered).sum().backward()
        torch.testing.assert_close(part.grad, torch.full_like(part, world * (world + 1) / 2))
    if world == 1:
        assert all_gather(x) is x


def test_rows_are_gathered_in_the_order_of_ranks(processes):
    processes.run(gathering)


def groups(rank, world):
    members = [1, 2]  # a group in which ranks are other than in the world
    group = dist.new_group(members)
    views = images(2, [3, 4, 5, 6], torch.float64)
    if rank in members:
        some = [views[k] for k in members]
        expected, gradients = of_all(some, info_nce_loss)
        mine = views[rank].clone().requires_grad_()
        loss = distributed.info_nce_loss(*mine, process_group=group)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(mine.grad / 2, gradients[members.index(rank)])
        assert_seeds_differ_is_an_error(group)
    else:
        for call in (
            lambda: all_gather(views[rank], process_group=group),
            lambda: distributed.info_nce_loss(*views[rank], process_group=group),
            lambda: assert_seeds_differ(process_group=group),
        ):
            with pytest.raises(ValueError, match="`process_group` must contain this process, got"):
                call()


def assert_seeds_differ_is_an_error(group=None):
    with pytest.raises(ValueError, match=r"must draw different random numbers, got the same state"):
        assert_seeds_differ(process_group=group)


def test_groups_of_processes(group_of):
    group_of(4).run(groups)


def seeds(rank, world):
    assert_seeds_differ_is_an_error()  # all have the seed 0
    torch.manual_seed(rank)
    assert_seeds_differ()


def test_processes_with_one_seed_are_found(two):
    two.run(seeds)


# What is sent


class Counted:
    """Count the bytes that a process receives from others in collectives, and the collectives."""

    def __init__(self, monkeypatch, world):
        self.bytes, self.calls = 0, 0
        for name in ("all_gather_single", "all_gather_into_tensor"):
            if hasattr(dist, name):
                monkeypatch.setattr(dist, name, self.counted(getattr(dist, name), world))

    def counted(self, function, world):
        def call(output, source, **options):
            self.calls += 1
            self.bytes += output.nbytes * (world - 1) // world
            return function(output, source, **options)

        return call


def communication(rank, world, dtype):
    z = torch.randn(2, ROWS, DIM).to(dtype).requires_grad_()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("all_reduce", "all_gather", "reduce_scatter_tensor", "broadcast"):
            monkeypatch.delattr(dist, name)  # nothing else is used
        sent = Counted(monkeypatch, world)
        loss = distributed.info_nce_loss(*z)
        forward = sent.calls
        loss.backward()
    assert sent.calls == forward == 3
    # Of each of the others: its sizes, both views in their dtype, and two numbers per row.
    per_process = 4 * 8 + 2 * ROWS * DIM * z.element_size() + 2 * ROWS * 2 * 8
    assert sent.bytes == (world - 1) * per_process


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_step(dtype, two):
    two.run(communication, dtype)


def one_value(rank, world):
    z1, z2 = torch.randn(2, ROWS, DIM) + rank
    return InfoNCELoss(gather_distributed=True)(z1, z2).item()


def test_all_processes_have_exactly_the_same_loss(processes):
    assert len(set(processes.run(one_value))) == 1


def test_without_a_process_group_gathering_is_the_identity():
    x = torch.randn(3, 4)
    assert all_gather(x) is x
    assert_seeds_differ()
    z1, z2 = torch.randn(2, 4, 3)
    assert torch.equal(distributed.info_nce_loss(z1, z2), info_nce_loss(z1, z2))
    with pytest.raises(ValueError, match="N >= 2"):
        distributed.info_nce_loss(z1[:1], z2[:1])
