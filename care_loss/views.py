"""Views that share an augmentation across a chunk.

The equivariance loss compares samples that have seen the *same* augmentation. :func:`shared_views`
makes such views of a batch, and :func:`augment_chunks` a single one, with a transform that treats
all images of a tensor alike (`torchvision.transforms.v2`, kornia with `same_on_batch=True`).
:class:`SharedAugmentCollate` makes them in a `DataLoader`, with any transform of single images.
:func:`assert_shared` checks a transform.

Augmentations in the ordinary views are ignored by the embedding. Augmentations that are only in the
shared views rotate it. An augmentation that is in both is ignored.

Pass the returned `chunks` to the loss, with the rows in the same order. Class labels cannot serve
as ids: images of one class do not share an augmentation.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.utils.data import default_collate

from care_loss import _checks, _chunks, _rng, _view_checks

# Any, though it returns a tensor: jsonargparse takes a class here for one to be instantiated, and
# expects a subclass of what the callable returns.
Transform = Callable[[Any], Any]
COPIES = 8  # of an image, on which a transform is tried: of two, half agree after a random flip


class AugmentedChunks(NamedTuple):
    """A view `(N, ...)` of a batch, and the `chunks` to pass to the loss with it."""

    view: Tensor
    chunks: int | Tensor


def augment_chunks(
    images: Tensor,
    transform: Callable[[Tensor], Tensor],
    *,
    chunks: int | Tensor,
    check: bool = True,
) -> AugmentedChunks:
    """Make one view of a batch; all images of a chunk share one augmentation.

    It serves the form of the loss with three forwards, in which the equivariance loss compares the
    first ordinary view with the same view under a shared augmentation. If the images come in one
    state (all upright, say), turn each by itself first, the same in all views: training has to show
    all states between which `turn` turns::

        images = torch.cat([turn(image[None]) for image in images])
        x1, x2 = ordinary(images), ordinary(images)
        turned, chunks = augment_chunks(x1, turn, chunks=8)
        z1, z2, e = encoder(x1), encoder(x2), encoder(turned)
        loss = criterion(z1, z2, equivariant1=z1, equivariant2=e, chunks=chunks)

    What `turn` does must not be part of `ordinary`: an augmentation that is in both is ignored by
    the embedding. In training mode, batch normalisation normalises each of the three batches by its
    own statistics. Embed all chunks of a view in one forward: in a forward of one chunk, whose
    images share one augmentation, batch normalisation may remove the effect of the augmentation.

    Args:
        images: A batch of images, `(N, ...)` with `N >= 2`.
        transform: Maps images `(n, ...)` to views `(n, ...)`, drawing one augmentation for all.
        chunks: The number of contiguous chunks, or integer ids `(N,)`, as the losses take them.
        check: Check the transform when it is first used: copies of one image must come out equal.
            The generators of torch, NumPy and `random` are left as they were; a transform with a
            generator of its own makes a few more draws. A transform that draws for each image but
            rarely changes any is not noticed: :func:`assert_shared` checks more. Functions that one
            line of code defines, and partials of one function, count as one transform.

    Returns:
        The view, in the order of `images`, and the chunks to pass to the loss: the number of chunks
        that were made if a number was given, otherwise the ids.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> def brightness(images):  # one factor for all images
        ...     return images * torch.rand(())
        >>> view, chunks = augment_chunks(torch.ones(6, 3, 8, 8), brightness, chunks=2)
        >>> torch.equal(view[0], view[2]), torch.equal(view[2], view[3])
        (True, False)
    """
    _view_checks.check_images(images)
    chunks = _checks.as_chunks(chunks, len(images), images.device)
    members = [
        rows.to(images.device, non_blocking=True) for rows in _chunks.members(chunks, len(images))
    ]
    _checks.check_pairs([rows for rows in members if len(rows) > 1])
    if _checks.as_boolean("check", check):
        _check_once(transform, images, max(map(len, members)))
    outputs = [_view_checks.as_views(transform(images[rows]), len(rows)) for rows in members]
    _view_checks.check_separate_memory(outputs)
    _view_checks.check_one_size([output[0] for output in outputs])
    view, order = torch.cat(outputs), torch.cat(members)
    if isinstance(chunks, Tensor):
        return AugmentedChunks(view[order.argsort().to(view.device)], chunks)
    return AugmentedChunks(view, len(members))


class SharedViews(NamedTuple):
    """Two views `(N, ...)` of a batch, and the `chunks` to pass to the loss with them."""

    view1: Tensor
    view2: Tensor
    chunks: int | Tensor


def shared_views(
    images: Tensor,
    transform: Callable[[Tensor], Tensor],
    *,
    chunks: int | Tensor,
    check: bool = True,
) -> SharedViews:
    """Make two views of a batch; each chunk shares one augmentation in each view.

    Every chunk draws its own pair of augmentations, as in the paper's algorithm. The views are
    those of two calls of :func:`augment_chunks`.

    Args:
        images: A batch of images, `(N, ...)` with `N >= 2`.
        transform: Maps images `(n, ...)` to views `(n, ...)`, drawing one augmentation for all.
        chunks: The number of contiguous chunks, or integer ids `(N,)`, as the losses take them.
        check: Check the transform when it is first used, as :func:`augment_chunks` does.

    Returns:
        The two views, in the order of `images`, and the chunks to pass to the loss: the number of
        chunks that were made where a number was given, otherwise the ids.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> def brightness(images):  # one factor for all images
        ...     return images * torch.rand(())
        >>> images = torch.ones(6, 3, 8, 8)
        >>> view1, view2, chunks = shared_views(images, brightness, chunks=2)
        >>> chunks
        2
        >>> torch.equal(view1[0], view1[2]), torch.equal(view1[0], view2[0])
        (True, False)
    """
    view1, made = augment_chunks(images, transform, chunks=chunks, check=check)
    view2, _ = augment_chunks(images, transform, chunks=chunks, check=check)
    return SharedViews(view1, view2, made)


class SharedAugmentCollate:
    """Collate a batch into chunk-shared views, with any transform of single images.

    All images of a chunk are transformed from the same state of the random generators of `torch`
    (on the CPU), NumPy and `random`, so they get the same augmentation. This works only if the
    transform draws the same random numbers for all of them. Images of different sizes may make it
    draw more often for one than for another (`RandomResizedCrop` does), so the states of the
    generators are compared after each image, and it is an error if they differ. A transform with a
    generator of its own is not noticed: :func:`assert_shared` with `batched=False` checks for it.

    Under `torch.manual_seed` the shared views are repeatable, whatever generator the transform
    draws from. The ordinary views are as repeatable as their transform: one that draws from NumPy
    or `random` needs their seeds as well. Every worker process and epoch of a `DataLoader` draws
    its own augmentations. Shared views leave the generators of NumPy and `random` as they were, and
    take from that of `torch` one seed for each chunk and view, whatever the transform draws.

    If workers are spawned (on macOS and Windows), the transforms must be picklable: functions of a
    module or objects, no lambdas.

    With `forwards=3`, `transform` is applied to the first ordinary view: it gets the tensor that
    `ordinary` returned, and the images of the dataset may have different sizes if those tensors
    have one. Most transforms of torchvision take tensors as they are, without `ToTensor`. Begin a
    transform of PIL images with `ToPILImage`, and convert the tensor for one of NumPy images with
    `view.permute(1, 2, 0).numpy()`.

    Args:
        transform: Maps one image, as the dataset yields it, to a tensor, and is shared by each
            chunk. Or a pair of such transforms, one for each view. With `forwards=3`, one
            transform that maps an ordinary view to a tensor.
        chunks: The number of contiguous chunks to cut a batch into; a batch too small for them gets
            `N // 2`.
        ordinary: Maps one image to a tensor, for the ordinary views: it draws anew for every image
            and view. Or a pair, one for each view (BYOL, Barlow Twins). Without it only the shared
            views are made, for `CAREloss(shared_views=True)`.
        forwards: How many views are made, each for one forward of the encoder: 2 shared ones
            (default without `ordinary`); 4, the ordinary and the shared ones (default with
            `ordinary`); or 3, the ordinary ones, and the first of them under `transform`.

    Raises:
        TypeError, ValueError: if an argument is not as described, here or in a call.

    Example:
        >>> def brightness(image):
        ...     return image * torch.rand(())
        >>> collate = SharedAugmentCollate(brightness, chunks=2, ordinary=brightness)
        >>> (x1, x2, a1, a2, chunks), labels = collate([(torch.ones(3), k) for k in range(4)])
        >>> torch.equal(a1[0], a1[1]), torch.equal(a1[1], a1[2]), torch.equal(x1[0], x1[1])
        (True, False, False)
        >>> chunks, labels
        (2, tensor([0, 1, 2, 3]))

        With three forwards, for `loss(z1, z2, equivariant1=z1, equivariant2=e, chunks=chunks)`:

        >>> def noise(image):
        ...     return image + torch.randn(3)
        >>> collate = SharedAugmentCollate(brightness, chunks=2, ordinary=noise, forwards=3)
        >>> (x1, x2, turned, chunks), labels = collate([(torch.ones(3), k) for k in range(4)])
        >>> factors = turned / x1  # one for each chunk
        >>> torch.allclose(factors[0], factors[1]), torch.allclose(factors[1], factors[2])
        (True, False)
    """

    def __init__(
        self,
        transform: Transform | tuple[Transform, Transform],
        *,
        chunks: int,
        ordinary: Transform | tuple[Transform, Transform] | None = None,
        forwards: Literal[2, 3, 4] | None = None,
    ) -> None:
        self.chunks = _checks.as_chunk_count(chunks)
        self.forwards = _view_checks.as_forwards(forwards, transform, ordinary)
        transforms = _view_checks.as_transforms("transform", transform)
        self.transforms = transforms[:1] if self.forwards == 3 else transforms
        self.ordinary = (
            None if ordinary is None else _view_checks.as_transforms("ordinary", ordinary)
        )

    def __call__(self, batch: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Collate samples `(image, label)` into `(views, labels)`.

        Whatever else the samples hold is collated too: `(image, label, name)` become `(views,
        labels, names)`.

        The views are in the order of the loss's arguments: the two ordinary ones if `ordinary` was
        given, the two shared ones (one with `forwards=3`), and the number of chunks.
        """
        _view_checks.check_samples(batch)
        images, *others = zip(*batch, strict=True)
        views = []
        for transform in self.ordinary or ():
            outputs = [
                _view_checks.as_view(transform(_copy(image)), image, "ordinary") for image in images
            ]
            views.append(_stack(outputs))
        sources = views[0] if self.forwards == 3 else images
        members = _chunks.members(self.chunks, len(images))
        seeds = _seeds(len(self.transforms), len(members))
        for transform, seeds_of_view in zip(self.transforms, seeds, strict=True):
            if self.forwards == 3 and not isinstance(images[0], Tensor):
                transform = partial(_transform_view, transform)
            outputs = []
            for rows, seed in zip(members, seeds_of_view, strict=True):
                outputs += _replay(transform, [sources[row] for row in rows.tolist()], seed)
            views.append(_stack(outputs))
        return (*views, len(members)), *(default_collate(list(values)) for values in others)


