"""Bad input to rotations and the sphere: the requirement, what came, and what to do."""

import math

import pytest
import torch
from test_errors import assert_refused

from care_loss import _checks
from care_loss.rotation import (
    fit_rotation,
    nearest_orthogonal,
    random_orthogonal,
    rotation_angles,
    rotation_distance,
)
from care_loss.sphere import (
    expmap,
    frechet_mean,
    geodesic_distance,
    logmap,
    normalize,
    parallel_transport,
    random_uniform,
    slerp,
    tangent_projection,
)

Z = torch.randn(8, 4)


FITS = {
    "one dimension": ((Z[0], Z[0]), "shape (*, N, D) with N >= 1 and D >= 1, got (4,)"),
    "no rows": ((Z[:0], Z[:0]), "with N >= 1 and D >= 1, got (0, 4)"),
    "no columns": ((Z[:, :0], Z[:, :0]), "with N >= 1 and D >= 1, got (8, 0)"),
    "numbers of rows that differ": ((Z, Z[:7]), "(*, N, D), got (8, 4) and (7, 4)"),
    "widths that differ": ((Z, Z[:, :3]), "(*, N, D), got (8, 4) and (8, 3)"),
    "a target of one dimension": ((Z, Z[0]), "(*, N, D), got (8, 4) and (4,)"),
    "batches that differ": ((Z.expand(2, 8, 4), Z.expand(3, 8, 4)), "broadcast, got (2,) and (3,)"),
    "integers": ((Z.long(), Z.long()), "`source` must be a torch.Tensor of a floating point dtype"),
    "complex numbers": ((Z, Z + 0j), "`target` must be a torch.Tensor of a floating point dtype"),
    "8 bits": ((Z.to(torch.float8_e4m3fn), Z), "floating point dtype, got torch.float8_e4m3fn"),
    "NumPy arrays": ((Z.numpy(), Z.numpy()), "got numpy.ndarray"),
    "two outputs of a model": (((Z, Z), Z), "got tuple: pick one output of the model."),
    "dtypes that differ": ((Z, Z.double()), "the same dtype, got torch.float32"),
    "devices that differ": ((Z, Z.to("meta")), "the same device, got torch.float32"),
}
WEIGHTS = {
    "the wrong number": (torch.ones(7), "`weights` must have shape (*, 8), got (7,)"),
    "a column": (torch.ones(8, 1), "`weights` must have shape (*, 8), got (8, 1)"),
    "a scalar": (torch.tensor(1.0), "`weights` must have shape (*, 8), got ()"),
    "a number": (2.0, "`weights` must be a torch.Tensor of a floating point dtype, got float 2.0"),
    "integers": (torch.ones(8).long(), "`weights` must be a torch.Tensor of a floating point"),
    "booleans": (torch.ones(8) > 0, "`weights` must be a torch.Tensor of a floating point dtype"),
    "a negative one": (torch.arange(8.0) - 1, "`weights` must be finite and >= 0, got -1.0"),
    "an infinite one": (1 / torch.arange(8.0), "`weights` must be finite and >= 0, got inf"),
    "another device": (torch.ones(8, device="meta"), "device of `source`, cpu, got meta"),
}


@pytest.mark.parametrize(("rows", "sentence"), FITS.values(), ids=FITS)
def test_bad_rows_to_fit(rows, sentence):
    assert_refused(lambda: fit_rotation(*rows), sentence)


@pytest.mark.parametrize(("weights", "sentence"), WEIGHTS.values(), ids=WEIGHTS)
def test_bad_weights(weights, sentence):
    assert_refused(lambda: fit_rotation(Z, Z, weights=weights), sentence)


def test_weights_must_broadcast_with_the_rows():
    rows = Z.expand(3, 8, 4)
    sentence = "`weights` must have leading dimensions that broadcast, got (3,) and (2,)"
    assert_refused(lambda: fit_rotation(rows, Z, weights=torch.ones(2, 8)), sentence)


