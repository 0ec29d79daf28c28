"""How long does fitting rotations take, how much memory, and how exact is the result?

    python benchmarks/procrustes.py                            # a table
    python benchmarks/procrustes.py --csv benchmarks/results/procrustes-cpu.csv

Each problem is a batch of B pairs of N rows of D dimensions, related by an orthogonal map and
noise. The contenders take turns. Times are given as ratios to the plain decomposition in the same
round: the product that forms the D x D matrix, `torch.linalg.svd`, and the product of its factors.
The product alone is the floor. "excess" is how much the sum of squared errors exceeds the best,
relative to the sum of squares of the target; "orthogonality" is ||R'R - I|| in units of
eps sqrt(D), the worst of the batch; "reflections" counts results of determinant -1 where a rotation
was asked for.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Row, megabytes, provenance, ratio_columns, take_turns, write_csv
from torch import Tensor

from care_loss.rotation import fit_rotation, random_orthogonal

SIZES = [  # problems of a batch, rows, dimensions
    (100_000, 8, 3),
    (4096, 8, 3),
    (256, 32, 16),
    (64, 128, 64),
    (16, 256, 128),
    (4, 1024, 512),
    (64, 16, 128),  # few rows
    (1, 64, 2048),
]
GIGABYTE = 2**30
Fit = Callable[[Tensor, Tensor], Tensor]


def svd(source: Tensor, target: Tensor) -> Tensor:
    """The textbook: fine forward, its derivative by autograd divides by differences."""
    u, _, vh = torch.linalg.svd(source.mT @ target)
    return u @ vh


def svd_special(source: Tensor, target: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(source.mT @ target)
    sign = torch.linalg.det(u) * torch.linalg.det(vh)
    return torch.cat((u[..., :-1], u[..., -1:] * sign[..., None, None]), -1) @ vh


def corrected(source: Tensor, target: Tensor) -> Tensor:
    """Decompose in float32, and take a step of Newton's method in float64."""
    m = source.double().mT @ target.double()
    u, s, vh = (x.double() for x in torch.linalg.svd(m.float()))
    r = polished(u @ vh)
    skew = vh @ (r.mT @ m - m.mT @ r) @ vh.mT / (s.unsqueeze(-1) + s.unsqueeze(-2))
    return polished(r + r @ vh.mT @ skew @ vh).float()


def by_eigenvectors(source: Tensor, target: Tensor) -> Tensor:
    """Decompose M'M in float64, which squares the condition of M."""
    m = source.double().mT @ target.double()
    squares, v = torch.linalg.eigh(m.mT @ m)
    return polished(m @ v / squares.sqrt().unsqueeze(-2) @ v.mT).float()


def polished(r: Tensor) -> Tensor:
    return 1.5 * r - 0.5 * r @ (r.mT @ r)


def scipy(source: Tensor, target: Tensor) -> Tensor:
    from scipy.linalg import orthogonal_procrustes

    pairs = zip(source.numpy(), target.numpy(), strict=True)
    return torch.stack([torch.from_numpy(orthogonal_procrustes(x, y)[0]) for x, y in pairs])


def roma(source: Tensor, target: Tensor) -> Tensor:
    from roma import procrustes

    rotation: Tensor = procrustes(source.mT @ target)
    return rotation


def roma_special(source: Tensor, target: Tensor) -> Tensor:
    from roma import special_procrustes

    rotation: Tensor = special_procrustes(source.mT @ target)
    return rotation


def contenders(b: int, n: int, d: int, device: str) -> dict[str, tuple[Fit, bool, bool]]:
    """Name the functions: each with whether it fits over SO(D) and whether it has a backward."""
    backward = b * d**3 < 4e9  # beyond that the backward of an SVD takes many seconds
    found: dict[str, tuple[Fit, bool, bool]] = {
        "SVD": (svd, False, backward),
        "SVD in float64": (lambda x, y: svd(x.double(), y.double()).float(), False, backward),
        "SVD, SO(D)": (svd_special, True, backward),
        "care_loss": (lambda x, y: fit_rotation(x, y).rotation, False, True),
        "care_loss, SO(D)": (lambda x, y: fit_rotation(x, y, special=True).rotation, True, True),
    }
    if n > d:  # else M is singular
        found["SVD in float32, corrected"] = corrected, False, False
        found["eigenvectors of M'M"] = by_eigenvectors, False, False
    if importlib.util.find_spec("roma"):
        # Its backward forms a Jacobian of D^4 entries.
        backward = 4 * b * d**4 < GIGABYTE
        found |= {"roma": (roma, False, backward), "roma, SO(D)": (roma_special, True, backward)}
    if importlib.util.find_spec("scipy") and device == "cpu":
        found["SciPy"] = scipy, False, False
    return found


