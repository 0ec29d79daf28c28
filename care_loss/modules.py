"""The losses as modules: they store the arguments of the functions.

They have no parameters or buffers of their own, so `state_dict()` is empty and old checkpoints
load, unless a learned temperature or a `base_loss` brings some. The constructors take plain
numbers, strings and booleans, which configuration files can contain.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from care_loss import _checks, _chunks, distributed, functional
from care_loss._checks import show
from care_loss.functional import (
    Reduction,
    Scale,
    cross_fitted,
    equivariance_loss,
    info_nce_loss,
)

_TEMPERATURE = 0.5
_WEIGHT = 10.0  # on the scale "mean"


class InfoNCELoss(nn.Module):
    """Contrast two views, as :func:`care_loss.functional.info_nce_loss` does (InfoNCE, or NT-Xent).

    It equals the `NTXentLoss` of lightly with the same temperature.

    Args:
        temperature: The temperature, > 0: a number, or an `nn.Parameter` `()` to learn it. The
            module registers the parameter, so pass `loss.parameters()` to the optimizer, with
            weight decay 0, and let DDP wrap the loss together with the encoder. Nothing keeps it
            above 0: a call with another value is an error on a CPU, and gives NaN elsewhere. Any
            other tensor `()` is used as it is: it is not saved, and does not move with `.to()`. It
            may be on the CPU or on the device of the embeddings.
        reduction: `"mean"`, or `"none"` for one value per anchor.
        gather_distributed: Contrast with the rows of all processes, not only with those of this
            one (:func:`care_loss.distributed.info_nce_loss`). Each process then returns the loss of
            the global batch, and the gradients that DDP averages are those of one process with all
            rows. One row per process is enough, and processes may have different numbers of them.

    Raises:
        TypeError, ValueError: if an argument is not as described, here or in a call.

    Example:
        >>> import torch
        >>> loss = InfoNCELoss(temperature=0.2)
        >>> loss(torch.randn(8, 16), torch.randn(8, 16)).shape
        torch.Size([])
        >>> InfoNCELoss(torch.nn.Parameter(torch.tensor(0.2)))
        InfoNCELoss(temperature=Parameter(0.2), reduction='mean', gather_distributed=False)
    """

    def __init__(
        self,
        temperature: float | Tensor = _TEMPERATURE,
        *,
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        _checks.check_reduction(reduction)
        self.temperature = _as_temperature(temperature)
        self.reduction: Reduction = reduction
        self.gather_distributed = _checks.as_boolean("gather_distributed", gather_distributed)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Return the loss of two views `(N, D)`: `()`, or `(2, N)` with `reduction="none"`."""
        return _info_nce(z1, z2, self.temperature, self.reduction, self.gather_distributed)

    def extra_repr(self) -> str:
        return _arguments(self, "temperature", "reduction", "gather_distributed")


