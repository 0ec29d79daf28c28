"""Views that share an augmentation: in one tensor, in a collate function, in worker processes."""

import multiprocessing
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from care_loss import CAREloss
from care_loss._view_checks import views_differ
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


FASTEST = multiprocessing.get_all_start_methods()[0]  # spawn everywhere, or fork


@pytest.mark.parametrize(
    ("context", "forwards", "epochs"),
    [
        (FASTEST, 4, 2),
        ("spawn", 3, 1),  # which imports everything in each worker and epoch
        *(
            pytest.param(context, 4, 2, marks=pytest.mark.deep)
            for context in multiprocessing.get_all_start_methods()[1:]
        ),
        pytest.param("spawn", 3, 2, marks=pytest.mark.deep),
    ],
)
def test_collate_works_in_worker_processes(context, forwards, epochs):
    loader = DataLoader(
        samples(16),
        batch_size=8,
        collate_fn=SharedAugmentCollate(
            brightness, chunks=2, ordinary=brightness, forwards=forwards
        ),
        num_workers=2,
        multiprocessing_context=context,
    )
    factors = []
    for _ in range(epochs):
        for (x1, _, *shared, ids), labels in loader:
            originals = x1 if forwards == 3 else torch.stack([x for x, _ in samples(16)])[labels]
            for view in shared:
                assert_constant_on_chunks(draws(view, originals), ids)
                factors += [draws(view, originals)[0], draws(view, originals)[-1]]
    # Every worker, view, chunk and epoch has drawn its own.
    assert len(torch.stack(factors).unique()) == len(factors) == 4 * epochs * (forwards - 2)


def test_a_ragged_last_batch_is_cut_like_any_other():
    (_, _, ids), _ = SharedAugmentCollate(brightness, chunks=8)(samples(13))
    assert ids == 6


# Collating for three forwards


def ordinary_noise(image):
    """A number of its own for every image and view."""
    return image + torch.rand(())


def three(transform=brightness, chunks=4, ordinary=ordinary_noise):
    return SharedAugmentCollate(transform, chunks=chunks, ordinary=ordinary, forwards=3)


def test_the_third_view_is_the_first_under_one_draw_for_each_chunk():
    (x1, x2, turned, chunks), labels = three()(samples())
    originals = torch.stack([image for image, _ in samples()])
    assert chunks == 4
    assert labels.tolist() == list(range(11))
    added = torch.cat([x1 - originals, x2 - originals]).flatten(1).mean(1)
    assert len(added.unique()) == 22  # a draw for each image and ordinary view
    assert_constant_on_chunks(draws(turned, x1), chunks)
    torch.testing.assert_close(turned / x1, draws(turned, x1).view(-1, 1, 1, 1).expand_as(x1))


def test_a_pair_for_the_ordinary_views_turns_the_first():
    pair = (lambda image: image + 10), (lambda image: image + 20)
    (x1, x2, turned, _), _ = three(lambda view: view.flip(-1), ordinary=pair)(samples())
    assert torch.equal(x2, x1 + 10)
    assert torch.equal(turned, x1.flip(-1))


def test_forwards_has_the_default_that_the_transforms_ask_for():
    for settings, forwards in (({}, 2), ({"ordinary": ordinary_noise}, 4)):
        made = []
        for more in ({}, {"forwards": forwards}, {"forwards": np.int64(forwards)}):
            torch.manual_seed(0)
            views, _ = SharedAugmentCollate(brightness, chunks=4, **settings, **more)(samples())
            assert len(views) == forwards + 1
            made.append(torch.stack(views[:-1]))
        assert torch.equal(made[0], made[1])
        assert torch.equal(made[0], made[2])


def test_three_forwards_are_repeatable_and_leave_the_generators():
    collate = three(three_generators)
    before = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views, _ = collate(samples())
        made.append(torch.stack(views[:3]))
    left = torch.get_rng_state()
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert before == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    torch.manual_seed(1)
    _ = [torch.rand(()) for _ in range(22)]  # the ordinary views
    torch.randint(2**32, (1, 4))  # a seed for each chunk of one view
    assert torch.equal(left, torch.get_rng_state())


def test_three_forwards_cut_a_ragged_last_batch_and_collate_other_fields():
    batch = [(image, label, f"image {label}") for image, label in samples(13)]
    (x1, _, turned, chunks), labels, names = three(chunks=8)(batch)
    assert chunks == 6
    assert_constant_on_chunks(draws(turned, x1), chunks)
    assert (labels[12], names[12]) == (12, "image 12")


def test_a_transform_in_place_leaves_the_ordinary_view_as_it_was():
    def in_place(view):
        return view.mul_(2 + torch.rand(()))

    batch = [(torch.ones(3), k) for k in range(4)]
    for ordinary in (lambda image: image, ordinary_noise):
        (x1, _, turned, _), _ = three(in_place, chunks=2, ordinary=ordinary)(batch)
        assert all((image == 1).all() for image, _ in batch)
        assert ((x1 >= 1) & (x1 <= 2)).all()
        assert_constant_on_chunks(draws(turned, x1), 2)


