"""How many digits do NT-Xent and the equivariance loss keep, in value and gradient?

    python benchmarks/precision.py                            # a table
    python benchmarks/precision.py --csv benchmarks/results/precision-cpu.csv

NT-Xent is computed for views about 45 degrees apart, against the temperature. The equivariance loss
is computed for views that one rotation relates but for noise, against the length of the noise, in
short chunks and in chunks with many more rows than dimensions. Errors are relative to the formula
in float64, and root mean squares over draws.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Row, parser, report, start
from rivals import authors_equivariance, info_nce_rivals, plain_equivariance
from torch import Tensor

from care_loss.functional import equivariance_loss, info_nce_loss
from care_loss.rotation import random_orthogonal

TEMPERATURES = [1, 0.5, 0.2, 0.1, 0.05, 0.03, 0.02, 0.0125, 0.01, 0.005]
NOISES = [1, 0.1, 0.01, 1e-3, 1e-4]
CHUNKS = [(256, 128, 16), (2048, 128, 2)]  # rows, dimensions, chunks
Loss = Callable[[Tensor, Tensor], Tensor]
Contenders = dict[str, tuple[Loss, float]]  # each with what its value is divided by


def exact_info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent in float64, in the form in which no digits cancel."""
    z = F.normalize(torch.cat((z1, z2)), dim=-1)
    scores = z @ z.mT / temperature
    n = len(z1)
    partner = torch.arange(2 * n, device=z.device).roll(n).unsqueeze(-1)
    positive = scores.gather(-1, partner).squeeze(-1)
    own = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    negative = scores.masked_fill(own, -torch.inf).scatter(-1, partner, -torch.inf).logsumexp(-1)
    return -F.logsigmoid(positive - negative).mean()


def by_columns(z1: Tensor, z2: Tensor, chunks: int) -> Tensor:
    """The equivariance loss from products of the columns, in the precision of the inputs."""
    u, v = (F.normalize(z, dim=-1).unflatten(0, (chunks, -1)) for z in (z1, z2))
    uu, vv, uv = u.mT @ u, v.mT @ v, u.mT @ v
    total = (uu.square() + vv.square() - 2 * uv.square()).sum((-2, -1))
    n = u.shape[1]
    return total.mean() / (n * (n - 1))


def info_nce_contenders(temperature: float) -> Contenders:
    rivals = {
        name: (loss, 1.0)
        for name, loss in info_nce_rivals(temperature).items()
        if name in ("authors", "lightly", "plain autograd")
    }
    return rivals | {
        "care_loss": (lambda z1, z2: info_nce_loss(z1, z2, temperature=temperature), 1.0)
    }


def equivariance_contenders(n: int, chunks: int) -> Contenders:
    authors_scale = 2 * (n // chunks - 1)
    return {
        "authors": (lambda z1, z2: authors_equivariance(z1, z2, chunks), authors_scale),
        "plain autograd": (lambda z1, z2: plain_equivariance(z1, z2, chunks), 1),
        "products of the columns": (lambda z1, z2: by_columns(z1, z2, chunks), 1),
        "care_loss": (lambda z1, z2: equivariance_loss(z1, z2, chunks=chunks), 1),
    }


def errors(contenders: Contenders, exact: Loss, draws: list[list[Tensor]]) -> list[Row]:
    """Return the root mean square of the relative errors of each contender, over the draws."""
    squared = {name: torch.zeros(2, dtype=torch.float64) for name in contenders}
    for views in draws:
        value, gradient = evaluate(exact, [z.double() for z in views])
        for name, (loss, scale) in contenders.items():
            found, found_gradient = (x / scale for x in evaluate(loss, views))
            squared[name] += torch.stack(
                (
                    ((found - value) / value).square(),
                    (found_gradient - gradient).square().sum() / gradient.square().sum(),
                )
            )
    rows: list[Row] = []
    for name, total in squared.items():
        value, gradient = (total / len(draws)).sqrt().tolist()
        rows.append({"contender": name, "value": f"{value:.1e}", "gradient": f"{gradient:.1e}"})
    return rows


def evaluate(loss: Loss, views: list[Tensor]) -> tuple[Tensor, Tensor]:
    leaves = [z.clone().requires_grad_() for z in views]
    value = loss(*leaves)
    gradient = torch.cat(torch.autograd.grad(value, leaves))
    return value.detach().double().cpu(), gradient.double().cpu()


def near(n: int, d: int, noise: float, **tensor: Any) -> list[Tensor]:
    """Return unit rows, and the same with noise of a given length added to each."""
    z = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1)
    other = z + noise * F.normalize(torch.randn_like(z), dim=-1)
    return [z.to(**tensor), other.to(**tensor)]


def rotated(n: int, d: int, noise: float, **tensor: Any) -> list[Tensor]:
    z1, z2 = near(n, d, noise, dtype=torch.float64)
    return [z1.to(**tensor), (z2 @ random_orthogonal(d, dtype=torch.float64)).to(**tensor)]


def measure(rounds: int, quick: bool, **tensor: Any) -> list[Row]:
    rows: list[Row] = []
    n, d = 256, 128
    for temperature in TEMPERATURES[: 1 if quick else None]:
        draws = [near(n, d, 1.0, **tensor) for _ in range(rounds)]

        def exact(z1: Tensor, z2: Tensor, temperature: float = temperature) -> Tensor:
            return exact_info_nce(z1, z2, temperature)

        what = {"loss": "InfoNCE", "N": n, "D": d, "chunks": "", "at": temperature}
        rows += [what | row for row in errors(info_nce_contenders(temperature), exact, draws)]
    for n, d, chunks in CHUNKS[: 1 if quick else None]:
        for noise in NOISES[: 1 if quick else None]:
            draws = [rotated(n, d, noise, **tensor) for _ in range(rounds)]

            def exact(z1: Tensor, z2: Tensor, chunks: int = chunks) -> Tensor:
                return plain_equivariance(z1, z2, chunks)

            what = {"loss": "equivariance", "N": n, "D": d, "chunks": chunks, "at": noise}
            rows += [what | row for row in errors(equivariance_contenders(n, chunks), exact, draws)]
    return rows


def main() -> None:
    options = parser(__doc__, rounds=12).parse_args()
    tensor = start(options)
    torch.manual_seed(0)
    print(f"{'loss':<13}{'N':>5} {'D':>4} {'chunks':>6} {'at':>7}  {'':<26}value    gradient")
    line = "{loss:<13}{N:>5} {D:>4} {chunks:>6} {at:>7}  {contender:<26}{value}  {gradient}"
    report(options, measure(options.rounds, options.quick, **tensor), line)


if __name__ == "__main__":
    main()
