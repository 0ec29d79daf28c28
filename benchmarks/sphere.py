"""How exact are distances, maps and means on the sphere, and what does exactness cost?

    python benchmarks/sphere.py                            # the tables
    python benchmarks/sphere.py --csv benchmarks/results/sphere-cpu.csv \
        --errors benchmarks/results/sphere-errors.csv

The first table compares errors of care_loss, the textbook formulas with `acos`, geoopt, geomstats
and SciPy, each where it is installed and offers the function. (geomstats 2.8 needs NumPy 2.3 or
older: install it with `pip install geomstats "numpy<2.4"` in an environment of its own.) Distances
are compared with those of the same rounded points in 40 digits. The script fails unless care_loss
stays within the bounds that it promises.

The second table gives times as ratios to the textbook distance, whose gradient is infinite or NaN
where points coincide; a copy of the two inputs is the floor.
"""

import argparse
import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mpmath
import torch
from measuring import Row, provenance, ratio_columns, take_turns, write_csv
from torch import Tensor

from care_loss import sphere

DIM, PAIRS = 16, 20
ANGLES = [1e-7, 1e-4, 1e-2, 1.0, 3.0]
SIZES = [(65536, 128), (4096, 128), (65536, 3)]
NO_ANSWER = ""


class Contender(NamedTuple):
    """The functions that a library offers."""

    distance: Callable[[Tensor, Tensor], Tensor] | None = None
    expmap: Callable[[Tensor, Tensor], Tensor] | None = None
    logmap: Callable[[Tensor, Tensor], Tensor] | None = None
    slerp: Callable[[Tensor, Tensor, float], Tensor] | None = None
    parallel_transport: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    frechet_mean: Callable[[Tensor], Tensor] | None = None


def acos(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1).acos()


def acos_clamped(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1).clamp(-1, 1).acos()


def acos_clamped_inside(x: Tensor, y: Tensor) -> Tensor:
    limit = 1 - torch.finfo(x.dtype).eps
    return (x * y).sum(-1).clamp(-limit, limit).acos()


def textbook_expmap(x: Tensor, v: Tensor) -> Tensor:
    length = v.norm(dim=-1, keepdim=True)
    return length.cos() * x + length.sin() / length * v


def textbook_logmap(x: Tensor, y: Tensor) -> Tensor:
    cos = (x * y).sum(-1, keepdim=True).clamp(-1, 1)
    angle = cos.acos()
    return angle / angle.sin() * (y - cos * x)


def textbook_slerp(x: Tensor, y: Tensor, t: float) -> Tensor:
    angle = acos_clamped(x, y).unsqueeze(-1)
    return (((1 - t) * angle).sin() * x + (t * angle).sin() * y) / angle.sin()