def problem(b: int, n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    source, noise = torch.randn(2, b, n, d, generator=generator, device=device)
    rotation = random_orthogonal(d, batch_shape=(b,), generator=generator, device=device)
    return source, source @ rotation + 0.1 * noise


def best(source: Tensor, target: Tensor, special: bool) -> Tensor:
    """Return the largest possible trace of R'M, from singular values in float64."""
    m = source.double().mT @ target.double()
    if source.shape[-2] < m.shape[-1]:  # the singular values of the small factors are the same
        (_, rx), (_, ry) = (torch.linalg.qr(z.double().mT) for z in (source, target))
        return torch.linalg.svdvals(rx @ ry.mT).sum(-1)
    s = torch.linalg.svdvals(m)
    if special:
        s[..., -1] *= torch.stack([torch.linalg.slogdet(one).sign for one in m])
    return s.sum(-1)


def errors(source: Tensor, target: Tensor, rotation: Tensor, special: bool) -> Row:
    r = rotation.double()
    trace = ((source.double() @ r) * target.double()).sum((-2, -1))
    excess = 2 * (best(source, target, special) - trace) / target.double().square().sum((-2, -1))
    d = r.shape[-1]
    deviation = (r.mT @ r - torch.eye(d, dtype=r.dtype, device=r.device)).norm(dim=(-2, -1))
    eps = torch.finfo(rotation.dtype).eps
    signs = torch.stack([torch.linalg.slogdet(one).sign for one in r]) if special else None
    return {
        "excess": f"{excess.max().clamp_min(0).item():.1e}",
        "orthogonality": f"{deviation.max().item() / eps / math.sqrt(d):.2f}",
        "reflections": "" if signs is None else int((signs < 0).sum()),
    }


def measure(b: int, n: int, d: int, rounds: int, device: str) -> list[Row]:
    source, target = problem(b, n, d, device)
    leaf = source.clone().requires_grad_()
    weight = torch.randn(b, d, d, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "floor: the product|forward": lambda: source.mT @ target,
    }
    results: dict[str, Row] = {}
    for name, (fit, special, backward) in contenders(b, n, d, device).items():
        calls[f"{name}|forward"] = lambda fit=fit: fit(source, target)
        results[f"{name}|forward"] = errors(source, target, fit(source, target), special)
        if backward:
            key = f"{name}|forward and backward"
            calls[key] = lambda fit=fit: torch.autograd.grad(fit(leaf, target), leaf, weight)
            finite = torch.autograd.grad(fit(leaf, target), leaf, weight)[0].isfinite()
            results[key] = {"finite gradients": f"{finite.all(-1).all(-1).double().mean():.3f}"}
    columns = ["excess", "orthogonality", "reflections", "finite gradients"]
    memory = {name: megabytes(call, device) for name, call in calls.items()}
    seconds = take_turns(calls, rounds)
    rows: list[Row] = []
    for name, times in seconds.items():
        contender, _, direction = name.partition("|")
        row: Row = {"B": b, "N": n, "D": d, "contender": contender, "direction": direction}
        row |= ratio_columns(times, seconds["SVD|forward"])
        row["MB"] = f"{memory[name]:.1f}"
        rows.append(row | dict.fromkeys(columns, "") | results.get(name, {}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="how often the contenders take turns")
    parser.add_argument("--quick", action="store_true", help="one small size and two rounds")
    parser.add_argument("--csv", type=Path, help="write the results here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    print(f"{'':<44}{'ms':>10}  {'ratio to SVD forward':<24}{'MB':>7}  excess, orthogonality")
    for size in [(32, 16, 8), (4, 4, 32)] if options.quick else SIZES:
        print("B = {}, N = {}, D = {}".format(*size))
        rounds = 2 if options.quick else options.rounds
        for row in measure(*size, rounds=rounds, device=options.device):
            rows.append(row | provenance(options.device))
            print(
                "  {contender:<20}{direction:<22}{ms:>10}  {ratio} ({ratio_low} to {ratio_high})"
                "{MB:>9}  {excess} {orthogonality}".format(**row)
            )
            sys.stdout.flush()
        write_csv(options.csv, rows)  # an interrupted run keeps the sizes that it has done


if __name__ == "__main__":
    main()
