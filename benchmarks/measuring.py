"""What all benchmarks share: contenders that take turns, and where a result comes from."""

import argparse
import csv
import ctypes
import io
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


SLOW = 2  # seconds: a call that takes longer is not repeated


def timed(call: Callable[[], Any], device: str, *, budget: float = 0.1, memory: bool = True) -> Row:
    """Return the time of a call in µs with its quartiles, and its memory, or why there are none.

    The first call compiles and fills the caches of libraries: nothing is measured in it. At least
    three calls are timed after that, on CUDA by its events.
    """
    try:
        first, again = once(call), once(call)
        if again > SLOW:
            return {"note": f"one call takes {again:.1f} s: not repeated"}
        found: Row = {"MB": f"{megabytes(call, device):.1f}"} if memory else {}
        count = min(50, max(3, int(budget / max(again, 1e-7))))
        seconds = repeated(call, count, device)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"note": "out of memory"}
    except Exception as error:  # of one contender at one size: the run goes on
        return {"note": f"failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    low, middle, high = (1e6 * q for q in statistics.quantiles(seconds, n=4, method="inclusive"))
    found |= {"µs": f"{middle:.1f}", "µs_low": f"{low:.1f}", "µs_high": f"{high:.1f}"}
    return found | ({"note": f"first call {first:.1f} s"} if first > SLOW else {})


def repeated(call: Callable[[], Any], count: int, device: str) -> list[float]:
    """Return the seconds of so many calls, one after the other."""
    if not device.startswith("cuda"):
        return [once(call) for _ in range(count)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


class Appended:
    """Rows of a CSV file, printed and written one by one: a run that is stopped keeps them.

    Several processes, one after the other, may write to one file.
    """

    def __init__(self, path: Path | None, columns: Iterable[str], device: str) -> None:
        self.origin = provenance(device)
        self.file = path.open("a", newline="") if path else io.StringIO()
        self.writer = csv.DictWriter(self.file, [*columns, *self.origin], restval="")
        if not self.file.tell():
            self.writer.writeheader()

    def add(self, row: Row) -> None:
        print(*(f"{key} {value}" for key, value in row.items() if value != ""), sep=", ")
        self.writer.writerow(row | self.origin)
        self.file.flush()
        sys.stdout.flush()


def provenance(device: str) -> Row:
    cuda = device.startswith("cuda")
    ask = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    gpu: Row = {"cuda": torch.version.cuda, "driver": answer(*ask)} if cuda else {}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **gpu,
        "python": platform.python_version(),
        "commit": answer("git", "describe", "--always", "--dirty"),
    }


def answer(*command: str) -> str:
    """Return the first line that a program prints, or nothing where it cannot be asked."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        lines = []
    return lines[0].strip() if lines else ""


def report(options: argparse.Namespace, rows: Iterable[Row], line: str) -> None:
    """Print and write each row as it comes, with where it comes from."""
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
