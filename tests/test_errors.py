"""Bad input: every error names the requirement, what came, and what to do."""

import math
import re

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from care_loss import CAREloss, EquivarianceLoss, InfoNCELoss
from care_loss.functional import (
    alignment_loss,
    equivariance_loss,
    info_nce_loss,
    uniformity_loss,
)
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
from care_loss.views import SharedAugmentCollate, assert_shared, shared_views

Z = torch.randn(8, 4)
PAIR_LOSSES = {
    "info_nce_loss": info_nce_loss,
    "equivariance_loss": equivariance_loss,
    "alignment_loss": alignment_loss,
    "InfoNCELoss": InfoNCELoss(),
    "EquivarianceLoss": EquivarianceLoss(2),
    "CAREloss": CAREloss(chunks=2, shared_views=True),
    "CAREloss, gathering": CAREloss(chunks=2, shared_views=True, gather_distributed=True),
}
PAIRS = {
    "shapes that differ": (Z, Z[:7], "same shape, got torch.float32 of shape (8, 4) on cpu and"),
    "widths that differ": (Z, Z[:, :3], "same shape, got torch.float32 of shape (8, 4) on cpu and"),
    "one dimension": (Z[0], Z[0], "N, D) with N >= 2 and D >= 1, got (4,)"),
    "no columns": (Z[:, :0], Z[:, :0], "D >= 1"),
    "integers": (Z.long(), Z.long(), "floating point dtype, got torch.int64 of shape (8, 4)"),
    "booleans": (Z > 0, Z > 0, "floating point dtype, got torch.bool"),
    "complex numbers": (Z + 0j, Z + 0j, "floating point dtype, got torch.complex64"),
    "NumPy arrays": (
        Z.numpy(),
        Z.numpy(),
        "must be a torch.Tensor of a floating point dtype, got numpy.ndarray",
    ),
    "a list": (Z.tolist(), Z, "must be a torch.Tensor of a floating point dtype, got list"),
    "a tuple": ((Z, Z), Z, "must be a torch.Tensor of a floating point dtype, got tuple"),
    "dtypes that differ": (
        Z,
        Z.double(),
        "same dtype, got torch.float32 of shape (8, 4) on cpu and torch.float64",
    ),
    "devices that differ": (
        Z,
        Z.to("meta"),
        "of shape (8, 4) on cpu and torch.float32 of shape (8, 4) on meta",
    ),
}


def assert_refused(call, sentence):
    """The call raises an error of the form *requirement, got X: what to do.*"""
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)) as error:
        call()
    assert re.search(r"must .+, got .+[:.] .+\.$", str(error.value), re.DOTALL)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES)
def test_bad_pairs(loss, pair):
    z1, z2, sentence = pair
    assert_refused(lambda: loss(z1, z2), sentence)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_bad_equivariant_pairs_are_called_by_their_names(pair):
    e1, e2, sentence = pair
    assert_refused(lambda: CAREloss(chunks=2)(Z, Z, e1, e2), sentence)
    with pytest.raises((ValueError, TypeError), match="`equivariant1`"):
        CAREloss(chunks=2)(Z, Z, e1, e2)


@pytest.mark.parametrize(
    "module", [InfoNCELoss(), EquivarianceLoss(2), CAREloss(chunks=2, shared_views=True)]
)
def test_modules_take_one_row_a_sample(module):
    maps = torch.randn(8, 4, 3, 3)  # a user has forgotten to pool them
    assert_refused(
        lambda: module(maps, maps),
        "`z1` must have shape (N, D) with N >= 2 and D >= 1, got (8, 4, 3, 3)",
    )
    if isinstance(module, CAREloss):
        sentence = "`equivariant1` must have shape (N, D)"
        assert_refused(lambda: CAREloss(chunks=2)(Z, Z, maps, maps), sentence)


@pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES)
def test_a_single_row(loss):
    assert_refused(lambda: loss(Z[:1], Z[:1]), "N, D) with N >= 2 and D >= 1, got (1, 4)")


def test_uniformity_checks_its_rows():
    assert_refused(lambda: uniformity_loss(Z[:1]), "N >= 2")
    assert_refused(lambda: uniformity_loss(Z.long()), "floating point dtype")


def nothing(images):
    return images


CHUNKS = {
    "zero": (0, "int >= 1, got int 0"),
    "negative": (-1, "got int -1"),
    "a fraction": (2.0, "got float 2.0"),
    "a boolean": (True, "got bool True"),
    "a word": ("2", "got str '2'"),
    "a list": ([2], "given as ids must be a torch.Tensor, got list: convert the ids with"),
    "an array": (np.arange(8), "given as ids must be a torch.Tensor, got numpy.ndarray"),
    "a dict": ({}, "got dict"),
}
IDS = {
    "the wrong length": (torch.arange(7), "integers of shape (8,), got torch.int64 of shape (7,)"),
    "two dimensions": (
        torch.zeros(8, 1).long(),
        "integers of shape (8,), got torch.int64 of shape (8, 1)",
    ),
    "no dimension": (torch.tensor(2), "integers of shape (8,), got torch.int64 of shape ()"),
    "floating point ids": (torch.zeros(8), "integers of shape (8,), got torch.float32"),
    "boolean ids": (torch.zeros(8) > 0, "integers of shape (8,), got torch.bool"),
    "another device": (torch.arange(8, device="meta"), "device of the embeddings, cpu, got meta"),
}


@pytest.mark.parametrize(("chunks", "sentence"), CHUNKS.values(), ids=CHUNKS)
def test_bad_numbers_of_chunks(chunks, sentence):
    for call in (
        lambda: equivariance_loss(Z, Z, chunks=chunks),
        lambda: EquivarianceLoss(chunks),
        lambda: CAREloss(chunks=chunks),
        lambda: SharedAugmentCollate(nothing, chunks=chunks),
        lambda: shared_views(Z, nothing, chunks=chunks),
    ):
        assert_refused(call, sentence)
    assert_refused(lambda: EquivarianceLoss(2)(Z, Z, chunks=chunks), sentence)
    assert_refused(lambda: CAREloss(chunks=2)(Z, Z, Z, Z, chunks=chunks), sentence)


@pytest.mark.parametrize(("ids", "sentence"), IDS.values(), ids=IDS)
def test_bad_ids(ids, sentence):
    for call in (
        lambda: equivariance_loss(Z, Z, chunks=ids),
        lambda: EquivarianceLoss(2)(Z, Z, chunks=ids),
        lambda: CAREloss(chunks=2)(Z, Z, Z, Z, chunks=ids),
        lambda: shared_views(Z, nothing, chunks=ids),
    ):
        assert_refused(call, sentence)


def test_constructors_take_a_number_of_chunks_and_no_ids():
    for module in (EquivarianceLoss, CAREloss):
        assert_refused(lambda module=module: module(chunks=torch.arange(8)), "got torch.int64")


def test_values_a_chunk_are_not_to_be_had_with_ids():
    ids = torch.arange(8) // 2
    sentence = "`reduction` must be 'mean' when `chunks` are ids, got 'none'"
    assert_refused(lambda: equivariance_loss(Z, Z, chunks=ids, reduction="none"), sentence)
    loss = EquivarianceLoss(2, reduction="none")
    assert_refused(lambda: loss(Z, Z, chunks=ids), sentence)


