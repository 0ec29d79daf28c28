"""Several processes: their gradient is that of one, and their mistakes are errors on all."""

import datetime
import os
import time
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from care_loss import CAREloss, InfoNCELoss, distributed
from care_loss.distributed import all_gather, assert_seeds_differ
from care_loss.functional import info_nce_loss

DIM, ROWS, CHUNKS = 6, 8, 2
CONTEXT = mp.get_context("spawn")
pytestmark = pytest.mark.xdist_group("processes")  # which start once


# Processes that wait for functions to run


def serve(rank, world, rendezvous, tasks, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    warnings.simplefilter("error")  # pytest's filters do not reach this process
    warnings.filterwarnings("ignore", message="`torch.jit.script")
    warnings.filterwarnings("ignore", message="`torch._prims_common.check` is deprecated")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message="<class 'torch.autograd.function.Function'> should")
    while True:
        function, arguments = tasks.get()
        try:
            torch.manual_seed(0)
            results.put((rank, function(rank, world, *arguments), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))


class Processes:
    """A group of processes, each of which runs what it is given."""

    def __init__(self, world, folder):
        self.tasks = [CONTEXT.Queue() for _ in range(world)]
        self.results = CONTEXT.Queue()
        self.processes = [
            CONTEXT.Process(target=serve, args=(rank, world, folder / "group", *queues))
            for rank, queues in enumerate((tasks, self.results) for tasks in self.tasks)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *arguments):
        """Run function(rank, world, *arguments) in all processes; return the results by rank."""
        for tasks in self.tasks:
            tasks.put((function, arguments))
        found = sorted(self.results.get(timeout=200) for _ in self.tasks)
        for rank, _, error in found:
            assert error is None, f"on process {rank}:\n{error}"
        return [result for _, result, _ in found]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def group_of(tmp_path_factory):
    """A function that returns the group of so many processes, started once."""
    groups = {}

    def get(world):
        if world not in groups:
            groups[world] = Processes(world, tmp_path_factory.mktemp("group"))
        return groups[world]

    yield get
    for group in groups.values():
        group.close()


@pytest.fixture(params=[1, 2, 4], ids=lambda world: f"{world}processes")
def processes(request, group_of):
    return group_of(request.param)


@pytest.fixture
def two(group_of):
    return group_of(2)


# The gradient


def network(dtype):
    torch.manual_seed(0)
    layers = torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, DIM)
    return torch.nn.Sequential(*layers).to(dtype)


def images(views, sizes, dtype):
    """The images of all processes: of each view, those of each process."""
    generator = torch.Generator().manual_seed(1)
    shape = (views, sum(sizes), 5)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).split(sizes, 1)


def rows_put_back(z):
    """A gather without gradient, with the own rows put back: half of the gradient is lost."""
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.detach())
    parts[dist.get_rank()] = z
    return torch.cat(parts)


def in_another_order(z):
    return all_gather(z).roll(len(z), 0)


def info_nce_of(gather1, gather2):
    return lambda z1, z2: info_nce_loss(gather1(z1), gather2(z2))


def own_anchors_only(z1, z2):
    """The loss of the own rows among all, which are gathered without gradient."""
    rank, n = dist.get_rank(), len(z1)
    losses = info_nce_loss(rows_put_back(z1), rows_put_back(z2), reduction="none")
    return losses[:, rank * n : (rank + 1) * n].mean()


LOSSES = {
    "InfoNCE": lambda world: InfoNCELoss(gather_distributed=world > 0),
    "two tensors": lambda world: CAREloss(
        chunks=CHUNKS if world else None, shared_views=True, gather_distributed=world > 0
    ),
    "four tensors": lambda world: CAREloss(
        equivariance_weight=3.0, chunks=CHUNKS if world else None, gather_distributed=world > 0
    ),
    "the function": lambda world: distributed.info_nce_loss if world else info_nce_loss,
    "a differentiable gather": lambda world: (
        info_nce_of(all_gather, all_gather) if world else info_nce_loss
    ),
}
WRONG = {
    "own rows put back": lambda world: (
        info_nce_of(rows_put_back, rows_put_back) if world else info_nce_loss
    ),
    "own anchors only": lambda world: own_anchors_only if world else info_nce_loss,
    "views in different orders": lambda world: (
        info_nce_of(all_gather, in_another_order) if world else info_nce_loss
    ),
}


def gradient_of(model, name, views, world):
    """The gradient of a model, with DDP where there are several processes; and the loss."""
    loss_function = (LOSSES | WRONG)[name](world)
    outputs = model(views.flatten(0, 1)).unflatten(0, (len(views), -1))
    options = {}
    if not world and isinstance(loss_function, CAREloss):
        options["chunks"] = dist.get_world_size() * CHUNKS
    loss = loss_function(*outputs, **options)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss.detach()


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


# Mistakes on one process are errors on all