def test_bad_matrices():
    square = torch.eye(4)
    for call, sentence in (
        (
            lambda: nearest_orthogonal(Z),
            "`matrix` must have shape (*, D, D) with D >= 1, got (8, 4)",
        ),
        (lambda: nearest_orthogonal(Z[0]), "shape (*, D, D) with D >= 1, got (4,)"),
        (lambda: nearest_orthogonal(Z[:0, :0]), "shape (*, D, D) with D >= 1, got (0, 0)"),
        (
            lambda: nearest_orthogonal(square.long()),
            "`matrix` must be a torch.Tensor of a floating",
        ),
        (lambda: rotation_angles(square + 0j), "`rotation` must be a torch.Tensor of a floating"),
        (lambda: rotation_distance(square, Z), "`rotation2` must have shape (*, D, D)"),
        (
            lambda: rotation_distance(square, torch.eye(3)),
            "the same D in their shapes (*, D, D), got",
        ),
        (lambda: rotation_distance(square, square.double()), "must have the same dtype, got"),
        (lambda: rotation_distance(square, square.to("meta")), "must have the same device, got"),
        (
            lambda: rotation_distance(square.expand(2, 4, 4), square.expand(3, 4, 4)),
            "leading dimensions that broadcast, got (2,) and (3,)",
        ),
    ):
        assert_refused(call, sentence)
    wide = torch.eye(300)  # ints above 256 are equal without being the same
    _checks.check_square(rotation1=wide, rotation2=wide[None])


def test_a_fit_is_not_a_matrix():
    fit = fit_rotation(Z, Z)
    assert_refused(lambda: rotation_angles(fit), "RotationFit: pick one output")


@pytest.mark.parametrize("draw", [random_orthogonal, random_uniform])
def test_bad_arguments_of_random_draws(draw):
    for dim in (0, -1, 2.0, True, None, torch.tensor(3)):
        assert_refused(lambda d=dim: draw(d), "`dim` must be an int >= 1, got ")
    for shape in (3, (-1,), (2.0,), "2", (True,)):
        sentence = "`batch_shape` must be a tuple of ints >= 0, got "
        assert_refused(lambda s=shape: draw(3, batch_shape=s), sentence)
    sentence = "`generator` must be a torch.Generator or None, got int 0"
    assert_refused(lambda: draw(3, generator=0), sentence)
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn, "float32"):
        sentence = "`dtype` must be a floating point dtype, got "
        assert_refused(lambda d=dtype: draw(3, dtype=d), sentence)


U = normalize(Z)
SPHERE_PAIRS = {
    "geodesic_distance": geodesic_distance,
    "slerp": lambda x, y: slerp(x, y, 0.5),
    "expmap": expmap,
    "logmap": logmap,
    "tangent_projection": tangent_projection,
    "parallel_transport": lambda x, v: parallel_transport(x, x, v),
}
VECTORS = {
    "widths that differ": ((U, U[:, :3]), "the same D in their shapes (*, D), got (8, 4) and (8,"),
    "a width of 1": ((U, torch.ones(8, 1)), "(*, D), got (8, 4) and (8, 1)"),
    "no columns": ((Z[:, :0], Z[:, :0]), "`x` must have shape (*, D) with D >= 1, got (8, 0)"),
    "no dimension": ((U[0, 0], U[0, 0]), "`x` must have shape (*, D) with D >= 1, got ()"),
    "integers": ((U.long(), U.long()), "`x` must be a torch.Tensor of a floating point dtype"),
    "complex numbers": ((U, U + 0j), "floating point dtype, got torch.complex64 of shape (8, 4)"),
    "a list": ((U.tolist(), U), "`x` must be a torch.Tensor of a floating point dtype, got list"),
    "NumPy arrays": ((U.numpy(), U.numpy()), "got numpy.ndarray: convert it with"),
    "8 bits": ((U.to(torch.float8_e4m3fn), U), "floating point dtype, got torch.float8_e4m3fn"),
    "dtypes that differ": ((U, U.double()), "the same dtype, got torch.float32"),
    "devices that differ": ((U, U.to("meta")), "the same device, got torch.float32"),
    "batches that differ": ((U, U[:7]), "leading dimensions that broadcast, got (8,) and (7,)"),
    "a shorter batch first": ((U[:7], U), "leading dimensions that broadcast, got (7,) and (8,)"),
    "vectors of any length": ((3 * U, U), "`x` must contain unit vectors along the last dimension"),
}


