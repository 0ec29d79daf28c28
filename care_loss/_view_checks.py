"""What samples, transforms and their views must be, and the errors."""

from typing import Any

import torch
from torch import Tensor

from care_loss._checks import is_int, show


def check_images(value: Any) -> None:
    """Require a batch of at least two images in one tensor."""
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) < 2:
        raise ValueError(
            f"`images` must be a tensor of shape (N, ...) with N >= 2, got {show(value)}: stack "
            "the images with torch.stack(), or use SharedAugmentCollate for single images."
        )


def check_samples(batch: Any) -> None:
    """Require samples (image, label, ...), enough of them to be cut into chunks."""
    for sample in batch:
        if not isinstance(sample, (tuple, list)) or len(sample) < 2:
            raise ValueError(
                f"a dataset must yield tuples (image, label, ...), got {show(sample)}: if there "
                "are no labels, yield (image, 0)."
            )
    if len({len(sample) for sample in batch}) > 1:
        raise ValueError(
            "the samples of a batch must have equally many parts, got "
            f"{sorted({len(sample) for sample in batch})}: yield the same parts for every image."
        )
    if len(batch) < 2:
        raise ValueError(
            f"a batch must contain at least 2 samples, got {len(batch)}: an augmentation is shared "
            "by at least two images. Set drop_last=True in the DataLoader."
        )


def as_transforms(name: str, value: Any) -> tuple[Any, Any]:
    """Require a transform or a pair of them, and return the pair."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(map(callable, pair)):
        raise TypeError(
            f"`{name}` must be a callable that maps one image to a tensor, or a pair of such, got "
            f"{show(value)}: compose several steps with torchvision.transforms.Compose."
        )
    return pair


def as_forwards(value: Any, transform: Any, ordinary: Any) -> int:
    """Require a number of forwards that fits the transforms, and return it or the default."""
    if value is None:
        return 2 if ordinary is None else 4
    if not is_int(value) or value not in (2, 3, 4):
        raise ValueError(
            f"`forwards` must be 2, 3 or 4, got {show(value)}: choose 2 for two shared views, 4 "
            "for two ordinary and two shared ones, or 3 for two ordinary views and the first of "
            "them under a shared transform."
        )
    if value == 2 and ordinary is not None:
        raise ValueError(
            f"`ordinary` must be left out when forwards=2, got {show(ordinary)}: both views are "
            "shared. Set forwards=3 or forwards=4 to make ordinary views too."
        )
    if value > 2 and ordinary is None:
        raise ValueError(
            f"`ordinary` must be given when forwards={value}, got None: pass the transform of the "
            "ordinary views, or set forwards=2 for two shared views only."
        )
    if value == 3 and isinstance(transform, (tuple, list)):
        raise ValueError(
            f"`transform` must be a single callable when forwards=3, got {show(transform)} of "
            f"length {len(transform)}: only one view is shared. Pass one transform, or set "
            "forwards=4."
        )
    return int(value)


def as_view(value: Any, image: Any, name: str = "transform") -> Tensor:
    """Require that a transform of one image returned a tensor, and return it."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` must map an image to a tensor, got {show(value)}: end it with a "
            "conversion such as ToTensor(), and if it returns several views, choose one of them."
        )
    if isinstance(image, Tensor) and image.ndim == 3 and value.ndim == 4 and len(value) == 1:
        raise ValueError(
            f"`{name}` must map an image {tuple(image.shape)} to a view of as many dimensions, "
            f"got {tuple(value.shape)}: it returned a batch of one. With kornia, set keepdim=True."
        )
    return value


# What PIL, torchvision and albumentations raise if they are given a tensor and expect an image.
ERRORS_AT_TENSORS = (AttributeError, OSError, TypeError)


