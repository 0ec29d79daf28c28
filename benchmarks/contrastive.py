"""How long does NT-Xent take, forward and backward, against other implementations?

    python benchmarks/contrastive.py                            # a table
    python benchmarks/contrastive.py --csv benchmarks/results/contrastive-cpu.csv

Every contender normalises the embeddings itself. The contenders take turns, and ratios are to the
authors' time in the same round, or to the floor's where the authors' form needs too much memory.
The floor is the matrix products alone, in blocks of 256 rows that stay in the cache, without any
other arithmetic and without allocation.
"""

from collections.abc import Callable
from typing import Any

import torch
from measuring import (
    RATIO,
    Row,
    leaves,
    parser,
    ratio_columns,
    report,
    start,
    take_turns,
)
from rivals import info_nce_products, info_nce_rivals

from care_loss.functional import info_nce_loss

TEMPERATURE = 0.5
SIZES = [  # rows of a view, dimensions
    (256, 128),
    (1024, 128),
    (2048, 128),
    (4096, 128),
    (4096, 512),
    (8192, 128),
    (16384, 128),
    (32768, 128),
]
# Others need too much memory, or time, beyond 4,096 rows.
MOST_ROWS = {"pytorch-metric-learning": 256, "torch.compile of plain": 16384}
FLOOR = "matrix products alone"


def measure(n: int, d: int, rounds: int, **tensor: Any) -> list[Row]:
    views = leaves(2, n, d, **tensor)
    rows = torch.randn(2 * n, d, **tensor)
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
    accepted = parser(__doc__, rounds=5)
    accepted.add_argument("--most", type=int, default=SIZES[-1][0], help="the largest N")
    options = accepted.parse_args()
    tensor = start(options)
    print(f"{'N':>6} {'D':>4}  {'':<26}{'ms':>10}  {'to the floor':<14}ratio")
    sizes = [size for size in SIZES if size[0] <= options.most][: 1 if options.quick else None]
    rows = (row for size in sizes for row in measure(*size, options.rounds, **tensor))
    line = "{N:>6} {D:>4}  {contender:<26}{ms:>10}  {ratio to floor:<14}"
    report(options, rows, line + RATIO)


if __name__ == "__main__":
    main()
