"""How long does the contrast through fitted rotations take, forward and backward?

    python benchmarks/rotation_contrast.py --csv benchmarks/results/rotation_contrast-cpu.csv

It stands beside CARE's loss of three forwards, beside the same contrast with a textbook fit (a
singular value decomposition, differentiated by autograd) and with a general linear map instead of a
rotation, and beside the floor: InfoNCE, and the products of the fits without the fits. A loss fits
two rotations for each chunk. Ratios are to care_loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from measuring import RATIO, Row, parser, ratio_columns, report, start, take_turns
from torch import Tensor
from torch.nn.functional import normalize

from care_loss import CAREloss, InfoNCELoss, RotationContrastLoss

TEMPERATURE, RIDGE = 0.5, 1e-3
SIZES = [  # rows, dimensions, chunks
    (256, 16, 4),
    (256, 16, 8),
    (256, 64, 4),
    (256, 128, 4),
    (256, 128, 8),
    (1024, 128, 8),
]
OURS = "care_loss"


def halves(z: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Return the unit rows of even places and of odd places of all chunks `(chunks, n / 2, D)`."""
    rows = normalize(z, dim=-1).unflatten(0, (chunks, -1, 2))
    return rows[:, :, 0], rows[:, :, 1]


def predicted(
    fit: Callable[[Tensor, Tensor], Tensor], z: Tensor, z_turned: Tensor, chunks: int
) -> Tensor:
    """Move each row by the map that `fit` returns for the other half of its chunk."""
    (a, b), (a_turned, b_turned) = halves(z, chunks), halves(z_turned, chunks)
    moved = a @ fit(b, b_turned), b @ fit(a, a_turned)
    return torch.stack(moved, 2).flatten(0, 2)


def textbook(source: Tensor, target: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(source.mT @ target)
    sign = torch.ones(u.shape[:-1], device=u.device)
    sign[:, -1] = torch.linalg.det(u @ vh).detach().sign()
    return (u * sign.unsqueeze(-2)) @ vh


def linear(source: Tensor, target: Tensor) -> Tensor:
    ridge = RIDGE * source.shape[1] * torch.eye(source.shape[-1], device=source.device)
    return torch.linalg.solve(source.mT @ source + ridge, source.mT @ target)


def product(source: Tensor, target: Tensor) -> Tensor:
    return source.mT @ target


def measure(n: int, d: int, chunks: int, rounds: int, **tensor: Any) -> list[Row]:
    # Rows near rotations of each other, as while an embedding learns.
    rotation = torch.linalg.qr(torch.randn(chunks, d, d, **tensor)).Q
    z = torch.randn(n, d, **tensor)
    turned = (z.view(chunks, -1, d) @ rotation).flatten(0, 1) + 0.3 * torch.randn_like(z)
    views = [z.requires_grad_(), turned.requires_grad_(), torch.randn_like(z).requires_grad_()]
    info_nce = InfoNCELoss(TEMPERATURE)
    contrast = RotationContrastLoss(temperature=TEMPERATURE, chunks=chunks)
    care = CAREloss(temperature=TEMPERATURE, chunks=chunks)

    def through(fit: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda z, e, _: info_nce(predicted(fit, z, e, chunks), e)

    losses: dict[str, Callable[..., Tensor]] = {
        OURS: lambda z, e, _: contrast(z, e),
        "torch.compile of care_loss": torch.compile(
            lambda z, e, _: contrast(z, e), fullgraph=True, dynamic=False
        ),
        "textbook fit with autograd": through(textbook),
        "linear map": through(linear),
        "CARE, three forwards": lambda z, e, z2: care(z, z2, z, e),
        "InfoNCE alone": lambda z, e, _: info_nce(z, e),
        "floor: InfoNCE and products": through(product),
    }
    calls = {
        name: lambda loss=loss: torch.autograd.grad(loss(*views), views[:2])
        for name, loss in losses.items()
    }
    seconds = take_turns(calls, rounds)
    return [
        {"N": n, "D": d, "chunks": chunks, "contender": name} | ratio_columns(times, seconds[OURS])
        for name, times in seconds.items()
    ]


def main() -> None:
    options = parser(__doc__, rounds=9).parse_args()
    tensor = start(options)
    print(f"{'N':>5} {'D':>4} {'chunks':>6}  {'':<28}{'ms':>9}  ratio to care_loss")
    sizes = SIZES[: 1 if options.quick else None]
    rows = (row for size in sizes for row in measure(*size, options.rounds, **tensor))
    report(options, rows, "{N:>5} {D:>4} {chunks:>6}  {contender:<28}{ms:>9}  " + RATIO)


if __name__ == "__main__":
    main()
