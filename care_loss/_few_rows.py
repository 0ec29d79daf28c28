"""The rotation that fits rows which leave two directions free, or more.

All directions that are orthogonal to the rows of both sides stay as they are. The rotation is 1
plus a product of two matrices of `2N` rows, so that nothing of the size `(D, D)` is decomposed.
"""

import torch
from torch import Tensor

from care_loss._numerics import with_value
from care_loss._polar import any_true, polar, rounding_noise, svd


def fit_few_rows(x: Tensor, y: Tensor, special: bool, equal: Tensor) -> tuple[Tensor, Tensor]:
    """Fit rows `(*, N, D)` of rank `D - 2` or less in their span; all others stay as they are.

    Returns left and right `(*, 2N, D)` of the rotation `1 + left.mT @ right`. The product is
    exactly 0 where `equal` says that the inputs are equal, and its derivatives are right there.

    The product `x.mT @ y` is, but for a symmetric factor, a map `u.mT @ v` between two frames of
    orthonormal rows. Of the maps that take u to v, the nearest to the identity goes from the span
    of u to that of v by two reflections, through the subspace h in the middle of the two and
    through the span of v, and then turns within that span by `o`, which aligns the frames:

        R = (1 - 2 hᵀ h) (1 - vᵀ (1 + oᵀ) v)

    ====  ========  =============================================================================
    f     (N, D)    the polar factor of x: orthonormal rows that span those of x
    v     (N, D)    the polar factor of x fᵀ y: the frame that the rows of y fit best
    u     (N, D)    f, without the directions of dependent rows: the frame that R takes to v
    o     (N, N)    the orthogonal factor of u vᵀ: oᵀ u is as near to v as its span permits
    h     (N, D)    the polar factor of v + oᵀ u: the frame of the subspace between the two
    ====  ========  =============================================================================

    With a rank of `D - 1` or more the product has at most one direction to spare, and is decomposed
    as a whole.
    """
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    f, _, _ = polar(x)
    v, _, _ = polar(x @ f.mT @ y, floor=None)
    # Dependent rows leave fewer than N directions: the frames are 0 on the others, and o is 1.
    kept = v @ v.mT
    u = kept @ f
    o, basis, values = polar(u @ v.mT + 2 * (identity - kept), special=special, full=True)
    if special and any_true(values[..., -1:] < -0.5):
        o, direction = _with_better_flip(o, u, v, basis, values)
        middle = _with_unit_part(v + o.mT @ u, v - o.mT @ u, v, direction)
    else:
        middle = v + o.mT @ u
    # Its singular values are at least 1: what is far smaller is noise in the directions that
    # dependent rows lack.
    h, _, _ = polar(middle, floor=0.5 * torch.finfo(x.dtype).eps ** 0.5)
    turned = (identity + o.mT) @ v
    reflected = 2 * (h @ v.mT) @ turned - 2 * h
    # The rotation is 1 + h.mT @ reflected - v.mT @ turned. In these differences it is a sum of two
    # products, each of which has a factor that is 0 for equal inputs, but for rounding.
    apart, rest = (
        with_value(z, z.detach().masked_fill(equal, 0)) for z in (h - v, reflected - turned)
    )
    return torch.cat((apart, v.expand_as(h)), -2), torch.cat((reflected, rest), -2)


def _with_better_flip(
    o: Tensor, u: Tensor, v: Tensor, basis: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the direction in which two nearly equal frames are farthest apart, and flip that one.

    Over SO(N), `o` aligns the frames but for one direction, the last of `basis`, in which it makes
    them opposite. This is to be the one of the smallest cosine. Cosines near 1 tell small angles
    apart down to the root of eps only; the difference of the frames does to eps.

    Returns `o`, and the direction `(*, N, 1)` in which `o.mT @ u` and `v` are opposite.
    """
    rotation, frame, last = o.detach(), v.detach(), basis.detach()[..., -1:]
    first = rotation.mT @ last
    aligned = rotation - 2 * last @ first.mT  # without the flip
    # Where dependent rows lack directions, both frames are 0 but for rounding.
    across = frame @ frame.mT @ (frame - aligned.mT @ u.detach())
    directions, sines, _ = svd(across)
    apart = (sines[..., :1] > 2 * rounding_noise(v, v.shape[-1])) & (values[..., -1:] < -0.5)
    direction = torch.where(apart.unsqueeze(-1), directions[..., :1], first)
    flipped = aligned - 2 * aligned @ direction @ direction.mT
    return with_value(o, flipped), direction


def _with_unit_part(middle: Tensor, across: Tensor, v: Tensor, direction: Tensor) -> Tensor:
    """Lengthen the part of the middle of two frames in the `direction` in which they are opposite.

    Over SO(N) two frames may be nearly opposite in one direction. There the middle, their sum, is
    short, and is only needed as a direction: it gets the length 1. It is orthogonal to `across`,
    their difference, but for rounding, which counts because the middle is short: it is removed, as
    :mod:`care_loss.sphere` does for two points. Other rounding errors turn planes that are hardly
    determined, and leave the fit as it is.

    Where nothing but rounding is left, half a turn in any plane through that direction of v fits
    equally well. The plane taken contains the axis that is farthest from the span of v.
    """
    part, other = (direction.detach().mT @ z for z in (middle, across))  # (*, 1, D)
    v, other, direction = v.detach(), other.detach(), direction.detach()
    square = other.square().sum(-1, keepdim=True)
    nearly_opposite = square > 2  # and so both have this direction, and the division is safe
    tilt = (part.detach() * other).sum(-1, keepdim=True) / square.clamp_min(2) * other
    length = torch.linalg.vector_norm(part.detach() - tilt, dim=-1, keepdim=True)
    opposite = length <= 2 * rounding_noise(v, v.shape[-1])
    axis = v.square().sum(-2).argmin(-1, keepdim=True)
    along = torch.gather(v, -1, axis.unsqueeze(-2).expand(*v.shape[:-1], 1))
    outside: Tensor = torch.zeros_like(v[..., 0, :]).scatter(-1, axis, 1.0) - (along * v).sum(-2)
    outside = outside / torch.linalg.vector_norm(outside, dim=-1, keepdim=True)
    unit = (part - tilt) / length.masked_fill(opposite, 1)
    unit = torch.where(opposite, part + outside.unsqueeze(-2), unit)
    return middle + direction @ torch.where(nearly_opposite, unit - part, 0)
