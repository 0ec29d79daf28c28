r"""Fitting, sampling and measuring orthogonal maps.

::

    +---------------------------------------------------------------------------+
    |  Vectors are rows:  target ≈ source @ rotation                            |
    |  Over O(D) by default, so a "rotation" may be a reflection;               |
    |  special=True asks for SO(D), the rotations proper (determinant +1).      |
    +---------------------------------------------------------------------------+

Leading dimensions are free: each index of them is one problem. Everything is computed in float64
(float32 on Apple's GPUs), and matrices are returned in the dtype of the input, so neither autocast
nor the TF32 setting changes a result. The singular value decompositions synchronise a GPU with the
host, and those from 33 x 33 to 256 x 256 run on the CPU.

An item of a batch that contains NaN or an infinity becomes NaN, and does not affect the others.

Fits have derivatives of every order in reverse mode, and forward mode over reverse mode and the
other way round. Forward mode within forward mode is refused: PyTorch would return zeros.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from care_loss import _checks
from care_loss._checks import (
    as_broadcast,
    check_floating,
    check_not_recorded,
    check_row_weights,
    check_same_dtype_and_device,
)
from care_loss._few_rows import fit_few_rows
from care_loss._numerics import computed_in, exact, normal, savable, with_value
from care_loss._polar import (
    determinant,
    polar,
    polished,
    svd,
    with_last_times,
)


class RotationFit(NamedTuple):
    """An orthogonal map, and how well and how uniquely it fits.

    Save it as a dictionary, `fit._asdict()`, and load it by `RotationFit(**torch.load(path))`:
    `torch.load` refuses other classes than its own by default.

    Attributes:
        rotation: The map, `(*, D, D)`.
        residual: The root mean squared row error, `(*)`.
        gap: In [0, 2], `(*)`; the fit is unique where it is > 0.
    """

    rotation: Tensor
    residual: Tensor
    gap: Tensor


class SimilarityFit(NamedTuple):
    """A similarity of rows, `target ≈ scale * source @ rotation + translation`, and how it fits.

    Save it as a dictionary, as :class:`RotationFit`.

    Attributes:
        rotation: The orthogonal map, `(*, D, D)`.
        scale: The factor, at least 0, `(*)`.
        translation: The vector that is added to each row, `(*, D)`.
        residual: The root mean squared row error, `(*)`.
        gap: In [0, 2], `(*)`; the rotation is unique where it is > 0.
    """

    rotation: Tensor
    scale: Tensor
    translation: Tensor
    residual: Tensor
    gap: Tensor


def fit_rotation(
    source: Tensor, target: Tensor, *, weights: Tensor | None = None, special: bool = False
) -> RotationFit:
    r"""Fit the orthogonal map that takes the rows of `source` nearest to those of `target`.

    .. math:: \min_R \sum_i w_i \lVert x_i R - y_i \rVert^2, \qquad R^\top R = I

    Rows are not centred and not normalised. Where several maps fit equally well, the result is the
    one nearest to the identity in the Frobenius norm: equal inputs give the identity exactly, a
    single row `u` and its target `v` give the minimal rotation over SO(D), and directions that are
    orthogonal to all rows stay as they are (over SO(D) at most one of them turns). Where several of
    these are equally near to the identity, the result is one of them.

    The gradient is that of this map where the fit is unique, and where `N <= D - 2` and the rows of
    each side are linearly independent. Elsewhere it is finite. With many rows of low rank (padding
    of weight 0, say), it does not include that the map between the directions orthogonal to all
    rows follows the rows.

    Args:
        source: Rows to be mapped, of a floating point dtype, `(*, N, D)` with any `N >= 1`.
        target: Rows to be reached, in the dtype of `source`, `(*, N, D)`.
        weights: A weight >= 0 for each row, `(*, N)`. A weight of 2 counts a row twice. A row of
            weight 0 is ignored: it may contain anything, NaN included. The gradients of the row and
            of its weight are 0. Negative and infinite weights are an error on a CPU; on other
            devices, under `torch.compile` and under `vmap` they are not read, and give NaN.
        special: Fit over SO(D), the maps of determinant +1, instead of O(D).

    Returns:
        A named tuple. Only the rotation has a gradient; the two numbers are float32 for half types.

        * `rotation`: the orthogonal map, `(*, D, D)`.
        * `residual`: the root mean squared row error, the weights normalised, `(*)`; 0 where all
          weights are 0. It is in the unit of the rows.
        * `gap`: how unique the fit is, in [0, 2], `(*)`; the fit is unique where it is > 0. With
          the singular values :math:`s_1 \ge \dots \ge s_D` of :math:`X^\top W Y` it is
          :math:`2 s_D / s_1` over O(D) and :math:`(s_{D-1} \pm s_D) / s_1` over SO(D), with
          the sign of the determinant of :math:`X^\top W Y`. Singular values up to
          :math:`\max(N, D) \, \varepsilon \, s_1` count as 0. For `D = 1` it is 2, or 0 where the
          product is 0.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> source = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> quarter_turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> fit = fit_rotation(source, source @ quarter_turn)
        >>> fit.rotation
        tensor([[ 0.,  1.],
                [-1.,  0.]])
        >>> fit.residual, fit.gap
        (tensor(0.), tensor(2.))

    References:
        Schönemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika,
        1966. Kabsch, A solution for the best rotation to relate two sets of vectors, 1976.
    """
    _check_rows_to_fit(source, target, weights)
    x, y, w = _exact_rows(source, target, weights)
    few = x.shape[-2] <= x.shape[-1] - 2
    return _fit(x, y, w, special, source.dtype, computed_in(source), few)


def fit_similarity(
    source: Tensor,
    target: Tensor,
    *,
    weights: Tensor | None = None,
    special: bool = False,
    scaled: bool = True,
) -> SimilarityFit:
    r"""Fit the rotation, scale and translation that take the rows of `source` nearest to `target`.

    .. math:: \min_{s \ge 0, R, t} \sum_i w_i \lVert s\, x_i R + t - y_i \rVert^2, \qquad
        R^\top R = I

    With the weighted means :math:`\bar x, \bar y` and the centred rows
    :math:`\tilde x_i, \tilde y_i`, the rotation is that of :func:`fit_rotation` for the centred
    rows, and

    .. math:: s = \frac{\sum_i w_i \langle \tilde x_i R, \tilde y_i \rangle}
        {\sum_i w_i \lVert \tilde x_i \rVert^2}, \qquad t = \bar y - s\, \bar x R.

    The scale and the translation of the mean are unique, also where the rotation is not. Where all
    rows of `source` are equal, as for `N = 1`, every scale fits equally well: the result has the
    smallest, 0, the identity as rotation, and the mean of `target` as translation. Where all rows
    of `target` are equal, the scale is 0, too. With `scaled=False`, the fit to a single row is the
    translation from one to the other.

    The rotation, the scale and the translation have gradients. They are exact where the rotation is
    unique, and where `N <= D - 1` and the differences of the rows of each side are linearly
    independent; elsewhere they are finite. Where the scale is 0 because all rows of `source` are
    equal, its gradient is 0.

    Rows may be far from the origin. They are centred in float64, which costs no digit of their
    differences. If their mean is `k` times as large as their spread, the differences are known to
    `k` times the rounding error of the input. The same holds for `scale * source @ rotation +
    translation` if it is computed in the dtype of the input: subtract the mean first if the digits
    count.

    Args:
        source: Rows to be mapped, of a floating point dtype, `(*, N, D)` with any `N >= 1`.
        target: Rows to be reached, in the dtype of `source`, `(*, N, D)`.
        weights: A weight >= 0 for each row, `(*, N)`, as for :func:`fit_rotation`. A row of weight
            0 is ignored. If all are 0, the result is the identity as rotation, the scale 0 (1 with
            `scaled=False`) and the translation 0.
        special: Fit over SO(D), the maps of determinant +1, instead of O(D).
        scaled: Fit the scale. False fits a rigid motion, whose scale is exactly 1.

    Returns:
        A named tuple. The two last numbers have no gradient, and are float32 for half types.

        * `rotation`: the orthogonal map, `(*, D, D)`.
        * `scale`: the factor, at least 0, `(*)`. Over SO(1) it is 0 where only a reflection of the
          line has a positive scale.
        * `translation`: the vector that is added to each row, `(*, D)`. It is the best one for the
          rotation and the scale as they are returned, rounded to the dtype of the input.
        * `residual`: the root mean squared row error, the weights normalised, `(*)`; 0 where all
          weights are 0. It is in the unit of `target`.
        * `gap`: how unique the rotation is, in [0, 2], `(*)`, as for :func:`fit_rotation` of the
          centred rows. The singular values that count as 0 are larger by the factor `1 + k` of the
          side whose mean is larger in terms of its spread.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> source = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> quarter_turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> fit = fit_similarity(source, 3 * source @ quarter_turn + torch.tensor([5.0, 7.0]))
        >>> fit.scale, fit.translation
        (tensor(3.), tensor([5., 7.]))
        >>> torch.allclose(fit.rotation, quarter_turn)
        True

    References:
        Umeyama, Least-squares estimation of transformation parameters between two point patterns,
        IEEE TPAMI, 1991. Schönemann and Carroll, Fitting one matrix to another under choice of a
        central dilation and a rigid motion, Psychometrika, 1970.
    """
    special, scaled = _checks.as_boolean("special", special), _checks.as_boolean("scaled", scaled)
    _check_rows_to_fit(source, target, weights)
    x, y, w = _exact_rows(source, target, weights)
    w = w / _or_1(w.detach().amax(-1, keepdim=True))
    (x, size_x, centre_x, far_x), (y, size_y, centre_y, far_y) = (_centred(z, w) for z in (x, y))
    if not scaled:  # in one unit
        unit = torch.maximum(size_x, size_y)
        x, y = (z * (size / _or_1(unit)) for z, size in ((x, size_x), (y, size_y)))
        size_x = size_y = unit
    far = torch.maximum(far_x, far_y).squeeze(-1)
    dtype, counted_in = source.dtype, computed_in(source)
    # Centred rows are dependent: N of them leave as many directions free as any N - 1.
    few = x.shape[-2] < x.shape[-1]
    rotation, _, gap = _fit(x, y, w, special, x.dtype, counted_in, few, far)
    mapped, weight = x @ rotation, w.unsqueeze(-1)
    relative: Tensor = torch.ones_like(gap, dtype=x.dtype)
    if scaled:
        spread = (weight * x.square()).sum((-2, -1))
        # At least 0 but for rounding, and for SO(1).
        product = (weight * mapped * y).sum((-2, -1)).clamp_min(0)
        relative = torch.where(spread == 0, 0, product / _or_1(spread))
    reached = relative.detach()[..., None, None] * mapped.detach()
    residual = _residual(reached, y.detach(), w.detach()) * size_y[..., 0, 0]
    # Where `size_x` is 0, so is `relative`.
    scale = relative * (size_y / _or_1(size_x))[..., 0, 0] if scaled else relative
    returned_rotation, returned_scale = rotation.to(dtype), scale.to(dtype)
    # What is rounded here is multiplied by the mean, which may be large.
    rotation = with_value(rotation, returned_rotation.to(rotation.dtype))
    scale = with_value(scale, returned_scale.to(scale.dtype))
    translation = (centre_y - scale[..., None, None] * (centre_x @ rotation)).squeeze(-2)
    return SimilarityFit(
        returned_rotation, returned_scale, translation.to(dtype), residual.to(counted_in), gap
    )


def nearest_orthogonal(matrix: Tensor, *, special: bool = False) -> Tensor:
    r"""Return the orthogonal matrix nearest to a matrix in the Frobenius norm.

    .. math:: \min_R \lVert R - M \rVert_F, \qquad R^\top R = I

    It is the orthogonal polar factor :math:`U V^\top` of :math:`M = U S V^\top`; with `special`,
    the last column of :math:`U` changes its sign where the determinant would be -1. Of several
    nearest matrices the result is the one nearest to the identity, the limit of the answer for
    :math:`M + \eta I` as :math:`\eta` falls to 0. Trailing singular values whose sum is lost in
    the rounding of the objective (:math:`8 \varepsilon s_1`) count as 0.

    The derivative is formed from sums of singular values only. It is exact where they repeat, and
    finite where the answer is not unique.

    Args:
        matrix: Any square matrices of a floating point dtype, `(*, D, D)`.
        special: Return the nearest matrix of SO(D), of determinant +1, instead of O(D).

    Returns:
        Orthogonal matrices in the dtype of `matrix`, `(*, D, D)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> nearest_orthogonal(torch.tensor([[3.0, 0.0], [0.0, -0.1]]))
        tensor([[ 1.,  0.],
                [ 0., -1.]])
        >>> nearest_orthogonal(torch.tensor([[3.0, 0.0], [0.0, -0.1]]), special=True)
        tensor([[1., 0.],
                [0., 1.]])

    References:
        Higham, Computing the polar decomposition, SIAM J. Sci. Stat. Comput., 1986.
    """
    _checks.check_square(matrix=matrix)
    x = exact(matrix)
    x = x / _or_1(x.detach().abs().amax((-2, -1), keepdim=True))
    eps = torch.finfo(computed_in(matrix)).eps
    zero = min(8, x.shape[-1]) * eps
    return polar(x, special=special, full=True, zero=zero, tie=8 * eps)[0].to(matrix.dtype)


def random_orthogonal(
    dim: int,
    *,
    batch_shape: Sequence[int] = (),
    special: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw orthogonal matrices from the uniform (Haar) distribution.

    Args:
        dim: The dimension `D >= 1`.
        batch_shape: The leading dimensions of the result.
        special: Draw from SO(D), the matrices of determinant +1, instead of O(D).
        generator: The generator that all randomness comes from; by default torch's global one.
        dtype: The dtype of the result; by default torch's default dtype.
        device: The device of the result; by default torch's default device.

    Returns:
        Orthogonal matrices, `(*batch_shape, D, D)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> r = random_orthogonal(3, batch_shape=(2,), special=True, dtype=torch.float64)
        >>> torch.allclose(r.mT @ r, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
        True

    References:
        Mezzadri, How to generate random matrices from the classical compact groups, 2007.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    _checks.check_sample(dim, batch_shape, generator, dtype)
    q: Tensor
    q, r = torch.linalg.qr(normal((*batch_shape, dim, dim), generator, device))
    # R with a positive diagonal makes Q unique, and so as uniform as the Gaussian matrix.
    q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).unsqueeze(-2)
    if special:
        q = with_last_times(q, determinant(q)[..., None, None])
    return q.to(dtype)


