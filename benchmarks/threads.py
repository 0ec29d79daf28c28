"""What do two threads of PyTorch cost where other processes use the cores too?

    python benchmarks/threads.py --csv benchmarks/results/threads-cpu.csv

One thread and two take turns with InfoNCE, forward and backward, with its plain formula, and with
as many matrix products as it takes: on an idle machine, and beside a process that keeps one core
busy, as the workers of a DataLoader do. The ratios are to one thread in the same conditions. Two
policies of OpenMP: by default its threads spin while they wait, and take the core from those that
they wait for; "passive" lets them sleep.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from measuring import Appended, Row, leaves, once, parser, ratio_columns
from rivals import plain_info_nce
from torch import Tensor

from care_loss.functional import info_nce_loss

SIZES = ((1024, 25), (4096, 5))  # rows of a view, and rounds
POLICIES = ("default", "passive")
COLUMNS = ("N", "D", "policy", "load", "contender", "at once")
COLUMNS += ("ms", "ratio", "ratio_low", "ratio_high")
D = 128


def products(z1: Tensor, z2: Tensor) -> None:
    """As many products as the loss takes: half of all scores, twice, and their two sums of rows."""
    rows, z = z1.detach(), torch.cat((z1, z2)).detach()
    for _ in range(2):
        scores = rows @ z.mT
    torch.mm(scores, z)
    torch.mm(scores.mT, rows)


def keep_busy() -> None:
    """Keep a core busy until this process is ended."""
    while True:
        sum(range(100_000))


@contextmanager
def busy_core() -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=keep_busy, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def measured(n: int, rounds: int) -> Iterator[Row]:
    views = leaves(2, n, D)
    losses: dict[str, Callable[..., Tensor]] = {
        "care_loss": info_nce_loss,
        "plain autograd": partial(plain_info_nce, temperature=0.5),
    }

    def step(loss: Callable[..., Tensor]) -> Any:
        return torch.autograd.grad(loss(*views), views)

    calls = {name: partial(step, loss) for name, loss in losses.items()}
    calls["matrix products alone"] = partial(products, *views)
    seconds: dict[tuple[str, int], list[float]] = {}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            for threads in (1, 2):
                torch.set_num_threads(threads)
                took = once(call)
                if round_number:  # the first round warms up
                    seconds.setdefault((name, threads), []).append(took)
    for (name, threads), times in seconds.items():
        yield {"contender": name, "at once": threads} | ratio_columns(times, seconds[name, 1])


def main() -> None:
    accepted = parser(__doc__)
    accepted.add_argument("--policy", choices=POLICIES, help="by default both, one after the other")
    options = accepted.parse_args()
    if options.policy is None:
        # OpenMP reads the policy when it starts.
        for policy in POLICIES:
            settings = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
            environment = {k: v for k, v in os.environ.items() if k not in settings}
            if policy == "passive":
                environment["OMP_WAIT_POLICY"] = policy
            command = [sys.executable, *sys.argv, "--policy", policy]
            subprocess.run(command, env=environment, check=True)
        return
    results = Appended(options.csv, COLUMNS, options.device)
    for n, rounds in ((128, 2),) if options.quick else SIZES:
        for load, context in (("idle", nullcontext), ("one core busy", busy_core)):
            with context():
                for row in measured(n, rounds):
                    results.add({"N": n, "D": D, "policy": options.policy, "load": load} | row)


if __name__ == "__main__":
    main()
