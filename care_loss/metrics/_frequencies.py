"""The frequencies of a representation of the circle, from rotations that were fitted to turns."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from care_loss import _checks
from care_loss._characters import nearest_counts
from care_loss._checks import check_floating, check_on_device, check_square
from care_loss._numerics import exact
from care_loss.metrics._measures import permutation


class Frequencies(NamedTuple):
    """The frequencies of rotations of a circle group.

    Attributes:
        multiplicity: How often each frequency occurs, `(T // 2 + 1,)`.
        deviation: The mean angle from the nearest representation, in radians, `()`.
    """

    multiplicity: Tensor
    deviation: Tensor


def frequencies(rotations: Tensor, angles: Tensor, *, shuffled: bool = False) -> Frequencies:
    r"""Estimate which frequencies rotations of a circle group have, and the deviation from these.

    A representation of the circle is, in some basis, a number of directions that do not move
    (frequency 0) and of planes that turn by :math:`k \theta` (frequency k = 1, 2, ...). The number
    of each follows from the traces:

    .. math:: m_0 = \frac 1 T \sum_\theta \mathrm{tr} R_\theta, \qquad
              m_k = \frac 1 T \sum_\theta \mathrm{tr} R_\theta \cos k \theta

    For a representation these are integers, and the eigenvalues of :math:`R_\theta` have the
    arguments :math:`\pm k \theta`. An encoder that ignores the turns has the frequency 0 only, and
    its deviation is small for that reason: always look at the multiplicities too.

    Args:
        rotations: Orthogonal matrices, one fitted to each turn, `(T, D, D)` with `T >= 2`. Fit them
            in the principal subspace of the embeddings, because directions without embeddings do
            not move in any fit, and count as frequency 0.
        angles: The angles of the turns in radians, `(T,)`. They must have uniform distances and
            fill the circle; their order is free. Only frequencies up to `T // 2` can be told apart.
        shuffled: Return the chance level instead, for which the angles change places.

    Returns:
        A named tuple without gradient:

        * `multiplicity`: how often each frequency 0, 1, ... occurs, `(T // 2 + 1,)`. The sum of
          the first and of twice the others is D for a representation.
        * `deviation`: the mean distance of the eigenvalues' arguments from those of the nearest
          integer multiplicities, in radians, `()`. Arguments of random rotations reach about 0.4.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> angles = 2 * torch.pi / 6 * torch.arange(6)
        >>> c, s, o, i = angles.cos(), angles.sin(), torch.zeros(6), torch.ones(6)
        >>> turns = torch.stack([c, s, o, -s, c, o, o, o, i], -1).view(6, 3, 3)
        >>> multiplicity, deviation = frequencies(turns, angles)
        >>> multiplicity.round(decimals=3).abs()
        tensor([1., 1., 0., 0.], dtype=torch.float64)

    References:
        Serre, Linear Representations of Finite Groups, 1977, section 2.3, for the characters.
    """
    _check_circle(rotations, angles)
    # Eigenvalues of matrices without symmetry are not computed on every device.
    r, theta = exact(rotations.detach().cpu()), exact(angles.detach().cpu())
    t, d, _ = r.shape
    if _checks.as_boolean("shuffled", shuffled):
        r = r[permutation(t)]
    k = torch.arange(t // 2 + 1, device="cpu")
    waves = torch.cos(theta.unsqueeze(-1) * k)
    # The squares of a wave sum to T / 2, but to more for frequency 0 and for T / 2. If the angles
    # lie between the extremes of the latter wave, it is 0 and shows nothing.
    squares = waves.square().sum(0)
    squares = torch.where(squares > 1e-3, squares, torch.inf)
    traces = r.diagonal(dim1=-2, dim2=-1).sum(-1)
    multiplicity = traces @ waves / squares / torch.where(k > 0, 2, 1)
    counts = nearest_counts(multiplicity, [1, *[2] * (t // 2)], d)
    ks = k.repeat_interleave(counts)
    ks = torch.cat((ks, -ks[ks > 0]))
    wanted = _wrap(theta.unsqueeze(-1) * ks).sort().values
    measured = torch.linalg.eigvals(r).angle().sort().values
    # On a circle, the best assignment of sorted points is one of the cyclic shifts.
    distances = [_wrap(measured - wanted.roll(shift, -1)).abs().mean(-1) for shift in range(d)]
    deviation = torch.stack(distances).amin(0).mean()
    dtype = exact(rotations[:0]).dtype
    return Frequencies(*(x.to(rotations.device, dtype) for x in (multiplicity, deviation)))


def _wrap(angle: Tensor) -> Tensor:
    """Return the angle in [-pi, pi) of the same direction."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def _check_circle(rotations: Any, angles: Any) -> None:
    """Require orthogonal matrices `(T, D, D)` with T >= 2, at angles `(T,)` of uniform distance."""
    check_square(rotations=rotations)
    check_floating("angles", angles)
    if rotations.ndim != 3 or len(rotations) < 2 or angles.shape != rotations.shape[:1]:
        raise ValueError(
            "`rotations` and `angles` must have shapes (T, D, D) and (T,) with T >= 2, got "
            f"{tuple(rotations.shape)} and {tuple(angles.shape)}: pass one rotation per angle."
        )
    check_on_device("angles", angles, rotations.device, "`rotations`")
    rotations, angles = rotations.detach(), angles.detach()
    identity = torch.eye(rotations.shape[-1], dtype=rotations.dtype, device=rotations.device)
    deviation = float((rotations.mT @ rotations - identity).abs().max())
    if not deviation <= 0.05:
        raise ValueError(
            "`rotations` must be orthogonal matrices, got an entry of R.mT @ R - I of "
            f"{deviation:.3g}: pass those of fit_rotation(...).rotation."
        )
    turn = 2 * math.pi
    steps = (angles.double() % turn).sort().values
    steps = torch.cat((steps[1:], steps[:1] + turn)) - steps
    if not float((steps * len(angles) / turn - 1).abs().max()) <= 1e-3:
        raise ValueError(
            "`angles` must have uniform distances and fill the circle, in radians, got steps from "
            f"{float(steps.min()):.3g} to {float(steps.max()):.3g}: pass "
            f"2 * torch.pi / {len(angles)} * torch.arange({len(angles)})."
        )