def rotation_angles(rotation: Tensor) -> Tensor:
    r"""Return the principal angles of rotations, largest first.

    A rotation of SO(D) turns :math:`\lfloor D / 2 \rfloor` orthogonal planes. With the singular
    values of :math:`R - I` and :math:`R + I`, :math:`2 \sin(\theta / 2)` and
    :math:`2 \cos(\theta / 2)`, the angles are accurate to :math:`10 \varepsilon \sqrt D` near 0,
    near :math:`\pi` and where they repeat. On a GPU, up to D = 32, they are as accurate as
    the singular values of its solver (docs/speed.md).

    Args:
        rotation: Matrices of SO(D), `(*, D, D)`.

    Returns:
        Angles in [0, pi] in radians, descending, without gradient, `(*, D // 2)`. They are NaN for
        a matrix of determinant -1, and for one that is far from orthogonal (where an entry of
        :math:`R^\top R - I` exceeds 0.05).

    Raises:
        TypeError, ValueError: if the argument is not as described.

    Example:
        >>> rotation_angles(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        tensor([1.5708])
    """
    _checks.check_square(rotation=rotation)
    r = _orthogonal_or_nan(rotation)
    reflection = (determinant(r) < 0).unsqueeze(-1)
    return _angles(r).masked_fill(reflection, torch.nan).to(rotation.dtype)