def assert_shared(transform: Callable[[Any], Tensor], image: Any, *, batched: bool = True) -> None:
    """Check that a transform draws one augmentation for a whole chunk, and a new one for each view.

    Copies of one image go through the transform as the images of a chunk would. They must come out
    equal within a view (to 1e-4 of its range of values), and not all views may be equal. At least
    16 views are drawn, and up to 128 until one differs, because some transforms rarely do anything.

    Args:
        transform: Maps images `(n, ...)` to views `(n, ...)` as for :func:`shared_views`, or, with
            `batched=False`, one image to a tensor as for :class:`SharedAugmentCollate`.
        image: An image that augmentations change visibly (not a constant one), or a list of images.
            Each is checked. With `batched=False` images of different sizes are also checked to draw
            the same random numbers.
        batched: Which of the two the transform is.

    Raises:
        TypeError, ValueError: if copies of one image differ within a view, if all views agree, or
            if an argument is not as described.

    Example:
        >>> def noise(images):
        ...     return images + torch.randn_like(images)
        >>> assert_shared(noise, torch.rand(3, 8, 8))
        Traceback (most recent call last):
        ...
        ValueError: `transform` must draw one augmentation for all images of a chunk, got ...
    """
    batched = _checks.as_boolean("batched", batched)
    images = image if isinstance(image, list) else [image]
    _view_checks.check_images_to_try(images, batched)
    if not batched and len(images) > 1:
        for seed in _seeds(16):
            _replay(transform, images, seed)
    for one in images:
        views: list[list[Tensor]] = []
        while len(views) < 16 or (
            len(views) < 128 and not _view_checks.views_differ(views[-1][0], views[0][0])
        ):
            views.append(_copies(transform, one, batched))
        copies = [copy for view in views for copy in view]
        _view_checks.check_finite(
            sum(not bool(copy.isfinite().all()) for copy in copies), len(copies)
        )
        _view_checks.check_one_size(copies)
        within = any(
            _view_checks.views_differ(copy, view[0]) for view in views for copy in view[1:]
        )
        across = any(_view_checks.views_differ(view[0], views[0][0]) for view in views[1:])
        _view_checks.check_shared(within, across, len(views))


