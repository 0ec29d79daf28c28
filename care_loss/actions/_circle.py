"""The action of the circle: turns by an angle."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from care_loss._checks import check_floating, check_on_device, is_int, show
from care_loss._numerics import exact
from care_loss.actions._action import Action, Pose
from care_loss.actions._fit import MAX_CONDITION, Turns, check_turns, fit_action

CONDITIONS = (2.0, 10.0, 100.0, MAX_CONDITION)  # frequencies are looked for up to each
POINTS_PER_PERIOD = 16  # of the grid for a pose, in one period of the highest frequency
MAX_PEAKS = 4  # that are refined
NEWTON_STEPS = (2, 6)  # for all of these, and for the best one


class CircleAction(Action):
    r"""A representation of the circle on embeddings.

    .. math:: R_\theta = 1 + B (\rho(\theta) - 1) B^\top, \qquad \rho(\theta) = 1_{m_0} \oplus
        \bigoplus_{k \ge 1} m_k \begin{pmatrix} \cos k\theta & \sin k\theta \\
        -\sin k\theta & \cos k\theta \end{pmatrix}

    Directions that are orthogonal to the basis B do not turn and belong to no frequency: `rotation`
    is the identity there, `apply` and `canonical` keep them, and `parts` and `invariants` leave
    them out.

    The reference of :meth:`canonical` has the coordinates c = 1 in all planes, and 0 elsewhere.

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

    _label = "frequency"
    _element_ndim = 0
    _units: Tensor
    _speeds: Tensor

    def __init__(self, basis: Tensor, multiplicity: Tensor | Sequence[int]) -> None:
        super().__init__(basis, multiplicity)
        self._divisor = math.gcd(*self._turning) if self._turning else 1
        units = [k // self._divisor for k in self._turning]
        speeds = [k for k in self._turning for _ in range(self._counts[k])]
        for name, numbers in {"_units": units, "_speeds": speeds}.items():
            whole = torch.tensor(numbers, dtype=torch.long, device=basis.device)
            self.register_buffer(name, whole, persistent=False)

    @staticmethod
    def _size(k: int) -> int:
        """Return the dimension of an irreducible part: two for a plane."""
        return 2 if k else 1

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
        c = {k: (parts[k][..., 0], parts[k][..., 1]) for k in self._turning}
        for k in self._turning:
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

    def _pairs(self, k: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the indices of all pairs of coordinates of two frequencies, each pair once."""
        first, second = self._counts[k], self._counts[n]
        if k == n:
            i, j = torch.triu_indices(first, first, device=device)
            return i, j
        each = torch.arange(first, device=device).repeat_interleave(second)
        return each, torch.arange(second, device=device).repeat(first)

    def _as_elements(self, name: str, g: Tensor) -> Tensor:
        check_floating(name, g)
        check_on_device(name, g, self.basis.device, "the action")
        return exact(g)

    def _turned(self, y: Tensor, g: Tensor) -> Tensor:
        a, b = y[..., ::2], y[..., 1::2]
        phase = g.unsqueeze(-1) * self._speeds
        cos, sin = phase.cos(), phase.sin()
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def _optimum(self, products: dict[int, Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
        # In units of the divisor, the objective is Σ c_k cos kφ + s_k sin kφ.
        blocks = list(products.values())
        cos = torch.stack([x[..., 0, 0] + x[..., 1, 1] for x in blocks], -1)
        sin = torch.stack([x[..., 0, 1] - x[..., 1, 0] for x in blocks], -1)
        speed, highest = self._units.to(cos), self._turning[-1] // self._divisor
        angle, gap = _highest_peak(cos.detach(), sin.detach(), speed, highest)
        # A step of Newton's method from the optimum leaves it where it is, and has its derivative:
        # -(d slope) / curvature is that of the implicit function theorem.
        phase = angle.unsqueeze(-1) * speed
        slope = (speed * (sin * phase.cos() - cos * phase.sin())).sum(-1)
        bend = (speed.square() * (cos * phase.cos() + sin * phase.sin())).sum(-1).detach()
        angle = angle + slope / bend.masked_fill(bend <= 0, torch.inf)
        angle = (angle - 2 * math.pi * torch.ceil(angle / (2 * math.pi) - 0.5)) / self._divisor
        size = torch.maximum(cos.detach().abs().amax(-1), sin.detach().abs().amax(-1))
        return angle, gap * 0 if self._divisor > 1 else gap, size

    def _reference(self) -> Tensor:
        return exact(self.basis).new_tensor([1.0, 0.0]).repeat(len(self._speeds))

    def _power(self, element: Tensor, t: Tensor | float) -> Tensor:
        return element * t

    def _neutral(self, like: Tensor) -> Tensor:
        return like.new_zeros(())


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
    check_floating("angles", angles)
    if angles.ndim != 1 or len(angles) < 3:
        raise ValueError(
            f"`angles` must have shape (T,) with T >= 3, got {tuple(angles.shape)}: frequency 1 "
            "needs three angles, and frequency k needs 2k + 1."
        )
    check_turns(z, z_turned, "angles", angles, multiplicity, subspace)
    return fit_action(z, z_turned, _Angles(angles), multiplicity, subspace)


class _Angles(Turns[CircleAction]):
    action = CircleAction
    fit_name = "fit_circle"

    def __init__(self, angles: Tensor) -> None:
        self.elements = angles.detach().cpu().double()

    def features(self, highest: int) -> Tensor:
        """Return 1, and √2 times cosines and sines of all frequencies, `(T, 2K + 1)`."""
        theta = self.elements
        phase = theta.unsqueeze(-1) * torch.arange(1, highest + 1, device=theta.device)
        both = torch.stack((phase.cos(), phase.sin()), -1).flatten(-2) * math.sqrt(2)
        return torch.cat((torch.ones_like(theta).unsqueeze(-1), both), -1)

    def characters(self, highest: int) -> Tensor:
        """Return 1 and 2 cos kθ, `(T, K + 1)`."""
        k = torch.arange(highest + 1, device=self.elements.device)
        waves = (self.elements.unsqueeze(-1) * k).cos()
        return torch.where(k > 0, 2 * waves, waves)

    def highest(self) -> list[int]:
        """Return the highest frequencies for several conditions.

        Angles that are not uniform determine high frequencies badly, and so all frequencies if high
        ones are among the unknowns.
        """
        found = sorted({self._highest(condition) for condition in CONDITIONS} - {0})
        if not found:
            self.refuse(1)
        return found

    def _highest(self, condition: float) -> int:
        """Return the highest K for which the condition is at most this; it grows with K."""
        low, high = 0, (len(self.elements) - 1) // 2
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.condition(middle) <= condition
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def padded(self, counts: list[int]) -> tuple[int, ...]:
        """Return entries for all frequencies that T uniform angles can show."""
        return *counts, *[0] * ((len(self.elements) - 1) // 2 + 1 - len(counts))

    def start(self, coefficients: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Return eigenvectors: R_θ has the parts √2 (A cos kθ + S sin kθ), and u uᴴ ~ A - iS."""
        fixed = coefficients[0] + coefficients[0].mT
        columns = [torch.linalg.eigh(fixed).eigenvectors[:, len(fixed) - counts[0] :]]
        for k, m in enumerate(counts):
            if k and m:
                even, odd = coefficients[2 * k - 1 : 2 * k + 1]
                u = torch.complex(even + even.mT, odd.mT - odd)
                u = torch.linalg.eigh(u).eigenvectors[:, -m:]
                columns.append(torch.view_as_real(u.resolve_conj()).flatten(-2) * math.sqrt(2))
        return columns

    def refuse(self, highest: int) -> None:
        """Say how many angles are missing."""
        t, needed = len(self.elements), max(3, 2 * highest + 1)
        more = f"pass {needed - t} more" if t < needed else "spread them over the circle"
        low, high = float(self.elements.min()), float(self.elements.max())
        raise ValueError(
            f"`angles` must determine the frequencies up to {highest}: at least {needed} different "
            f"angles in radians that fill the circle, or {4 * highest} random ones, got {t} from "
            f"{low:.3g} to {high:.3g}, whose Fourier system has the condition "
            f"{self.condition(highest):.1g}: {more}."
        )
