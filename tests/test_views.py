"""Views that share an augmentation: in one tensor, in a collate function, in worker processes."""

import multiprocessing
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from care_loss import CAREloss
from care_loss.functional import equivariance_loss
from care_loss.views import (
    SharedAugmentCollate,
    assert_shared,
    augment_chunks,
    shared_views,
)


def brightness(images):
    """One factor for all images of a tensor, or for one image."""
    return images * (0.5 + torch.rand(()))


def noise(images):
    """A number for every image of its own."""
    return images + torch.rand(len(images), *[1] * (images.ndim - 1), device=images.device)


def three_generators(image):
    return image + torch.rand(()) + 10 * np.random.rand() + 100 * random.random()  # noqa: NPY002


def draws(views, images):
    """The factor that each row of a view of `brightness` was multiplied by."""
    return (views / images).flatten(1).mean(1)


@pytest.fixture
def images(device):
    return 0.5 + torch.rand(11, 3, 4, 4, device=device)


def ids_of(chunks, n):
    """The ids of n rows in a number of contiguous chunks."""
    parts = torch.arange(n).tensor_split(chunks)
    return torch.cat([torch.full_like(part, k) for k, part in enumerate(parts)])


def assert_constant_on_chunks(values, ids):
    ids = ids_of(ids, len(values)) if isinstance(ids, int) else ids
    ids = ids.to(values.device)
    for chunk in ids.unique():
        members = values[ids == chunk]
        torch.testing.assert_close(members, members[:1].expand_as(members))
    firsts = torch.stack([values[ids == chunk][0] for chunk in ids.unique()])
    assert len(firsts.unique()) == len(firsts)


# Views of a batch


@pytest.mark.parametrize("chunks", [1, 2, 4, 100])
def test_each_chunk_draws_its_own_pair(chunks, images):
    view1, view2, ids = shared_views(images, brightness, chunks=chunks)
    assert ids == min(chunks, 5)
    first, second = draws(view1, images), draws(view2, images)
    assert_constant_on_chunks(first, ids)
    assert_constant_on_chunks(second, ids)
    assert ((first - second).abs() > 1e-6).all()


@pytest.mark.parametrize("chunks", [1, 4, 100])
def test_shared_views_are_two_augmentations_of_the_chunks(chunks, images):
    torch.manual_seed(1)
    view, made = augment_chunks(images, brightness, chunks=chunks)
    other, _ = augment_chunks(images, brightness, chunks=chunks)
    assert made == min(chunks, 5)
    assert_constant_on_chunks(draws(view, images), made)
    torch.manual_seed(1)
    view1, view2, _ = shared_views(images, brightness, chunks=chunks)
    assert torch.equal(view, view1)
    assert torch.equal(other, view2)
    ids = torch.tensor([4, 0, 4, 4, 0, 4, 2, 2, 0, 4, 2], device=images.device)
    view, returned = augment_chunks(images, brightness, chunks=ids)
    assert returned is ids
    assert_constant_on_chunks(draws(view, images), ids)


def test_three_forwards_compare_an_ordinary_view_with_its_turn(images):
    turned, chunks = augment_chunks(
        images, lambda x: x.roll(int(torch.randint(3, ())), dims=1), chunks=4
    )
    z1, e = images.flatten(1), turned.flatten(1)  # a permutation of pixels is orthogonal
    parts = CAREloss().forward_components(z1, z1.flip(0), z1, e, chunks=chunks)
    assert parts.equivariance < 1e-12
    shuffled = e[torch.randperm(len(e))]
    assert equivariance_loss(z1, shuffled, chunks=chunks) > 1e-6


def test_ids_share_among_rows_that_need_not_be_neighbours(images, device):
    ids = torch.tensor([4, 0, 4, 4, 0, -1, 2, 2, 0, 4, 2], device=device)
    view1, view2, returned = shared_views(images, brightness, chunks=ids)
    assert torch.equal(returned, ids)
    assert_constant_on_chunks(draws(view1, images), ids)
    assert_constant_on_chunks(draws(view2, images), ids)


def test_the_views_carry_their_chunks_to_the_loss(images):
    for chunks in (3, 4):
        view1, view2, ids = shared_views(images, lambda x: x + torch.rand(()), chunks=chunks)
        z1, z2 = view1.flatten(1), view2.flatten(1)
        torch.testing.assert_close(
            CAREloss(chunks=99).forward_components(z1, z2, z1, z2, chunks=ids).equivariance,
            equivariance_loss(z1, z2, chunks=chunks),
        )