def not_a_transform_of_views(error: Exception, view: Tensor) -> TypeError:
    """Return the error of a transform of images that was given an ordinary view."""
    return TypeError(
        "`transform` must take the tensor that `ordinary` returned when forwards=3, got "
        f"{type(error).__name__} from a call with {show(view)}: leave out its ToTensor(). A "
        "transform of PIL images can begin with ToPILImage(), and one of NumPy images with "
        "view.permute(1, 2, 0).numpy()."
    )


def as_views(value: Any, n: int) -> Tensor:
    """Require that a transform of `n` stacked images returned as many, and return them."""
    if not isinstance(value, Tensor) or not value.ndim or len(value) != n:
        raise ValueError(
            f"`transform` must map a tensor of {n} images to a tensor of {n} images, got "
            f"{show(value)}: for a transform of single images use SharedAugmentCollate, and "
            "assert_shared with batched=False."
        )
    return value


def check_one_size(views: list[Tensor]) -> None:
    """Require that single views have one size."""
    sizes = sorted({tuple(view.shape) for view in views})
    if len(sizes) > 1:
        raise ValueError(
            f"`transform` must return views of one size, got sizes {sizes[0]} and {sizes[1]}: end "
            "it with a resize or a crop to a fixed size."
        )


def check_separate_memory(views: list[Tensor]) -> None:
    """Require that the outputs of a transform do not lie in the same memory."""
    places = [view.data_ptr() for view in views if view.numel() and not view.is_meta]
    if len(set(places)) < len(places):
        raise ValueError(
            "`transform` must return a new tensor at every call, got one that it returned before: "
            "its earlier values are lost. Return a copy, with .clone()."
        )


def check_same_draws(same: bool, first: Any, other: Any) -> None:
    """Require that two images of a chunk made a transform draw the same random numbers."""
    if not same:
        raise ValueError(
            "`transform` must draw the same random numbers for all images of a chunk, got "
            f"different states of the random generators after images of size {_size(first)} and "
            f"{_size(other)}: what it drew last was not shared. Bring the images to one size and "
            "mode first, for example with Resize and CenterCrop in the dataset's transform."
        )


def check_images_to_try(images: list[Any], batched: bool) -> None:
    """Require images, and tensors for transforms that take stacked images."""
    if not images:
        raise ValueError("`image` must be an image or a list of images, got []: pass at least one.")
    for image in images:
        if batched and not isinstance(image, Tensor):
            raise TypeError(
                f"`image` must be a torch.Tensor, got {show(image)}: convert it to a tensor, or "
                "pass batched=False if the transform takes single images."
            )


def check_finite(broken: int, count: int) -> None:
    """Require that no view of a transform is broken."""
    if broken:
        raise ValueError(
            f"`transform` must return finite values, got NaN or infinity in {broken} of {count} "
            "views: check the range of values that it expects."
        )


def check_shared(differ_within: bool, differ_across: bool, count: int) -> None:
    """Require that the images of a chunk shared each augmentation, and that views differed."""
    if differ_within:
        raise ValueError(
            "`transform` must draw one augmentation for all images of a chunk, got different views "
            "of copies of one image: use torchvision.transforms.v2 or kornia with "
            "same_on_batch=True for tensors of images; for single images draw from the generators "
            "of torch, NumPy or random, or seed another from random.getrandbits(32) in every call."
        )
    if not differ_across:
        raise ValueError(
            f"`transform` must draw a new augmentation for each view, got {count} equal views: use "
            "a random transform, and an image that it changes."
        )


def views_differ(a: Tensor, b: Tensor) -> bool:
    """Tell whether two views differ by more than rounding, 1e-4 of the range of their values."""
    if a.shape != b.shape:
        return True
    a, b = a.cpu().double(), b.cpu().double()
    return not bool((a - b).abs().max() <= 1e-4 * (b.max() - b.min()))


def _size(image: Any) -> Any:
    """Return what an image calls its size: a tensor its shape, a PIL image width and height."""
    size = getattr(image, "shape", getattr(image, "size", "unknown"))
    mode = getattr(image, "mode", "")  # of a PIL image
    return f"{tuple(size) if isinstance(size, torch.Size) else size} {mode}".strip()
