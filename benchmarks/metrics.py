"""How long do the measures of equivariance take, beside the encoder?

    python benchmarks/metrics.py --threads 2                            # a table
    python benchmarks/metrics.py --threads 2 --csv benchmarks/results/metrics-cpu.csv

The report is made for an encoder that costs nothing, the identity, and for a transformation that
costs little, a shift of the entries. It includes the unshared control, for which each image is
transformed by itself, eight times. The held-out Wahba error of all draws is compared with the same
from scipy, one draw at a time. The floor is the singular value decompositions that fits need. Times
are ratios to the floor in the same round.
"""

from typing import Any

import numpy as np
import torch
from measuring import RATIO, Row, parser, ratio_columns, report, start, take_turns
from scipy.linalg import orthogonal_procrustes
from torch import Tensor, nn

from care_loss.metrics import equivariance_report, wahba_error
from care_loss.sphere import normalize

SIZES = [  # draws, images, dimensions
    (16, 500, 32),
    (16, 2000, 128),
    (64, 2000, 128),
]


def shift(images: Tensor) -> Tensor:
    """Shift the entries of all images by one random number."""
    return images.roll(int(torch.randint(images.shape[1], ())), 1)


def by_scipy(z: Tensor, moved: Tensor) -> float:
    u, vs = (normalize(x.double()).cpu().numpy() for x in (z, moved))
    total = 0.0
    for v in vs:
        for fitted, scored in ((0, 1), (1, 0)):
            rotation, _ = orthogonal_procrustes(u[fitted::2], v[fitted::2])
            total += np.square(u[scored::2] @ rotation - v[scored::2]).sum()
    return total


def measure(draws: int, n: int, d: int, rounds: int, **tensor: Any) -> list[Row]:
    z, moved = torch.randn(n, d, **tensor), torch.randn(draws, n, d, **tensor)
    products = torch.randn(2, draws, d, d, **tensor).double()

    def whole() -> object:
        return equivariance_report(
            nn.Identity(), z, {"shift": shift}, samples=draws, progress=False
        )

    calls = {
        "floor: the decompositions": lambda: torch.linalg.svd(products),
        "wahba_error": lambda: wahba_error(z, moved),
        "wahba_error, a loop": lambda: [wahba_error(z, one) for one in moved],
        "scipy, a loop": lambda: by_scipy(z, moved),
        "equivariance_report": whole,
    }
    seconds = take_turns(calls, rounds)
    return [
        {"draws": draws, "images": n, "D": d, "contender": name}
        | ratio_columns(times, seconds["floor: the decompositions"])
        for name, times in seconds.items()
    ]


def main() -> None:
    options = parser(__doc__, rounds=5).parse_args()
    tensor = start(options)
    sizes = SIZES[: 1 if options.quick else None]
    rows = (row for size in sizes for row in measure(*size, options.rounds, **tensor))
    line = "{draws} draws, {images} images, D = {D}: {contender:<28}{ms:>10} ms  "
    report(options, rows, line + RATIO)


if __name__ == "__main__":
    main()