def textbook_transport(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    cos = (x * y).sum(-1, keepdim=True)
    return v - (y * v).sum(-1, keepdim=True) / (1 + cos) * (x + y)


def geoopt() -> Contender:
    from geoopt.manifolds import Sphere

    manifold = Sphere()
    return Contender(manifold.dist, manifold.expmap, manifold.logmap, None, manifold.transp)


def geomstats() -> Contender:
    os.environ["GEOMSTATS_BACKEND"] = "pytorch"
    from geomstats.geometry.hypersphere import Hypersphere
    from geomstats.learning.frechet_mean import FrechetMean

    def metric(x: Tensor) -> Any:
        return Hypersphere(dim=x.shape[-1] - 1).metric

    def mean(x: Tensor) -> Tensor:
        estimate: Tensor = FrechetMean(Hypersphere(dim=x.shape[-1] - 1)).fit(x).estimate_
        return estimate

    return Contender(
        lambda x, y: metric(x).dist(x, y),
        lambda x, v: metric(x).exp(v, x),
        lambda x, y: metric(x).log(y, x),
        None,
        lambda x, y, v: metric(x).parallel_transport(v, x, end_point=y),
        mean,
    )


def scipy() -> Contender:
    from scipy.spatial import geometric_slerp

    def slerp(x: Tensor, y: Tensor, t: float) -> Tensor:
        pairs = zip(x.numpy(), y.numpy(), strict=True)
        rows = [torch.from_numpy(geometric_slerp(a, b, [t])[0]) for a, b in pairs]
        return torch.stack(rows).to(x.dtype)

    return Contender(slerp=slerp)


def contenders() -> dict[str, Contender]:
    found = {
        "care_loss": Contender(
            sphere.geodesic_distance,
            sphere.expmap,
            sphere.logmap,
            sphere.slerp,
            sphere.parallel_transport,
            sphere.frechet_mean,
        ),
        "acos": Contender(
            acos, textbook_expmap, textbook_logmap, textbook_slerp, textbook_transport
        ),
        "acos, clamped": Contender(acos_clamped),
        "acos, clamped inside": Contender(acos_clamped_inside),
    }
    for load in (geoopt, geomstats, scipy):
        if importlib.util.find_spec(load.__name__):
            found[load.__name__] = load()
    return found


def pairs(angle: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw points at an angle, and the tangent vectors of that length that lead to the second."""
    generator = torch.Generator().manual_seed(0)
    x = sphere.random_uniform(DIM, batch_shape=(PAIRS,), generator=generator, dtype=torch.float64)
    v = torch.randn(PAIRS, DIM, generator=generator, dtype=torch.float64)
    v = v - (x * v).sum(-1, keepdim=True) * x
    v = v / v.norm(dim=-1, keepdim=True)
    y = math.cos(angle) * x + math.sin(angle) * v
    return x.to(dtype), y.to(dtype), (angle * v).to(dtype)


def exact_angles(x: Tensor, y: Tensor) -> list[Any]:
    angles = []
    with mpmath.workdps(40):
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            a, b = ([mpmath.mpf(value) for value in z] for z in (a, b))
            a, b = ([value / mpmath.norm(z) for value in z] for z in (a, b))
            apart = mpmath.norm([p - q for p, q in zip(a, b, strict=True)])
            along = mpmath.norm([p + q for p, q in zip(a, b, strict=True)])
            angles.append(2 * mpmath.atan2(apart, along))
    return angles


def largest(errors: Tensor) -> float:
    """Return the largest, or the first that is not finite."""
    broken = errors[~errors.isfinite()]
    return float(broken[0] if broken.numel() else errors.abs().max())


def distance_error(c: Contender, angle: float, dtype: torch.dtype) -> float:
    x, y, _ = pairs(angle, dtype)
    found = c.distance(x, y).tolist()
    errors = [float(abs(f - e) / e) for f, e in zip(found, exact_angles(x, y), strict=True)]
    return largest(torch.tensor(errors))


def distance_to_itself(c: Contender, _: float, dtype: torch.dtype) -> float:
    x = pairs(1.0, dtype)[0]
    return largest(c.distance(x, x))


def distance_to_the_antipode(c: Contender, _: float, dtype: torch.dtype) -> float:
    x = pairs(1.0, dtype)[0]
    return largest(c.distance(x, -x).double() - math.pi)


def gradient_length(c: Contender, angle: float, dtype: torch.dtype) -> float:
    x, y, _ = pairs(angle, dtype)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(c.distance(x, y).sum(), x)
    grad = grad.double()
    # Along the sphere: what leaves it depends on how a formula extends beyond it.
    unit = x.detach().double()
    return largest((grad - (grad * unit).sum(-1, keepdim=True) * unit).norm(dim=-1) - 1)


def gradient_where_there_is_none(sign: int) -> Callable[..., float]:
    def gradient(c: Contender, _: float, dtype: torch.dtype) -> float:
        x = pairs(1.0, dtype)[0]
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(c.distance(leaf, sign * x).sum(), leaf)
        return largest(grad.flatten())

    return gradient


def log_of_exp(c: Contender, angle: float, dtype: torch.dtype) -> float:
    x, _, v = pairs(angle, dtype)
    return largest((c.logmap(x, c.expmap(x, v)) - v).flatten())


def logmap_of_itself(c: Contender, _: float, dtype: torch.dtype) -> float:
    """Return how far the derivative at equal points is from 1, along a tangent vector."""
    x, _, v = pairs(1.0, dtype)
    y = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((c.logmap(x, y) * v).sum(), y)
    return largest((grad * v).sum(-1) - 1)


def expmap_of_zero(c: Contender, _: float, dtype: torch.dtype) -> float:
    x, _, v = pairs(1.0, dtype)
    zero = torch.zeros_like(v).requires_grad_()
    (grad,) = torch.autograd.grad((c.expmap(x, zero) * v).sum(), zero)
    return largest((grad * v).sum(-1) - 1)


def slerp_error(c: Contender, angle: float, dtype: torch.dtype) -> float:
    x, _, v = pairs(angle, torch.float64)
    expected = math.cos(angle / 2) * x + math.sin(angle / 2) / angle * v
    found = c.slerp(*pairs(angle, dtype)[:2], 0.5)
    return largest((found.double() - expected).flatten())


def transport_error(c: Contender, angle: float, dtype: torch.dtype) -> float:
    """Return the error of the inner product of two tangent vectors, relative to their lengths."""
    x, y, v = pairs(angle, dtype)
    w = v.roll(1, -1)
    w = w - (x * w).sum(-1, keepdim=True) * x
    v, w = (z / z.norm(dim=-1, keepdim=True) for z in (v, w))
    before, after = (
        (a.double() * b.double()).sum(-1)
        for a, b in ((v, w), (c.parallel_transport(x, y, v), c.parallel_transport(x, y, w)))
    )
    return largest(after - before)


def gradient_at_the_mean(c: Contender, radius: float, dtype: torch.dtype) -> float:
    """Return the norm of the gradient of the objective at the mean of points within a radius."""
    x, _, v = pairs(1.0, dtype)
    lengths = torch.linspace(0, radius, PAIRS, dtype=dtype).unsqueeze(-1)
    around = v - (v * x[:1]).sum(-1, keepdim=True) * x[:1]
    around = lengths * around / around.norm(dim=-1, keepdim=True)
    points = textbook_expmap(x[:1], around[1:])
    mean = c.frechet_mean(points).double()
    return textbook_logmap(mean, points.double()).mean(0).norm().item()


QUESTIONS: dict[str, tuple[Callable[..., float], list[float], str, float]] = {
    # what is measured, at which angles, by which function, and the bound in units of eps
    "distance, relative error": (distance_error, ANGLES, "distance", 8),
    "distance of a point to itself": (distance_to_itself, [0.0], "distance", 0),
    "distance of antipodes, minus pi": (distance_to_the_antipode, [math.pi], "distance", 4),
    "gradient of distance, error of length": (gradient_length, ANGLES[1:], "distance", 8),
    "gradient at a point itself, largest": (
        gradient_where_there_is_none(1), [0.0], "distance", 0,
    ),
    "gradient at the antipode, largest": (
        gradient_where_there_is_none(-1), [math.pi], "distance", 0,
    ),
    "log(exp(v)) - v": (log_of_exp, ANGLES, "logmap", 80),
    "derivative of logmap at equal points": (logmap_of_itself, [0.0], "logmap", 8),
    "derivative of expmap at 0": (expmap_of_zero, [0.0], "expmap", 8),
    "slerp at 1/2": (slerp_error, ANGLES, "slerp", 8),
    "transport, inner product": (
        transport_error, [1.0, 3.0, math.pi - 1e-3], "parallel_transport", 8,
    ),
    "gradient at the Fréchet mean": (gradient_at_the_mean, [0.1, 0.5, 1.2], "frechet_mean", 8),
}  # fmt: skip


def error_rows() -> tuple[list[Row], list[str]]:
    """Ask every question of every contender; return the answers, and the bounds not kept."""
    rows: list[Row] = []
    failures = []
    candidates = contenders()
    for question, (ask, angles, name, bound) in QUESTIONS.items():
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)  # geomstats computes in it
            for angle in angles:
                row: Row = {"question": question, "dtype": str(dtype)[6:], "angle": f"{angle:.7g}"}
                for contender, functions in candidates.items():
                    row[contender] = NO_ANSWER
                    if not getattr(functions, name):
                        continue
                    try:
                        error = ask(functions, angle, dtype)
                    except (RuntimeError, ValueError) as exception:
                        row[contender] = type(exception).__name__
                        continue
                    row[contender] = f"{error:.1e}"
                    kept = abs(error) <= bound * torch.finfo(dtype).eps
                    if contender == "care_loss" and not kept:
                        failures.append(f"{question}, {dtype}, {angle}: {error:.1e}")
                rows.append(row)
    torch.set_default_dtype(torch.float32)
    return rows, failures


def times(n: int, dim: int, rounds: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    x, y = sphere.random_uniform(dim, batch_shape=(2, n), generator=generator, dtype=torch.float32)
    leaves = x.requires_grad_(), y.requires_grad_()

    def forward(distance: Callable[..., Tensor]) -> Callable[[], Any]:
        return torch.no_grad()(lambda: distance(x, y))

    def both(distance: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(distance(x, y).sum(), leaves)

    distances = {
        "acos, clamped": acos_clamped,
        "care_loss": sphere.geodesic_distance,
    }
    if importlib.util.find_spec("geoopt"):
        distances["geoopt"] = geoopt().distance
    rows = []
    for direction, call in (("forward", forward), ("forward and backward", both)):
        calls = {name: call(distance) for name, distance in distances.items()}
        calls["copy of the inputs"] = torch.no_grad()(lambda: (x.clone(), y.clone()))
        taken = take_turns(calls, rounds)
        for name, seconds in taken.items():
            ratios = ratio_columns(seconds, taken["acos, clamped"])
            rows.append({"N": n, "D": dim, "direction": direction, "contender": name} | ratios)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--rounds", type=int, default=9, help="how often the contenders take turns")
    parser.add_argument("--quick", action="store_true", help="one small size and two rounds")
    parser.add_argument("--csv", type=Path, help="write the times here as well")
    parser.add_argument("--errors", type=Path, help="write the errors here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of other libraries
    rows, failures = error_rows()
    names = list(rows[0])[3:]
    print(f"{'':<40}{'angle':>10}  " + "".join(f"{name:>22}" for name in names))
    for row in rows:
        print("{question:<40}{angle:>10}  ".format(**row) + row["dtype"][5:], end="")
        print("".join(f"{row[name]:>22}" for name in names))
    write_csv(options.errors, [row | provenance("cpu") for row in rows])
    timed: list[Row] = []
    for size in [(256, 16)] if options.quick else SIZES:
        for row in times(*size, rounds=2 if options.quick else options.rounds):
            timed.append(row | provenance("cpu"))
            print(
                "N = {N}, D = {D}: {contender:<20}{direction:<22}{ms:>9} ms"
                "  {ratio} ({ratio_low} to {ratio_high})".format(**row)
            )
    write_csv(options.csv, timed)
    if failures:
        raise SystemExit(f"care_loss is less exact than promised: {failures}")


if __name__ == "__main__":
    main()
