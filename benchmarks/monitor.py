"""How much of a training does an equivariance monitor take?

    python benchmarks/monitor.py                                        # a table
    python benchmarks/monitor.py --csv benchmarks/results/monitor-cpu.csv

The training is that of a small network with three strided convolutions on images of 28 x 28 in
three forwards, in batches of 256; its epoch has 60,000 images, hence 234 steps. A call of the
monitor embeds 512 held-out images under four draws, clean, and twice under a draw for each image.
The transformation is a rotation of the plane with bilinear interpolation. Loading of the data is
not included. Times are ratios to the training step in the same round.
"""

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from measuring import RATIO, Row, parser, ratio_columns, report, start, take_turns
from torch import Tensor, nn

from care_loss import CAREloss
from care_loss.metrics import EquivarianceMonitor
from care_loss.views import augment_chunks

BATCH, EPOCH, HELD_OUT = 256, 60_000, 512
DIMENSIONS = [32, 128]


def rotate(images: Tensor) -> Tensor:
    """Rotate all images by one random angle."""
    angle = 2 * math.pi * torch.rand((), dtype=images.dtype, device=images.device)
    c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([c, -s, zero, s, c, zero]).view(1, 2, 3)
    grid = F.affine_grid(matrix, [1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=False)


def network(d: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, d)),
    )


def measure(d: int, rounds: int, **tensor: Any) -> list[Row]:
    encoder, criterion = network(d).to(**tensor), CAREloss()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4)
    x = torch.rand(BATCH, 1, 28, 28, **tensor)
    monitor = EquivarianceMonitor(torch.rand(HELD_OUT, 1, 28, 28, **tensor), {"turn": rotate})

    def step() -> None:
        x1, x2 = x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)
        turned, chunks = augment_chunks(x1, rotate, chunks=8)
        z1, z2, e = encoder(x1), encoder(x2), encoder(turned)
        loss = criterion(z1, z2, z1, e, chunks=chunks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    calls = {"training step": step, "monitor call": lambda: monitor(encoder, 0)}
    seconds = take_turns(calls, rounds)
    rows = []
    for name, times in seconds.items():
        found = ratio_columns(times, seconds["training step"])
        share = float(found["ratio"]) / (EPOCH // BATCH)
        rows.append({"D": d, "contender": name} | found | {"of an epoch": f"{share:.4f}"})
    return rows


def main() -> None:
    warnings.filterwarnings("ignore", "step 0: ")  # of random images: what counts is the time
    options = parser(__doc__, rounds=9).parse_args()
    tensor = start(options)
    sizes = DIMENSIONS[: 1 if options.quick else None]
    rows = (row for d in sizes for row in measure(d, options.rounds, **tensor))
    report(options, rows, "D = {D}: {contender:<14}{ms:>10} ms  " + RATIO + ", {of an epoch}")


if __name__ == "__main__":
    main()