@pytest.mark.parametrize("word", ["sum", "Mean", None, 1, ["mean"]])
def test_unknown_words(word):
    for call in (
        lambda: info_nce_loss(Z, Z, reduction=word),
        lambda: equivariance_loss(Z, Z, reduction=word),
        lambda: InfoNCELoss(reduction=word),
        lambda: EquivarianceLoss(2, reduction=word),
    ):
        assert_refused(call, f"`reduction` must be 'mean' or 'none', got {word!r}")
    for call in (
        lambda: equivariance_loss(Z, Z, scale=word if word != "mean" else "x"),
        lambda: EquivarianceLoss(2, scale=word),
        lambda: CAREloss(chunks=2, scale=word),
    ):
        assert_refused(call, f"`scale` must be 'mean' or 'authors', got {word!r}")


@pytest.mark.parametrize(
    "value", [0, -0.1, math.nan, math.inf, "0.5", None, True, np.float32(0), np.ones(1)]
)
def test_bad_numbers(value):
    for name, call in (
        ("temperature", lambda: info_nce_loss(Z, Z, temperature=value)),
        ("temperature", lambda: InfoNCELoss(value)),
        ("temperature", lambda: CAREloss(temperature=value, chunks=2)),
        ("t", lambda: uniformity_loss(Z, t=value)),
        ("alpha", lambda: alignment_loss(Z, Z, alpha=value)),
    ):
        assert_refused(call, f"`{name}` must be a finite number > 0, got ")
    if value != 0:
        assert_refused(
            lambda: CAREloss(temperature=0.5, equivariance_weight=value, chunks=2),
            "`equivariance_weight` must be a finite number >= 0, got ",
        )


def test_a_weight_of_zero_is_a_baseline():
    assert CAREloss(equivariance_weight=0, chunks=2)(Z, Z, Z, -Z) == info_nce_loss(Z, Z)


def test_bad_temperature_tensors():
    for tensor in (torch.ones(1), torch.ones(8, 1), torch.tensor(1)):
        sentence = "number or a floating point tensor of shape ()"
        assert_refused(lambda t=tensor: info_nce_loss(Z, Z, temperature=t), sentence)
    elsewhere = torch.tensor(0.5, device="meta")
    for number, said in ((0.0, "0"), (-0.25, "-0.25")):
        sentence = f"`temperature` must be > 0, got {said}: where it is learned, learn its"
        t = torch.tensor(number, requires_grad=True)
        assert_refused(lambda t=t: info_nce_loss(Z, Z, temperature=t), sentence)
        assert_refused(lambda t=t: info_nce_loss(Z, Z, temperature=t, negatives=Z), sentence)
        compiled = torch.compile(info_nce_loss, backend="eager", fullgraph=True)
        assert compiled(Z, Z, temperature=t).isnan()  # where it is not read
    sentence = "`temperature` must be on the device of the embeddings"
    assert_refused(lambda: info_nce_loss(Z, Z, temperature=elsewhere), sentence)
    # A module remembers plain values; a learned temperature is the function's.
    assert_refused(lambda: InfoNCELoss(torch.tensor(0.5)), "finite number > 0, got torch.float32")


def test_bad_queues():
    for queue, sentence in {
        (Z[0], "shape (K, 4) with K >= 1"),
        (Z[:0], "shape (K, 4) with K >= 1"),
        (Z[:, :3], "shape (K, 4) with K >= 1"),
        (Z[None], "shape (K, 4) with K >= 1"),
        (Z.long(), "floating point dtype"),
        (Z.to("meta"), "device of the embeddings, cpu, got meta"),
    }:
        assert_refused(lambda q=queue: info_nce_loss(Z, Z, negatives=q), sentence)
    assert_refused(
        lambda: info_nce_loss(Z, Z, negatives=Z.numpy()),
        "must be a torch.Tensor of a floating point dtype, got numpy",
    )


def test_two_ordinary_views_would_train_a_placebo():
    sentence = "`equivariant1` and `equivariant2` must be given unless shared_views=True"
    assert_refused(lambda: CAREloss(chunks=2)(Z, Z), sentence)
    assert_refused(lambda: CAREloss(chunks=2)(Z, Z), "no rotation relates the views")