def test_an_ordinary_transform_may_reuse_its_memory_for_the_second_view():
    memory = torch.empty(4, 3)
    calls = iter(range(8))

    def ordinary(image):
        call = next(calls)
        return memory[call % 4].copy_(image + call)

    batch = [(torch.zeros(3), k) for k in range(4)]
    (x1, x2, turned, _), _ = three(lambda view: view * 2, ordinary=ordinary)(batch)
    assert x1[:, 0].tolist() == [0, 1, 2, 3]
    assert x2[:, 0].tolist() == [4, 5, 6, 7]
    assert torch.equal(turned, 2 * x1)


def test_images_of_different_sizes_are_brought_to_one_by_the_ordinary_views():
    collate = three(ordinary=lambda image: image[:, :4, :4] + 1)
    (x1, _, turned, chunks), _ = collate([(torch.rand(3, 4 + k, 9 - k), k) for k in range(6)])
    assert_constant_on_chunks(draws(turned, x1), chunks)


def test_numpy_images_go_through_the_ordinary_views_to_tensors():
    def ordinary(image):  # ends in a tensor with the channels first
        return torch.from_numpy(image + np.random.rand()).permute(2, 0, 1)  # noqa: NPY002

    def transform(view):  # of NumPy images, as those of albumentations
        image = view.permute(1, 2, 0).numpy()
        return torch.from_numpy(image * (0.5 + random.random())).permute(2, 0, 1)

    batch = [(1 + np.random.rand(4, 5, 3), k) for k in range(11)]  # noqa: NPY002
    (x1, x2, turned, chunks), _ = three(transform, ordinary=ordinary)(batch)
    assert x1.shape == x2.shape == turned.shape == (11, 3, 4, 5)
    assert_constant_on_chunks(draws(turned, x1), chunks)


def test_pil_images_go_through_the_ordinary_views_to_tensors():
    image = pytest.importorskip("PIL.Image")

    def to_tensor(picture):
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def ordinary(picture):
        return to_tensor(picture.rotate(90 * random.randrange(4)))

    def transform(view):  # of PIL images: adds a number to all values
        picture, number = image.fromarray(view.permute(1, 2, 0).numpy()), random.randrange(100)
        return to_tensor(picture.point(lambda value: value + number))

    pixels = np.random.default_rng(0).integers(0, 99, (11, 6, 6, 3), dtype=np.uint8)
    batch = [(image.fromarray(array), k) for k, array in enumerate(pixels)]
    (x1, _, turned, chunks), _ = three(transform, chunks=2, ordinary=ordinary)(batch)
    assert_constant_on_chunks((turned - x1).flatten(1), chunks)
    assert ((turned - x1).flatten(1) == (turned - x1)[:, :1, 0, 0]).all()


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
    with pytest.raises(ValueError, match="got 128 equal views"):
        assert_shared(lambda x: 2 * x, torch.rand(3, 8, 8, device=device))
    with pytest.raises(ValueError, match="an image that it changes"):
        assert_shared(brightness, torch.zeros(3, 8, 8, device=device))


def test_views_differ_by_more_than_a_part_of_their_range():
    image = 255 * torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not views_differ(image, image + 0.01)  # less than 1e-4 of 255
    assert views_differ(image, image + 0.1)
    assert views_differ(image, torch.full_like(image, torch.nan))
    assert views_differ(image, image[:, :7])


def test_assert_shared_compares_the_draws_of_two_images():
    def transform(image):  # draws once for each row of an image
        return image * torch.rand(image.shape[-2], 1)

    with pytest.raises(ValueError, match="draw the same random numbers for all images of a chunk"):
        assert_shared(transform, [torch.rand(3, 8, 8), torch.rand(3, 9, 8)], batched=False)
    assert_shared(transform, [torch.rand(3, 8, 8), torch.rand(3, 8, 9)], batched=False)


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


def test_images_without_values_are_not_checked():
    def transform(images):
        return noise(images)

    images = torch.empty(32, 3, 4, 4, device="meta")
    made = augment_chunks(images, transform, chunks=2)
    assert made.view.shape == images.shape
    assert made.view.is_meta
    with pytest.raises(ValueError, match="one augmentation for all images of a chunk"):
        augment_chunks(torch.rand(32, 3, 4, 4), transform, chunks=2)  # it was not checked before


def test_each_method_of_an_object_is_checked():
    class Transforms:
        def shared(self, images):
            return brightness(images)

        def for_each(self, images):
            return noise(images)

    images, transforms = torch.rand(32, 3, 4, 4), Transforms()
    augment_chunks(images, transforms.shared, chunks=2)
    with pytest.raises(ValueError, match="one augmentation for all images of a chunk"):
        augment_chunks(images, transforms.for_each, chunks=2)


def test_a_constant_image_does_not_hide_that_others_differ():
    images = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for value in (0, 0.5, 1):
        images[::2] = value  # flips leave it as it is
        with pytest.raises(ValueError, match="one augmentation for all images of a chunk"):
            augment_chunks(images, flips, chunks=2)


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