def mistakes(rank, world):
    mine = torch.randn(4, 5 + rank)
    sentence = r"rows of one shape and dtype on all processes, got 1-dimensional rows of 5 values"
    for call in (
        lambda: all_gather(mine),
        lambda: distributed.info_nce_loss(mine, mine),
        lambda: InfoNCELoss(gather_distributed=True)(mine, mine),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    other = torch.randn(4, 5).to(torch.float64 if rank else torch.float32)
    with pytest.raises(ValueError, match=r"torch.float32 on process 0 and .*torch.float64 on"):
        distributed.info_nce_loss(other, other)
    with pytest.raises(ValueError, match=r"got 2-dimensional rows of 6 .* and 1-dimensional rows"):
        all_gather(torch.zeros(4, 2, 3) if rank == 0 else torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"`x` must have shape \(N, ...\), got"):
        all_gather(torch.tensor(1.0))
    torch.testing.assert_close(all_gather(torch.ones(1)), torch.ones(world))  # nothing is stuck


def test_a_mistake_on_one_process_is_an_error_on_all(two):
    two.run(mistakes)


def only_on(place, rank, wrong, right):
    return wrong if rank == place else right


def refusals(rank, world):
    """What one process refuses must be an error on all, which names it and says the fault."""
    eight, last = torch.randn(4, 8, 6), world - 1
    care = CAREloss(gather_distributed=True, chunks=2)
    two_views = CAREloss(gather_distributed=True, shared_views=True)

    def one(wrong, right):
        return only_on(last, rank, wrong, right)

    ids = torch.arange(8)
    calls = {
        "one row": (lambda: care(*one(eight[:, :1], eight)), "with N >= 2"),
        "no rows": (lambda: care(*one(eight[:, :0], eight)), "got (0, 6)"),
        "no rows, InfoNCE": (
            lambda: InfoNCELoss(gather_distributed=True)(*one(eight[:2, :0], eight[:2])),
            "got (0, 6)",
        ),
        "other lengths": (
            lambda: distributed.info_nce_loss(eight[0], one(eight[1, :5], eight[1])),
            "must have the same shape",
        ),
        "other lengths of the shared views": (
            lambda: care(eight[0], eight[1], eight[2], one(eight[3, :5], eight[3])),
            "`equivariant1` and `equivariant2` must have the same shape",
        ),
        "ids without a pair": (
            lambda: two_views(eight[0], eight[1], chunks=one(ids, ids // 2)),
            "`chunks`",
        ),
        "no chunks": (lambda: two_views(eight[0], eight[1], chunks=one(None, 2)), "`chunks`"),
        "views missing": (lambda: care(*one(eight[:2], eight)), "shared_views=True"),
        "a list": (lambda: all_gather(one([1.0], torch.ones(2))), "got list"),
        "a temperature": (
            lambda: distributed.info_nce_loss(*eight[:2], temperature=one(torch.tensor(-1.0), 0.5)),
            "`temperature` must be > 0, got -1",
        ),
        "a word": (
            lambda: distributed.info_nce_loss(*eight[:2], reduction=one("sum", "mean")),
            "`reduction` must be",
        ),
    }
    for name, (call, sentence) in calls.items():
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert str(error.value).startswith(f"on process {last}: "), name
        assert sentence in str(error.value), name
    found = distributed.info_nce_loss(*eight[:2])  # nothing is stuck
    assert found.isfinite()


def test_what_one_process_refuses_is_an_error_on_all(two):
    two.run(refusals)  # a process that waits ends in another error, after the timeout


def other_inputs(rank, world):
    z1, z2 = torch.randn(2, ROWS, DIM)
    for t in (0.5 + 0.001 * rank, torch.tensor(0.0695 - 0.001 * rank, requires_grad=True)):
        with pytest.raises(ValueError, match=r"same on all processes, got 0.*on process 0 and 0"):
            distributed.info_nce_loss(z1, z2, temperature=t)
    with pytest.raises(NotImplementedError, match=r"outside of torch\.func"):
        torch.func.grad(lambda z: distributed.info_nce_loss(z, z2))(z1)
    with pytest.raises(NotImplementedError, match=r"outside of torch\.func"):
        torch.func.grad(lambda z: all_gather(z).sum())(z1)
    pairs = torch.randn(3, 2, dtype=torch.complex64)
    gathered = all_gather(pairs.conj())
    assert torch.equal(gathered, torch.cat([pairs.conj()] * world).resolve_conj())
    negative = pairs.conj().imag  # a view whose sign is kept beside it
    assert negative.is_neg()
    assert torch.equal(all_gather(negative), torch.cat([negative] * world))
    with torch.inference_mode():
        key = z2.clone()
    z1.requires_grad_()
    loss, expected = (distributed.info_nce_loss(z1, z) for z in (key, key.clone()))
    loss, expected = (torch.autograd.grad(x, z1)[0] for x in (loss, expected))
    assert torch.equal(loss, expected)


def test_temperatures_transforms_views_and_tensors_of_inference_mode(two):
    two.run(other_inputs)


def missing(rank, rendezvous, how):
    options = {"rank": rank, "world_size": 2, "init_method": f"file://{rendezvous}"}
    dist.init_process_group("gloo", **options)
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=6))
    dist.barrier()  # the short timeout is not for the start
    z1, z2 = torch.randn(2, 4, 5)
    distributed.info_nce_loss(z1, z2, process_group=group)
    dist.barrier()
    if rank == 1:
        if how == "sleeps":
            time.sleep(16)
        return
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        distributed.info_nce_loss(z1, z2, process_group=group)
    assert time.monotonic() - begin < 15
    os._exit(0)  # leaving a group whose other process is gone, gloo may abort in its destructor


@pytest.mark.parametrize("how", ["stops", "sleeps"])
def test_a_process_that_is_missing_ends_in_an_error_within_the_timeout(how, tmp_path):
    mp.spawn(missing, args=(tmp_path / "group", how), nprocs=2)


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


# Other parts of PyTorch


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


def test_without_a_process_group_gathering_is_the_identity():
    x = torch.randn(3, 4)
    assert all_gather(x) is x
    assert_seeds_differ()
    z1, z2 = torch.randn(2, 4, 3)
    assert torch.equal(distributed.info_nce_loss(z1, z2), info_nce_loss(z1, z2))
    with pytest.raises(ValueError, match="N >= 2"):
        distributed.info_nce_loss(z1[:1], z2[:1])
