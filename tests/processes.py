"""Groups of processes that wait for functions to run, and the models that they train."""

import datetime
import traceback
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from care_loss import CAREloss, InfoNCELoss, distributed
from care_loss.distributed import all_gather
from care_loss.functional import info_nce_loss

DIM, ROWS, CHUNKS = 6, 8, 2
# Where it is offered, processes are forked from one that has imported torch, once for all.
METHOD = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
CONTEXT = mp.get_context(METHOD)
if METHOD == "forkserver":
    CONTEXT.set_forkserver_preload(["care_loss", "pytest", "torch._dynamo", "torch.distributed"])


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
    warnings.filterwarnings("ignore", message="the halves of chunks should have")
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
