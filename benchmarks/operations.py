"""How many operations does a step dispatch, forward and backward?

    python benchmarks/operations.py                            # a table
    python benchmarks/operations.py --csv benchmarks/results/operations.csv

The count includes views and is the same at every run. At small batches it decides the time on a
GPU, where each operation costs a launch. Operations that make the host wait for the device are
counted as well. On a CPU, the equivariance loss also reads how close rows are; here it does not.
Many rows are taken in tiles, which are larger on a GPU.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from measuring import Row, leaves, parser, report, start
from rivals import authors, authors_equivariance, info_nce_rivals
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from care_loss import CAREloss, EquivarianceLoss, InfoNCELoss

SIZES = [(256, 128, 16), (250, 128, 16), (4096, 128, 16)]  # rows, dimensions, chunks
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}


class Operations(TorchDispatchMode):
    """Count the operations that are dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.waiting = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.all += 1
        self.waiting += function._schema.name in WAITING
        return function(*args, **(kwargs or {}))


def count(loss: Callable[..., Tensor], *views: Tensor) -> Row:
    as_on_a_gpu = patch("care_loss._autograd.gram_gap.reads_values", return_value=False)
    with as_on_a_gpu, Operations() as operations:
        loss(*views).backward()
    return {"operations": operations.all, "waiting": operations.waiting}


def measure(n: int, d: int, chunks: int, **tensor: Any) -> list[Row]:
    views = leaves(4, n, d, **tensor)
    pair = views[:2]
    whole = CAREloss(chunks=chunks)
    rivals = info_nce_rivals(0.5)
    counts = {
        ("CARE", "authors"): count(lambda *z: authors(torch.stack(z), 0.5, 0.3, chunks), *views),
        ("CARE", "care_loss"): count(whole, *views),
        ("InfoNCE", "lightly"): count(rivals["lightly"], *pair),
        ("InfoNCE", "plain autograd"): count(rivals["plain autograd"], *pair),
        ("InfoNCE", "care_loss"): count(InfoNCELoss(), *pair),
        ("equivariance", "authors"): count(
            lambda *z: authors_equivariance(*z, chunks=chunks), *pair
        ),
        ("equivariance", "care_loss"): count(EquivarianceLoss(chunks), *pair),
    }
    return [
        {"N": n, "D": d, "chunks": chunks, "loss": loss, "contender": contender} | row
        for (loss, contender), row in counts.items()
    ]


def main() -> None:
    options = parser(__doc__).parse_args()
    tensor = start(options)
    print(f"{'N':>5} {'D':>4} {'chunks':>6}  {'':<14}{'':<16}operations  of which wait")
    sizes = SIZES[: 1 if options.quick else None]
    rows = (row for size in sizes for row in measure(*size, **tensor))
    line = "{N:>5} {D:>4} {chunks:>6}  {loss:<14}{contender:<16}{operations:>10}  {waiting}"
    report(options, rows, line)


if __name__ == "__main__":
    main()
