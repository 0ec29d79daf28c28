"""Views that share an augmentation across a chunk.

The equivariance loss compares samples that went through the *same* augmentation.
:func:`shared_views` makes such views of a batch with a transform that treats all images of a tensor
alike (`torchvision.transforms.v2`, kornia with `same_on_batch=True`).
:class:`SharedAugmentCollate` makes them in a `DataLoader` with any transform of single images.
:func:`assert_shared` tells whether a transform does what it should.
"""

import random
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from care_loss import _checks, _chunks

Transform = Callable[[Any], Tensor]


class SharedViews(NamedTuple):
    """Two views `(N, ...)` of a batch, and the id of each row's chunk `(N,)` for the loss."""

    view1: Tensor
    view2: Tensor
    chunks: Tensor


def shared_views(
    images: Tensor, transform: Callable[[Tensor], Tensor], *, chunks: int | Tensor
) -> SharedViews:
    """Make two views of a batch; each chunk shares one augmentation in each view.

    Every chunk draws its own pair of augmentations, as in the paper's algorithm.

    Args:
        images: A batch of images, `(N, ...)` with `N >= 2`.
        transform: Maps images `(n, ...)` to views `(n, ...)`, drawing one augmentation for all.
        chunks: The number of chunks, or ids `(N,)`, just as the losses take them.

    Returns:
        The two views, in the order of `images`, and the chunk ids, to be handed to the loss.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> def brightness(images):  # one factor for all images
        ...     return images * torch.rand(())
        >>> images = torch.ones(6, 3, 8, 8)
        >>> view1, view2, chunks = shared_views(images, brightness, chunks=2)
        >>> chunks
        tensor([0, 0, 0, 1, 1, 1])
        >>> torch.equal(view1[0], view1[2]), torch.equal(view1[0], view2[0])
        (True, False)
    """
    _checks.images(images)
    _checks.chunks(chunks, len(images), images.device)
    ids = _chunks.ids(chunks, len(images), images.device)
    members = _chunks.members(ids)
    pairs = [
        [_checks.views(transform(images[rows]), len(rows)) for _ in range(2)] for rows in members
    ]
    restore = torch.cat(members).argsort()
    view1, view2 = (torch.cat(parts)[restore] for parts in zip(*pairs, strict=True))
    return SharedViews(view1, view2, ids)


class SharedAugmentCollate:
    """Collate a batch into chunk-shared views, with any transform of single images.

    All images of a chunk are transformed from the same state of the random generators of `torch`
    (on the CPU), NumPy and `random`, so they get the same augmentation. A transform with a private
    generator would escape that, and images of different sizes get different crops:
    :func:`assert_shared` with `batched=False` checks a transform.

    The generators of NumPy and `random` are left as they were found, and `torch`'s advances by one
    draw a batch for the shared views: `torch.manual_seed` makes a run repeatable, and every worker
    process and epoch of a `DataLoader` draws its own augmentations. Where workers are spawned (on
    macOS and Windows), the transforms must be picklable: functions of a module, no lambdas.

    Args:
        transform: Maps one image, as the dataset yields it, to a tensor; shared by each chunk.
        chunks: How many contiguous chunks to cut a batch into; a small batch gets `N // 2` chunks.
        own: Maps one image to a tensor, drawing anew for every image and view; for the ordinary
            views. Without it the shared views come alone (`CAREloss(shared_views=True)`).

    Example:
        >>> def brightness(image):
        ...     return image * torch.rand(())
        >>> collate = SharedAugmentCollate(brightness, chunks=2, own=brightness)
        >>> (z1, z2, e1, e2, chunks), labels = collate([(torch.ones(3), k) for k in range(4)])
        >>> torch.equal(e1[0], e1[1]), torch.equal(e1[1], e1[2]), torch.equal(z1[0], z1[1])
        (True, False, False)
        >>> chunks, labels
        (tensor([0, 0, 1, 1]), tensor([0, 1, 2, 3]))
    """

    def __init__(self, transform: Transform, *, chunks: int, own: Transform | None = None) -> None:
        _checks.chunk_count(chunks)
        self.transform = transform
        self.chunks = chunks
        self.own = own

    def __call__(self, batch: Sequence[tuple[Any, Any]]) -> tuple[tuple[Tensor, ...], Any]:
        """Collate samples `(image, label)` into `(views, labels)`.

        The views stand in the order of the loss's arguments: the two of `own` where given, the two
        shared ones, and the chunk ids.
        """
        _checks.samples(batch)
        images, labels = zip(*batch, strict=True)
        ids = _chunks.ids(self.chunks, len(images), torch.device("cpu"))
        views = []
        if self.own is not None:
            views += [
                torch.stack([_checks.view(self.own(_copy(image))) for image in images])
                for _ in range(2)
            ]
        for seeds in torch.randint(2**32, (2, int(ids[-1]) + 1)):  # a seed for each view and chunk
            views.append(torch.stack(_replay(self.transform, images, seeds[ids].tolist())))
        return (*views, ids), default_collate(list(labels))


