r"""Fitting, sampling and measuring orthogonal maps.

::

    +---------------------------------------------------------------------------+
    |  Vectors are rows:  target ≈ source @ rotation                            |
    |  Over O(D) by default, so a "rotation" may be a reflection;               |
    |  special=True asks for SO(D), the rotations proper (determinant +1).      |
    +---------------------------------------------------------------------------+

Leading dimensions are free: each index of them is one problem. Everything is computed in float64
(float32 on Apple's GPUs) and returned in the dtype of the input, so neither autocast nor the TF32
setting changes a result. The singular value decompositions synchronise a GPU with the host.

An item of a batch that contains NaN or an infinity becomes NaN; the other items do not notice.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from care_loss import _checks
from care_loss.sphere import _computed_in, _exact


class RotationFit(NamedTuple):
    """An orthogonal map `(*, D, D)`, and how well `(*)` and how uniquely `(*)` it fits."""

    rotation: Tensor
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

    The gradient is that of this map where the fit is unique and where `N <= D - 2`. Elsewhere it is
    finite: where fewer than `D - 1` independent rows are left of more (by weights of 0, say),
    it treats the map between the directions that no row reaches as fixed.

    Args:
        source: Rows to be mapped, of a floating point dtype, `(*, N, D)` with any `N >= 1`.
        target: Rows to be reached, in the dtype of `source`, `(*, N, D)`.
        weights: A weight >= 0 for each row, `(*, N)`. A weight of 2 counts a row twice. A row of
            weight 0 is ignored: it may contain anything, NaN included, and its gradient is 0.
            Negative weights are an error on a CPU; on other devices, under `torch.compile` and
            under `vmap` their values are not read and they give NaN.
        special: Fit over SO(D), the maps of determinant +1, instead of O(D).

    Returns:
        A named tuple without gradient but for the rotation:

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
    _checks.rows_to_fit(source, target, weights)
    x, y = _exact(source), _exact(target)
    if weights is None:
        w = x.new_ones(x.shape[-2])
    else:
        w = _exact(weights)
        x, y = (z.masked_fill((w == 0).unsqueeze(-1), 0) for z in (x, y))
        w = torch.where(w < 0, torch.nan, w)
    equal = (x - y).detach().abs().amax((-2, -1), keepdim=True) == 0
    a, b, unit = _balanced(x, y, w)
    n, d = source.shape[-2:]
    dtype, gap_dtype = source.dtype, _computed_in(source)
    eps = torch.finfo(gap_dtype).eps
    if n <= d - 2:
        left, right = _fit_few_rows(a, b, special, eps)
        # What differs from the identity is exactly 0 where the inputs are equal.
        right = right - right.detach().masked_fill(~equal, 0)
        # Strips of the product stay in the cache until they are cast.
        strips = [(strip.mT @ right).to(dtype) for strip in left.split(512, -1)]
        rotation = torch.cat(strips, -2)
        rotation.diagonal(dim1=-2, dim2=-1).add_(1)
        if dtype == x.dtype and 8 * n >= d:  # elsewhere the cast to `dtype` is the larger error
            rotation = rotation + (_polished(rotation.detach()) - rotation.detach())
        mapped = x + x @ left.mT @ right
        gap = (right[..., 0, 0] * 0).abs()  # NaN where the inputs are not finite
    else:
        rotation, _, values = _polar(a.mT @ b, special=special, complete=True, eps=eps, size=n)
        # I - R is exact next to I, and so is R + (I - R).
        identity = torch.eye(d, dtype=x.dtype, device=x.device)
        rotation = rotation + (identity - rotation.detach()).masked_fill(~equal, 0)
        mapped = x @ rotation
        rotation = rotation.to(dtype)
        gap = _gap(values, special, eps, max(n, d))
    residual = _residual(mapped.detach() / unit, y.detach() / unit, w.detach()) * unit[..., 0, 0]
    return RotationFit(rotation, residual.to(gap_dtype), gap.detach().to(gap_dtype))


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
    _checks.square(matrix=matrix)
    x = _exact(matrix)
    x = x / _largest(_largest(x, -1), -2)
    eps = torch.finfo(_computed_in(matrix)).eps
    return _polar(x, special=special, complete=True, eps=eps)[0].to(matrix.dtype)


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
    _checks.sample(dim, batch_shape, dtype)
    normal = torch.randn(
        *batch_shape, dim, dim, generator=generator, dtype=torch.float64, device=device
    )
    reflectors, scales = torch.geqrf(normal)
    signs = torch.where(reflectors.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    q: Tensor = torch.linalg.householder_product(reflectors, scales)
    # R with a positive diagonal makes Q unique, and so as uniform as the Gaussian matrix.
    q = q * signs.to(q.dtype).unsqueeze(-2)
    if special:
        q = _with_last_times(q, _determinant(q)[..., None, None])
    return q.to(dtype)


def rotation_angles(rotation: Tensor) -> Tensor:
    r"""Return the principal angles of rotations, largest first.

    A rotation of SO(D) turns :math:`\lfloor D / 2 \rfloor` orthogonal planes. With the singular
    values of :math:`R - I` and :math:`R + I`, :math:`2 \sin(\theta / 2)` and
    :math:`2 \cos(\theta / 2)`, the angles are accurate to :math:`10 \varepsilon \sqrt D` near 0,
    near :math:`\pi` and where they repeat.

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
    _checks.square(rotation=rotation)
    r = _exact(rotation.detach())
    return _angles(r).masked_fill((_determinant(r) < 0).unsqueeze(-1), torch.nan).to(rotation.dtype)


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
    _checks.square(rotation1=rotation1, rotation2=rotation2)
    r = _exact(rotation1.detach()).mT @ _exact(rotation2.detach())
    distance: Tensor = torch.linalg.vector_norm(_angles(r), dim=-1)
    differ = (_determinant(r) < 0) & ~distance.isnan()
    return distance.masked_fill(differ, torch.inf).to(rotation1.dtype)


