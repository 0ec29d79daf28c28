"""What does the InfoNCE loss of several processes cost, in time, memory and bytes received?

    python benchmarks/distributed.py                            # a table
    python benchmarks/distributed.py --csv benchmarks/results/distributed-cpu.csv
    python benchmarks/distributed.py --calculate --csv benchmarks/results/distributed-calculated.csv

Processes of one machine (gloo), each with N rows of two views; a step is forward and backward. Each
process has one thread. Where there are more processes than cores they wait for each other: then the
ratios say something, the times do not.

The contenders: the NTXentLoss of lightly with gather_distributed; the ClipLoss of open_clip in its
two modes, which contrasts one view with the other only, a half of the products; `care_loss` as it
is; and the same loss of rows that `all_gather` gathers, so that each process computes everything.
Bytes are those that a process receives, by the formulas of ring algorithms.
"""

import argparse
import datetime
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import Row, leaves, megabytes, once, parser, ratio_columns, report, start, write_csv
from rivals import import_torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from care_loss import distributed
from care_loss.functional import info_nce_loss

TEMPERATURE = 0.5
SIZES = [(256, 128), (1024, 128), (4096, 128)]  # N rows of each view on a process, D
WORLDS = [1, 2, 4]
LARGEST = 8192  # samples of all processes that contenders with a matrix of products are given
CONTENDERS = ["care_loss", "care_loss, all_gather", "lightly", "open_clip", "open_clip, local_loss"]
# Of the bytes that a collective gives to each process, how many times it receives those of others.
RECEIVED = {"allgather_": 1, "_allgather_base_": 1, "allreduce_": 2}
Loss = Callable[[Tensor, Tensor], Tensor]