def rotation_distance(rotation1: Tensor, rotation2: Tensor) -> Tensor:
    r"""Return the geodesic distance of orthogonal matrices.

    .. math:: d(R_1, R_2) = \Bigl( \sum_k \theta_k^2 \Bigr)^{1/2}

    with the principal angles :math:`\theta_k` of :math:`R_1^\top R_2`. It does not change when both
    matrices are multiplied by one orthogonal matrix, from the left or from the right.

    Args:
        rotation1: Orthogonal matrices, `(*, D, D)`.
        rotation2: Orthogonal matrices in the dtype of `rotation1`, `(*, D, D)`.

    Returns:
        Distances in radians, in :math:`[0, \pi \sqrt{\lfloor D / 2 \rfloor}]`, without gradient,
        `(*)`: infinity where the determinants differ, since no path connects the two; NaN where a
        matrix is far from orthogonal.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
        >>> rotation_distance(torch.eye(3), half_turn)
        tensor(3.1416)
    """
    _checks.check_square(rotation1=rotation1, rotation2=rotation2)
    r = _orthogonal_or_nan(rotation1).mT @ _orthogonal_or_nan(rotation2)
    distance: Tensor = torch.linalg.vector_norm(_angles(r), dim=-1)
    differ = (determinant(r) < 0) & ~distance.isnan()
    return distance.masked_fill(differ, torch.inf).to(rotation1.dtype)


