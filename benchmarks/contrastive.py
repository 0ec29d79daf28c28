"""How long does NT-Xent take, forward and backward, against other implementations?

    python benchmarks/contrastive.py                            # a table
    python benchmarks/contrastive.py --csv benchmarks/results/contrastive-cpu.csv

Every contender normalises the embeddings itself. The contenders take turns, and ratios are to the
authors' time in the same round, or to the floor's where the authors' form needs too much memory.
The floor is the matrix products alone, in blocks of 256 rows that stay in the cache, without any
other arithmetic and without allocation.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Row, leaves, provenance, ratio_columns, take_turns, write_csv
from rivals import info_nce_products, info_nce_rivals

from care_loss.functional import info_nce_loss

TEMPERATURE = 0.5
SIZES = [(256, 128), (1024, 128), (4096, 128), (4096, 512), (16384, 128)]  # rows of a view, D
MOST_ROWS = {"pytorch-metric-learning": 256, "torch.compile of plain": 16384}  # others 4096: memory
FLOOR = "matrix products alone"


def measure(n: int, d: int, rounds: int, device: str, dtype: torch.dtype) -> list[Row]:
    views = leaves(2, n, d, device=device, dtype=dtype)
    rows = torch.randn(2 * n, d, device=device, dtype=dtype)
    losses: dict[str, Callable[..., Any]] = {
        name: loss
        for name, loss in info_nce_rivals(TEMPERATURE).items()
        if n <= MOST_ROWS.get(name, 4096)
    }
    losses["care_loss"] = lambda z1, z2: info_nce_loss(z1, z2, temperature=TEMPERATURE)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda loss=loss: torch.autograd.grad(loss(*views), views)
        for name, loss in losses.items()
    }
    calls[FLOOR] = lambda: info_nce_products(rows)
    seconds = take_turns(calls, rounds)
    reference = "authors" if "authors" in seconds else FLOOR
    return [
        {"N": n, "D": d, "contender": name, "reference": reference}
        | ratio_columns(times, seconds[reference])
        | {"ratio to floor": ratio_columns(times, seconds[FLOOR])["ratio"]}
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the embeddings")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="how often the contenders take turns")
    parser.add_argument("--quick", action="store_true", help="the first size only")
    parser.add_argument("--csv", type=Path, help="write the results here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    rows = []
    print(f"{'N':>6} {'D':>4}  {'':<26}{'ms':>10}  {'ratio':<26}  ratio to the floor")
    for size in SIZES[: 1 if options.quick else None]:
        for row in measure(*size, options.rounds, options.device, dtype):
            rows.append(row | {"dtype": options.dtype} | provenance(options.device))
            ratio = "{ratio} ({ratio_low} to {ratio_high})".format(**row)
            print(
                f"{row['N']:>6} {row['D']:>4}  {row['contender']:<26}{row['ms']:>10}  {ratio:<26}"
                f"  {row['ratio to floor']}"
            )
            sys.stdout.flush()
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