def test_a_chunk_that_a_rotation_relates_has_equivariance_loss_zero(images):
    def quarter_turns(x):
        return x.rot90(int(torch.randint(4, ())), (-2, -1))

    view1, view2, ids = shared_views(images, quarter_turns, chunks=4)
    assert equivariance_loss(view1.flatten(1), view2.flatten(1), chunks=ids) < 1e-12
    assert equivariance_loss(view1.flatten(1), view2.flatten(1)) > 1e-6  # chunks differ


def test_the_images_are_left_as_they_were(images):
    def in_place(x):
        return x.mul_(torch.rand(()))

    before = images.clone()
    shared_views(images, in_place, chunks=2)
    assert torch.equal(images, before)


def test_the_images_of_a_dataset_are_left_as_they_were():
    def in_place(image):
        return image.mul_(0.5 + torch.rand(()))

    dataset = [(torch.ones(3), k) for k in range(4)]
    (own1, _, view1, view2, _), _ = SharedAugmentCollate(in_place, chunks=2, ordinary=in_place)(
        dataset
    )
    assert all((image == 1).all() for image, _ in dataset)
    for view in (own1, view1, view2):  # each drawn for the image as it was
        assert ((view > 0.5) & (view < 1.5)).all()
    assert torch.equal(view2[0], view2[1])


def samples(count=11):
    return [(torch.full((3, 4, 4), 1.0 + k), k) for k in range(count)]


# Collating


def test_collate_shares_within_a_chunk_and_draws_anew_for_each_chunk_and_view():
    (view1, view2, ids), labels = SharedAugmentCollate(brightness, chunks=4)(samples())
    originals = torch.stack([image for image, _ in samples()])
    assert ids == 4
    assert labels.tolist() == list(range(11))
    first, second = draws(view1, originals), draws(view2, originals)
    assert_constant_on_chunks(first, ids)
    assert_constant_on_chunks(second, ids)
    assert ((first - second).abs() > 1e-6).all()


def test_collate_puts_own_views_first_and_draws_them_for_each_image():
    collate = SharedAugmentCollate(brightness, chunks=4, ordinary=brightness)
    (own1, own2, view1, view2, ids), _ = collate(samples())
    originals = torch.stack([image for image, _ in samples()])
    own = torch.cat([draws(own1, originals), draws(own2, originals)])
    assert len(own.unique()) == 22
    assert_constant_on_chunks(draws(view1, originals), ids)
    assert_constant_on_chunks(draws(view2, originals), ids)


def test_collate_replays_torch_numpy_and_random():
    batch = [(torch.zeros(3), 0)] * 8
    (view1, view2, ids), _ = SharedAugmentCollate(three_generators, chunks=2)(batch)
    for view in (view1, view2):
        assert_constant_on_chunks(view[:, 0], ids)


def test_collate_leaves_the_generators_as_they_would_have_been():
    collate = SharedAugmentCollate(three_generators, chunks=2)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    before = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    torch.manual_seed(0)
    collate([(torch.zeros(3), 0)] * 8)
    after = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert before == after
    left = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randint(
        2**32, (2, 2)
    )  # a seed for each view and chunk, and nothing that the transform drew
    assert torch.equal(left, torch.get_rng_state())


def test_collate_restores_the_generators_when_a_transform_fails():
    def fails(image):
        raise RuntimeError("no such image")

    before = random.getstate()
    with pytest.raises(RuntimeError, match="no such image"):
        SharedAugmentCollate(fails, chunks=2)(samples())
    assert random.getstate() == before


def test_collate_is_repeatable_and_never_repeats_itself():
    collate = SharedAugmentCollate(three_generators, chunks=2, ordinary=three_generators)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    (_, _, first, _, _), _ = collate(samples())
    (_, _, second, _, _), _ = collate(samples())
    torch.manual_seed(0)
    (_, _, again, _, _), _ = collate(samples())
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("context", multiprocessing.get_all_start_methods())
def test_collate_works_in_worker_processes(context):
    loader = DataLoader(
        samples(16),
        batch_size=8,
        collate_fn=SharedAugmentCollate(brightness, chunks=2, ordinary=brightness),
        num_workers=2,
        multiprocessing_context=context,
    )
    factors = []
    for _ in range(2):  # two epochs
        for (_, _, view1, view2, ids), labels in loader:
            originals = torch.stack([image for image, _ in samples(16)])[labels]
            for view in (view1, view2):
                assert_constant_on_chunks(draws(view, originals), ids)
                factors += [draws(view, originals)[0], draws(view, originals)[-1]]
    # Every worker, view, chunk and epoch has drawn its own.
    assert len(torch.stack(factors).unique()) == len(factors) == 16