class EquivarianceLoss(nn.Module):
    """Compare Gram matrices, as :func:`care_loss.functional.equivariance_loss` does.

    Args:
        chunks: The number of contiguous chunks to cut a batch into, >= 1, for calls without
            `chunks`; a batch too small for them gets `N // 2`.
        scale: `"mean"` over pairs, in [0, 4], or `"authors"`, :math:`2(n-1)` times that.
        reduction: `"mean"`, or `"none"` for one value per chunk.

    Example:
        >>> import torch
        >>> loss = EquivarianceLoss(chunks=4)
        >>> z = torch.randn(32, 16)
        >>> round(loss(z, z.flip(-1)).item(), 6)  # a permutation of the axes is orthogonal
        0.0
    """

    def __init__(
        self,
        chunks: int | None = None,
        *,
        scale: Scale = "mean",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _checks.check_scale(scale)
        _checks.check_reduction(reduction)
        self.chunks = None if chunks is None else _checks.as_chunk_count(chunks)
        self.scale: Scale = scale
        self.reduction: Reduction = reduction

    def forward(self, z1: Tensor, z2: Tensor, *, chunks: int | Tensor | None = None) -> Tensor:
        """Return the loss of two chunk-shared views `(N, D)`.

        `chunks`, an int or ids `(N,)`, takes the place of the constructor's for this batch: pass
        what the views returned.
        """
        _checks.check_embeddings(leading=False, z1=z1, z2=z2)
        chunks = _as_chunks_of_call(chunks, self.chunks)
        return equivariance_loss(z1, z2, chunks=chunks, scale=self.scale, reduction=self.reduction)

    def extra_repr(self) -> str:
        return _arguments(self, "chunks", "scale", "reduction")


class CARElossComponents(NamedTuple):
    """The parts of the CARE loss, each `()`: `loss = base + equivariance_weight * equivariance`.

    Attributes:
        loss: The loss to call `backward` on.
        base: InfoNCE, or the base loss.
        equivariance: The equivariance loss before the weight, on the scale of the module. In
            several processes, it is that of the chunks of this one.
    """

    loss: Tensor
    base: Tensor
    equivariance: Tensor


class CAREloss(nn.Module):
    r"""Train augmentations to rotate embeddings: InfoNCE plus a weighted equivariance loss.

    .. math:: L_{CARE} = L_{InfoNCE}(z_1, z_2) + \lambda L_{equi}(e_1, e_2)

    The ordinary views :math:`z_1, z_2` are augmented one sample at a time, as in SimCLR. The
    equivariant views :math:`e_1, e_2` are chunk-shared: all samples of a chunk get the same
    augmentation. :mod:`care_loss.views` makes such views and returns their `chunks`. Pass these in
    the call: a loss that cuts the batch in other places compares samples that share nothing.

    There are three forms of a step:

    * four forwards, as published: ``loss(z1, z2, e1, e2)``;
    * two forwards, with `shared_views=True`: ``loss(z1, z2)``, where both are chunk-shared;
    * three forwards: ``loss(z1, z2, equivariant1=z1, equivariant2=e)``, or ``loss(z1, z2, z1, e)``.
      InfoNCE compares the first ordinary view `z1` with the second, and the equivariance loss
      compares it with `e`, which embeds the same view under a shared augmentation
      (:func:`care_loss.views.augment_chunks`) that is not part of the ordinary views.

    Augmentations in the ordinary views are ignored by the embedding. Augmentations that are only in
    the shared views rotate it. An augmentation that is in both is ignored.

    Args:
        temperature: The temperature of InfoNCE, > 0: a number, or an `nn.Parameter` `()` to learn
            it, as in :class:`InfoNCELoss`. If `base_loss` is given, leave it out: any value but the
            default is an error.
        equivariance_weight: :math:`\lambda \ge 0`, for the given `scale`. The default is 10 for
            `scale="mean"`; with `scale="authors"` it must be given, because 10 would be
            :math:`2(n-1)` times as much there. The attribute may be changed between steps.
        chunks: The number of contiguous chunks to cut a batch into, >= 1, for calls without
            `chunks`; a batch too small for them gets `N // 2`.
        shared_views: Whether `z1` and `z2` are chunk-shared themselves and serve both terms, so
            that a step needs two forwards instead of four. Ordinary views with shared_views=True
            cannot be detected: the setting is a promise.
        scale: The scale of the equivariance loss, `"mean"` over pairs or `"authors"`,
            :math:`2(n-1)` times that. :data:`care_loss.RECIPES` has the published weights.
        base_loss: A callable `(z1, z2) -> scalar` that takes the place of InfoNCE, such as a loss
            of another library, MoCo or Barlow Twins. It gets the embeddings without normalisation.
        gather_distributed: As in :class:`InfoNCELoss`. The equivariance loss needs no gathering,
            because all rows of a chunk are on one process.

    Raises:
        TypeError, ValueError: if an argument is not as described, here or in a call.

    Example:
        >>> import torch
        >>> from care_loss.views import augment_chunks
        >>> encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16))
        >>> x1, x2 = torch.rand(2, 32, 3, 4, 4)  # two ordinary views of 32 images
        >>> def turn(images):  # one order of the channels for all images of a call
        ...     return images[:, torch.randperm(3)]
        >>> turned, chunks = augment_chunks(x1, turn, chunks=4)
        >>> z1, z2, e = encoder(x1), encoder(x2), encoder(turned)
        >>> loss = CAREloss(equivariance_weight=10)
        >>> value = loss(z1, z2, equivariant1=z1, equivariant2=e, chunks=chunks)
        >>> parts = loss.forward_components(z1, z2, z1, e, chunks=chunks)  # the same call
        >>> torch.equal(value, parts.base + 10 * parts.equivariance)
        True

    References:
        Gupta et al., Structuring Representation Geometry with Rotationally Equivariant Contrastive
        Learning, ICLR 2024, section 3.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = _TEMPERATURE,
        equivariance_weight: float = _WEIGHT,
        chunks: int | None = None,
        shared_views: bool = False,
        scale: Scale = "mean",
        base_loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        temperature = _as_temperature(temperature)
        gather_distributed = _checks.as_boolean("gather_distributed", gather_distributed)
        _checks.check_scale(scale)
        _check_base_loss(base_loss, gather_distributed, temperature)
        if equivariance_weight is _WEIGHT:  # the object: a 10.0 that somebody gives is another
            _check_default_weight(scale)
        self.temperature = temperature
        self.equivariance_weight = _checks.as_number(
            "equivariance_weight", equivariance_weight, or_zero=True
        )
        self.chunks = None if chunks is None else _checks.as_chunk_count(chunks)
        self.shared_views = _checks.as_boolean("shared_views", shared_views)
        self.scale: Scale = scale
        self.base_loss = base_loss
        self.gather_distributed = gather_distributed

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        equivariant1: Tensor | None = None,
        equivariant2: Tensor | None = None,
        *,
        chunks: int | Tensor | None = None,
    ) -> Tensor:
        """Return the loss `()`, the first of :meth:`forward_components`."""
        return self.forward_components(z1, z2, equivariant1, equivariant2, chunks=chunks).loss

    def forward_components(
        self,
        z1: Tensor,
        z2: Tensor,
        equivariant1: Tensor | None = None,
        equivariant2: Tensor | None = None,
        *,
        chunks: int | Tensor | None = None,
    ) -> CARElossComponents:
        """Return the loss and its two parts, all with gradient.

        Args:
            z1: Embeddings of the first ordinary view, `(N, D)`.
            z2: Embeddings of the second ordinary view, `(N, D)`.
            equivariant1: Embeddings of the first chunk-shared view, `(N', D')`; their number and
                dimension may differ from those of `z1`. Leave it and `equivariant2` out with
                `shared_views=True`.
            equivariant2: Embeddings of the second chunk-shared view, `(N', D')`.
            chunks: The number of chunks or the ids `(N',)` that the views returned. They take the
                place of the constructor's `chunks` for this batch.
        """
        arguments = partial(self._arguments, z1, z2, equivariant1, equivariant2, chunks)
        # In several processes, all arguments are checked before the first part communicates.
        pair = None if self.gather_distributed else arguments()
        if self.base_loss is None:
            base = _info_nce(
                z1, z2, self.temperature, "mean", self.gather_distributed, also=arguments
            )
        else:
            base = _as_scalar(self.base_loss(z1, z2))
        first, second, chunks = pair or arguments()
        equivariance = equivariance_loss(first, second, chunks=chunks, scale=self.scale)
        weight = _checks.as_number("equivariance_weight", self.equivariance_weight, or_zero=True)
        loss = base + weight * equivariance
        return CARElossComponents(loss, base, equivariance)

    def _arguments(
        self,
        z1: Tensor,
        z2: Tensor,
        equivariant1: Tensor | None,
        equivariant2: Tensor | None,
        chunks: int | Tensor | None,
    ) -> tuple[Tensor, Tensor, int | Tensor]:
        """Check what the equivariance loss is given, and return it."""
        _check_equivariant_pair(equivariant1, equivariant2, self.shared_views)
        chunks = _as_chunks_of_call(chunks, self.chunks)
        if equivariant1 is None or equivariant2 is None:
            _checks.check_embeddings(leading=False, z1=z1, z2=z2)
            equivariant1, equivariant2 = z1, z2
        else:
            _checks.check_embeddings(
                leading=False, equivariant1=equivariant1, equivariant2=equivariant2
            )
        chunks = _checks.as_chunks(chunks, len(equivariant1), equivariant1.device)
        if self.gather_distributed and (layout := _chunks.layout(chunks, len(equivariant1))):
            _checks.check_pairs(layout[1])
        return equivariant1, equivariant2, chunks

    def extra_repr(self) -> str:
        names = ["equivariance_weight", "chunks", "shared_views", "scale"]
        if self.base_loss is None:
            names = ["temperature", *names, "gather_distributed"]
        elif not isinstance(self.base_loss, nn.Module):  # a module is printed as a child
            names.append("base_loss")
        return _arguments(self, *names)


class RotationContrastComponents(NamedTuple):
    r"""The loss of rotations, and what they explain, each `()`.

    Attributes:
        loss: The loss to call `backward` on.
        share: The share of the displacement of the unit rows that the rotations explain, held out:
            :math:`1 - \sum_i \lVert p_i - v_i \rVert^2 / \sum_i \lVert u_i - v_i \rVert^2`, at most
            1. It is negative if they do worse than the identity, NaN if nothing moves, and has no
            gradient. In several processes, it is that of this one.
    """

    loss: Tensor
    share: Tensor


class RotationContrastLoss(nn.Module):
    r"""Contrast turned embeddings with their predictions by rotations that fit other rows.

    .. math:: L = L_{InfoNCE}(p, z_{turned})

    Each chunk of rows shares one augmentation. The prediction :math:`p_i` is the unit row of `z`
    under the rotation that fits the other half of its chunk
    (:func:`care_loss.functional.cross_fitted`). A step needs two forwards, of an ordinary view, and
    of a view of the same images under ordinary augmentations and a shared one. The embedding learns
    to ignore the ordinary augmentations, and to rotate with the shared one; there is no weight to
    choose.

    Each half of a chunk needs twice as many rows as the embedding has dimensions, or 32: otherwise
    the first call gives a warning.

    Args:
        temperature: The temperature of InfoNCE, > 0: a number, or an `nn.Parameter` `()` to learn
            it, as in :class:`InfoNCELoss`. If `base_loss` is given, leave it out: any value but the
            default is an error.
        chunks: The number of contiguous chunks to cut a batch into, >= 1, for calls without
            `chunks`. A batch too small for chunks of four rows is an error.
        special: Fit over SO(D), the rotations of determinant +1, instead of O(D).
        base_loss: A callable `(prediction, z_turned) -> scalar` that takes the place of InfoNCE. It
            gets unit rows as predictions, and `z_turned` without normalisation, in the dtype of the
            predictions (float32 for half types).
        gather_distributed: Contrast with the rows of all processes, as in :class:`InfoNCELoss`. The
            fits need no gathering, because all rows of a chunk are on one process.

    Raises:
        TypeError, ValueError: if an argument is not as described, here or in a call.

    Example:
        >>> import torch
        >>> from care_loss.views import augment_chunks
        >>> encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8))
        >>> def noise(images):  # to be ignored
        ...     return images + 0.1 * torch.randn_like(images)
        >>> def turn(images):  # one order of the channels for all images of a call
        ...     return images[:, torch.randperm(3)]
        >>> images = torch.rand(64, 3, 4, 4)
        >>> turned, chunks = augment_chunks(noise(images), turn, chunks=2)
        >>> loss = RotationContrastLoss(temperature=0.5)
        >>> loss(encoder(noise(images)), encoder(turned), chunks=chunks).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = _TEMPERATURE,
        chunks: int | None = None,
        special: bool = True,
        base_loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        temperature = _as_temperature(temperature)
        gather_distributed = _checks.as_boolean("gather_distributed", gather_distributed)
        _check_base_loss(base_loss, gather_distributed, temperature)
        self.temperature = temperature
        self.chunks = None if chunks is None else _checks.as_chunk_count(chunks)
        self.special = _checks.as_boolean("special", special)
        self.base_loss = base_loss
        self.gather_distributed = gather_distributed

    def forward(self, z: Tensor, z_turned: Tensor, *, chunks: int | Tensor | None = None) -> Tensor:
        """Return the loss `()`, the first of :meth:`forward_components`."""
        return self._contrast(z, z_turned, chunks)[0]

    def forward_components(
        self, z: Tensor, z_turned: Tensor, *, chunks: int | Tensor | None = None
    ) -> RotationContrastComponents:
        """Return the loss, and the share of the displacement that the rotations explain.

        Args:
            z: Embeddings of the ordinary view, `(N, D)`.
            z_turned: Embeddings of the chunk-shared view of the same images, `(N, D)`.
            chunks: The number of chunks or the ids `(N,)` that the views returned. They take the
                place of the constructor's `chunks` for this batch.
        """
        loss, prediction = self._contrast(z, z_turned, chunks)
        share = functional._share_explained(z, z_turned, prediction)
        return RotationContrastComponents(loss, share)

    def _contrast(
        self, z: Tensor, z_turned: Tensor, chunks: int | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the prediction of `z_turned`."""
        refused: Exception | None = None
        try:
            prediction = self._prediction(z, z_turned, chunks)
        except (TypeError, ValueError) as error:
            if not self.gather_distributed:
                raise
            prediction, refused = z, error

        def also() -> None:
            """Refuse, where all processes hear of it, what this one has refused."""
            if refused is not None:
                raise refused

        turned = z_turned if refused else z_turned.to(prediction.dtype)
        if self.base_loss is None:
            gather = self.gather_distributed
            loss = _info_nce(prediction, turned, self.temperature, "mean", gather, also)
        else:
            loss = _as_scalar(self.base_loss(prediction, turned))
        return loss, prediction

    def _prediction(self, z: Tensor, z_turned: Tensor, chunks: int | Tensor | None) -> Tensor:
        _checks.check_embeddings(leading=False, z=z, z_turned=z_turned)
        chunks = _as_chunks_of_call(chunks, self.chunks)
        return cross_fitted(z, z_turned, chunks=chunks, special=self.special)

    def extra_repr(self) -> str:
        names = ["chunks", "special"]
        if self.base_loss is None:
            names = ["temperature", *names, "gather_distributed"]
        elif not isinstance(self.base_loss, nn.Module):  # a module is printed as a child
            names.append("base_loss")
        return _arguments(self, *names)


def _info_nce(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    reduction: Reduction,
    gather_distributed: bool,
    also: Callable[[], object] = lambda: None,
) -> Tensor:
    if gather_distributed:
        return distributed._checked_info_nce_loss(z1, z2, temperature, reduction, None, also)
    _checks.check_embeddings(leading=False, z1=z1, z2=z2)
    return info_nce_loss(z1, z2, temperature=temperature, reduction=reduction)


def _arguments(module: nn.Module, *names: str) -> str:
    return ", ".join(f"{name}={_described(getattr(module, name))}" for name in names)


def _described(value: Any) -> str:
    """Return the repr of an argument; of a temperature that is a tensor, its kind and value."""
    if not isinstance(value, Tensor):
        return repr(value)
    kind = "Parameter" if isinstance(value, nn.Parameter) else "tensor"
    return f"{kind}({'...' if value.is_meta else format(value.item(), '.6g')})"


def _as_temperature(value: Any) -> float | Tensor:
    """Require a temperature that can be used in every call, and return it."""
    temperature = _checks.as_temperature(value)
    if not isinstance(value, Tensor):
        return temperature
    if value.grad_fn is not None:
        raise ValueError(
            "`temperature` must be a number, an nn.Parameter or another leaf tensor, got the "
            "result of a computation, which the module would not repeat: pass the nn.Parameter "
            "itself and move the module with .to(), or compute the temperature in a `base_loss` "
            "that calls functional.info_nce_loss."
        )
    return value  # the same object, for the optimizer


def _check_base_loss(value: Any, gather_distributed: bool, temperature: float | Tensor) -> None:
    """Require a callable base loss beside which nothing is set that only InfoNCE uses, or None."""
    if value is None:
        return
    if not callable(value) or isinstance(value, type):
        kind = f"the class {value.__name__}" if isinstance(value, type) else show(value)
        raise TypeError(
            "`base_loss` must be an instance of a loss module or another callable (z1, z2) -> "
            f"scalar, got {kind}: create the module first, as in base_loss=Loss()."
        )
    if gather_distributed:
        raise ValueError(
            "`gather_distributed` must be False when `base_loss` is given, got True: it applies to "
            "InfoNCE, which `base_loss` replaces. Let the base loss gather for itself."
        )
    # A tensor is not compared, which would read it.
    if isinstance(temperature, Tensor) or temperature != _TEMPERATURE:
        raise ValueError(
            "`temperature` must be left out when `base_loss` is given, got one that is not the "
            "default: it applies to InfoNCE, which `base_loss` replaces. Give the temperature to "
            "the base loss."
        )


def _as_scalar(value: Any) -> Tensor:
    """Require that a base loss returned a tensor without dimensions, and return it."""
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(
            f"`base_loss` must return a scalar tensor, got {show(value)}: "
            "reduce it inside the callable, for example with .mean()."
        )
    return value


def _check_equivariant_pair(first: Any, second: Any, shared_views: bool) -> None:
    """Require both equivariant views, or neither where the ordinary views are chunk-shared."""
    is_view = isinstance(first, Tensor) and (first.is_floating_point() or first.is_complex())
    if first is not None and second is None and not is_view:
        raise TypeError(
            f"`chunks` must be passed by keyword, got {show(first)} as third positional argument: "
            "write loss(z1, z2, chunks=chunks)."
        )
    if (first is None) != (second is None):
        given = "equivariant2" if first is None else "equivariant1"
        raise ValueError(
            f"`equivariant1` and `equivariant2` must be given together, got only `{given}`: "
            "pass the two chunk-shared views, or neither with shared_views=True."
        )
    if first is None and not shared_views:
        raise ValueError(
            "`equivariant1` and `equivariant2` must be given unless shared_views=True, got only "
            "`z1` and `z2`: if every sample has an augmentation of its own, no rotation relates "
            "the views. Pass two views whose augmentation is shared by each chunk, or set "
            "shared_views=True if `z1` and `z2` are such views."
        )
    if first is not None and shared_views:
        raise ValueError(
            "`equivariant1` and `equivariant2` must be left out when shared_views=True, got four "
            "views: with shared_views=True `z1` and `z2` serve both terms. Set shared_views=False "
            "to pass four."
        )


def _check_default_weight(scale: str) -> None:
    """Require the scale that the default weight is meant for."""
    if scale != "mean":
        raise ValueError(
            f"`equivariance_weight` must be given with scale={scale!r}, got none: the default is "
            'meant for scale="mean". Pass the weight of the recipe, such as 0.01.'
        )


def _as_chunks_of_call(value: Any, default: int | None) -> Any:
    """Require chunks in a call or in the constructor, and return those of the call if given."""
    if value is None and default is None:
        raise ValueError(
            "`chunks` must be given in the call or in the constructor, got neither: pass the "
            "`chunks` that the views came with, loss(..., chunks=chunks)."
        )
    return default if value is None else value