_CHECKED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # transforms, with their methods


def _check_once(transform: Callable[[Tensor], Tensor], images: Tensor, n: int) -> None:
    """Check, when a transform is first used, that it draws one augmentation for all `n` images."""
    owner, method = _identity(transform)
    if images.is_meta or method in _CHECKED.get(owner, ()):  # a meta tensor has no values
        return
    values = images.detach().flatten(1)
    image = images[(values.amax(-1) - values.amin(-1)).argmax()]  # a constant one may hide it
    with _rng.preserved(images.device):
        for _ in range(math.ceil((COPIES - 1) / (n - 1))):
            copies = _view_checks.as_views(transform(torch.stack([image] * n)), n)
            finite = bool(copies.isfinite().all())  # what is not is the encoder's to find
            differ = finite and _view_checks.views_differ(copies, copies[:1].expand_as(copies))
            _view_checks.check_shared(differ, True, 1)
    _CHECKED.setdefault(owner, set()).add(method)


def _identity(transform: Callable[[Tensor], Tensor]) -> tuple[Any, str]:
    """Return what stays the same if a transform is made anew for every call, and a name of it.

    A method is a new object at every access, and so is a function that is defined in a loop.
    """
    while isinstance(transform, partial):
        transform = transform.func
    owner = getattr(transform, "__self__", None)
    name = getattr(transform, "__name__", "") if owner is not None else ""
    owner = getattr(transform, "__code__", transform) if owner is None else owner
    try:
        hash(owner), ref(owner)
    except TypeError:
        owner = type(owner)
    return owner, name


