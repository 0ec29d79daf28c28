"""What all benchmarks share: contenders that take turns, and where a result comes from."""

import argparse
import csv
import ctypes
import math
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.benchmark import timer as synchronized_clock

Row = dict[str, object]

RATIO = "{ratio} ({ratio_low} to {ratio_high})"  # of the columns of ratio_columns


def parser(question: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return the options that benchmarks share, for a script that asks the given question."""
    found = argparse.ArgumentParser(description=question.splitlines()[0])
    found.add_argument("--device", default="cpu")
    found.add_argument("--dtype", default="float32", help="of the embeddings")
    found.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    if rounds:
        found.add_argument("--rounds", type=int, default=rounds, help="turns of each contender")
    found.add_argument("--quick", action="store_true", help="the first size only")
    found.add_argument("--csv", type=Path, help="write the results here as well")
    return found


def start(options: argparse.Namespace) -> dict[str, Any]:
    """Set the number of threads, and return the device and dtype of tensors."""
    torch.set_num_threads(options.threads)
    return {"device": options.device, "dtype": getattr(torch, options.dtype)}


def printed_by_another_process(script: str, options: argparse.Namespace, *more: object) -> str:
    """Run a script in a process of its own, where the memory of others is not counted."""
    common = [f"--{name}={getattr(options, name)}" for name in ("device", "dtype", "threads")]
    command = [sys.executable, script, *common, *map(str, more)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def leaves(count: int, *shape: int, **options: Any) -> list[Tensor]:
    """Return random tensors that want a gradient."""
    return [torch.randn(*shape, **options).requires_grad_() for _ in range(count)]


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time the calls in turns, so that other work on the machine slows all of them alike.

    Returns the seconds of each call in each round.
    """
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for name, call in calls.items()
    }
    for call in calls.values():
        once(call)  # to compile, say
    slow = {name for name, call in calls.items() if once(call) > 0.5}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            # A block of several runs for one sample would be wasted on a slow call.
            if name in slow:
                sample = once(call)
            else:
                sample = timers[name].blocked_autorange(min_run_time=0.1).median
            seconds[name].append(sample)
    return seconds


def once(call: Callable[[], Any]) -> float:
    """Return the seconds of one run of a call."""
    start = synchronized_clock()
    call()
    return synchronized_clock() - start


def ratio_columns(times: list[float], reference: list[float]) -> Row:
    """Return the median time and the quartiles of its ratio to the reference in the same round."""
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ms": f"{1000 * statistics.median(times):.3f}",
        "ratio": f"{middle:.3f}",
        "ratio_low": f"{low:.3f}",
        "ratio_high": f"{high:.3f}",
    }


def provenance(device: str) -> Row:
    git = ["git", "describe", "--always", "--dirty"]
    cuda = device.startswith("cuda")
    gpu: Row = {"cuda": torch.version.cuda, "driver": driver()} if cuda else {}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **gpu,
        "python": platform.python_version(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def driver() -> str:
    """Return the version of NVIDIA's driver, or nothing where it cannot be asked for."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        answer = []
    return answer[0] if answer else ""


def report(options: argparse.Namespace, rows: Iterable[Row], line: str) -> None:
    """Print each row as it comes, and write all of them, with where they come from."""
    origin = {"dtype": options.dtype} | provenance(options.device)
    found = []
    for row in rows:
        found.append(row | origin)
        print(line.format(**row), flush=True)
    write_csv(options.csv, found)


def write_csv(path: Path | None, rows: list[Row]) -> None:
    if path:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def megabytes(call: Callable[[], Any], device: str) -> float:
    """Return how much memory a call needs at its peak, above what is held before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return math.nan
    pages = Path("/proc/self/statm")
    done, seen = threading.Event(), []

    def watch() -> None:
        while not done.wait(2e-4):
            seen.append(int(pages.read_text().split()[1]))

    ctypes.CDLL(None).malloc_trim(0)  # what is free already would not be seen
    before = int(pages.read_text().split()[1])
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(0, max(seen, default=before) - before) * 4096 / 2**20
