"""How much memory does NT-Xent need at its peak, forward and backward, beyond its inputs?

    python benchmarks/memory.py                            # a table
    python benchmarks/memory.py --csv benchmarks/results/memory-cpu.csv

Each contender runs in a process of its own, once at a small size before it is measured. On a CPU
the peak is that of the resident memory of the process; on CUDA that of the allocator.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from measuring import Row, leaves, megabytes, provenance, write_csv
from rivals import info_nce_rivals

from care_loss.functional import info_nce_loss

SIZES = [(256, 128), (1024, 128), (4096, 128), (4096, 512), (16384, 128)]
CONTENDERS = {  # the largest N that is tried
    "authors": 4096,
    "lightly": 4096,
    "plain autograd": 4096,
    "torch.compile of plain": 4096,
    "care_loss": 16384,
}


def measure(contender: str, n: int, d: int, device: str) -> float:
    """Return the megabytes of one contender, in this process."""
    losses = {**info_nce_rivals(0.5), "care_loss": info_nce_loss}

    def step(n: int) -> float:
        views = leaves(2, n, d, device=device)
        loss = losses[contender]
        return megabytes(lambda: torch.autograd.grad(loss(*views), views), device)

    step(64)
    step(n) if contender.startswith("torch.compile") else None  # to compile
    return step(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--quick", action="store_true", help="the first size only")
    parser.add_argument("--csv", type=Path, help="write the results here as well")
    parser.add_argument("--one", nargs=3, metavar=("CONTENDER", "N", "D"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        contender, n, d = options.one
        print(measure(contender, int(n), int(d), options.device))
        return
    rows: list[Row] = []
    print(f"{'N':>6} {'D':>4}  {'':<26}{'MB':>8}")
    common = ["--device", options.device, "--threads", str(options.threads)]
    for n, d in SIZES[: 1 if options.quick else None]:
        for contender in [name for name, most in CONTENDERS.items() if n <= most]:
            command = [sys.executable, __file__, *common, "--one", contender, str(n), str(d)]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = {"N": n, "D": d, "contender": contender, "MB": f"{float(result.stdout):.1f}"}
            rows.append(row | provenance(options.device))
            print("{N:>6} {D:>4}  {contender:<26}{MB:>8}".format(**row))
            sys.stdout.flush()
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