@pytest.mark.parametrize(("pair", "sentence"), VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("function", SPHERE_PAIRS.values(), ids=SPHERE_PAIRS)
def test_bad_points_and_tangent_vectors(function, pair, sentence):
    assert_refused(lambda: function(*pair), sentence)


def test_points_of_many_dimensions_have_the_same_number_of_them():
    x, y = normalize(torch.randn(2, 300))  # ints above 256 are equal without being the same
    assert geodesic_distance(x, y[None]).shape == (1,)


def test_points_on_the_right_must_be_unit_vectors_too():
    rows = U.clone()
    rows[5] *= 1.5
    sentence = "dimension, got one of length 1.5: pass care_loss.sphere.normalize(y)."
    for function in (geodesic_distance, logmap, lambda x, y: slerp(x, y, 0.5)):
        assert_refused(lambda f=function: f(U, rows), "`y` must contain unit vectors")
        assert_refused(lambda f=function: f(U, rows), sentence)
    assert_refused(lambda: parallel_transport(U, rows, U), sentence)
    assert expmap(U, 3 * rows).isfinite().all()  # tangent vectors have any length
    rows[5], rows[6] = 0, torch.nan
    assert geodesic_distance(U, rows)[:6].isfinite().all()
    rows[4] = 0.5 * U[4]  # below and above 1, beside a row of zeros and NaN
    assert_refused(lambda: geodesic_distance(U, rows), "got one of length 0.5")
    rows[4] = 2
    assert_refused(lambda: geodesic_distance(U, rows), "got one of length 4")
    assert geodesic_distance(U.bfloat16(), U.bfloat16()).isfinite().all()  # 1 to within rounding


def test_bad_vectors_to_normalize():
    for x, sentence in (
        (torch.tensor([3, 4]), "floating point dtype, got torch.int64 of shape (2,)"),
        ([3.0, 4.0], "floating point dtype, got list"),
        (Z + 0j, "floating point dtype, got torch.complex64"),
        (Z[:, :0], "`x` must have shape (*, D) with D >= 1, got (8, 0)"),
        (torch.tensor(3.0), "`x` must have shape (*, D) with D >= 1, got ()"),
        ((Z, Z), "got tuple: pick one output of the model."),
    ):
        assert_refused(lambda x=x: normalize(x), sentence)


def test_bad_positions():
    for t in (None, "0.5", True, [0.5], math.nan, math.inf, 1j):
        sentence = "`t` must be a finite number or a torch.Tensor of a floating point dtype, got"
        assert_refused(lambda t=t: slerp(U, U, t), sentence)
    assert_refused(lambda: slerp(U, U, torch.ones(8).long()), "`t` must be a torch.Tensor of a")
    assert_refused(lambda: slerp(U, U, torch.ones(7)), "broadcast, got (8,) and (7,)")
    sentence = "`t` must be on the device of the points, cpu, got meta"
    assert_refused(lambda: slerp(U, U, torch.ones(8, device="meta")), sentence)
    assert_refused(lambda: slerp(U, U, torch.tensor(0.5, device="meta")), sentence)
    assert torch.equal(slerp(U, U, torch.tensor(0.5)), slerp(U, U, 0.5))


def test_bad_points_to_average():
    for x, sentence in (
        (Z[0], "`x` must have shape (*, N, D) with N >= 1 and D >= 1, got (4,)"),
        (Z[:0], "with N >= 1 and D >= 1, got (0, 4)"),
        (Z[:, :0], "with N >= 1 and D >= 1, got (8, 0)"),
        (Z.long(), "`x` must be a torch.Tensor of a floating point dtype"),
        (Z.tolist(), "`x` must be a torch.Tensor of a floating point dtype, got list"),
    ):
        assert_refused(lambda x=x: frechet_mean(x), sentence)


@pytest.mark.parametrize(("weights", "sentence"), WEIGHTS.values(), ids=WEIGHTS)
def test_bad_weights_of_points(weights, sentence):
    sentence = sentence.replace("`source`", "`x`")
    assert_refused(lambda: frechet_mean(U, weights=weights), sentence)


def test_weights_must_broadcast_with_the_points():
    sentence = "`x` and `weights` must have leading dimensions that broadcast, got (3,) and (2,)"
    assert_refused(lambda: frechet_mean(U.expand(3, 8, 4), weights=torch.ones(2, 8)), sentence)
