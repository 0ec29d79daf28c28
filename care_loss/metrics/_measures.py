"""Measures of embeddings: of one tensor, or of two whose rows belong to the same images."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from care_loss import _checks
from care_loss._autograd.paths import is_long
from care_loss._checks import as_broadcast, check_floating, check_same_dtype_and_device
from care_loss._numerics import computed_in, exact
from care_loss.functional import equivariance_loss
from care_loss.rotation import fit_rotation
from care_loss.sphere import normalize

Fit = Callable[[Tensor, Tensor], Tensor]
TIE = 1e-12  # scores that differ by less, or that rounding may have made differ, count as equal
MAX_SCORES = 2**20  # how many scores of a retrieval are held at a time


def wahba_error(
    z: Tensor,
    z_transformed: Tensor,
    *,
    special: bool = False,
    held_out: bool = True,
    shuffled: bool = False,
) -> Tensor:
    r"""Measure how far one rotation is from taking the embeddings to the transformed ones.

    .. math:: \Bigl( \frac 1 N \sum_i \lVert u_i R - v_i \rVert^2 \Bigr)^{1/2}

    with unit rows :math:`u` and :math:`v`. For the rows of even number, :math:`R` is fitted to
    those of odd number, and the other way round. A small value shows a rotation only if the
    identity does worse: see :func:`rotation_share`.

    Args:
        z: Embeddings of the images, `(*, N, D)` with `N >= 4` (`N >= 2` with `held_out=False`).
        z_transformed: Embeddings of the transformed images, `(*, N, D)`.
        special: Fit over SO(D) instead of O(D), which includes reflections.
        held_out: Score each half of the rows by the fit to the other. Otherwise the rotation is
            fitted to all rows and scored on them, as in the paper (which does not divide by
            :math:`\sqrt N`). The value is then small for unrelated embeddings too, unless `N` is
            much larger than `D`.
        shuffled: Return the chance level instead.

    Returns:
        The root mean squared error of a row, in [0, 2], `(*)`; about :math:`\sqrt 2` for unrelated
        embeddings if held out.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> z = torch.eye(3).repeat(2, 1)
        >>> z_transformed = z.roll(1, 1)  # the axes change places
        >>> wahba_error(z, z_transformed), invariance_error(z, z_transformed)
        (tensor(0., dtype=torch.float64), tensor(1.4142, dtype=torch.float64))

    References:
        Gupta et al., Structuring Representation Geometry with Rotationally Equivariant Contrastive
        Learning, ICLR 2024, section 4. Wahba, A least squares estimate of satellite attitude, 1965.
    """
    held_out = _checks.as_boolean("held_out", held_out)
    _check_transformed(4 if held_out else 2, z=z, z_transformed=z_transformed)
    u, v = unit_rows(shuffled, z, z_transformed)
    fit = rotation_fit(special)
    return distance(across_halves(fit, u, v) if held_out else u @ fit(u, v), v)


def equivariance_error(z: Tensor, z_transformed: Tensor, *, shuffled: bool = False) -> Tensor:
    r"""Return the mean squared difference of the Gram matrices, off the diagonal.

    It is the equivariance loss of each item, :func:`care_loss.functional.equivariance_loss` with
    one chunk: 0 exactly if one orthogonal map takes all rows to the transformed ones. Unrelated
    embeddings reach about :math:`2 / D`, so a small value alone shows nothing.

    Args:
        z: Embeddings of the images, `(*, N, D)` with `N >= 2`.
        z_transformed: Embeddings of the transformed images, `(*, N, D)`.
        shuffled: Return the chance level instead.

    Returns:
        The mean over pairs of rows, in [0, 4], `(*)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> equivariance_error(torch.eye(3), torch.eye(3).roll(1, 1))
        tensor(0., dtype=torch.float64)

    References:
        Gupta et al., 2024, equation 3.
    """
    _check_transformed(2, z=z, z_transformed=z_transformed)
    z, z_transformed = _paired(shuffled, z, z_transformed)
    if not is_long(*z.shape[-2:]):  # else the loss sums in float64, and float32 rows cost less
        z, z_transformed = exact(z), exact(z_transformed)
    z, z_transformed = torch.broadcast_tensors(z, z_transformed)
    return exact(equivariance_loss(z, z_transformed, reduction="none").squeeze(-1))


def relative_equivariance(z: Tensor, z_transformed: Tensor, *, shuffled: bool = False) -> Tensor:
    r"""Return how much distances between embeddings change, relative to how far these move.

    .. math::
        \gamma_f = \frac{\mathrm{mean}_{i \ne j} \, (\lVert v_i - v_j \rVert^2 - \lVert u_i - u_j
        \rVert^2)^2}{\mathrm{mean}_{i \ne j} \, (\lVert u_i - v_i \rVert^2 + \lVert u_j - v_j
        \rVert^2)^2}

    The paper has the mean of the ratios, which is dominated by pairs that hardly move. Unrelated
    embeddings reach about :math:`1 / (2 D)`.

    Args:
        z: Embeddings of the images, `(*, N, D)` with `N >= 2`.
        z_transformed: Embeddings of the transformed images, `(*, N, D)`.
        shuffled: Return the chance level instead.

    Returns:
        The ratio, >= 0, `(*)`; NaN if no row moves. For zero rows, whose squared norm is not 1, it
        is formed from the same products as for unit rows.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> relative_equivariance(torch.eye(3), torch.eye(3).roll(1, 1))
        tensor(0., dtype=torch.float64)

    References:
        Gupta et al., 2024, section 4.
    """
    gap = equivariance_error(z, z_transformed, shuffled=shuffled)
    return 4 * gap / squared_displacements(*unit_rows(shuffled, z, z_transformed))


def invariance_error(z: Tensor, z_transformed: Tensor, *, shuffled: bool = False) -> Tensor:
    r"""Measure how far the embeddings move.

    .. math:: \Bigl( \frac 1 N \sum_i \lVert u_i - v_i \rVert^2 \Bigr)^{1/2}

    It is the error of the identity, in the unit of :func:`wahba_error`.

    Args:
        z: Embeddings of the images, `(*, N, D)` with `N >= 2`.
        z_transformed: Embeddings of the transformed images, `(*, N, D)`.
        shuffled: Return the chance level instead.

    Returns:
        The root mean squared distance, in [0, 2], `(*)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> invariance_error(torch.eye(3), -torch.eye(3))
        tensor(2., dtype=torch.float64)
    """
    _check_transformed(2, z=z, z_transformed=z_transformed)
    return distance(*unit_rows(shuffled, z, z_transformed))


def rotation_share(
    z: Tensor, z_transformed: Tensor, *, special: bool = False, shuffled: bool = False
) -> Tensor:
    r"""Return the share of the displacement that one rotation explains, held out.

    .. math:: 1 - W^2 / I^2

    with :math:`W` of :func:`wahba_error` and :math:`I` of :func:`invariance_error`. It tells
    equivariance from invariance, for which both are small.

    Args:
        z: Embeddings of the images, `(*, N, D)` with `N >= 4`.
        z_transformed: Embeddings of the transformed images, `(*, N, D)`.
        special: Fit over SO(D) instead of O(D), which includes reflections.
        shuffled: Return the chance level instead.

    Returns:
        The share, at most 1, `(*)`; negative if the rotation does worse than the identity, and NaN
        if no row moves.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> z = torch.eye(3).repeat(2, 1)
        >>> rotation_share(z, z.roll(1, 1))
        tensor(1., dtype=torch.float64)
    """
    wahba = wahba_error(z, z_transformed, special=special, shuffled=shuffled)
    return 1 - (wahba / invariance_error(z, z_transformed, shuffled=shuffled)).square()


def composition_error(
    z: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    z_ab: Tensor,
    *,
    special: bool = False,
    shuffled: bool = False,
) -> Tensor:
    r"""Measure how far the rotations of two transformations are from composing to that of both.

    .. math:: \Bigl( \frac 1 N \sum_i \lVert u_i R_a R_b - w_i \rVert^2 \Bigr)^{1/2}

    with the unit rows :math:`w` of `z_ab`, and :math:`R_a`, :math:`R_b` fitted as for
    :func:`wahba_error`, held out. It says something of transformations that form a group (turns of
    the hue, rotations), not of crops.

    Args:
        z: Embeddings f(x) of the images, `(*, N, D)` with `N >= 4`.
        z_a: Embeddings f(a(x)), `(*, N, D)`.
        z_b: Embeddings f(b(x)), `(*, N, D)`.
        z_ab: Embeddings f(b(a(x))), where a came first, `(*, N, D)`.
        special: Fit over SO(D) instead of O(D), which includes reflections.
        shuffled: Return the chance level instead.

    Returns:
        The root mean squared error of a row, in [0, 2], `(*)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> z = torch.eye(3).repeat(2, 1)
        >>> composition_error(z, z.roll(1, 1), z.flip(1), z.roll(1, 1).flip(1))
        tensor(0., dtype=torch.float64)

    References:
        Gupta et al., 2024, the corollary on compositions in section 3.
    """
    _check_transformed(4, z=z, z_a=z_a, z_b=z_b, z_ab=z_ab)
    u, a, b, ab = unit_rows(shuffled, z, z_a, z_b, z_ab)
    return distance(across_halves(rotation_fit(special), u, a, b), ab)


def cosine_spread(z: Tensor, z_transformed: Tensor, *, shuffled: bool = False) -> Tensor:
    r"""Return the variance over the images of the cosine between :math:`f(x)` and :math:`f(a(x))`.

    This is the paper's statistic for embeddings on the circle: for `D = 2` it is 0 if one rotation
    by an angle takes all rows to the transformed ones. It is also 0 if the transformation moves no
    row, so a small value does not distinguish equivariance from invariance. In more dimensions a
    rotation moves some directions further than others, and the value says nothing of equivariance.

    Args:
        z: Embeddings of the images, `(*, N, D)` with `N >= 2`.
        z_transformed: Embeddings of the transformed images, `(*, N, D)`.
        shuffled: Return the chance level instead.

    Returns:
        The variance, in [0, 1], `(*)`; 1/2 for unrelated embeddings on the circle.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> cosine_spread(z, z @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        tensor(0., dtype=torch.float64)

    References:
        Gupta et al., 2024, section 4.
    """
    _check_transformed(2, z=z, z_transformed=z_transformed)
    u, v = unit_rows(shuffled, z, z_transformed)
    cosine = (u * v).sum(-1)
    return (cosine - cosine.mean(-1, keepdim=True)).square().mean(-1)


class Retrieval(NamedTuple):
    """How well transformed images are found by the fitted rotation.

    Attributes:
        mrr: The mean reciprocal rank, `(*)`.
        hits: The fractions of ranks up to 1 and up to 5, `(*, 2)`.
    """

    mrr: Tensor
    hits: Tensor


def transformed_retrieval(
    z: Tensor, z_transformed: Tensor, *, special: bool = False, shuffled: bool = False
) -> Retrieval:
    r"""Look for each transformed image among all of them, from where the rotation predicts it.

    The prediction for image i is :math:`u_i R`, with the rotation fitted to the half of the rows
    that does not contain row i. The candidates are all rows of `z_transformed`, ranked by their
    distance from the prediction. Candidates that are equally near share the mean of their ranks, so
    constant embeddings are at chance level.

    Args:
        z: Embeddings of the images, `(*, N, D)` with `N >= 4`.
        z_transformed: Embeddings of the transformed images, `(*, N, D)`.
        special: Fit over SO(D) instead of O(D), which includes reflections.
        shuffled: Return the chance level instead.

    Returns:
        A named tuple: `mrr`, the mean of 1 / rank, in (0, 1], `(*)`, and `hits`, the fractions of
        images of rank 1 and of rank at most 5, `(*, 2)`. An invariant encoder that tells images
        apart reaches 1 as well.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> z = torch.randn(100, 3)
        >>> transformed_retrieval(z, z.roll(1, 1)).mrr
        tensor(1., dtype=torch.float64)

    References:
        Garrido et al., Self-supervised learning of split invariant equivariant representations,
        ICML 2023, section 5, for the measure.
    """
    _check_transformed(4, z=z, z_transformed=z_transformed)
    u, v = unit_rows(shuffled, z, z_transformed)
    return retrieval(across_halves(rotation_fit(special), u, v), v)


def effective_rank(z: Tensor) -> Tensor:
    r"""Return the effective number of dimensions that the embeddings use.

    .. math:: \exp \Bigl( - \sum_k p_k \log p_k \Bigr), \qquad p_k = s_k / \textstyle\sum_l s_l

    with the singular values :math:`s` of the unit rows, which are not centred.

    Args:
        z: Embeddings, `(*, N, D)` with `N >= 1`.

    Returns:
        The effective rank, in [1, min(N, D)], `(*)`; 1 if all embeddings coincide, and NaN if all
        are 0.

    Raises:
        TypeError, ValueError: if the argument is not as described.

    Example:
        >>> effective_rank(torch.eye(3))
        tensor(3.0000, dtype=torch.float64)

    References:
        Roy and Vetterli, The effective rank: a measure of effective dimensionality, 2007.
    """
    _check_transformed(1, z=z)
    (u,) = unit_rows(False, z)
    broken = ~u.sum((-2, -1), keepdim=True).isfinite()
    # An error would come of NaN; zeros give NaN below.
    s = torch.linalg.svdvals(u.masked_fill(broken, 0))
    rank: Tensor = torch.special.entr(s / s.sum(-1, keepdim=True)).sum(-1).exp()
    return rank


def mean_norm(z: Tensor) -> Tensor:
    """Return the norm of the mean of the unit rows, a sign of collapse where it is near 1.

    Args:
        z: Embeddings, `(*, N, D)` with `N >= 1`.

    Returns:
        The norm, in [0, 1], `(*)`; 1 if all embeddings coincide.

    Raises:
        TypeError, ValueError: if the argument is not as described.

    Example:
        >>> mean_norm(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.7071, dtype=torch.float64)
    """
    _check_transformed(1, z=z)
    (u,) = unit_rows(False, z)
    norm: Tensor = torch.linalg.vector_norm(u.mean(-2), dim=-1)
    return norm


# What follows is of unit rows in float64, and shared with the report.


def permutation(n: int) -> Tensor:
    """Return a random order of `n` rows, in which no row keeps its place; the same for every call.

    A shift of all rows would not do: if images are sorted by pose, it is a transformation too.
    """
    order = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return torch.empty_like(order).scatter_(0, order, order.roll(1))  # one cycle through all rows


def unit_rows(shuffled: bool, *embeddings: Tensor) -> list[Tensor]:
    """Return unit rows, those of the first embeddings shuffled on request."""
    return [normalize(exact(z)) for z in _paired(shuffled, *embeddings)]


def _paired(shuffled: bool, z: Tensor, *others: Tensor) -> list[Tensor]:
    if _checks.as_boolean("shuffled", shuffled):
        z = z.index_select(-2, permutation(z.shape[-2]).to(z.device))
    return [x.detach() for x in (z, *others)]


def rotation_fit(special: bool) -> Fit:
    """Return the fit of a rotation `(*, D, D)` to rows and transformed rows."""
    fit = partial(fit_rotation, special=_checks.as_boolean("special", special))
    return lambda source, target: fit(source, target).rotation


def linear_fit(z: Tensor) -> Fit:
    """Return the fit of any linear map by least squares, to rows that came in the dtype of `z`."""
    # Directions that rounding alone has made are not inverted.
    rtol = max(z.shape[-2:]) * torch.finfo(computed_in(z)).eps

    def fit(source: Tensor, target: Tensor) -> Tensor:
        """Return the linear map `(*, D, D)`."""
        try:
            mapping: Tensor = torch.linalg.pinv(source, rtol=rtol)
        except LinAlgError:  # rarely, where many singular values are equal
            mapping = torch.linalg.pinv(source.mT, rtol=rtol).mT
        return mapping @ target

    return fit


def across_halves(fit: Fit, u: Tensor, *steps: Tensor) -> Tensor:
    """Apply to each half of the rows, one after the other, the maps that fit the other half."""
    leading = torch.broadcast_shapes(*(v.shape[:-2] for v in (u, *steps)))
    result = u.new_empty(*leading, *u.shape[-2:])
    halves = slice(0, None, 2), slice(1, None, 2)
    for fitted, scored in (halves, halves[::-1]):
        x = u[..., scored, :]
        for v in steps:
            x = x @ fit(u[..., fitted, :], v[..., fitted, :])
        result[..., scored, :] = x
    return result


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the root mean squared distance of rows, `(*)`."""
    return (x - y).square().sum(-1).mean(-1).sqrt()


def squared_displacements(u: Tensor, v: Tensor) -> Tensor:
    """Return the denominator of :func:`relative_equivariance`, `(*)`."""
    moved = (u - v).square().sum(-1)
    n = moved.shape[-1]
    # Of the square of a sum of two, each row has its own square in 2 (n - 1) ordered pairs; the
    # products of two rows add to the square of the total without the squares.
    total, squares = moved.sum(-1), moved.square().sum(-1)
    return (2 * (n - 2) * squares + 2 * total.square()) / (n * (n - 1))


def retrieval(predicted: Tensor, candidates: Tensor) -> Retrieval:
    """Rank candidate i for prediction i among all; those that tie have the mean of their ranks."""
    predicted, candidates = torch.broadcast_tensors(predicted, candidates)
    n, d = predicted.shape[-2:]
    rank_parts = []
    for x, y in zip(predicted.reshape(-1, n, d), candidates.reshape(-1, n, d), strict=True):
        for rows in torch.arange(n, device=x.device).split(max(1, MAX_SCORES // n)):
            scores = x[rows] @ y.mT
            correct = scores.gather(1, rows.unsqueeze(1))
            nearer = (scores > correct + TIE).sum(1)
            as_near = (scores >= correct - TIE).sum(1)  # or nearer, and itself
            rank_parts.append((nearer + as_near + 1).to(x.dtype) / 2)
    ranks = torch.cat([predicted.new_empty(0), *rank_parts]).view(predicted.shape[:-1])
    hits = torch.stack([(ranks <= k).to(ranks.dtype) for k in (1, 5)], -1)
    broken = ~(predicted + candidates).sum((-2, -1)).isfinite()
    mrr = ranks.reciprocal().mean(-1).masked_fill(broken, torch.nan)
    return Retrieval(mrr, hits.mean(-2).masked_fill(broken.unsqueeze(-1), torch.nan))


def _check_transformed(rows: int, **tensors: Any) -> None:
    """Require embeddings `(*, N, D)` of the same N >= `rows` images, which broadcast."""
    for name, z in tensors.items():
        check_floating(name, z)
    (name, first), *others = tensors.items()
    names, leading = name, first.shape[:-2]
    if first.ndim < 2 or first.shape[-2] < rows or first.shape[-1] < 1:
        hint = ": each half of the rows needs two" if rows > 2 else ""
        raise ValueError(
            f"`{name}` must have shape (*, N, D) with N >= {rows} and D >= 1, got "
            f"{tuple(first.shape)}{hint}: pass one row per image."
        )
    for other_name, other in others:
        if first.shape[-2:] != other.shape[-2:]:
            raise ValueError(
                f"`{name}` and `{other_name}` must have the same N and D in their shapes "
                f"(*, N, D), got {tuple(first.shape)} and {tuple(other.shape)}: row i of both "
                "belongs to image i, from the same encoder."
            )
        check_same_dtype_and_device(name, first, other_name, other)
        leading = as_broadcast(names, leading, other_name, other.shape[:-2])
        names += f"` and `{other_name}"
