"""What the images, the encoder and its outputs must be for a report, and the errors."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from care_loss._checks import check_floating, show


class TransformationError(ValueError):
    """What a transformation of the report has raised or returned that it must not."""


def check_encoder(value: Any) -> None:
    """Require a callable encoder."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(
            f"`encoder` must be a callable that maps images to embeddings, got {show(value)}: "
            "pass a module or a function."
        )


def check_encoders(value: Any, baseline: Any) -> None:
    """Require two named encoders or more, of which one is the baseline."""
    if not isinstance(value, Mapping) or len(value) < 2:
        raise TypeError(
            "`encoders` must map at least two names to encoders, got "
            f"{show(value) if not isinstance(value, Mapping) else list(value)}: a figure without "
            "one to compare it with says nothing. Give a control, too."
        )
    for encoder in value.values():
        check_encoder(encoder)
    if baseline not in value:
        raise ValueError(
            f"`baseline` must be one of the names {list(value)}, got {baseline!r}: name the "
            "stronger control, such as the training without the augmentation in its views."
        )


def check_transformations(value: Any) -> None:
    """Require a mapping of names to transforms."""
    if not isinstance(value, Mapping) or not value:
        raise TypeError(
            "`transformations` must be a mapping of names to transforms, with at least one, got "
            f"{show(value)}: pass {{'hue': transform}}."
        )
    for name, transform in value.items():
        if not isinstance(name, str) or not callable(transform) or isinstance(transform, type):
            raise TypeError(
                "`transformations` must map names to callables of images (n, ...), got "
                f"{name!r}: {show(transform)}; create the transform first, as in "
                "{'flip': RandomHorizontalFlip()}."
            )


def check_loader(value: Any) -> None:
    """Require a DataLoader where the images are not a tensor."""
    if not isinstance(value, DataLoader):
        raise TypeError(
            "`images` must be a tensor (N, ...) or a torch.utils.data.DataLoader, got "
            f"{show(value)}: stack the images with torch.stack()."
        )


def as_images_of_batch(value: Any) -> Tensor:
    """Require a batch of images, alone or first in a tuple, and return the images."""
    images = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(images, Tensor) or not images.ndim:
        raise TypeError(
            "a batch must be a tensor of images (n, ...), or a tuple that starts with one, got "
            f"{show(value)}: let the dataset yield image or (image, label)."
        )
    return images


def as_images(first: Any) -> Tensor:
    """Require a first batch of at least one image, and return the images."""
    images = None if first is None else as_images_of_batch(first)
    if images is None or images.ndim < 2 or not len(images):
        raise ValueError(
            f"`images` must contain images, (N, ...) with N >= 4, got {show(images)}: stack the "
            "images with torch.stack()."
        )
    return images


def check_enough_images(n: int) -> None:
    """Require four images, two in each half."""
    if n < 4:
        raise ValueError(
            f"`images` must contain at least 4 images, got {n}: rotations are fitted to one half "
            "and scored on the other. Pass at least twice as many images as the embedding has "
            "dimensions."
        )


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the transformation in the errors that it raises."""
    try:
        yield
    except TransformationError:
        raise
    except Exception as error:
        raise TransformationError(
            f"transformations[{name!r}] must map a tensor of images (n, ...) to such a tensor, for "
            f"any n and with one size, got {type(error).__name__}: {error}. Transforms of single "
            "images can be wrapped in a function that stacks what they return."
        ) from error


def as_transformed(name: str, value: Any, images: Tensor) -> Tensor:
    """Require that a transformation returned as many images of the same dtype, and return them."""
    n = len(images)
    if not isinstance(value, Tensor) or not value.ndim or len(value) != n:
        raise TransformationError(
            f"transformations[{name!r}] must map a tensor of {n} images to a tensor of {n} images, "
            f"got {show(value)}: return one transformed image for each."
        )
    if value.dtype != images.dtype:
        raise TransformationError(
            f"transformations[{name!r}] must keep the dtype of the images, {images.dtype}, got "
            f"{value.dtype}: convert and normalise in the encoder, or beforehand, because the "
            "clean images are embedded as they are."
        )
    return value


def check_finite(name: str, view: Tensor) -> None:
    """Require finite images."""
    if view.is_floating_point() and not bool(view.isfinite().all()):
        raise TransformationError(
            f"transformations[{name!r}] must return finite images, got NaN or infinity: check the "
            "range of values that it expects, and the images themselves."
        )


def check_repeatable(
    name: str, differ_within: bool, differ_again: bool, differ_for_one: bool
) -> None:
    """Require that a transformation shared its draw, and drew it from generators that are seeded.

    The draw has to be the same a second time, and for a single image.
    """
    if differ_again:
        raise TransformationError(
            f"transformations[{name!r}] must draw from the generators of torch, NumPy or random, "
            "got different images for one state of these: seed its own generator from "
            "random.getrandbits(32) in every call."
        )
    if differ_within:
        raise TransformationError(
            f"transformations[{name!r}] must draw one augmentation for all images of a call, got "
            "different views of copies of one image: use torchvision.transforms.v2, or kornia with "
            "same_on_batch=True. The unshared control is made by the report."
        )
    if differ_for_one:
        raise TransformationError(
            f"transformations[{name!r}] must draw the same for any number of images, got another "
            "view for one image than for several: draw the parameters of the augmentation first, "
            "with a shape that does not depend on the batch."
        )


def check_batch_independent(z: Tensor, halves: Tensor) -> None:
    """Require that images have the same embeddings in one batch and in two."""
    difference = float(torch.linalg.vector_norm(z - halves))
    if not difference <= 0.02 * float(torch.linalg.vector_norm(z)):
        raise ValueError(
            "`encoder` must embed an image the same way in every batch, got other embeddings for "
            "the same images in two halves: batch normalisation and dropout must be in eval mode. "
            "Pass the module itself, or call its .eval() before."
        )


def as_outputs(value: Any, n: int, name: str | None) -> dict[str, Tensor]:
    """Require finite embeddings of `n` images, or features and projections, and name them."""
    where = "the clean images" if name is None else f"transformation {name!r}"
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    outputs = dict(zip(("features", "projections"), value, strict=True)) if pair else None
    for z in (outputs or {"": value}).values():
        if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != n or not z.shape[1]:
            raise ValueError(
                f"`encoder` must map {n} images to embeddings ({n}, D), or to a pair of features "
                f"and projections, got {show(z)} for {where}: use .flatten(1), or a function that "
                "picks one output of the model."
            )
        check_floating("encoder(images)", z)
        broken = int((~z.isfinite().all(1)).sum())
        if broken:
            raise ValueError(
                f"`encoder` must return finite embeddings, got NaN or infinity for {broken} of {n} "
                f"images of a batch for {where}: check the weights, and the range of values that "
                "the encoder and the transformation expect."
            )
    return outputs or {"embeddings": value}


def check_progress(progress: bool | None, installed: bool) -> None:
    """Require tqdm where a progress bar is asked for."""
    if progress and not installed:
        raise ValueError(
            "`progress` must be False or None where tqdm is not installed, got True: install tqdm."
        )


def check_any_row(rows: Sequence[Any], every: Sequence[Any], asked: tuple[Any, Any, Any]) -> None:
    """Require that a report has the row that is asked for."""
    if not rows:
        keys = sorted({(r.transformation, r.output, r.against) for r in every})
        raise KeyError(
            f"the transformation, output and comparison must be those of a row, got {asked}: the "
            f"report has {keys}."
        )