def _angles(r: Tensor) -> Tensor:
    """Return the principal angles of `(*, D, D)`, NaN where it is far from orthogonal."""
    d = r.shape[-1]
    identity = torch.eye(d, dtype=r.dtype, device=r.device)
    orthogonal = ((r.mT @ r - identity).abs() <= 0.05).all(-1, True).all(-2, True)
    r = torch.where(orthogonal, r, identity)
    # Singular values come in pairs; in odd dimensions the smallest of R - I is alone, and is 0.
    sines = torch.linalg.svdvals(r - identity)[..., : d // 2 * 2 : 2]
    cosines = torch.linalg.svdvals(r + identity).flip(-1)[..., : d // 2 * 2 : 2]
    angles = 2 * torch.atan2(sines, cosines)
    return torch.where(orthogonal.squeeze(-1), angles, torch.nan)


def _balanced(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a, b with `a.mT @ b` a positive multiple of `x.mT @ (w * y)`, and the largest entry.

    Rows of `x` that are far shorter than others may meet rows of `y` that are far longer. Here all
    rows of `a` have the size 1, and those of `b` the size of their product, at most 1.
    """
    size_x, size_y = _largest(x, -1), _largest(y, -1)
    w = w.unsqueeze(-1)
    share = w / _largest(w, -2) * (size_x / _largest(size_x, -2)) * (size_y / _largest(size_y, -2))
    share = share / _largest(share, -2)
    unit = torch.maximum(_largest(size_x, -2), _largest(size_y, -2))
    return x / size_x, y / size_y * share, unit


def _largest(z: Tensor, dim: int) -> Tensor:
    """Return the largest magnitude along a dimension, which is kept, or 1 where all is 0."""
    most = z.detach().abs().amax(dim, keepdim=True)
    return torch.where(most == 0, 1, most)


def _residual(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Return the root mean squared row distance, `(*)`."""
    w = w / _largest(w, -1)
    total = w.sum(-1)
    mean = (w * (x - y).square().sum(-1)).sum(-1) / torch.where(total == 0, 1, total)
    return mean.sqrt()


def _gap(values: Tensor, special: bool, eps: float, size: int) -> Tensor:
    """Return how unique a fit is, from its signed singular values `(*, D)`."""
    largest = values.abs().amax(-1, keepdim=True)
    values = values.masked_fill(values.abs() <= size * eps * largest, 0)
    if special and values.shape[-1] > 1:
        # Two equal values of opposite sign cancel but for rounding.
        smallest = values[..., -2:].sum(-1, keepdim=True)
        smallest = smallest.masked_fill(smallest <= max(8, size) * eps * largest, 0)
    else:
        smallest = 2 * values[..., -1:].abs()
    return (smallest / torch.where(largest == 0, 1, largest)).squeeze(-1)


def _fit_few_rows(x: Tensor, y: Tensor, special: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Fit `N <= D - 2` rows `(*, N, D)` in their span; all other directions stay as they are.

    Returns left and right `(*, 2N, D)` of the rotation `1 + left.mT @ right`.

    The product `x.mT @ y` is, but for a symmetric factor, a map `u.mT @ v` between two frames of
    orthonormal rows. Of the maps that take u to v, the nearest to the identity goes from the span
    of u to that of v by two reflections, through the subspace h in the middle of the two and
    through the span of v, and then turns within that span by `o`, which aligns the frames.
    """
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    f, _, _ = _polar(x)
    v, _, _ = _polar(x @ f.mT @ y, eps=eps)
    # Dependent rows leave fewer than N directions: the frames are 0 on the others, and o is 1.
    kept = v @ v.mT
    u = kept @ f
    o, basis, _ = _polar(u @ v.mT + 2 * (identity - kept), special=special, complete=True)
    middle = v + o.mT @ u
    if special:
        middle = middle + _where_opposite(middle, v, o.mT @ basis[..., -1:])
    h, _, _ = _polar(middle)
    turned = (identity + o.mT) @ v
    left = torch.cat((h, v.expand_as(h)), -2)
    right = torch.cat((2 * (h @ v.mT) @ turned - 2 * h, -turned), -2)
    return left, right


def _where_opposite(middle: Tensor, v: Tensor, direction: Tensor) -> Tensor:
    """Return what is added to the middle of two frames that are opposite in one direction.

    Half a turn in any plane through that direction of v fits equally well, and the middle of the
    two frames is 0 there. The plane taken contains the axis that is farthest from the span of v.
    """
    middle, v, direction = middle.detach(), v.detach(), direction.detach()
    length = torch.linalg.vector_norm(direction.mT @ middle, dim=(-2, -1))
    # Below this the direction is rounding noise, and the cosine differs from -1 by less than eps.
    opposite = length <= torch.finfo(v.dtype).eps ** 0.5
    axis = v.square().sum(-2).argmin(-1, keepdim=True)
    along = torch.gather(v, -1, axis.unsqueeze(-2).expand(*v.shape[:-1], 1))
    normal: Tensor = torch.zeros_like(v[..., 0, :]).scatter(-1, axis, 1.0) - (along * v).sum(-2)
    normal = normal / torch.linalg.vector_norm(normal, dim=-1, keepdim=True)
    return (direction * normal.unsqueeze(-2)).masked_fill(~opposite[..., None, None], 0)


def _polar(
    x: Tensor,
    *,
    special: bool = False,
    complete: bool = False,
    eps: float | None = None,
    size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the orthogonal polar factor of matrices `(*, N, D)` with `N <= D`.

    Without `complete` it is a partial isometry: 0 where the matrix is 0. With it (`N = D`) it is
    orthogonal, the nearest to the identity where singular values are 0, and of determinant 1 where
    `special`.

    Returns:
        The factor `(*, N, D)`, the eigenvectors `(*, N, N)` of `x @ factor.mT`, and its eigenvalues
        `(*, N)`, descending: the singular values, the last with a sign where `special`. Only the
        factor has a derivative.
    """
    size = max(size, *x.shape[-2:])
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _function(_Polar, _ForwardPolar).apply(x, special, complete, eps, size)  # type: ignore[no-any-return]


def _polished(factor: Tensor) -> Tensor:
    """Take one step of Newton and Schulz, which removes most of the rounding errors."""
    return 1.5 * factor - 0.5 * (factor @ factor.mT) @ factor


def _noise(x: Tensor, size: int) -> float:
    """Bound what a decomposition makes of a singular value of 0, relative to the largest.

    Seen: up to 3.4 eps for D = 2, 4.6 for 128 and 10.1 for 1024.
    """
    return (4 + math.sqrt(size)) * torch.finfo(x.dtype).eps


def _tie(x: Tensor, eps: float, size: int) -> float:
    """Return the difference, relative to the largest, up to which singular values are equal."""
    return max(8 * eps, _noise(x, size))


def _toward_identity(p: Tensor, q: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the singular vectors of the value 0 that bring `p @ q.mT` nearest to the identity."""
    block = null.unsqueeze(-1) & null.unsqueeze(-2)
    identity = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    # Null directions come last, and so do the singular values of their block: none exceeds 1.
    a, _, bh = torch.linalg.svd(torch.where(block, p.mT @ q, 2 * identity))
    return p @ torch.where(block, a, identity), q @ torch.where(block, bh.mT, identity)


def _best_to_flip_last(p: Tensor, q: Tensor, tied: Tensor) -> tuple[Tensor, Tensor]:
    """Turn tied singular vectors so that flipping the last costs `p @ q.mT` the least trace."""
    block = tied.unsqueeze(-1) & tied.unsqueeze(-2)
    identity = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    # Eigenvalues ascend, and tied directions come last: theirs are those >= -1.
    trace = q.mT @ p
    _, e = torch.linalg.eigh(torch.where(block, -(trace + trace.mT) / 2, -2 * identity))
    e = torch.where(block, e, identity)
    return p @ e, q @ e


def _determinant(q: Tensor) -> Tensor:
    """Return the determinant of orthogonal matrices `(*, D, D)`, 1 or -1.

    It counts the reflections of a QR decomposition. In float32 `det` underflows (to 0 from D = 384
    on), and `slogdet` shares its LU decompositions, which can be wrong for batches: with torch
    2.13, MKL and two threads they are, from D = 256 on.
    """
    reflectors, scales = torch.geqrf(q)
    negative = reflectors.diagonal(dim1=-2, dim2=-1) < 0
    odd = (negative.sum(-1) + (scales != 0).sum(-1)) % 2
    return 1 - 2 * odd.to(q.dtype)


def _with_last_times(x: Tensor, factor: Tensor) -> Tensor:
    return torch.cat((x[..., :-1], x[..., -1:] * factor), -1)


def _any(mask: Tensor) -> bool:
    """Tell whether anything is true; where values cannot be read, something may be."""
    return torch.compiler.is_compiling() or mask.is_meta or bool(mask.any())


def _function(plain: type[Function], with_forward_mode: type[Function]) -> Any:
    """Choose the Function: torch.compile does not trace those that have a forward mode."""
    return plain if torch.compiler.is_compiling() else with_forward_mode


class _Polar(Function):
    """The polar factor, with a derivative that is its own transpose.

    With h = x factorᵀ and the solution w of h w + w h = dx factorᵀ - factor dxᵀ it is w factor, and
    for what leaves the row space of a partial isometry, h⁺ dx (1 - factorᵀ factor).
    """

    @staticmethod
    def forward(
        x: Tensor, special: bool, complete: bool, eps: float, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        broken = ~x.sum((-2, -1), keepdim=True).isfinite()
        # The transpose lies in memory as LAPACK wants it.
        q, s, ph = torch.linalg.svd(x.masked_fill(broken, 0).mT, full_matrices=False)
        p, top = ph.mT, s[..., :1]
        # Values count as 0 where the rounding of the objective hides even their sum, or where they
        # are the noise that the decomposition leaves of a 0.
        tail = s.flip(-1).cumsum(-1).flip(-1)
        null = (tail <= min(8, size) * eps * top) | (s <= _noise(x, size) * top)
        s = s.masked_fill(null, 0)
        if not complete:
            q = q.masked_fill(null.unsqueeze(-2), 0)
        elif _any(null):
            p, q = _toward_identity(p, q, null)
        if special:
            sign = _determinant(p @ q.mT).unsqueeze(-1)
            tied = (s - s[..., -1:] <= _tie(x, eps, size) * top) & ~null[..., -1:] & (sign < 0)
            if _any(tied[..., :-1]):
                p, q = _best_to_flip_last(p, q, tied)
            p = _with_last_times(p, sign.unsqueeze(-1))
            s = _with_last_times(s, sign)
        factor = _polished(p @ q.mT).masked_fill(broken, torch.nan)
        return factor, p, s.masked_fill(broken[..., 0], torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, ctx.complete, eps, size = inputs
        ctx.least = _tie(x, eps, size)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, *output)
        ctx.save_for_forward(x, *output)

    @staticmethod
    def backward(ctx: Any, step: Tensor, *_: Any) -> Any:
        x, factor, basis, values = ctx.saved_tensors
        h, k = x @ factor.mT, step @ factor.mT
        sums = values.unsqueeze(-1) + values.unsqueeze(-2)
        top = values.abs().amax(-1)[..., None, None]
        # Only sums of singular values are divided by, so equal ones do no harm. Where a sum is 0
        # but for rounding, the factor may turn freely, and has no derivative.
        inverse = torch.where(sums > ctx.least * top, 1 / sums, 0)
        result = _solve(h, k - k.mT, basis, inverse) @ factor
        if not ctx.complete:
            kept = basis * (values > 0).to(basis.dtype).unsqueeze(-2)
            pseudoinverse = _solve(h, 2 * kept @ basis.mT, basis, inverse)
            result = result + pseudoinverse @ (step - k @ factor)
        return result, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *settings: Any) -> Any:
        x = x.movedim(in_dims[0], 0)
        return _function(_Polar, _ForwardPolar).apply(x, *settings), (0, 0, 0)


class _ForwardPolar(_Polar):
    @staticmethod
    def jvp(ctx: Any, step: Tensor, *_: Any) -> Any:
        return _Polar.backward(ctx, step)[0], None, None


def _solve(h: Tensor, k: Tensor, basis: Tensor, inverse: Tensor) -> Tensor:
    return _function(_Solve, _ForwardSolve).apply(h, k, basis, inverse)  # type: ignore[no-any-return]


class _Solve(Function):
    """The solution x of h x + x h = k, for symmetric h.

    The columns of `basis` are the eigenvectors of h, and `inverse` has the reciprocals of the sums
    of its eigenvalues. The derivatives solve the same equation: they are finite to every order,
    where those of eigenvectors are not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, k: Tensor, basis: Tensor, inverse: Tensor) -> Tensor:
        return basis @ (inverse * (basis.mT @ k @ basis)) @ basis.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        h, _, *factors = inputs
        ctx.save_for_backward(h, output, *factors)
        ctx.save_for_forward(h, output, *factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, x, *factors = ctx.saved_tensors
        grad = _solve(h, grad, *factors)
        return -grad @ x.mT - x.mT @ grad, grad, None, None


class _ForwardSolve(_Solve):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, dh: Tensor, dk: Tensor, *_: Any) -> Any:
        h, x, *factors = ctx.saved_tensors
        return _solve(h, dk - dh @ x - x @ dh, *factors)
