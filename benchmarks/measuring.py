"""What all benchmarks share: contenders that take turns, and where a result comes from."""

import csv
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

Row = dict[str, object]


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time the calls in turns, so that other work on the machine slows all of them alike.

    Returns the seconds of each call in each round.
    """
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for name, call in calls.items()
    }
    slow = {name: timer.timeit(1).mean > 0.5 for name, timer in timers.items()}
    for name, timer in timers.items():
        if not slow[name]:
            timer.timeit(3)
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            # A block of several runs for one sample would be wasted on a slow call.
            sample = timer.timeit(1) if slow[name] else timer.blocked_autorange(min_run_time=0.1)
            seconds[name].append(sample.median)
    return seconds


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
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def write_csv(path: Path | None, rows: list[Row]) -> None:
    if path:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
