"""Where fits of rotations by others are wrong or not differentiable, and this one is right.

    python benchmarks/procrustes_gradients.py
    python benchmarks/procrustes_gradients.py --csv benchmarks/results/procrustes-gradients.csv

Each case has a known answer. Every contender must agree with it to a relative error of 1e-4; "nan",
an exception and a larger error count as failures. The script fails unless care_loss passes every
case and each rival fails at least those that are listed for it: a rival that is mended makes itself
heard.
"""

import argparse
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Row, provenance, write_csv
from rivals import torchmetrics_shape
from torch import Tensor

from care_loss.rotation import nearest_orthogonal, random_orthogonal

Nearest = Callable[[Tensor], Tensor]
Case = Callable[[Nearest], float]
TOLERANCE = 1e-4


def svd(m: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(m)
    sign = torch.linalg.det(u) * torch.linalg.det(vh)
    return torch.cat((u[..., :-1], u[..., -1:] * sign[..., None, None]), -1) @ vh


def roma(m: Tensor) -> Tensor:
    from roma import special_procrustes

    rotation: Tensor = special_procrustes(m)
    return rotation


def care_loss(m: Tensor) -> Tensor:
    return nearest_orthogonal(m, special=True)


CONTENDERS = {"SVD with autograd": svd, "roma": roma, "care_loss": care_loss}


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def rotations(*batch: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return random_orthogonal(d, batch_shape=batch, special=True, generator=generator, dtype=dtype)


def at_a_multiple_of_a_rotation(scale: float, d: int) -> Case:
    """At M = c Q the gradient of <G, R> is (G - Q G'Q) / (2 c)."""

    def case(nearest: Nearest) -> float:
        q = rotations(d=d)
        g = torch.randn(d, d, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
        m = (scale * q).requires_grad_()
        (grad,) = torch.autograd.grad((nearest(m) * g).sum(), m)
        return relative(grad, (g - q @ g.mT @ q) / (2 * scale))

    return case


def where_a_pair_of_values_repeats(nearest: Nearest) -> float:
    """The derivative along K = R A of a matrix with s = (2, 2, 1) has a closed form."""
    q = rotations(d=3)
    s = torch.tensor([2.0, 2.0, 1.0], dtype=q.dtype)
    g = torch.randn(3, 3, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    m = (q * s).requires_grad_()
    (grad,) = torch.autograd.grad((nearest(m) * g).sum(), m)
    a = q.mT @ g
    return relative(grad, q @ ((a - a.mT) / (s + s[:, None])))


def rotations_of_large_matrices(d: int) -> Case:
    """The nearest rotation to a float32 matrix of negative determinant is a rotation."""

    def case(nearest: Nearest) -> float:
        m = rotations(d=d)
        m[:, 0] *= -0.1
        found = nearest(m.float()).double()
        error = relative(found.mT @ found, torch.eye(d, dtype=found.dtype))
        return error + float(torch.linalg.slogdet(found).sign != 1)

    return case


def nan_of_one_item(nearest: Nearest) -> float:
    """The other items of a batch do not notice."""
    m = rotations(3, d=4)
    expected = m[[0, 2]].clone()
    m[1, 0, 0] = torch.nan
    found = nearest(m)
    assert found[1].isnan().all(), "an item that contains NaN became a number"
    return relative(found[[0, 2]], expected)


def half_precision(nearest: Nearest) -> float:
    """Half types are taken."""
    q = rotations(d=4, dtype=torch.float16)
    return relative(nearest(q), q) / 100


CASES: dict[str, tuple[Case, set[str]]] = {
    "gradient at a rotation, D = 6": (at_a_multiple_of_a_rotation(1.0, 6), {"SVD with autograd"}),
    "gradient at 1e-6 times a rotation": (
        at_a_multiple_of_a_rotation(1e-6, 6),
        {"SVD with autograd", "roma"},
    ),
    "gradient at 1e6 times a rotation": (
        at_a_multiple_of_a_rotation(1e6, 6),
        {"SVD with autograd"},
    ),
    "gradient at s = (2, 2, 1)": (where_a_pair_of_values_repeats, {"SVD with autograd"}),
    "a rotation in float32, D = 512": (
        rotations_of_large_matrices(512),
        {"SVD with autograd", "roma"},
    ),
    "a NaN in one item of a batch": (nan_of_one_item, {"SVD with autograd", "roma"}),
    "float16": (half_precision, {"SVD with autograd", "roma"}),
}


def run(case: Case, nearest: Nearest) -> tuple[bool, str]:
    """Return whether a contender passes, and what it did."""
    try:
        error = case(nearest)
    except Exception as exception:
        return False, type(exception).__name__.lstrip("_")
    return error <= TOLERANCE, f"{error:.1e}"


def torchmetrics_rows() -> list[Row]:
    """Ask the disparity of torchmetrics for a gradient, and for a batch with a NaN in one item."""
    disparity = torchmetrics_shape().procrustes_disparity
    source, target = torch.randn(2, 2, 8, 3)
    try:
        leaf = source.clone().requires_grad_()
        disparity(leaf, target).sum().backward()
        passed, what = bool(leaf.grad.isfinite().all()), "a gradient"
    except RuntimeError as exception:
        passed, what = False, type(exception).__name__
    rows: list[Row] = [{"case": "gradient of a disparity", "passed": passed, "error": what}]
    expected = disparity(source, target)[1].item()
    source[0, 0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = disparity(source, target)  # of another type, in this case
    found = found[0] if isinstance(found, tuple) else found
    passed = found.ndim == 1 and abs(found[1].item() - expected) <= TOLERANCE * expected
    what = f"{found.tolist()} for {expected:.3f}"
    rows.append({"case": "a NaN in one item of a batch", "passed": passed, "error": what})
    return [row | {"contender": "torchmetrics"} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the results here as well")
    options = parser.parse_args()
    rows: list[Row] = []
    surprises = []
    for name, (case, expected) in CASES.items():
        for contender, nearest in CONTENDERS.items():
            if contender == "roma" and not importlib.util.find_spec("roma"):
                continue
            passed, what = run(case, nearest)
            rows.append({"case": name, "contender": contender, "passed": passed, "error": what})
            if passed == (contender in expected):
                surprises.append(f"{contender}, {name}: {what}")
    if importlib.util.find_spec("torchmetrics"):
        for row in torchmetrics_rows():
            rows.append(row)
            if row["passed"]:
                surprises.append(f"torchmetrics, {row['case']}")
    for row in rows:
        word = "right" if row["passed"] else "WRONG"
        print(f"{row['case']:<38}{row['contender']:<20}{word:<7}{row['error']}")
    write_csv(options.csv, [row | provenance("cpu") for row in rows])
    if surprises:
        raise SystemExit(f"not as described: {surprises}")


if __name__ == "__main__":
    main()
