"""Bad input to losses and views: every error names the requirement, what came, and what to do."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from care_loss import CAREloss, EquivarianceLoss, InfoNCELoss, RotationContrastLoss
from care_loss.functional import (
    alignment_loss,
    cross_fitted,
    equivariance_loss,
    info_nce_loss,
    uniformity_loss,
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
    "cross_fitted": partial(cross_fitted, chunks=1),
    "RotationContrastLoss": RotationContrastLoss(chunks=1),
    "RotationContrastLoss, gathering": RotationContrastLoss(chunks=1, gather_distributed=True),
}
PAIRS = {
    "shapes that differ": (Z, Z[:7], "same shape, got torch.float32 of shape (8, 4) on cpu and"),
    "widths that differ": (Z, Z[:, :3], "same shape, got torch.float32 of shape (8, 4) on cpu and"),
    "one dimension": (Z[0], Z[0], "N, D) with N >= 2 and D >= 1, got (4,)"),
    "no columns": (Z[:, :0], Z[:, :0], "D >= 1"),
    "no columns in a batch": (Z[None, :, :0], Z[None, :, :0], "D >= 1"),
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
    ("module", "name"),
    [
        (InfoNCELoss(), "z1"),
        (EquivarianceLoss(2), "z1"),
        (CAREloss(chunks=2, shared_views=True), "z1"),
        (RotationContrastLoss(chunks=1), "z"),
    ],
)
def test_modules_take_one_row_a_sample(module, name):
    maps = torch.randn(8, 4, 3, 3)  # a user has forgotten to pool them
    sentence = f"`{name}` must have shape (N, D) with N >= 2 and D >= 1, got (8, 4, 3, 3)"
    assert_refused(lambda: module(maps, maps), sentence)
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
        lambda: cross_fitted(Z, Z, chunks=chunks),
        lambda: RotationContrastLoss(chunks=chunks),
        lambda: RotationContrastLoss(chunks=1)(Z, Z, chunks=chunks),
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
        lambda: cross_fitted(Z, Z, chunks=ids),
        lambda: RotationContrastLoss()(Z, Z, chunks=ids),
    ):
        assert_refused(call, sentence)


def test_chunks_of_fewer_than_four_rows_to_fit():
    loss = RotationContrastLoss()
    for chunks, shortest in (
        (3, 2),
        (100, 2),
        (torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]), 3),
        (torch.tensor([0, 0, 0, 0, 0, 0, 0, 1]), 1),
        (torch.arange(8), 1),
    ):
        sentence = (
            f"`chunks` must form chunks of at least four rows, got one of {shortest} among 8 rows: "
            "each half of a chunk needs two rows"
        )
        for call in (
            lambda c=chunks: cross_fitted(Z, Z, chunks=c),
            lambda c=chunks: loss(Z, Z, chunks=c),
        ):
            assert_refused(call, sentence)
            if isinstance(chunks, torch.Tensor):
                assert_refused(call, "Ids are those of chunks, not of samples.")


def test_ids_of_rows_to_fit_are_read():
    ids = torch.arange(8).expand(3, 8) // 4
    z = Z.expand(3, 8, 4)
    call = torch.func.vmap(lambda x, c: cross_fitted(x, x, chunks=c))
    assert_refused(lambda: call(z, ids), "values that can be read, got ids under a transform")


def test_settings_of_the_contrast_of_rotations():
    for word in ("false", None, 1):
        assert_refused(lambda w=word: cross_fitted(Z, Z, chunks=1, special=w), "True or False")
        assert_refused(lambda w=word: RotationContrastLoss(special=w), "True or False, got")
    assert_refused(lambda: RotationContrastLoss()(Z, Z), "`chunks` must be given in the call or in")
    assert_refused(lambda: RotationContrastLoss(temperature=0), "a finite number > 0, got int 0")
    sentence = "`temperature` must be left out when `base_loss` is given"
    call = partial(RotationContrastLoss, base_loss=alignment_loss)
    assert_refused(lambda: call(temperature=0.2), sentence)
    sentence = "`gather_distributed` must be False when `base_loss` is given"
    assert_refused(lambda: call(gather_distributed=True), sentence)
    assert_refused(lambda: call(base_loss=0.5), "must be an instance of a loss module or another")
    loss = RotationContrastLoss(chunks=1, base_loss=lambda p, e: p)
    assert_refused(lambda: loss(Z, Z), "return a scalar tensor, got torch.float32 of shape (8, 4)")


def test_constructors_take_a_number_of_chunks_and_no_ids():
    for module in (EquivarianceLoss, CAREloss, RotationContrastLoss):
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
    "value",
    [0, -0.1, math.nan, math.inf, float("inf"), "0.5", None, True, np.float32(0), np.ones(1)],
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
    losses = torch.func.vmap(lambda t: info_nce_loss(Z, Z, temperature=t))
    assert losses(torch.tensor([0.5, -0.5, 0.0, 1.5])).isnan().tolist() == [0, 1, 1, 0]
    sentence = "`temperature` must be on the device of the embeddings"
    assert_refused(lambda: info_nce_loss(Z, Z, temperature=elsewhere), sentence)


@pytest.mark.parametrize("module", [InfoNCELoss, partial(CAREloss, chunks=2, shared_views=True)])
def test_bad_learned_temperatures_of_modules(module):
    for tensor in (torch.ones(1), torch.ones(8, 1), torch.tensor(1)):
        sentence = "number or a floating point tensor of shape ()"
        assert_refused(lambda t=tensor: module(temperature=t), sentence)
    for number, said in ((0.0, "0"), (-0.25, "-0.25")):
        t = nn.Parameter(torch.tensor(number))
        sentence = f"`temperature` must be > 0, got {said}: where it is learned, learn its"
        assert_refused(lambda t=t: module(temperature=t), sentence)
        loss = module(temperature=nn.Parameter(torch.tensor(0.5)))
        loss.load_state_dict({"temperature": t.detach()})  # as after a step that is too long
        assert_refused(lambda loss=loss: loss(Z, Z), sentence)
        assert torch.compile(loss, backend="eager", fullgraph=True)(Z, Z).isnan()
    learned = nn.Parameter(torch.tensor(0.7))
    for computed in (learned.exp(), learned.to("meta"), learned.double()):
        sentence = "another leaf tensor, got the result of a computation, which the module would"
        assert_refused(lambda t=computed: module(temperature=t), sentence)
    meta = module(temperature=nn.Parameter(torch.tensor(0.5, device="meta")))
    assert_refused(lambda: meta(Z, Z), "`temperature` must be on the device of the embeddings")


def test_a_temperature_beside_a_base_loss():
    sentence = "`temperature` must be left out when `base_loss` is given, got one that is not the"
    half, unread = torch.tensor(0.5), torch.tensor(0.5, device="meta")  # and no default either
    for temperature in (0.2, half, unread, nn.Parameter(half), nn.Parameter(unread)):
        settings = {"temperature": temperature, "base_loss": alignment_loss}
        assert_refused(lambda settings=settings: CAREloss(**settings), sentence)


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


def test_transforms_that_return_a_batch_of_one():
    def batch_of_one(image):
        return torch.rand(()) * image[None]

    photo, video = torch.rand(3, 4, 4), torch.rand(1, 2, 4, 4)
    sentence = (
        "`transform` must map an image (3, 4, 4) to a view of as many dimensions, got "
        "(1, 3, 4, 4): it returned a batch of one"
    )
    assert_refused(lambda: assert_shared(batch_of_one, photo, batched=False), sentence)
    # What is a batch of one for a picture is a view of a video of one channel; and several crops
    # of a picture are a view, too.
    assert_shared(lambda x: torch.rand(()) * x, video, batched=False)
    assert_shared(lambda x: torch.rand(()) * torch.stack([x, x]), photo, batched=False)


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