def _orthogonal_or_nan(rotation: Tensor) -> Tensor:
    """Return matrices in float64, NaN where they are far from orthogonal."""
    r = exact(rotation.detach())
    deviation = r.mT @ r - torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    near = deviation.abs().amax((-2, -1), keepdim=True) <= 0.05
    return r.masked_fill(~near, torch.nan)


def _angles(r: Tensor) -> Tensor:
    """Return the principal angles of orthogonal matrices `(*, D, D)`, NaN where these are NaN."""
    d = r.shape[-1]
    broken = r.sum((-2, -1), keepdim=True).isnan()
    r = r.masked_fill(broken, 0)
    identity = torch.eye(d, dtype=r.dtype, device=r.device)
    # Singular values come in pairs; in odd dimensions the smallest of R - I is alone, and is 0.
    # Not svdvals: without vectors, LAPACK has returned one of a pair with an error of 52 eps.
    sines = svd(r - identity)[1][..., : d // 2 * 2 : 2]
    cosines = svd(r + identity)[1].flip(-1)[..., : d // 2 * 2 : 2]
    return (2 * torch.atan2(sines, cosines)).masked_fill(broken.squeeze(-1), torch.nan)


def _exact_rows(
    source: Tensor, target: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and weights in float64: 0 for rows of weight 0, NaN for negative weights."""
    source, target = savable(source, target)
    x, y = exact(source), exact(target)
    if weights is None:
        return x, y, x.new_ones(x.shape[-2])
    w = exact(*savable(weights))
    zero = w == 0
    x, y = (z.masked_fill(zero.unsqueeze(-1), 0) for z in (x, y))
    # The fill gives weights of 0 the gradient 0.
    return x, y, torch.where(w < 0, torch.nan, w.masked_fill(zero, 0))


def _centred(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Subtract the weighted mean of rows `(*, N, D)`.

    A row is subtracted first, that of the largest weight: equal rows become 0 exactly, and as
    rounding is relative to a difference, the sum of the results is 0 up to rounding of their size,
    also where the mean is far larger. A derivative with respect to that row would cancel.

    Returns the centred rows in units of their size; the size `(*, 1, 1)`; the mean `(*, 1, D)`; and
    the factor by which the rounding of `x` is larger than that of the result.
    """
    rows, weight = torch.broadcast_tensors(x.detach(), w.detach().unsqueeze(-1))
    origin = rows.gather(-2, weight.argmax(-2, keepdim=True))
    without = (w == 0).unsqueeze(-1)
    x = (x - origin).masked_fill(without, 0)
    size = x.detach().abs().amax((-2, -1), keepdim=True)
    unit = _or_1(size)
    x, weight = x / unit, w.unsqueeze(-1)
    mean = (weight * x).sum(-2, keepdim=True) / _or_1(weight.sum(-2, keepdim=True))
    far = 1 + origin.abs().amax((-2, -1), keepdim=True) / unit
    return (x - mean).masked_fill(without, 0), size, origin + unit * mean, far


def _fit(
    x: Tensor,
    y: Tensor,
    w: Tensor,
    special: bool,
    dtype: torch.dtype,
    counted_in: torch.dtype,
    few: bool,
    far: Tensor | float = 1.0,
) -> RotationFit:
    """Fit rows in float64; the rotation is cast to `dtype`, the two numbers to `counted_in`.

    `few` says that the rows leave two directions free, or more. The rows are as exact as numbers of
    `counted_in`, but for the factor `far`, `(*, 1)`: the gap is 0 where the fit is not unique to
    that precision.
    """
    equal = (x - y).detach().abs().amax((-2, -1), keepdim=True) == 0
    a, b, unit = _balanced(x, y, w)
    n, d = x.shape[-2:]
    eps = torch.finfo(counted_in).eps
    x = x.detach() / unit
    if few:
        left, right = fit_few_rows(a, b, special, equal)
        # Strips of the product stay in the cache until they are cast.
        rotation = torch.cat([(strip.mT @ right).to(dtype) for strip in left.split(512, -1)], -2)
        rotation.diagonal(dim1=-2, dim2=-1).add_(1)
        if dtype == x.dtype and 8 * n >= d:  # elsewhere the cast to `dtype` is the larger error
            rotation = with_value(rotation, polished(rotation.detach()))
        mapped = x + x @ left.detach().mT @ right.detach()
        gap = (right[..., 0, 0].detach() * 0).abs()  # NaN where the inputs are not finite
    else:
        m = a.mT @ b
        rotation, _, values = polar(m, special=special, full=True, tie=8 * eps, floor=None, rows=n)
        identity = torch.eye(d, dtype=x.dtype, device=x.device)
        rotation = with_value(rotation, torch.where(equal, identity, rotation.detach()))
        mapped = x @ rotation.detach()
        rotation = rotation.to(dtype)
        gap = _gap(values, special, eps * far, max(n, d))
    residual = _residual(mapped, y.detach() / unit, w.detach()) * unit[..., 0, 0]
    return RotationFit(rotation, residual.to(counted_in), gap.to(counted_in))


def _balanced(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a, b with `a.mT @ b` a positive multiple of `x.mT @ (w * y)`, and the largest entry.

    Rows of `x` that are far shorter than others may meet rows of `y` that are far longer. Here all
    rows of `a` have the size 1 (or are 0), and those of `b` that of their product. The root of the
    sum of the squares of these products is 1: whatever cancels, rounding is relative to 1.
    """
    size_x, size_y = (z.detach().abs().amax(-1, keepdim=True) for z in (x, y))
    w = w.unsqueeze(-1)
    most_x, most_y, most_w = (z.detach().amax(-2, keepdim=True) for z in (size_x, size_y, w))
    weight = (w / _or_1(most_w)) * (size_x / _or_1(most_x)) * (size_y / _or_1(most_y))
    weight = weight / _or_1(weight.detach().amax(-2, keepdim=True))
    unit = _or_1(torch.maximum(most_x, most_y))
    a, b = x / _or_1(size_x), y / _or_1(size_y) * weight
    squares = (a.detach().square().sum(-1) * b.detach().square().sum(-1)).sum(-1)
    return a, b / _or_1(squares.sqrt())[..., None, None], unit


def _or_1(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)


def _residual(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Return the root mean squared row distance, `(*)`."""
    w = w / _or_1(w.amax(-1, keepdim=True))
    return ((w * (x - y).square().sum(-1)).sum(-1) / _or_1(w.sum(-1))).sqrt()


def _gap(values: Tensor, special: bool, eps: float | Tensor, size: int) -> Tensor:
    """Return how unique a fit is, from its signed singular values `(*, D)`."""
    largest = values.abs().amax(-1, keepdim=True)
    values = values.masked_fill(values.abs() <= size * eps * largest, 0)
    both = special and values.shape[-1] > 1
    smallest = values[..., -2:].sum(-1, keepdim=True) if both else 2 * values[..., -1:].abs()
    # Two equal values of opposite sign cancel but for rounding.
    smallest = smallest.masked_fill(smallest <= max(8, size) * eps * largest, 0)
    return (smallest / _or_1(largest)).squeeze(-1)


def _check_rows_to_fit(source: Any, target: Any, weights: Any) -> None:
    """Require rows `(*, N, D)` to fit a rotation to, and a weight `(*, N)` for each or None."""
    check_not_recorded("rotations", "use torch.export")
    check_floating("source", source)
    check_floating("target", target)
    if source.ndim < 2 or source.shape[-2] < 1 or source.shape[-1] < 1:
        raise ValueError(
            "`source` must have shape (*, N, D) with N >= 1 and D >= 1, got "
            f"{tuple(source.shape)}: pass one vector per row."
        )
    if source.shape[-2:] != target.shape[-2:]:
        raise ValueError(
            "`source` and `target` must have the same N and D in their shapes (*, N, D), got "
            f"{tuple(source.shape)} and {tuple(target.shape)}: row i of `target` is what row i of "
            "`source` is mapped to."
        )
    check_same_dtype_and_device("source", source, "target", target)
    leading = as_broadcast("source", source.shape[:-2], "target", target.shape[:-2])
    check_row_weights(weights, "source", source, "source` and `target", leading)