class Received(TorchDispatchMode):
    """Count the bytes that a process receives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            given = sum(x.nbytes for x in tree_leaves(args[0]))
            if name == "scatter_":  # gloo's all-to-all: one part from each of the others
                self.bytes += 0 if args[1] else given
            else:
                world = dist.get_world_size()
                self.bytes += RECEIVED[name] * given * (world - 1) / world
        return function(*args, **(kwargs or {}))


def contenders(world: int) -> dict[str, Loss]:
    import_torchvision()
    from lightly.loss import NTXentLoss
    from open_clip import ClipLoss

    several = world > 1
    lightly = NTXentLoss(TEMPERATURE, gather_distributed=several)
    options = {"rank": dist.get_rank(), "world_size": world, "gather_with_grad": True}
    clip = {local: ClipLoss(local_loss=local, **options) for local in (False, True)}

    def open_clip(z1: Tensor, z2: Tensor, *, local: bool) -> Tensor:
        z1, z2 = (torch.nn.functional.normalize(z, dim=-1) for z in (z1, z2))
        loss: Tensor = clip[local](z1, z2, 1 / TEMPERATURE)
        return loss

    def gathered(z1: Tensor, z2: Tensor) -> Tensor:
        z1, z2 = distributed.all_gather(z1), distributed.all_gather(z2)
        return info_nce_loss(z1, z2, temperature=TEMPERATURE)

    ours = partial(distributed.info_nce_loss, temperature=TEMPERATURE)
    clips = [partial(open_clip, local=local) for local in (False, True)]
    return dict(zip(CONTENDERS, (ours, gathered, lightly, *clips), strict=True))


def step(loss: Loss, n: int, d: int, **tensor: Any) -> None:
    views = leaves(2, n, d, **tensor)
    torch.autograd.grad(loss(*views), views)


def process(
    rank: int,
    world: int,
    group: str,
    names: list[str],
    n: int,
    d: int,
    rounds: int,
    results: Any,
) -> None:
    """Measure some contenders on this process, in turns."""
    torch.set_num_threads(1)
    # open_clip gathers by functions that torch has renamed.
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional")
    timeout = datetime.timedelta(minutes=10)
    options = {"rank": rank, "world_size": world, "timeout": timeout}
    dist.init_process_group("gloo", init_method=f"file://{group}", **options)
    tensor = {"device": "cpu", "dtype": torch.float32}
    every = contenders(world)
    losses = {name: every[name] for name in names}
    for name, loss in losses.items():
        step(loss, 64, d, **tensor)
        found: Row = {"MB": megabytes(partial(step, loss, n, d, **tensor), "cpu")}
        with Received() as received:
            step(loss, n, d, **tensor)
        found["bytes"] = received.bytes
        if rank == 0:
            results.put((name, found))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, loss in losses.items():
            dist.barrier()
            seconds[name].append(once(partial(step, loss, n, d, **tensor)))
            dist.barrier()
    if rank == 0:
        results.put(("seconds", seconds))
    dist.barrier()  # without rounds, a process may still be in its last step
    os._exit(0)  # leaving a group whose other process is gone, gloo may abort in its destructor


def run(world: int, *arguments: Any) -> dict[str, Any]:
    """Run some contenders in `world` processes, and return what the first of them measured."""
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (world, f"{folder}/group", *arguments, results), nprocs=world)
    found = {}
    while not results.empty():
        name, value = results.get()
        found[name] = value
    return found


def measure_all(options: argparse.Namespace) -> Iterator[Row]:
    for n, d in SIZES[: 1 if options.quick else None]:
        for world in [2] if options.quick else WORLDS:
            names = CONTENDERS[: None if n * world <= LARGEST else 2]
            timed = run(world, names, n, d, options.rounds)
            for name in names:
                # Memory that others have freed is not counted in processes of their own.
                alone = (timed if options.quick else run(world, [name], n, d, 0))[name]
                yield {
                    "W": world,
                    "N": n,
                    "D": d,
                    "contender": name,
                    **ratio_columns(timed["seconds"][name], timed["seconds"]["care_loss"]),
                    "MB": f"{alone['MB']:.1f}",
                    "KB": f"{alone['bytes'] / 1000:.1f}",
                }


def calculate(n: int = 256, d: int = 128, size: int = 4) -> Iterator[Row]:
    """Return what a step of W processes needs, without measuring: megabytes of each process.

    The memory of care_loss is that of the gathered rows, of their unit rows in float32, of two
    numbers per row, and of one tile of scores on a GPU. Of a loss with a matrix of products, it is
    the matrix of the own rows with all, and its gradient.
    """
    tile = 2048 * 4096 * 4
    for world in (1, 8, 64, 512, 4096):
        rows = 2 * n * world
        numbers = {
            "batch": n * world,
            "received": (world - 1) * (2 * n * d * size + 2 * n * 16 + 32),
            "received by lightly": (world - 1) * 6 * n * d * size,
            "memory": rows * (d * (size + 4) + 32) + min(tile, 2 * n * 4096 * 4),
            "memory with a matrix": rows * d * size + 2 * 2 * n * rows * 4,
        }
        yield {"W": world} | {
            name: value if name == "batch" else f"{value / 1e6:.1f}"
            for name, value in numbers.items()
        }


def main() -> None:
    accepted = parser(__doc__, rounds=5)
    accepted.add_argument(
        "--calculate", action="store_true", help="print formulas, measure nothing"
    )
    options = accepted.parse_args()
    start(options)
    if options.calculate:
        rows = list(calculate())
        header: Row = {name: name for name in rows[0]}
        for row in [header, *rows]:
            print("".join(str(value).rjust(len(name) + 3) for name, value in row.items()))
        write_csv(options.csv, rows)
        return
    print(f"{'W':>2} {'N':>6} {'D':>4}  {'':<24}{'ms':>10}{'ratio':>8}{'MB':>9}{'KB received':>13}")
    row = "{W:>2} {N:>6} {D:>4}  {contender:<24}{ms:>10}{ratio:>8}{MB:>9}{KB:>13}"
    report(options, measure_all(options), row)


if __name__ == "__main__":
    main()
