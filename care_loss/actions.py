r"""The action of a group on embeddings, fitted: pose, invariants and canonical states.

If turns of the images by angles act on their embeddings as rotations that compose, these are a
representation of the circle: in some orthonormal basis, a number of coordinates that do not move
(frequency 0), and of planes that turn by :math:`k \theta` (frequency k = 1, 2, ...).
:func:`fit_circle` finds this basis and these frequencies.

::

    +---------------------------------------------------------------------------+
    |  Vectors are rows:  z_turned ≈ z @ rotation(angle)                        |
    |  A plane of frequency k has the coordinates (a, b) = z @ (two columns of  |
    |  the basis), and c = a + ib becomes exp(ik angle) c.                      |
    +---------------------------------------------------------------------------+

The methods take any leading dimensions, which broadcast. They compute in float64 (float32 on
Apple's GPUs) and return results in the dtype of the embeddings. They read no values of tensors, so
they do not synchronise a GPU, and `torch.compile` makes one graph of each. Only the fit reads
values; it has no gradient.

References:
    Serre, Linear Representations of Finite Groups, 1977, chapters 2 and 4, for characters and for
    compact groups. Journée, Nesterov, Richtárik and Sepulchre, Generalized power method for sparse
    principal component analysis, JMLR, 2010, for the ascent of the fit. Kakarala, The bispectrum as
    a source of phase-sensitive invariants for Fourier descriptors, J. Math. Imaging Vis., 2012, for
    invariants of order 3.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from care_loss._characters import nearest_counts
from care_loss._checks import (
    as_broadcast,
    check_embeddings,
    check_floating,
    check_on_device,
    is_int,
    is_real,
    read_on_cpu,
    show,
)
from care_loss._moments import (
    explained_share,
    moments_of,
    principal_directions,
    rotations_of,
    subspace_of,
)
from care_loss._numerics import computed_in, exact
from care_loss.sphere import normalize

MAX_CONDITION = 1e3  # of the Fourier system of the angles
CONDITIONS = (2.0, 10.0, 100.0, MAX_CONDITION)  # frequencies are looked for up to each
MAX_ITERATIONS = 200
POINTS_PER_PERIOD = 16  # of the grid for a pose, in one period of the highest frequency
MAX_PEAKS = 4  # that are refined
NEWTON_STEPS = (2, 6)  # for all of these, and for the best one


class Pose(NamedTuple):
    """The element of a group that takes one embedding nearest to another.

    Attributes:
        element: The element, an angle in (-pi, pi] for the circle, `(*)`.
        gap: How much worse the next best local optimum is, in [0, 1], `(*)`.
    """

    element: Tensor
    gap: Tensor


class CircleAction(nn.Module):
    r"""A representation of the circle on embeddings.

    .. math:: R_\theta = 1 + B (\rho(\theta) - 1) B^\top, \qquad \rho(\theta) = 1_{m_0} \oplus
        \bigoplus_{k \ge 1} m_k \begin{pmatrix} \cos k\theta & \sin k\theta \\
        -\sin k\theta & \cos k\theta \end{pmatrix}

    Directions that are orthogonal to the basis B do not turn and belong to no frequency: `rotation`
    is the identity there, `apply` and `canonical` keep them, and `parts` and `invariants` leave
    them out.

    :func:`fit_circle` makes it. There are no parameters to be learned.

    Args:
        basis: Orthonormal columns `(D, D')`, ordered by frequency, two adjacent ones for each
            plane, where `D'` is :math:`m_0 + 2 \sum_{k \ge 1} m_k`.
        multiplicity: How often each frequency 0, 1, ..., K occurs: integers, `(K + 1,)`.

    Attributes:
        basis: As given, a buffer.
        multiplicity: As given, a buffer of integers. A `state_dict` loads into an action of the
            same multiplicities only.
        explained: The share of the squared displacement of held-out rows that the action explains,
            `()`, a buffer: 1 for an exact representation; NaN if it was not fitted. Even rows are
            scored by the fit to the odd ones, and the other way round, with the subspace and the
            multiplicities of all rows.
        explained_free: The same for one free rotation per angle, `()`. If it is much larger than
            `explained`, the rotations do not form a representation with these frequencies.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> action = CircleAction(torch.eye(3), torch.tensor([1, 1]))  # z[0] stays, the rest turns
        >>> z = torch.tensor([5.0, 1.0, 0.0])
        >>> quarter = torch.tensor(torch.pi / 2)
        >>> action.apply(z, quarter).round(decimals=4) + 0
        tensor([5., 0., 1.])
        >>> action.pose(z, action.apply(z, quarter))
        Pose(element=tensor(1.5708), gap=tensor(1.))
        >>> action.invariants(z)
        tensor([5., 1.])
    """

    basis: Tensor
    multiplicity: Tensor
    explained: Tensor
    explained_free: Tensor
    _units: Tensor
    _speeds: Tensor

    def __init__(self, basis: Tensor, multiplicity: Tensor | Sequence[int]) -> None:
        super().__init__()
        self._counts = _as_counts(multiplicity)
        _check_basis(basis, self._counts)
        counts = torch.tensor(self._counts, device=basis.device)
        nan = torch.tensor(torch.nan, dtype=basis.dtype, device=basis.device)
        self.register_buffer("basis", basis.detach().clone())
        self.register_buffer("multiplicity", counts)
        self.register_buffer("explained", nan)
        self.register_buffer("explained_free", nan.clone())
        # Shapes depend on the multiplicities, which must be known without reading a tensor.
        self._frequencies = [k for k, m in enumerate(self._counts) if k and m]
        self._divisor = math.gcd(*self._frequencies) if self._frequencies else 1
        units = [k // self._divisor for k in self._frequencies]
        speeds = [k for k in self._frequencies for _ in range(self._counts[k])]
        for name, numbers in {"_units": units, "_speeds": speeds}.items():
            whole = torch.tensor(numbers, dtype=torch.long, device=basis.device)
            self.register_buffer(name, whole, persistent=False)

    def extra_repr(self) -> str:
        return f"dim={self.basis.shape[0]}, multiplicity={list(self._counts)}"

    def rotation(self, g: Tensor) -> Tensor:
        """Return the rotations by which angles act.

        They are a homomorphism: `rotation(g + h)` is `rotation(g) @ rotation(h)` to rounding.

        Args:
            g: Angles in radians, `(*)`.

        Returns:
            Rotations in the dtype of the basis, `(*, D, D)`.
        """
        self._check_angles("g", g)
        a, b = self._planes()
        cos, sin = self._waves(g)
        cos, sin = (cos - 1).unsqueeze(-2), sin.unsqueeze(-2)
        turn = (a * cos - b * sin) @ a.mT + (a * sin + b * cos) @ b.mT
        identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
        return (identity + turn).to(self.basis.dtype)

    def apply(self, z: Tensor, g: Tensor) -> Tensor:  # type: ignore[override]
        """Turn embeddings by angles: `z @ rotation(g)`, without forming the rotations.

        `nn.Module.apply`, which takes a function, has no use here: there are no submodules.

        Args:
            z: Embeddings, `(*, D)`.
            g: Angles in radians, `(*)`; both have gradients.

        Returns:
            Embeddings in the dtype of `z`, `(*, D)`.
        """
        self._check_rows(z=z)
        self._check_angles("g", g)
        as_broadcast("z", z.shape[:-1], "g", g.shape)
        x = exact(z)
        a, b = self._planes()
        x_a, x_b = x @ a, x @ b
        cos, sin = self._waves(g)
        # What does not turn is never projected, so it keeps its digits.
        turned = x + (x_a * (cos - 1) - x_b * sin) @ a.mT + (x_a * sin + x_b * (cos - 1)) @ b.mT
        return turned.to(z.dtype)

    def parts(self, z: Tensor) -> dict[int, Tensor]:
        """Split embeddings by frequency.

        Args:
            z: Embeddings, `(*, D)`.

        Returns:
            The coordinates in the basis, by frequency: those of frequency 0, `(*, m_0)`, and for
            each other frequency that occurs the real and imaginary parts, `(*, m_k, 2)`, which
            `torch.view_as_complex` takes.
        """
        self._check_rows(z=z)
        parts = self._parts(exact(z))
        return {k: part.to(z.dtype).contiguous() for k, part in parts.items()}

    def pose(self, z1: Tensor, z2: Tensor) -> Pose:
        r"""Return the angle that takes an embedding nearest to another.

        .. math:: \arg\max_\varphi \langle z_1 R_\varphi, z_2 \rangle = \arg\max_\varphi
            \operatorname{Re} \sum_k e^{-ik\varphi} \sum_i \overline{c_{ki}(z_1)} \, c_{ki}(z_2)

        The lengths of the embeddings do not matter. The result is the global optimum, found on a
        grid and refined by Newton's method. It is equivariant: if `z1` turns by a and `z2` by b,
        the pose changes by b - a.

        The gradient is that of the implicit function theorem, of first order only. It grows without
        bound where the optimum becomes flat.

        Args:
            z1: Embeddings, `(*, D)`.
            z2: Embeddings in the dtype of `z1`, `(*, D)`.

        Returns:
            A named tuple:

            * `element`: the angle in radians, in (-pi, pi], `(*)`. Where all frequencies have a
              common divisor d > 1, the angle is determined up to :math:`2\pi / d`, and the one
              nearest to 0 is returned. NaN where nothing turns: only frequency 0 occurs, or the
              parts of the two that turn have no frequency in common.
            * `gap`: how much worse the next best local optimum is, relative to the range of the
              objective, in [0, 1], without gradient, `(*)`. It is 1 where there is no other, and 0
              where another angle fits as well. Optima that a grid of 16 points in each period of
              the highest frequency does not show are not counted.
        """
        element, gap = self._pose(z1, z2)
        return Pose(element.to(z1.dtype), gap.to(z1.dtype))

    def invariants(self, z: Tensor, *, order: int = 2) -> Tensor:
        r"""Return numbers that are the same for all states of an image.

        With :math:`c_{ki}` the complex coordinate i of frequency k, in this order:

        * the :math:`m_0` coordinates of frequency 0;
        * for each k >= 1, of all :math:`c_{ki} \overline{c_{kj}}` the real parts for :math:`i \le
          j`, then the imaginary parts for :math:`i < j`: :math:`m_k^2` numbers;
        * with `order=3`, for all frequencies :math:`1 \le k \le l` for which :math:`k + l` occurs,
          the bispectrum :math:`c_{ki} c_{lj} \overline{c_{k+l,r}}` for all i, j, r, the real parts,
          then the imaginary parts: :math:`2 m_k m_l m_{k+l}` numbers (for k = l those of
          :math:`i \le j`).

        Those of order 2 do not see by how much frequencies are turned relative to each other; the
        bispectrum does.

        Args:
            z: Embeddings, `(*, D)`.
            order: 2, or 3 to add the bispectrum.

        Returns:
            Invariants in the dtype of `z`, `(*, F)`.
        """
        self._check_rows(z=z)
        if not is_int(order) or order not in (2, 3):
            raise ValueError(f"`order` must be 2 or 3, got {show(order)}: choose one of them.")
        parts = self._parts(exact(z))
        found = [parts[0]]
        c = {k: (parts[k][..., 0], parts[k][..., 1]) for k in self._frequencies}
        for k in self._frequencies:
            (a, b), m = c[k], self._counts[k]
            i, j = torch.triu_indices(m, m, device=z.device)
            found.append(a[..., i] * a[..., j] + b[..., i] * b[..., j])
            i, j = torch.triu_indices(m, m, 1, device=z.device)
            found.append(b[..., i] * a[..., j] - a[..., i] * b[..., j])
        pairs = [(k, n) for k in c for n in c if k <= n and k + n in c] if order == 3 else []
        for k, n in pairs:
            i, j = self._pairs(k, n, z.device)
            (a, b), (p, q), (u, v) = c[k], c[n], c[k + n]
            a, b, p, q = a[..., i], b[..., i], p[..., j], q[..., j]
            real, imaginary = ((x.unsqueeze(-1)) for x in (a * p - b * q, a * q + b * p))
            u, v = u.unsqueeze(-2), v.unsqueeze(-2)
            found.append((real * u + imaginary * v).flatten(-2))
            found.append((imaginary * u - real * v).flatten(-2))
        return torch.cat(found, -1).to(z.dtype)

    def canonical(self, z: Tensor) -> Tensor:
        r"""Turn embeddings into the same state for all states of an image.

        It is the state nearest to a fixed reference, whose coordinates are c = 1 in all planes and
        0 elsewhere: the pose to the reference is applied. This is defined for any frequencies, also
        where the smallest is not 1, since angles that :meth:`pose` cannot tell apart act in the
        same way. It is continuous except where two angles fit the reference equally well. Where the
        pose is NaN, the embedding is returned as it is.

        Args:
            z: Embeddings, `(*, D)`.

        Returns:
            Embeddings in the dtype of `z`, `(*, D)`.
        """
        self._check_rows(z=z)
        x = exact(z)
        element, _ = self._pose(x, self._planes()[0].sum(-1).expand_as(x))
        return self.apply(x, element.nan_to_num(0.0)).to(z.dtype)

    def interpolate(self, z1: Tensor, z2: Tensor, t: Tensor | float) -> Tensor:
        """Turn an embedding part of the way to another, along the group.

        At t = 0 it is `z1`, and at t = 1 the state of `z1` that is nearest to `z2`: the image stays
        that of `z1`. On the way it is `z1` turned by t times the pose, which is the shorter way
        round. Where nothing turns, it is `z1`.

        Args:
            z1: Embeddings, `(*, D)`.
            z2: Embeddings in the dtype of `z1`, `(*, D)`.
            t: Any numbers, `(*)`, or a Python number.

        Returns:
            Embeddings in the dtype of `z1`, `(*, D)`.
        """
        element, _ = self._pose(z1, z2)
        if isinstance(t, Tensor):
            self._check_angles("t", t)
            as_broadcast("t", t.shape, "z1` and `z2", element.shape)
        elif not is_real(t):
            raise TypeError(f"`t` must be a number or a torch.Tensor, got {show(t)}.")
        angle = torch.where(element.isnan(), 0, element * t)
        return self.apply(z1, angle)

    def _planes(self) -> tuple[Tensor, Tensor]:
        """Return the columns of the basis for the real and for the imaginary parts, `(D, P)`."""
        turning = exact(self.basis)[:, self._counts[0] :]
        return turning[:, ::2], turning[:, 1::2]

    def _waves(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of the angles of all planes, `(*, P)`."""
        phase = exact(g).unsqueeze(-1) * self._speeds
        return phase.cos(), phase.sin()

    def _parts(self, x: Tensor) -> dict[int, Tensor]:
        y, fixed = x @ exact(self.basis), self._counts[0]
        sizes = [2 * self._counts[k] for k in self._frequencies]
        blocks = y[..., fixed:].split(sizes, -1) if sizes else ()
        parts = {0: y[..., :fixed]}
        for k, block in zip(self._frequencies, blocks, strict=True):
            parts[k] = block.unflatten(-1, (self._counts[k], 2))
        return parts

    def _pairs(self, k: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the indices of all pairs of coordinates of two frequencies, each pair once."""
        first, second = self._counts[k], self._counts[n]
        if k == n:
            i, j = torch.triu_indices(first, first, device=device)
            return i, j
        each = torch.arange(first, device=device).repeat_interleave(second)
        return each, torch.arange(second, device=device).repeat(first)

    def _pose(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """Return pose and gap as :meth:`pose` does, before they are rounded."""
        self._check_rows(z1=z1, z2=z2)
        if z1.dtype != z2.dtype:
            raise ValueError(
                f"`z1` and `z2` must have the same dtype, got {z1.dtype} and {z2.dtype}: convert "
                "one of them with .to()."
            )
        shape = as_broadcast("z1", z1.shape[:-1], "z2", z2.shape[:-1])
        x, y = normalize(exact(z1)), normalize(exact(z2))
        if not self._frequencies:
            zero = x.new_zeros(shape)
            return zero + torch.nan, zero
        first, second = self._parts(x), self._parts(y)
        c, s = [], []
        for k in self._frequencies:
            (a, b), (u, v) = first[k].unbind(-1), second[k].unbind(-1)
            c.append((a * u + b * v).sum(-1))
            s.append((a * v - b * u).sum(-1))
        # In units of the divisor, the objective is Σ c_k cos kφ + s_k sin kφ.
        cos, sin = torch.stack(c, -1), torch.stack(s, -1)
        speed, highest = self._units.to(cos), self._frequencies[-1] // self._divisor
        angle, gap = _highest_peak(cos.detach(), sin.detach(), speed, highest)
        # A step of Newton's method from the optimum leaves it where it is, and has its derivative:
        # -(d slope) / curvature is that of the implicit function theorem.
        phase = angle.unsqueeze(-1) * speed
        slope = (speed * (sin * phase.cos() - cos * phase.sin())).sum(-1)
        bend = (speed.square() * (cos * phase.cos() + sin * phase.sin())).sum(-1).detach()
        angle = angle + slope / bend.masked_fill(bend <= 0, torch.inf)
        angle = (angle - 2 * math.pi * torch.ceil(angle / (2 * math.pi) - 0.5)) / self._divisor
        # Of unit rows, correlations of this size are rounding errors.
        nothing = 8 * max(torch.finfo(x.dtype).eps for x in (self.basis, z1.to(computed_in(z1))))
        size = torch.maximum(cos.detach().abs().amax(-1), sin.detach().abs().amax(-1))
        still = size <= nothing
        gap = gap.masked_fill(still, 0)
        return angle.masked_fill(still, torch.nan), gap * 0 if self._divisor > 1 else gap

    def _check_rows(self, **rows: Any) -> None:
        """Require embeddings `(*, D)` on the device of the basis."""
        for name, z in rows.items():
            check_floating(name, z)
            if z.ndim < 1 or z.shape[-1] != len(self.basis):
                raise ValueError(
                    f"`{name}` must have shape (*, {len(self.basis)}), got {tuple(z.shape)}: pass "
                    "embeddings of the encoder that the action was fitted to."
                )
            check_on_device(name, z, self.basis.device, "the action")

    def _check_angles(self, name: str, g: Any) -> None:
        check_floating(name, g)
        check_on_device(name, g, self.basis.device, "the action")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}multiplicity")
        if loaded is not None and tuple(loaded.tolist()) != self._counts:
            raise ValueError(
                f"`multiplicity` of the state_dict must be {list(self._counts)}, as in the module, "
                f"got {loaded.tolist()}: make the module as CircleAction(state['basis'], "
                "state['multiplicity'])."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _highest_peak(cos: Tensor, sin: Tensor, k: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    r"""Return where h(φ) = Σ_k cos_k cos kφ + sin_k sin kφ is highest, and the gap, `(*)`.

    With the range 2r of h and n the highest frequency, M. Riesz' lemma bounds h below near its
    maximum: :math:`h(\varphi^* + x) \ge \max h - r (1 - \cos nx)` for :math:`|x| \le \pi / n`. So
    on a grid of 16 points in each period of the highest frequency, the nearest point to the optimum
    is at most 0.02 r lower, and the optimum is a peak of the grid. A parabola through three points
    errs by 1e-3 r at most in the height of a peak. The highest peaks in this sense are refined.
    There are n at most; where more than `MAX_PEAKS` are equally high to 1e-3 r, the gap says so.
    """
    step = 2 * math.pi / (POINTS_PER_PERIOD * k_max)
    grid = step * torch.arange(POINTS_PER_PERIOD * k_max, dtype=cos.dtype, device=cos.device)
    phase = k.unsqueeze(-1) * grid
    h = cos @ phase.cos() + sin @ phase.sin()
    before, after = h.roll(1, -1), h.roll(-1, -1)
    # Of two equal neighbours, the first is the peak. Its bend is positive.
    is_peak = (h > before) & (h >= after)
    difference = after - before
    shift = difference / (2 * (2 * h - before - after)).masked_fill(~is_peak, 1)
    height = (h + difference * shift / 4).masked_fill(~is_peak, -torch.inf)
    height, index = height.topk(min(k_max, MAX_PEAKS), -1)
    low, high = grid[index] - step, grid[index] + step
    angle = grid[index] + step * shift.gather(-1, index)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    angle, low, high = _climb(cos, sin, k, angle, low, high, NEWTON_STEPS[0])
    phase = angle.unsqueeze(-1) * k
    reached = (cos * phase.cos() + sin * phase.sin()).sum(-1)
    reached = reached.masked_fill(height == -torch.inf, -torch.inf)
    best, place = reached.max(-1, keepdim=True)
    found = angle.gather(-1, place)
    # Rounding may make two peaks of the grid out of a flat one.
    same = (torch.remainder(angle - found + math.pi, 2 * math.pi) - math.pi).abs() < 1e-3 * step
    other = reached.masked_fill(same, -torch.inf).amax(-1, keepdim=True)
    gap = (best - other) / (best - h.amin(-1, keepdim=True))
    gap = gap.masked_fill(other == -torch.inf, 1).clamp(0, 1)
    low, high = low.gather(-1, place), high.gather(-1, place)
    found, _, _ = _climb(cos, sin, k, found, low, high, NEWTON_STEPS[1])
    return found.squeeze(-1), gap.squeeze(-1)


def _climb(
    cos: Tensor, sin: Tensor, k: Tensor, angle: Tensor, low: Tensor, high: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Climb to the peaks between `low` and `high` by Newton's method."""
    for _ in range(steps):
        phase = angle.unsqueeze(-1) * k
        c, s = phase.cos(), phase.sin()
        slope = (k * (sin * c - cos * s)).sum(-1)
        curvature = -(k.square() * (cos * c + sin * s)).sum(-1)
        low, high = torch.where(slope > 0, angle, low), torch.where(slope > 0, high, angle)
        following = angle - slope / torch.where(curvature < 0, curvature, -torch.inf)
        # The peak stays bracketed: where Newton's method would leave, the bracket is halved.
        inside = (curvature < 0) & (low <= following) & (following <= high)
        angle = torch.where(inside, following, (low + high) / 2)
    return angle, low, high


def fit_circle(
    z: Tensor,
    z_turned: Tensor,
    angles: Tensor,
    *,
    multiplicity: Tensor | Sequence[int] | None = None,
    subspace: float | None = None,
) -> CircleAction:
    r"""Fit the representation of the circle by which turns act on embeddings.

    The steps, with the rows scaled to unit length:

    1. a rotation :math:`R_t` of SO(D') is fitted to each angle :math:`\theta_t`, in the subspace
       that the embeddings use;
    2. the multiplicities are the integers nearest to the least-squares Fourier coefficients of the
       traces :math:`\mathrm{tr} R_t = m_0 + 2 \sum_k m_k \cos k \theta_t`;
    3. the basis is that of the representation nearest to the rotations,

       .. math:: \min_B \sum_t \lVert R_t - B \rho(\theta_t) B^\top \rVert^2, \qquad B^\top B = 1

       It starts from the eigenvectors of the Fourier coefficients of :math:`R_\theta` and ascends
       until it no longer changes.

    Angles need not be uniform. T uniform angles that fill the circle tell frequencies up to
    (T - 1) // 2 apart, random ones those up to about T / 4. A higher frequency looks like a lower
    one: pass more angles if `explained` is far below `explained_free`.

    Args:
        z: Embeddings, `(N, D)`, with two rows or more for each direction that they use.
        z_turned: The embeddings of the same samples, each turned by all angles, `(T, N, D)`, in the
            dtype of `z`. They should not be those that the encoder was trained on.
        angles: The angles in radians, `(T,)` with `T >= 3`.
        multiplicity: How often each frequency 0, 1, ... occurs, if it is known. The subspace then
            consists of as many principal directions as this makes.
        subspace: The share of the second moment to keep, in (0, 1]: the subspace consists of the
            fewest principal directions that hold this share. By default it consists of all
            principal directions in which more than half of the second moment of the turned
            embeddings is predicted, on held-out rows, by rotations. The others are noise. If all
            are noise, as for unrelated embeddings, all are kept.

    Returns:
        The action, with buffers in the dtype of `z` (float32 for half types). Its multiplicities
        have (T - 1) // 2 + 1 entries, or those that were given.

    Raises:
        TypeError, ValueError: if an argument is not as described; if the angles leave the
            frequencies undetermined; if reflections fit the turns, and rotations do not.

    Warns:
        UserWarning: if the action explains less than half of the displacement, or if nothing turns.

    Example:
        >>> planted = CircleAction(torch.eye(5), [1, 1, 1])
        >>> z = torch.randn(64, 5)
        >>> angles = 2 * torch.pi / 8 * torch.arange(8)
        >>> action = fit_circle(z, z @ planted.rotation(angles), angles)
        >>> action.multiplicity, action.explained
        (tensor([1, 1, 1, 0]), tensor(1.))
    """
    given = _check_turns(z, z_turned, angles, multiplicity, subspace)
    # Decompositions of this size are fastest on the CPU, and complex ones not on every device.
    theta = angles.detach().cpu().double()
    moments = moments_of(z.detach(), z_turned.detach())
    width = None if given is None else _width(given)
    directions = principal_directions(moments, z, width, subspace)
    directions, halves = subspace_of(moments, directions, given is None and subspace is None)
    cross = directions.mT @ moments.cross @ directions
    rotations, _ = rotations_of(cross.sum(0))
    if given is not None:
        _check_condition(theta, given)
    counts = given or _multiplicities(rotations, theta)
    basis = _basis(rotations, theta, counts)
    action = CircleAction((directions @ basis).to(z.device, computed_in(z)), counts)
    identity = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
    turns = CircleAction(identity, counts).rotation(theta)
    bases = [_ascend(basis, _means(half, theta, counts), counts) for half in halves]
    fitted = torch.stack([b @ turns @ b.mT for b in bases])
    action.explained.fill_(explained_share(moments, cross, fitted))
    action.explained_free.fill_(explained_share(moments, cross, halves))
    _warn(action)
    return action


def _fourier(theta: Tensor, k_max: int) -> Tensor:
    """Return 1, and cosines and sines of the frequencies up to K, `(T, 2K + 1)`."""
    phase = theta.unsqueeze(-1) * torch.arange(1, k_max + 1, device=theta.device)
    both = torch.stack((phase.cos(), phase.sin()), -1).flatten(-2)
    return torch.cat((torch.ones_like(theta).unsqueeze(-1), both), -1)


def _condition(theta: Tensor, k_max: int) -> float:
    waves = _fourier(theta, k_max)
    waves[:, 1:] *= math.sqrt(2)  # uniform angles have the condition 1
    if waves.shape[0] < waves.shape[1]:
        return math.inf
    values = torch.linalg.svdvals(waves)
    return float(values[0] / values[-1])


def _highest_frequency(theta: Tensor, condition: float) -> int:
    """Return the highest K for which the condition is at most this; it grows with K."""
    low, high = 0, (len(theta) - 1) // 2
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _condition(theta, middle) <= condition else (low, middle - 1)
    return low


def _multiplicities(rotations: Tensor, theta: Tensor) -> tuple[int, ...]:
    """Return the integers nearest to the Fourier coefficients of the traces.

    Angles that are not uniform determine high frequencies badly, and so all frequencies if high
    ones are among the unknowns. Of several highest frequencies, that one is taken whose integers
    are nearest to the traces.
    """
    t, d, _ = rotations.shape
    traces = rotations.diagonal(dim1=-2, dim2=-1).sum(-1)
    best, least = [d], math.inf
    highest = sorted({_highest_frequency(theta, condition) for condition in CONDITIONS} - {0})
    if not highest:
        _raise_condition(theta, 1)
    for k_max in highest:
        waves = torch.cat((_fourier(theta, k_max)[:, :1], 2 * _fourier(theta, k_max)[:, 1::2]), 1)
        coefficients = torch.linalg.lstsq(waves, traces.unsqueeze(-1), driver="gelsd").solution
        counts = nearest_counts(coefficients.squeeze(-1), d)
        error = float((traces - waves @ counts.to(waves)).square().sum())
        if error < 0.99 * least - 1e-12:
            best, least = counts.tolist(), error
    return *best, *[0] * ((t - 1) // 2 + 1 - len(best))


def _check_condition(theta: Tensor, counts: Sequence[int]) -> None:
    highest = max((k for k, m in enumerate(counts) if m), default=0)
    if _condition(theta, highest) > MAX_CONDITION:
        _raise_condition(theta, highest)


def _raise_condition(theta: Tensor, k_max: int) -> None:
    t, needed = len(theta), max(3, 2 * k_max + 1)
    more = f"pass {needed - t} more" if t < needed else "spread them over the circle"
    raise ValueError(
        f"`angles` must determine the frequencies up to {k_max}: at least {needed} different "
        f"angles in radians that fill the circle, or {4 * k_max} random ones, got {t} from "
        f"{float(theta.min()):.3g} to {float(theta.max()):.3g}, whose Fourier system has the "
        f"condition {_condition(theta, k_max):.1g}: {more}."
    )


def _means(rotations: Tensor, theta: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the Hermitian parts of the means of exp(-ikθ) R_θ for the k that occur, `(F, D, D)`.

    With the columns u = b_a + i b_b of the planes of frequency k, B ρ(θ) Bᵀ is the sum over k of
    Re exp(ikθ) u uᴴ. So the objective, the mean of tr(Rᵀ B ρ(θ) Bᵀ), is the sum of tr(uᴴ M_k u).
    """
    k = torch.tensor([k for k, m in enumerate(counts) if m or not k], device=theta.device)
    waves = torch.exp(-1j * k.unsqueeze(-1) * theta) / len(theta)
    return _hermitian((waves @ rotations.flatten(1).to(waves)).unflatten(-1, rotations.shape[1:]))


def _hermitian(x: Tensor) -> Tensor:
    return (x + x.mH) / 2


def _basis(rotations: Tensor, theta: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the basis `(D, D)` in which the rotations are nearest to the representation."""
    k_max = max(k for k, m in enumerate(counts) if m or not k)
    coefficients = torch.linalg.pinv(_fourier(theta, k_max)) @ rotations.flatten(1)
    coefficients = coefficients.unflatten(-1, rotations.shape[1:])
    columns = [torch.linalg.eigh(coefficients[0] + coefficients[0].mT).eigenvectors]
    columns = [columns[0][:, len(rotations[0]) - counts[0] :]]
    for k, m in enumerate(counts[: k_max + 1]):
        if k and m:  # R_θ has the parts A cos kθ + S sin kθ, and u uᴴ is A - iS
            even, odd = coefficients[2 * k - 1 : 2 * k + 1]
            u = torch.linalg.eigh(_hermitian(torch.complex(even, -odd))).eigenvectors[:, -m:]
            columns.append(torch.view_as_real(u.resolve_conj()).flatten(-2) * math.sqrt(2))
    start = torch.cat(columns, -1)
    norm = torch.linalg.matrix_norm
    factor, converged = _orthonormal(start / (norm(start, 1) * norm(start, math.inf)).sqrt(), 60)
    if not converged:  # columns of several frequencies coincide: there is no action to be found
        factor = torch.linalg.qr(start).Q
    return _ascend(factor, _means(rotations, theta, counts), counts)


def _gradient(basis: Tensor, means: Tensor, counts: Sequence[int]) -> Tensor:
    """Return half the gradient of the objective, with columns ordered as those of the basis."""
    columns = [means[0].real @ basis[:, : counts[0]]]
    place = counts[0]
    for mean, m in zip(means[1:], [m for m in counts[1:] if m], strict=True):
        block = basis[:, place : place + 2 * m].unflatten(-1, (m, 2)).contiguous()
        columns.append(torch.view_as_real(mean @ torch.view_as_complex(block)).flatten(-2))
        place += 2 * m
    return torch.cat(columns, -1)


def _ascend(basis: Tensor, means: Tensor, counts: Sequence[int]) -> Tensor:
    """Maximise the objective over orthonormal bases, by polar factors of the gradient G.

    The objective f is a quadratic form in B whose eigenvalues are in [-1, 1], since it is a mean of
    products of orthogonal matrices. So f(B) + 2 ‖B‖² is convex, above its tangents: the polar
    factor of G + 2 B, which maximises the tangent at B, cannot lessen it, and ‖B‖² is constant.
    The singular values of G + 2 B are in [1, 3], so this factor always exists. That of G makes
    longer steps; it is taken where it exists and does not lessen f.
    """
    gradient = _gradient(basis, means, counts)
    noise = 32 * len(basis) ** 0.5 * torch.finfo(basis.dtype).eps
    for _ in range(MAX_ITERATIONS):
        following, converged = _orthonormal(gradient)
        slope = _gradient(following, means, counts)
        if not converged or (following * slope).sum() < (basis * gradient).sum():
            following, _ = _orthonormal((gradient + 2 * basis) / 3)
            slope = _gradient(following, means, counts)
        change = (following - basis).abs().max()
        basis, gradient = following, slope
        if change <= noise:
            break
    return basis


def _orthonormal(x: Tensor, steps: int = 20) -> tuple[Tensor, bool]:
    """Return the polar factor of a matrix of norm 1 at most, and whether the steps were enough.

    The iteration of Newton and Schulz brings singular values in (0, 1] to 1, each by a factor of
    up to 1.5 in a step. It does not mind equal ones, for which LAPACK's svd has failed.
    """
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    noise = 4 * len(identity) ** 0.5 * torch.finfo(x.dtype).eps
    for _ in range(steps):
        error = x.mT @ x - identity
        x = x - 0.5 * x @ error
        if error.abs().max() <= noise:
            return x, True
    return x, False


def _warn(action: CircleAction) -> None:
    explained = float(action.explained)
    if not action._frequencies:
        warnings.warn(
            "fit_circle found frequency 0 only: the turns do not move these embeddings by any "
            "rotation that follows the angle, and all poses are NaN.",
            stacklevel=3,
        )
    elif explained < 0.5:
        warnings.warn(
            f"the action that fit_circle found explains {explained:.2f} of the displacement of "
            f"held-out embeddings (free rotations: {float(action.explained_free):.2f}): poses and "
            "invariants mean little. Measure the encoder with metrics.equivariance_report, or pass "
            "more angles if free rotations explain far more.",
            stacklevel=3,
        )


def _width(counts: Sequence[int]) -> int:
    """Return the number of directions that multiplicities make."""
    return counts[0] + 2 * sum(counts[1:])


def _as_counts(multiplicity: Any) -> tuple[int, ...]:
    """Require integers >= 0, not all 0, and return them as a tuple."""
    counts = multiplicity.tolist() if isinstance(multiplicity, Tensor) else multiplicity
    is_list = isinstance(counts, (list, tuple))
    if not is_list or not all(is_int(m) and m >= 0 for m in counts) or not any(counts):
        raise ValueError(
            "`multiplicity` must be integers >= 0 of shape (K + 1,), not all 0, got "
            f"{counts if is_list else show(multiplicity)}: pass how often each frequency 0, 1, "
            "..., K occurs."
        )
    return tuple(int(m) for m in counts)


def _check_basis(basis: Any, counts: Sequence[int]) -> None:
    """Require orthonormal columns `(D, D')`, as many as the multiplicities make."""
    check_floating("basis", basis)
    width = _width(counts)
    if basis.ndim != 2 or basis.shape[1] != width or len(basis) < width:
        raise ValueError(
            f"`basis` must have shape (D, {width}) with D >= {width} for the multiplicities "
            f"{list(counts)}, got {tuple(basis.shape)}: pass one column per direction, two per "
            "plane."
        )
    identity = torch.eye(width, dtype=basis.dtype, device=basis.device)
    deviation = read_on_cpu(basis, lambda b: float((b.mT @ b - identity).abs().max()))
    if deviation is not None and not deviation <= 0.05:
        raise ValueError(
            "`basis` must have orthonormal columns, got an entry of B.mT @ B - I of "
            f"{deviation:.3g}: pass torch.linalg.qr(basis).Q."
        )


def _check_turns(
    z: Any, z_turned: Any, angles: Any, multiplicity: Any, subspace: Any
) -> tuple[int, ...] | None:
    """Require what `fit_circle` describes, and return the multiplicities as a tuple or None."""
    check_embeddings(leading=False, z=z)
    for name, x in {"z_turned": z_turned, "angles": angles}.items():
        check_floating(name, x)
        check_on_device(name, x, z.device, "`z`")
    if angles.ndim != 1 or len(angles) < 3:
        raise ValueError(
            f"`angles` must have shape (T,) with T >= 3, got {tuple(angles.shape)}: frequency 1 "
            "needs three angles, and frequency k needs 2k + 1."
        )
    if z_turned.shape != (len(angles), *z.shape) or z_turned.dtype != z.dtype:
        raise ValueError(
            f"`z_turned` must be {z.dtype} of shape (T, N, D) = {(len(angles), *z.shape)}, got "
            f"{show(z_turned)}: pass the embeddings of the samples of `z` at each of the angles."
        )
    if not angles.isfinite().all():
        raise ValueError("`angles` must be finite, got NaN or an infinity.")
    if subspace is not None and (not is_real(subspace) or not 0 < subspace <= 1):
        raise ValueError(
            f"`subspace` must be a share in (0, 1] or None, got {show(subspace)}: pass 0.95, say."
        )
    if multiplicity is None:
        return None
    if subspace is not None:
        raise ValueError(
            "`subspace` must be None when `multiplicity` is given, got both: the multiplicities "
            "say how many directions there are."
        )
    return _as_counts(multiplicity)