def assert_shared(transform: Callable[[Any], Tensor], image: Any, *, batched: bool = True) -> None:
    """Check that a transform draws one augmentation for a whole chunk, and a new one for each view.

    Copies of one image go through the transform as the images of a chunk would. They must come out
    equal within a view (to 1e-4 of its range of values), and not all views may be equal: 16 are
    drawn, for the sake of transforms that often do nothing.

    Args:
        transform: Maps images `(n, ...)` to views `(n, ...)` as for :func:`shared_views`, or, with
            `batched=False`, one image to a tensor as for :class:`SharedAugmentCollate`.
        image: One image that augmentations change visibly (not a constant one).
        batched: Which of the two the transform is.

    Raises:
        ValueError: if copies of one image differ within a view, or all views agree.

    Example:
        >>> def noise(images):
        ...     return images + torch.randn_like(images)
        >>> assert_shared(noise, torch.rand(3, 8, 8))
        Traceback (most recent call last):
        ...
        ValueError: `transform` must draw one augmentation for all images of a chunk, got ...
    """
    views = [_copies(transform, image, batched) for _ in range(16)]
    if any(_differ(copy, view[0]) for view in views for copy in view[1:]):
        raise ValueError(
            "`transform` must draw one augmentation for all images of a chunk, got different views "
            "of copies of one image: use torchvision.transforms.v2 or kornia with "
            "same_on_batch=True for tensors of images; for single images draw from the generators "
            "of torch, NumPy or random, or seed another from random.getrandbits(32) in every call."
        )
    if not any(_differ(view[0], views[0][0]) for view in views[1:]):
        raise ValueError(
            f"`transform` must draw a new augmentation for each view, got {len(views)} equal "
            "views: use a random transform, and an image that it changes."
        )


def _replay(transform: Transform, images: Sequence[Any], seeds: Sequence[int]) -> list[Tensor]:
    """Transform each image after setting the random generators to its seed, then restore them."""
    numpy = sys.modules.get("numpy")  # if nobody has imported it, nobody draws from it
    states = torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    views = []
    try:
        for image, seed in zip(images, seeds, strict=True):
            # Not torch.manual_seed: that would set the generators of every GPU too.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed)
            views.append(_checks.view(transform(_copy(image))))
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(states[2])
    return views


def _copy(image: Any) -> Any:
    """Copy an image, for transforms that work in place."""
    return image.clone() if isinstance(image, Tensor) else deepcopy(image)


def _copies(transform: Callable[[Any], Tensor], image: Any, batched: bool) -> list[Tensor]:
    """Transform four copies of an image as the four images of one chunk."""
    if batched:
        return list(_checks.views(transform(torch.stack([image] * 4)), 4))
    seed = int(torch.randint(2**32, ()))
    return _replay(transform, [image] * 4, [seed] * 4)


def _differ(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    a, b = a.cpu().double(), b.cpu().double()
    return not bool((a - b).abs().max() <= 1e-4 * (b.max() - b.min()))
