"""Second moments of embeddings and their turned ones, and rotations fitted to them.

What fits of the action of any group share: rows are reduced to second moments, of even and of odd
rows, from which the subspace, the rotations and what they explain on the other half follow.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from care_loss._numerics import exact
from care_loss._polar import determinant, polar, polar_by_products
from care_loss.sphere import normalize

TURNS_FOR_NOISE = 12  # at least, of those that there are
# Of a polar factor by products; for singular values far apart, a decomposition is faster.
MAX_STEPS, AT_ONCE = 14, 8


class Moments(NamedTuple):
    """Second moments of unit rows x and their turned y, on the CPU.

    `cross` (2, T, D, D) has x.mT @ y for even and for odd rows; `source` is x.mT @ x, `target` the
    sum of all y.mT @ y, and `displacement` half the sum of all squared distances of x and y.
    """

    cross: Tensor
    source: Tensor
    target: Tensor
    displacement: Tensor


def moments_of(z: Tensor, z_turned: Tensor) -> Moments:
    """Return the moments of embeddings `(N, D)` and their turned ones `(T, N, D)`."""
    x = normalize(exact(z))
    cross, target, displacement = [], torch.zeros_like(x.mT @ x), x.new_zeros(())
    for turned in z_turned:  # one by one, since all in float64 may not fit
        y = normalize(exact(turned))
        cross.append(torch.stack([x[half::2].mT @ y[half::2] for half in (0, 1)]))
        target += y.mT @ y
        displacement += (y - x).square().sum() / 2
    found = torch.stack(cross, 1), x.mT @ x, target, displacement
    moments = Moments(*(moment.cpu().double() for moment in found))
    if not moments.cross.isfinite().all():
        raise ValueError(
            "`z` and `z_turned` must be finite, got NaN or an infinity: look for the samples whose "
            "embeddings are not finite."
        )
    return moments


def principal_directions(
    moments: Moments, z: Tensor, width: int | None, share: float | None
) -> Tensor:
    """Return orthonormal columns: the principal directions above rounding that are asked for."""
    values, ascending = torch.linalg.eigh(moments.source + moments.target)
    values = values.flip(0)
    vectors: Tensor = ascending.flip(1)
    n, d = z.shape
    # Rounding of rows has that size in each direction, and so have errors of eigenvalues.
    noise = max(16 * d * torch.finfo(values.dtype).eps, (8 * torch.finfo(z.dtype).eps) ** 2)
    rank = int((values > noise * values[0]).sum())
    if not rank:
        raise ValueError("`z` must contain embeddings other than 0, got only zeros.")
    asked = rank
    if width is not None:
        asked = width
    elif share is not None:
        held = values[:rank].cumsum(0) / values[:rank].sum()
        asked = min(rank, int((held < share).sum()) + 1)
    if asked > rank:
        raise ValueError(
            f"`multiplicity` must make at most {rank} directions, as many as the embeddings use, "
            f"got {asked}: leave it out, or count the directions of each frequency once."
        )
    if n < 2 * asked:
        raise ValueError(
            f"`z` must have at least {2 * asked} rows, two for each of the {asked} directions that "
            f"are fitted, got {n}: pass more samples, or keep fewer directions with subspace=0.95."
        )
    return vectors[:, :asked]


def rotations_of(cross: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotations fitted to x.mT @ y `(*, D, D)`, and what reflections would gain `(*)`.

    The gain is in the trace of R.mT @ cross, that orthogonal maps of any determinant maximise.
    """
    found = []
    for some in cross.flatten(0, -3).split(AT_ONCE):
        factor, converged = polar_by_products(some, MAX_STEPS)
        if not converged or bool((determinant(factor) < 0).any()):
            rotations, _, values = polar(cross, special=True, full=True)
            return rotations, (-2 * values[..., -1]).clamp_min(0)
        found.append(factor)
    return torch.cat(found).view_as(cross), cross.new_zeros(cross.shape[:-2])


def subspace_of(moments: Moments, directions: Tensor, reject: bool) -> tuple[Tensor, Tensor]:
    """Leave out noise if asked to; return the directions, and the rotations of the two halves.

    Where y is a rotation of x, the rows predicted from the other half have all of the second moment
    of y in each direction. A direction in which signal is weaker than noise has less than half.
    Some of the turns are enough to see that, and spare most of the fits in all directions.
    """
    cross = directions.mT @ moments.cross @ directions
    t = cross.shape[1]
    some = torch.arange(t) % max(1, t // TURNS_FOR_NOISE) == 0
    halves, gains = torch.empty_like(cross), cross.new_empty(cross.shape[:-2])
    halves[:, some], gains[:, some] = rotations_of(cross[:, some])
    if reject:
        _refuse_reflections(moments, directions, halves[:, some], cross[:, some], gains[:, some])
        predicted = (halves[:, some] * cross[:, some].flip(0)).sum((0, 1, 2)) / some.sum()
        expected = (directions.mT @ moments.target @ directions).diagonal() / t
        kept = predicted > 0.5 * expected
        if kept.any() and not kept.all():
            return subspace_of(moments, directions[:, kept], False)
    if not some.all():
        halves[:, ~some], gains[:, ~some] = rotations_of(cross[:, ~some])
    _refuse_reflections(moments, directions, halves, cross, gains)
    return directions, halves


def _refuse_reflections(
    moments: Moments, directions: Tensor, halves: Tensor, cross: Tensor, gains: Tensor
) -> None:
    """Refuse turns that orthogonal maps of determinant -1 fit far better than rotations.

    Half the squared error of R is that of the moments minus the trace of R.mT @ cross.
    """
    t = gains.shape[1]
    in_turns = moments.target / moments.cross.shape[1]
    second = directions.mT @ (moments.source + in_turns) @ directions
    size = t * float(second.trace()) / 2
    proper = size - float((halves * cross).sum())
    best = proper - float(gains.sum())
    if proper > 1e-6 * size and best < 0.2 * proper:
        turns = int((gains > 0).any(0).sum())
        raise ValueError(
            "`z_turned` must be rotations of `z`, got reflections: for "
            f"{turns} of the {t} turns tried, a map of determinant -1 fits, and no rotation does. "
            "A sign that changes (an eigenvalue -1) belongs to no action of these groups: look for "
            "a flip among the augmentations, or pass more turns."
        )


def explained_share(moments: Moments, cross: Tensor, halves: Tensor) -> float:
    """Return the share of the displacement that rotations `(2, T, D, D)` explain on other rows.

    Half the squared distance of x R and y is less than that of x and y by ⟨x R - x, y⟩.
    """
    identity = torch.eye(halves.shape[-1], dtype=halves.dtype, device=halves.device)
    total = float(moments.displacement)
    explained = float(((halves - identity) * cross.flip(0)).sum())
    moved = total > 1e-12 * float(moments.target.trace())
    return explained / total if moved else math.nan