def _stack(views: list[Tensor]) -> Tensor:
    _view_checks.check_separate_memory(views)
    _view_checks.check_one_size(views)
    return torch.stack(views)


def _transform_view(transform: Transform, view: Tensor) -> Any:
    """Transform an ordinary view of an image that was no tensor, as a transform may expect it."""
    try:
        return transform(view)
    except _view_checks.ERRORS_AT_TENSORS as error:
        raise _view_checks.not_a_transform_of_views(error, view) from error


def _replay(transform: Transform, images: Sequence[Any], seed: int) -> list[Tensor]:
    """Transform the images of a chunk from one state of the generators, then restore those."""
    outputs, first = [], None
    device = images[0].device if isinstance(images[0], Tensor) else None
    with _rng.preserved(device):
        for image in images:
            _rng.seed(seed, device)
            outputs.append(_view_checks.as_view(transform(_copy(image)), image))
            after = _rng.states()
            first = first or after
            _view_checks.check_same_draws(_rng.same_states(first, after), images[0], image)
    return outputs


def _seeds(*shape: int) -> Any:
    """Draw seeds as a list, or as a list of lists, whatever the default device is."""
    return torch.randint(2**32, shape, device="cpu").tolist()


def _copy(image: Any) -> Any:
    """Copy an image, for transforms that work in place."""
    return image.clone() if isinstance(image, Tensor) else deepcopy(image)


def _copies(transform: Callable[[Any], Tensor], image: Any, batched: bool) -> list[Tensor]:
    """Transform four copies of an image as the four images of one chunk."""
    if batched:
        return list(_view_checks.as_views(transform(torch.stack([image] * 4)), 4))
    return _replay(transform, [image] * 4, *_seeds(1))