@pytest.mark.parametrize("shared_views", [True, False])
def test_half_an_equivariant_pair(shared_views):
    loss = CAREloss(chunks=2, shared_views=shared_views)
    assert_refused(lambda: loss(Z, Z, Z), "given together, got only `equivariant1`")
    assert_refused(lambda: loss(Z, Z, None, Z), "given together, got only `equivariant2`")


def test_bad_base_losses():
    sentence = "`gather_distributed` must be False when `base_loss` is given"
    assert_refused(
        lambda: CAREloss(chunks=2, base_loss=alignment_loss, gather_distributed=True), sentence
    )
    assert_refused(lambda: CAREloss(chunks=2, base_loss=0.5), "callable (z1, z2) -> scalar")
    for result, got in (
        (Z, "torch.float32 of shape (8, 4)"),
        (Z[0, :1], "torch.float32 of shape (1,)"),
        (0.5, "float 0.5"),
        (None, "NoneType"),
        ({"loss": Z.sum()}, "dict"),
    ):
        loss = CAREloss(chunks=2, shared_views=True, base_loss=lambda a, b, result=result: result)
        assert_refused(lambda loss=loss: loss(Z, Z), f"return a scalar tensor, got {got}")


def test_bad_batches_of_images():
    assert_refused(lambda: shared_views([Z, Z], nothing, chunks=2), "tensor of shape (N, ...)")
    assert_refused(
        lambda: shared_views(Z[:1], nothing, chunks=2), "N >= 2, got torch.float32 of shape (1, 4)"
    )
    assert_refused(lambda: shared_views(Z[:, 0], nothing, chunks=2), "shape (N, ...)")


def test_bad_samples():
    collate = SharedAugmentCollate(nothing, chunks=2)
    assert_refused(lambda: collate([(Z[0], 0)]), "at least 2 samples, got 1")
    for sample in (Z[0], Z[:2], (Z[0],), {"image": Z[0], "label": 0}):
        assert_refused(lambda s=sample: collate([s, s]), "tuples (image, label, ...), got ")
    assert_refused(lambda: collate([(Z[0], 0), (Z[1], 0, "a")]), "equally many parts, got [2, 3]")
    for transform in (lambda x: [x, x], lambda x: x.numpy()):
        for broken in (
            SharedAugmentCollate(transform, chunks=2),
            SharedAugmentCollate(nothing, chunks=2, ordinary=transform),
        ):
            sentence = "must map an image to a tensor, got "
            assert_refused(lambda c=broken: c([(Z[0], 0), (Z[1], 0)]), sentence)
        assert_refused(lambda t=transform: assert_shared(t, Z[0], batched=False), sentence)


def test_transforms_that_return_no_batch():
    for transform in (lambda x: x[0], lambda x: list(x), lambda x: x.sum(), lambda x: None):
        assert_refused(
            lambda t=transform: shared_views(Z[:, :3], t, chunks=2), "a tensor of 4 images, got"
        )


@pytest.mark.parametrize("loss", [info_nce_loss, equivariance_loss, alignment_loss])
def test_the_checks_read_no_values(loss):
    # A fake tensor has shape, dtype and device, and nothing to read.
    with FakeTensorMode():
        z1, z2, temperature = torch.randn(8, 4), torch.randn(8, 4), torch.tensor(0.5)
        assert loss(z1, z2).shape == ()
        assert info_nce_loss(z1, z2, temperature=temperature, negatives=z1).shape == ()
        assert equivariance_loss(z1, z2, chunks=torch.arange(8)).shape == ()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            z1.sum().item()


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
    "vectors of any length": ((3 * U, U), "`x` must contain unit vectors along the last dimension"),
}


@pytest.mark.parametrize(("pair", "sentence"), VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("function", SPHERE_PAIRS.values(), ids=SPHERE_PAIRS)
def test_bad_points_and_tangent_vectors(function, pair, sentence):
    assert_refused(lambda: function(*pair), sentence)


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
