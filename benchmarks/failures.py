"""Who is wrong where: difficult inputs with a known answer, for care_loss and for others.

    python benchmarks/failures.py
    python benchmarks/failures.py --csv benchmarks/results/failures.csv

Each case has an answer that is known from a formula, from float64 or from many digits, and a
tolerance. A library that offers the function gets one of these results:

* right: the error is at most the tolerance;
* wrong: the error is larger, or there is no error where the input has no answer;
* NaN: the value or the gradient is not finite, where it should be;
* refused: the library raises an error. If the input has an answer, it is not found; but nobody gets
  a wrong number.

`promise` says what the documentation of the others promises for the case. The script fails unless
care_loss is right in every case, and the others have the results that are listed here: a library
that is mended makes itself heard. Those that are not installed are left out. (geomstats 2.8 needs
NumPy 2.3 or older: install it with `pip install geomstats "numpy<2.4"` in an environment of its
own.)
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measuring import Row, provenance, write_csv
from precision import exact_info_nce
from rivals import authors_equivariance, info_nce_rivals, torchmetrics_shape
from torch import Tensor

import care_loss
from care_loss import functional
from care_loss.rotation import fit_rotation, fit_similarity, nearest_orthogonal, random_orthogonal

Nearest = Callable[[Tensor], Tensor]  # a matrix to the nearest rotation
Loss = Callable[..., Tensor]
DAMPED = (
    "PyTorch: a gradient for distinct singular values. roma: one that `gradient_eps` damps. "
    "geomstats: nothing on gradients"
)
TEMPERATURE = (
    "lightly: an error below 1e-8. Others: nothing; the paper has temperatures of 0.2 and 0.5"
)


class Case(NamedTuple):
    """A question with its answer, how to ask each library for its error, and who is not right."""

    question: str
    answer: str
    promise: str  # what the others promise
    tolerance: float
    ask: dict[str, Callable[[], float]]
    others: dict[str, str]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotations(*batch: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_orthogonal(d, batch_shape=batch, special=True, generator=generator(), dtype=dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# Rotations


def svd(m: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(m)
    sign = torch.linalg.det(u) * torch.linalg.det(vh)
    return torch.cat((u[..., :-1], u[..., -1:] * sign[..., None, None]), -1) @ vh


def roma(m: Tensor) -> Tensor:
    from roma import special_procrustes

    rotation: Tensor = special_procrustes(m)
    return rotation


def geomstats(m: Tensor) -> Tensor:
    from geomstats.geometry.special_orthogonal import SpecialOrthogonal

    rotation: Tensor = SpecialOrthogonal(m.shape[-1]).projection(m)
    return rotation


def scipy(m: Tensor) -> Tensor:
    """Over O(D): the same for the rotations that it is asked for."""
    from scipy.linalg import orthogonal_procrustes

    return torch.as_tensor(orthogonal_procrustes(torch.eye(m.shape[-1]).expand_as(m), m)[0])


def ours(m: Tensor) -> Tensor:
    return nearest_orthogonal(m, special=True)


NEAREST = {"SVD with autograd": svd, "roma": roma, "geomstats": geomstats, "care_loss": ours}


def each(case: Callable[[Nearest], float]) -> dict[str, Callable[[], float]]:
    return {name: lambda nearest=nearest: case(nearest) for name, nearest in NEAREST.items()}


def gradient_at_a_multiple_of_a_rotation(scale: float) -> Callable[[Nearest], float]:
    """At M = c Q the gradient of <G, R> is (G - Q G'Q) / (2 c)."""

    def case(nearest: Nearest) -> float:
        q = rotations(d=6)
        g = torch.randn(6, 6, dtype=q.dtype, generator=generator(1))
        m = (scale * q).requires_grad_()
        (grad,) = torch.autograd.grad((nearest(m) * g).sum(), m)
        return relative(grad, (g - q @ g.mT @ q) / (2 * scale))

    return case


def gradient_where_two_values_repeat(nearest: Nearest) -> float:
    """The derivative along K = R A of a matrix with s = (2, 2, 1) has a closed form."""
    q = rotations(d=3)
    s = torch.tensor([2.0, 2.0, 1.0], dtype=q.dtype)
    g = torch.randn(3, 3, dtype=q.dtype, generator=generator(1))
    m = (q * s).requires_grad_()
    (grad,) = torch.autograd.grad((nearest(m) * g).sum(), m)
    a = q.mT @ g
    return relative(grad, q @ ((a - a.mT) / (s + s[:, None])))


def rotation_nearest_to_a_large_reflection(nearest: Nearest) -> float:
    """The nearest rotation to a float32 matrix of negative determinant is a rotation."""
    d = 512
    m = rotations(d=d)
    m[:, 0] *= -0.1
    found = nearest(m.float()).double()
    error = relative(found.mT @ found, torch.eye(d, dtype=found.dtype))
    return error + float(torch.linalg.slogdet(found).sign != 1)


def nan_in_one_item(nearest: Nearest) -> float:
    """That item becomes NaN, and the others do not notice."""
    m = rotations(3, d=4)
    expected = m[[0, 2]].clone()
    m[1, 0, 0] = torch.nan
    found = nearest(m)
    return relative(found[[0, 2]], expected) + float(not found[1].isnan().any())


def nan_in_one_cloud_of_torchmetrics() -> float:
    source, target = torch.randn(2, 2, 8, 3, generator=generator())
    disparity = torchmetrics_shape().procrustes_disparity
    expected = disparity(source, target)[1].item()
    source[0, 0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = disparity(source, target)  # a single 0, or one number for each cloud
    if isinstance(found, tuple):
        found = found[0]
    if found.ndim == 0:
        return abs(found.item() - expected) / expected
    return abs(found[1].item() - expected) / expected + float(not found[0].isnan())


def half_precision(nearest: Nearest) -> float:
    q = rotations(d=4, dtype=torch.float16)
    return relative(nearest(q), q)


def few_rows(mapped: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The gradient of <G, X R> for 16 rows of 128 dimensions.

    R takes the span of the rows X onto that of Y, and X R is a smooth function of both: with bases
    E and F of the spans, X R = (X E') W F, where W is the orthogonal factor of a 16 x 16 matrix.
    The derivative is taken by central differences in float64.
    """
    x, y, g, direction = torch.randn(4, 16, 128, dtype=torch.float64, generator=generator())

    def exact(y: Tensor) -> Tensor:
        (_, left), (f, right) = (torch.linalg.qr(z.mT) for z in (x, y))
        u, _, vh = torch.linalg.svd(left @ right.mT)
        return left.mT @ (u @ vh) @ f.mT

    step = 1e-5
    slope = (g * (exact(y + step * direction) - exact(y - step * direction))).sum() / (2 * step)
    y.requires_grad_()
    (grad,) = torch.autograd.grad((g * mapped(x, y)).sum(), y)
    return relative((grad * direction).sum(), slope)


FEW_ROWS = {
    "SVD with autograd": lambda x, y: x @ svd(x.mT @ y),
    "roma": lambda x, y: x @ roma(x.mT @ y),
    "geomstats": lambda x, y: x @ geomstats(x.mT @ y),
    "care_loss": lambda x, y: x @ fit_rotation(x, y, special=True).rotation,
}

# Similarities


# The rotation, scale and translation of target = scale * source @ rotation + translation.
Similarity = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def umeyama(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook: centre, decompose the covariance, divide by the variance."""
    mean_x, mean_y = x.mean(-2, keepdim=True), y.mean(-2, keepdim=True)
    a, b = x - mean_x, y - mean_y
    rotation = svd(a.mT @ b)
    scale = (a @ rotation * b).sum((-2, -1)) / a.square().sum((-2, -1))
    translation = mean_y - scale[..., None, None] * (mean_x @ rotation)
    return rotation, scale, translation.squeeze(-2)


def similarity_of_roma(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from roma import rigid_points_registration

    rotation, translation, scale = rigid_points_registration(x, y, compute_scaling=True)
    return rotation.mT, scale, translation


def our_similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    fit = fit_similarity(x, y, special=True)
    return fit.rotation, fit.scale, fit.translation


SIMILARITIES: dict[str, Similarity] = {
    "Umeyama with autograd": umeyama,
    "roma": similarity_of_roma,
    "care_loss": our_similarity,
}


def of_each(case: Callable[[Similarity], float]) -> dict[str, Callable[[], float]]:
    return {name: lambda fit=fit: case(fit) for name, fit in SIMILARITIES.items()}


def moved_points(offset: float) -> tuple[Tensor, Tensor]:
    """Points of spread 1 far from the origin, and the same turned, twice as large."""
    x = torch.randn(100, 3, dtype=torch.float64, generator=generator())
    turned = 2 * x @ rotations(d=3) + 0.01 * torch.randn(x.shape, generator=generator(1))
    return (x + offset).float(), (turned - offset).float()


def far_from_the_origin(fit: Similarity) -> float:
    """Rotation and scale of float32 points, against those of the same points in float64."""
    x, y = moved_points(1e6)
    rotation, scale, _ = our_similarity(x.double(), y.double())
    found, found_scale, _ = fit(x, y)
    return max(relative(found, rotation), relative(found_scale, scale))


def gradient_of_one_repeated_point(fit: Similarity) -> float:
    """Where all points are equal, the mapped points are the mean of the others."""
    x = torch.ones(8, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(8, 3, dtype=torch.float64, generator=generator())
    rotation, scale, translation = fit(x, y)
    mapped = scale * x @ rotation + translation
    (grad,) = torch.autograd.grad(mapped.square().sum(), x)
    return relative(mapped, y.mean(0).expand_as(y)) + float(not grad.isfinite().all())


def gradient_at_a_cube(fit: Similarity) -> float:
    """The vertices of a cube, turned: their singular values are equal."""
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    y, direction = x @ rotations(d=3), torch.randn(8, 3, dtype=x.dtype, generator=generator(1))
    g = torch.randn(8, 3, dtype=x.dtype, generator=generator(2))

    def value(y: Tensor) -> Tensor:
        rotation, scale, translation = fit(x, y)
        return (g * (scale * x @ rotation + translation)).sum()

    step = 1e-5
    slope = (value(y + step * direction) - value(y - step * direction)) / (2 * step)
    y.requires_grad_()
    (grad,) = torch.autograd.grad(value(y), y)
    return relative((grad * direction).sum(), slope)


# Losses


CONTRASTIVE = ("authors", "lightly", "pytorch-metric-learning", "plain autograd")


def contrastive(temperature: float) -> dict[str, Loss]:
    rivals: dict[str, Loss] = info_nce_rivals(temperature)
    rivals = {name: rivals[name] for name in CONTRASTIVE}

    def care(z1: Tensor, z2: Tensor) -> Tensor:
        return functional.info_nce_loss(z1, z2, temperature=temperature)

    return rivals | {"care_loss": care}


def with_gradient(loss: Loss, *views: Tensor) -> tuple[Tensor, Tensor]:
    leaves = [z.clone().requires_grad_() for z in views]
    value = loss(*leaves)
    return value.detach(), torch.cat(torch.autograd.grad(value, leaves))


def info_nce(temperature: float, views: Tensor) -> dict[str, Callable[[], float]]:
    """The larger of the relative errors of value and gradient, judged by float64."""

    def exact(z1: Tensor, z2: Tensor) -> Tensor:
        return exact_info_nce(z1, z2, temperature)

    value, gradient = with_gradient(exact, *views.double())

    def error(loss: Loss) -> float:
        found, found_gradient = with_gradient(loss, *views)
        errors = relative(found, value), relative(found_gradient, gradient)
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    return {name: lambda loss=loss: error(loss) for name, loss in contrastive(temperature).items()}


def row_of_zeros(views: Tensor) -> dict[str, Callable[[], float]]:
    """The gradient of a row of zeros, in units of 1000 times the longest of the others."""
    views = views.clone()
    views[0, 3] = 0

    def error(loss: Loss) -> float:
        lengths = with_gradient(loss, *views)[1].norm(dim=-1)
        others = torch.cat((lengths[:3], lengths[4:]))
        return (lengths[3] / others.max()).item() / 1000

    return {name: lambda loss=loss: error(loss) for name, loss in contrastive(0.5).items()}


def nan_in_a_row() -> dict[str, Callable[[], float]]:
    views = torch.randn(2, 32, 16, generator=generator())
    views[0, 3, 5] = torch.nan

    def error(loss: Loss) -> float:
        return float(not loss(*views).isnan())

    return {name: lambda loss=loss: error(loss) for name, loss in contrastive(0.5).items()}


def equivariance(
    error: Callable[[Callable[[Tensor, Tensor, int], Tensor]], float],
) -> dict[str, Callable[[], float]]:
    def care(z1: Tensor, z2: Tensor, chunks: int) -> Tensor:
        return functional.equivariance_loss(z1, z2, chunks=chunks, scale="authors")

    losses = {"authors": authors_equivariance, "care_loss": care}
    return {name: lambda loss=loss: error(loss) for name, loss in losses.items()}


def nearly_rotated(n: int = 256, d: int = 128) -> tuple[Tensor, Tensor]:
    """Unit rows, and the same after a rotation with noise of length 1e-3 added to each."""
    z = F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator()), dim=-1)
    noise = torch.randn(n, d, dtype=torch.float64, generator=generator(1))
    other = (z + 1e-3 * F.normalize(noise, dim=-1)) @ rotations(d=d)
    return z.float(), other.float()


def gradient_under_autocast(loss: Callable[[Tensor, Tensor, int], Tensor]) -> float:
    views = nearly_rotated()

    def wanted(z1: Tensor, z2: Tensor) -> Tensor:
        return authors_equivariance(z1, z2, 16)

    def found(z1: Tensor, z2: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(z1, z2, 16)

    _, gradient = with_gradient(wanted, *(z.double() for z in views))
    return relative(with_gradient(found, *views)[1], gradient)


def rows_that_fill_no_chunk(loss: Callable[[Tensor, Tensor, int], Tensor]) -> float:
    """The last 10 of 250 rows are moved: the loss must change."""
    z1, z2 = torch.randn(2, 250, 16, generator=generator())
    other = torch.cat((z2[:240], z2[240:].flip(0)))
    return float(loss(z1, z2, 16) == loss(z1, other, 16))


def second_derivative_at_zero(loss: Callable[[Tensor, Tensor, int], Tensor]) -> float:
    """Of views that are equal: the Hessian times a vector, against a difference of gradients."""
    z, direction = torch.randn(2, 8, 4, dtype=torch.float64, generator=generator())

    def gradient(x: Tensor, **options: Any) -> Tensor:
        (grad,) = torch.autograd.grad(loss(x, z, 1), x, **options)
        return grad

    x = z.clone().requires_grad_()
    (found,) = torch.autograd.grad((gradient(x, create_graph=True) * direction).sum(), x)
    step = 1e-5
    ahead, behind = (gradient((z + sign * step * direction).requires_grad_()) for sign in (1, -1))
    return relative(found, (ahead - behind) / (2 * step))


def of_rotations() -> list[Case]:
    refused = {"SVD with autograd": "refused", "roma": "refused", "geomstats": "refused"}
    return [
        Case(
            "gradient at a rotation, as of an equivariant encoder with white embeddings",
            "(G − QGᵀQ) / 2",
            DAMPED,
            1e-4,
            each(gradient_at_a_multiple_of_a_rotation(1.0)),
            {"SVD with autograd": "NaN", "geomstats": "wrong"},
        ),
        Case(
            "gradient at 1e-6 times a rotation",
            "1e6 times that",
            DAMPED,
            1e-4,
            each(gradient_at_a_multiple_of_a_rotation(1e-6)),
            {"SVD with autograd": "NaN", "roma": "wrong", "geomstats": "NaN"},
        ),
        Case(
            "gradient where two singular values are equal",
            "a closed form",
            DAMPED,
            1e-4,
            each(gradient_where_two_values_repeat),
            # NaN on processors whose rounding leaves the two values exactly equal
            {"SVD with autograd": "wrong or NaN", "geomstats": "wrong or NaN"},
        ),
        Case(
            "gradient of a fit to 16 rows in 128 dimensions",
            "central differences in float64",
            DAMPED,
            1e-4,
            {name: lambda mapped=mapped: few_rows(mapped) for name, mapped in FEW_ROWS.items()},
            {"SVD with autograd": "NaN", "geomstats": "NaN"},
        ),
        Case(
            "nearest rotation to a float32 matrix of 512 dimensions, determinant < 0",
            "a rotation",
            "roma, geomstats: the nearest rotation. The textbook: a sign from `det`",
            1e-4,
            each(rotation_nearest_to_a_large_reflection),
            {"SVD with autograd": "wrong", "roma": "wrong", "geomstats": "wrong"},
        ),
        Case(
            "NaN in one item of a batch of fits",
            "NaN for this item only",
            "SciPy, PyTorch: an error. torchmetrics: a warning, and 0 for the batch",
            1e-4,
            each(nan_in_one_item)
            | {
                "torchmetrics": nan_in_one_cloud_of_torchmetrics,
                "SciPy": lambda: nan_in_one_item(scipy),
            },
            refused | {"SciPy": "refused", "torchmetrics": "wrong"},
        ),
        Case(
            "nearest rotation to a float16 matrix",
            "to the rounding of float16",
            "PyTorch: `svd` takes no half types",
            2**-10,
            each(half_precision),
            refused,
        ),
    ]


def of_similarities() -> list[Case]:
    return [
        Case(
            "similarity of float32 points of spread 1, 1e6 from the origin",
            "rotation and scale of the same points in float64",
            "nothing",
            1e-4,
            of_each(far_from_the_origin),
            {"Umeyama with autograd": "wrong", "roma": "wrong"},
        ),
        Case(
            "similarity of eight equal points, with its gradient",
            "the mean of the others, and a finite gradient",
            "nothing",
            1e-4,
            of_each(gradient_of_one_repeated_point),
            {"Umeyama with autograd": "NaN", "roma": "NaN"},
        ),
        Case(
            "gradient of a similarity between two cubes",
            "central differences in float64",
            DAMPED,
            1e-4,
            of_each(gradient_at_a_cube),
            {"Umeyama with autograd": "NaN"},
        ),
    ]


def of_info_nce() -> list[Case]:
    views = torch.randn(2, 128, 128, generator=generator())
    near = torch.stack((views[0], F.normalize(views[0], dim=-1) + 0.09 * views[1]))
    overflow = {"authors": "NaN"}
    return [
        *(
            Case(
                f"InfoNCE of near positives in {name}, temperature {temperature}",
                "float64 of the same rows",
                TEMPERATURE if name == "float32" else "nothing on half types",
                tolerance,
                info_nce(temperature, near.to(getattr(torch, name))),
                others,
            )
            for name, tolerance, temperature, others in (
                ("float32", 1e-3, 0.5, {}),
                ("float32", 1e-3, 0.05, {}),
                ("float32", 1e-3, 0.02, dict.fromkeys(CONTRASTIVE, "wrong")),
                ("float32", 1e-3, 0.0112, dict.fromkeys(CONTRASTIVE, "wrong") | overflow),
                ("float32", 1e-3, 0.005, dict.fromkeys(CONTRASTIVE, "wrong") | overflow),
                ("bfloat16", 2e-2, 0.5, {}),
                ("bfloat16", 2e-2, 0.07, dict.fromkeys(CONTRASTIVE, "wrong")),
                ("float16", 1e-2, 0.5, {}),
                ("float16", 1e-2, 0.07, overflow),
            )
        ),
        Case(
            "InfoNCE with a row of zeros",
            "a gradient at most 1,000 times as long as the others",
            "`normalize` of PyTorch divides by the larger of the length and 1e-12",
            1.0,
            row_of_zeros(views),
            dict.fromkeys(CONTRASTIVE, "wrong"),
        ),
        Case("InfoNCE with NaN in a row", "NaN", "nothing", 0.5, nan_in_a_row(), {}),
    ]


def of_equivariance() -> list[Case]:
    return [
        Case(
            "equivariance gradient near its minimum, under bfloat16 autocast",
            "float64",
            "nothing; the published training is in float32",
            1e-2,
            equivariance(gradient_under_autocast),
            {"authors": "wrong"},
        ),
        Case(
            "equivariance loss of 250 rows in 16 chunks",
            "depends on all rows",
            "nothing; the published batches fill their chunks",
            0.5,
            equivariance(rows_that_fill_no_chunk),
            {"authors": "wrong"},
        ),
        Case(
            "second derivative of the equivariance loss at 0",
            "a difference of gradients",
            "nothing; training needs first derivatives",
            1e-4,
            equivariance(second_derivative_at_zero),
            {"authors": "NaN"},
        ),
    ]


SUBJECTS = {
    "rotations": of_rotations,
    "similarities": of_similarities,
    "InfoNCE": of_info_nce,
    "equivariance": of_equivariance,
}


def result(ask: Callable[[], float], tolerance: float) -> tuple[str, str]:
    """Ask a library, and return its result and its error."""
    try:
        error = ask()
    except Exception as exception:
        return "refused", type(exception).__name__.lstrip("_")
    if not math.isfinite(error):
        return "NaN", ""
    return "right" if error <= tolerance else "wrong", f"{error:.1e}"


FORMULAS = (
    "authors",
    "plain autograd",
    "SVD with autograd",
    "Umeyama with autograd",
)  # no libraries


def version_of(library: str) -> str:
    """Return the version of a library, or an empty text if it is not installed."""
    if library == "care_loss":
        return care_loss.__version__
    name = library.lower()
    return version(name) if find_spec(name.replace("-", "_")) else ""


def measure() -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    surprises = []
    for subject, case in [(name, case) for name, cases in SUBJECTS.items() for case in cases()]:
        for library, ask in sorted(case.ask.items(), key=lambda item: item[0] != "care_loss"):
            release = torch.__version__ if library in FORMULAS else version_of(library)
            if not release:
                continue
            found, error = result(ask, case.tolerance)
            rows.append(
                {
                    "subject": subject,
                    "case": case.question,
                    "right answer": case.answer,
                    "library": library,
                    "version": release,
                    "result": found,
                    "error": error,
                    "promise": case.promise,
                }
            )
            if found not in case.others.get(library, "right").split(" or "):
                surprises.append(f"{library}, {case.question}: {found} {error}")
    return rows, surprises


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the results here as well")
    options = parser.parse_args()
    rows, surprises = measure()
    for row in rows:
        print("{case:<76}{library:<25}{result:<9}{error}".format(**row))
    write_csv(options.csv, [row | provenance("cpu") for row in rows])
    if surprises:
        sys.exit("not as described:\n" + "\n".join(surprises))


os.environ.setdefault("GEOMSTATS_BACKEND", "pytorch")
if __name__ == "__main__":
    main()