def test_a_ragged_last_batch_is_cut_like_any_other():
    (_, _, ids), _ = SharedAugmentCollate(brightness, chunks=8)(samples(13))
    assert ids == 6


# Checking a transform


def test_a_shared_transform_is_accepted(device):
    image = torch.rand(3, 8, 8, device=device)
    assert_shared(brightness, image)
    assert_shared(lambda x: x.flip(-1) if torch.rand(()) < 0.5 else x, image)  # often does nothing
    assert_shared(three_generators, image, batched=False)
    assert_shared(lambda x: noise(x[None])[0], image, batched=False)


def test_a_transform_that_treats_images_one_by_one_is_refused(device):
    image = torch.rand(3, 8, 8, device=device)
    with pytest.raises(ValueError, match="one augmentation for all images of a chunk"):
        assert_shared(noise, image)
    with pytest.raises(ValueError, match="one augmentation for all images of a chunk"):
        assert_shared(lambda x: torch.cat((x[:1] * torch.rand(()), x[1:])), image)


def test_a_transform_with_a_private_generator_is_refused():
    private = random.Random(0)
    with pytest.raises(ValueError, match="or seed another"):
        assert_shared(lambda x: x * private.random(), torch.rand(3, 8, 8), batched=False)


def test_views_that_agree_are_refused(device):
    for batched in (True, False):
        with pytest.raises(ValueError, match="a new augmentation for each view"):
            assert_shared(lambda x: 2 * x, torch.rand(3, 8, 8, device=device), batched=batched)
    with pytest.raises(ValueError, match="an image that it changes"):
        assert_shared(brightness, torch.zeros(3, 8, 8, device=device))


def test_assert_shared_leaves_the_image_as_it_was():
    image = torch.rand(3, 8, 8)
    before = image.clone()
    for batched in (True, False):
        assert_shared(lambda x: x.mul_(0.5 + torch.rand(())), image, batched=batched)
        assert torch.equal(image, before)


def test_a_private_generator_that_is_seeded_from_random_is_accepted():
    private = random.Random()

    def transform(image):
        private.seed(random.getrandbits(32))
        return image * private.random()

    assert_shared(transform, torch.rand(3, 8, 8), batched=False)


def test_whatever_else_samples_hold_is_collated_too():
    batch = [(torch.rand(3), k, f"image {k}", {"id": k}) for k in range(4)]
    views, labels, names, more = SharedAugmentCollate(brightness, chunks=2)(batch)
    assert len(views) == 3
    assert labels.tolist() == more["id"].tolist() == [0, 1, 2, 3]
    assert list(names) == ["image 0", "image 1", "image 2", "image 3"]


def flips(images):  # each image by itself
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flipped, images.flip(-1), images)


class PerImage:
    __hash__ = None

    def __call__(self, images):
        return noise(images)

    def method(self, images):
        return noise(images)


@pytest.mark.parametrize(
    "transform",
    [noise, flips, PerImage(), PerImage().method, partial(noise), lambda x: noise(x)],
    ids=["function", "flips", "object", "method", "partial", "lambda"],
)
@pytest.mark.parametrize("chunks", [2, 16])
def test_a_transform_of_single_images_is_refused_at_its_first_use(transform, chunks, device):
    images = torch.rand(32, 3, 4, 4, device=device)
    before = torch.get_rng_state(), random.getstate()
    for make in (augment_chunks, shared_views):
        with pytest.raises(ValueError, match="one augmentation for all images of a chunk"):
            make(images, transform, chunks=chunks)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    made = augment_chunks(images, transform, chunks=chunks, check=False)
    assert made.view.shape == images.shape


def test_a_shared_transform_is_checked_once_and_draws_as_without_the_check(device):
    images = torch.rand(12, 3, 4, 4, device=device)
    calls = []

    def views(check):
        def transform(x):  # a new function in every call
            calls.append(len(x))
            return brightness(x)

        torch.manual_seed(0)
        made = [augment_chunks(images, transform, chunks=3, check=check).view for _ in range(2)]
        return torch.stack(made)

    checked = views(True)
    assert len(calls) == 6 + 3  # of four copies each, three tries
    assert torch.equal(checked, views(True))
    assert len(calls) == 6 + 3 + 6
    assert torch.equal(checked, views(False))
