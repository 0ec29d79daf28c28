"""The action of SO(3): rotations of space."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from care_loss._checks import check_floating, check_on_device, is_int, read_on_cpu, show
from care_loss._numerics import exact
from care_loss.actions._action import Action, Pose
from care_loss.actions._fit import MAX_CONDITION, Turns, check_turns, fit_action
from care_loss.actions._highest import (
    highest,
    matrix_of,
    near_rotation,
    quaternion_of,
    starts,
    table,
)
from care_loss.actions._spherical import couplings, wigner
from care_loss.sphere import slerp

MAX_DEGREE = 6


class SO3Action(Action):
    r"""A representation of the rotations of space on embeddings.

    .. math:: R_g = 1 + B (\rho(g) - 1) B^\top, \qquad \rho(g) = \bigoplus_l m_l \, D^l(g), \qquad
        R_{gh} = R_g R_h

    Points are rows: g takes x to x g. The matrices :math:`D^l` are those of real spherical
    harmonics of degree l as rows, :math:`Y^l(x g) = Y^l(x) D^l(g)`, in the order and with the signs
    of e3nn: :math:`D^0 = 1`, :math:`D^1(g) = g` (the harmonics are x, y, z), and those of degree 2
    are :math:`\sqrt 3 xz, \sqrt 3 xy, y^2 - (x^2 + z^2) / 2, \sqrt 3 yz, \sqrt 3 (z^2 - x^2) / 2`.
    In general y is the polar axis, and m = -l, ..., l counts the harmonics: for m < 0 they have the
    factor :math:`\mathrm{Im} (z + ix)^{|m|}`, for m >= 0 :math:`\mathrm{Re} (z + ix)^m`.

    Directions that are orthogonal to the basis B do not turn and belong to no degree: `rotation` is
    the identity there, `apply` and `canonical` keep them, and `parts` and `invariants` leave them
    out. Reflections of space do not act.

    The reference of :meth:`canonical` has the coordinates :math:`\cos n^2` in the columns n = 1, 2,
    ... of the basis that turn, and 0 elsewhere: numbers of which no rotation makes the same again.

    :func:`fit_so3` makes it. There are no parameters to be learned. Matrices g that are given to
    methods may have rounding errors of their dtype: the nearest rotations are used. On a CPU,
    others than rotations are an error; elsewhere they give NaN.

    Args:
        basis: Orthonormal columns `(D, D')`, ordered by degree, 2l + 1 adjacent ones for each copy,
            where `D'` is :math:`\sum_l (2l + 1) m_l`.
        multiplicity: How often each degree 0, 1, ..., L occurs: integers, `(L + 1,)` with `L <= 6`.

    Attributes:
        basis: As given, a buffer.
        multiplicity: As given, a buffer of integers. A `state_dict` loads into an action of the
            same multiplicities only.
        explained: The share of the squared displacement of held-out rows that the action explains,
            `()`, a buffer: 1 for an exact representation; NaN if it was not fitted. Even rows are
            scored by the fit to the odd ones, and the other way round, with the subspace and the
            multiplicities of all rows.
        explained_free: The same for one free rotation per element, `()`. If it is much larger than
            `explained`, the rotations do not form a representation with these degrees.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> action = SO3Action(torch.eye(4), torch.tensor([1, 1]))  # z[0] stays, the rest turns
        >>> z = torch.tensor([5.0, 1.0, 0.0, 0.0])
        >>> g = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> action.apply(z, g)
        tensor([5., 0., 1., 0.])
        >>> action.pose(z, action.apply(z, g)).element.round(decimals=4) + 0
        tensor([[ 0.,  1.,  0.],
                [-1.,  0.,  0.],
                [ 0.,  0.,  1.]])
        >>> action.invariants(z)
        tensor([5., 1.])
    """

    _label = "degree"
    _element_ndim = 2
    _couplings: Tensor
    _starts: Tensor
    _neighbours: Tensor
    _entries: Tensor

    def __init__(self, basis: Tensor, multiplicity: Tensor | Sequence[int]) -> None:
        super().__init__(basis, multiplicity)
        top = self._turning[-1] if self._turning else 1
        if top > MAX_DEGREE:
            raise ValueError(
                f"`multiplicity` must be 0 beyond degree {MAX_DEGREE}, got {list(self._counts)}: "
                "leave out higher degrees."
            )
        squares = couplings(top)
        self._shapes = [tuple(square.shape) for square in squares]
        none = torch.empty(0, dtype=torch.long, device="cpu")
        whole = torch.cat([none, *(square.flatten() for square in squares)])
        rotations, neighbours = starts(top)
        grid = {"_couplings": whole, "_starts": rotations, "_neighbours": neighbours}
        grid["_entries"] = table(rotations, self._turning or [1])
        for name, x in grid.items():
            self.register_buffer(name, x.to(basis.device, copy=True), persistent=False)

    @staticmethod
    def _size(k: int) -> int:
        """Return the dimension of an irreducible part."""
        return 2 * k + 1

    def pose(self, z1: Tensor, z2: Tensor) -> Pose:
        r"""Return the rotation that takes an embedding nearest to another.

        .. math:: \arg\max_g \langle z_1 R_g, z_2 \rangle

        The lengths of the embeddings do not matter. All degrees count. Newton's method starts from
        the 16 highest peaks among :math:`64 L^3` rotations that cover the group evenly, where L is
        the highest degree that occurs, and from the fit to the vectors of degree 1. The result is
        the global optimum: 24,000 searches for random embeddings with degrees up to 3 have missed
        none. If one embedding is the other one turned, it is that turn.

        It is equivariant: if `z1` turns by a and `z2` by b, the pose g becomes :math:`a^{-1} g b`.

        The gradient is that of the implicit function theorem, of first order only. It grows without
        bound where the optimum becomes flat. A pair takes memory for :math:`64 L^3` numbers.

        Args:
            z1: Embeddings, `(*, D)`.
            z2: Embeddings in the dtype of `z1`, `(*, D)`.

        Returns:
            A named tuple:

            * `element`: the rotation, `(*, 3, 3)`. NaN where nothing turns: only degree 0 occurs,
              or the parts of the two that turn have no degree in common. Where several fit equally
              well, one of them: a single vector is turned the shortest way.
            * `gap`: how much worse the next best local optimum is, relative to the range of the
              objective, in [0, 1], without gradient, `(*)`. It is 1 where there is no other, and 0
              where another rotation fits as well, as for a single vector, or for a single tensor of
              degree 2, which half turns about three axes leave as it is. Optima that the starts do
              not lead to are not counted.
        """
        element, gap = self._pose(z1, z2)
        return Pose(element.to(z1.dtype), gap.to(z1.dtype))

    def invariants(self, z: Tensor, *, order: int = 2) -> Tensor:
        r"""Return numbers that are the same for all states of an image.

        These are the :math:`m_0` coordinates of degree 0, and for each other degree that occurs all
        inner products of two copies :math:`i \le j`, :math:`m_l (m_l + 1) / 2` numbers. They do not
        see by how much degrees are turned relative to each other.

        Args:
            z: Embeddings, `(*, D)`.
            order: 2, the only one there is.

        Returns:
            Invariants in the dtype of `z`, `(*, F)`.
        """
        self._check_rows(z=z)
        if not is_int(order) or order != 2:
            raise ValueError(
                f"`order` must be 2, got {show(order)}: for rotations of space there are no others."
            )
        parts = self._parts(exact(z))
        found = [parts[0]]
        for k in self._turning:
            i, j = torch.triu_indices(self._counts[k], self._counts[k], device=z.device)
            found.append((parts[k][..., i, :] * parts[k][..., j, :]).sum(-1))
        return torch.cat(found, -1).to(z.dtype)

    def _squares(self) -> list[Tensor]:
        sizes = [a * b * c for a, b, c in self._shapes]
        blocks = self._couplings.split(sizes) if sizes else ()
        return [x.view(shape) for x, shape in zip(blocks, self._shapes, strict=True)]

    def _as_elements(self, name: str, g: Any) -> Tensor:
        check_floating(name, g)
        if g.ndim < 2 or g.shape[-2:] != (3, 3):
            raise ValueError(
                f"`{name}` must have shape (*, 3, 3), got {tuple(g.shape)}: pass rotations of "
                "space, x_turned = x @ g for points as rows."
            )
        check_on_device(name, g, self.basis.device, "the action")
        return as_rotations(name, exact(g))

    def _turned(self, y: Tensor, g: Tensor) -> Tensor:
        matrices = wigner(g, self._squares())
        blocks = [block @ matrices[k - 1] for k, block in self._split(y).items()]
        if not blocks:
            return y.expand(*torch.broadcast_shapes(y.shape[:-1], g.shape[:-2]), 0)
        return torch.cat([block.flatten(-2) for block in blocks], -1)

    def _optimum(self, products: dict[int, Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
        grid = (self._starts, self._neighbours, self._entries)
        element, gap = highest(products, self._squares(), grid, eps)
        sizes = [m.detach().abs().amax((-2, -1)) for m in products.values()]
        return element, gap, torch.stack(sizes).amax(0)

    def _reference(self) -> Tensor:
        x = exact(self.basis)
        n = 1 + torch.arange(x.shape[1] - self._counts[0], dtype=x.dtype, device=x.device)
        return n.square().cos()

    def _power(self, element: Tensor, t: Tensor | float) -> Tensor:
        q = quaternion_of(element)
        one = torch.eye(4, dtype=q.dtype, device=q.device)[0]
        return matrix_of(slerp(one, q, t))

    def _neutral(self, like: Tensor) -> Tensor:
        return torch.eye(3, dtype=like.dtype, device=like.device)


def fit_so3(
    z: Tensor,
    z_turned: Tensor,
    rotations: Tensor,
    *,
    max_degree: int = 3,
    multiplicity: Tensor | Sequence[int] | None = None,
    subspace: float | None = None,
) -> SO3Action:
    r"""Fit the representation by which rotations of space act on embeddings.

    Points are rows: sample i of `z_turned[t]` is that of `z` with all points x replaced by x @
    rotations[t]. Then `z_turned[t]` is near `z @ action.rotation(rotations[t])`.

    The steps, with the rows scaled to unit length:

    1. a rotation :math:`R_t` of SO(D') is fitted to each rotation :math:`g_t` of space, in the
       subspace that the embeddings use;
    2. the multiplicities are the integers nearest to the least-squares coefficients of the traces
       in characters, :math:`\mathrm{tr} R_t = \sum_l m_l \, \mathrm{tr} D^l(g_t)`;
    3. the basis is that of the representation nearest to the rotations,

       .. math:: \min_B \sum_t \lVert R_t - B \rho(g_t) B^\top \rVert^2, \qquad B^\top B = 1

       It starts from the least-squares coefficients of :math:`R_g` in the entries of all
       :math:`D^l(g)` and ascends until it no longer changes.

    Rotations may be any that determine these coefficients, :math:`\sum_{l \le L} (2l + 1)^2` of
    each entry: 10, 35 and 84 up to the degrees L = 1, 2 and 3. Half as many again are enough if
    they are random. A higher degree than `max_degree` looks like a mixture of lower ones: raise it
    if `explained` is far below `explained_free`.

    Args:
        z: Embeddings, `(N, D)`, with two rows or more for each direction that they use.
        z_turned: The embeddings of the same samples, each turned by all rotations, `(T, N, D)`, in
            the dtype of `z`. They should not be those that the encoder was trained on.
        rotations: The rotations of space, `(T, 3, 3)`. Rounding errors are removed.
        max_degree: The highest degree that is looked for, in [1, 6]. Ignored if `multiplicity` is
            given.
        multiplicity: How often each degree 0, 1, ... occurs, if it is known. The subspace then
            consists of as many principal directions as this makes.
        subspace: The share of the second moment to keep, in (0, 1], as for
            :func:`~care_loss.actions.fit_circle`.

    Returns:
        The action, with buffers in the dtype of `z` (float32 for half types). Its multiplicities
        have `max_degree + 1` entries, or those that were given.

    Raises:
        TypeError, ValueError: if an argument is not as described; if there are too few rotations,
            or they leave the coefficients undetermined; if reflections fit the turns, and
            rotations do not.

    Warns:
        UserWarning: if the action explains less than half of the displacement, or if nothing turns.

    Example:
        >>> from care_loss.rotation import random_orthogonal
        >>> planted = SO3Action(torch.eye(6), [3, 1])
        >>> z = torch.randn(64, 6)
        >>> rotations = random_orthogonal(3, batch_shape=(60,), special=True)
        >>> action = fit_so3(z, z @ planted.rotation(rotations), rotations, max_degree=2)
        >>> action.multiplicity, action.explained
        (tensor([3, 1, 0]), tensor(1.))
    """
    check_floating("rotations", rotations)
    if rotations.ndim != 3 or rotations.shape[1:] != (3, 3):
        raise ValueError(
            f"`rotations` must have shape (T, 3, 3), got {tuple(rotations.shape)}: pass one "
            "rotation of space for each entry of `z_turned`."
        )
    check_turns(z, z_turned, "rotations", rotations, multiplicity, subspace)
    if not is_int(max_degree) or not 1 <= max_degree <= MAX_DEGREE:
        raise ValueError(
            f"`max_degree` must be an int in [1, {MAX_DEGREE}], got {show(max_degree)}: pass 3, "
            "or less if there are few rotations."
        )
    turns = _Rotations(as_rotations("rotations", rotations.detach().cpu().double()), max_degree)
    return fit_action(z, z_turned, turns, multiplicity, subspace)


def as_rotations(name: str, g: Tensor) -> Tensor:
    """Require matrices that are rotations but for rounding; return the nearest rotations."""
    identity = torch.eye(3, dtype=g.dtype, device=g.device)
    deviation = (g.mT @ g - identity).detach().abs().amax((-2, -1))
    a, b, c = g.detach().unbind(-2)
    determinant = (torch.linalg.cross(a, b) * c).sum(-1)
    worst = read_on_cpu(deviation, lambda x: float(x.nan_to_num(-1.0).max()))
    if worst is not None and worst > 0.05:
        raise ValueError(
            f"`{name}` must be rotations of space, got an entry of g.mT @ g - I of {worst:.3g}: "
            "pass nearest_orthogonal(g, special=True)."
        )
    least = read_on_cpu(determinant, lambda x: float(x.nan_to_num(1.0).min()))
    if least is not None and least < 0:
        raise ValueError(
            f"`{name}` must be rotations of space, got a determinant of {least:.3g}: reflections "
            "do not act, leave them out of the augmentations."
        )
    valid = (deviation <= 0.05) & (determinant > 0)
    return near_rotation(g).masked_fill(~valid[..., None, None], torch.nan)


class _Rotations(Turns[SO3Action]):
    action = SO3Action
    fit_name = "fit_so3"

    def __init__(self, rotations: Tensor, max_degree: int) -> None:
        self.elements, self.max_degree = rotations, max_degree

    def features(self, highest: int) -> Tensor:
        """Return the entries of √(2l + 1) D^l, `(T, Σ (2l + 1)²)`."""
        entries = [
            (2 * k + 1) ** 0.5 * matrices.flatten(1)
            for k, matrices in enumerate(self._matrices(highest))
        ]
        return torch.cat(entries, 1)

    def characters(self, highest: int) -> Tensor:
        """Return the traces of all D^l, `(T, L + 1)`."""
        traces = [x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in self._matrices(highest)]
        return torch.stack(traces, -1)

    def highest(self) -> list[int]:
        """Return the highest degree that is looked for."""
        if self.condition(self.max_degree) > MAX_CONDITION:
            self.refuse(self.max_degree)
        return [self.max_degree]

    def start(self, coefficients: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Return eigenvectors of the coefficients.

        R_g has the parts Σ_ij √(2l + 1) D^l_ij A_ij, where √(2l + 1) A_ij is the sum over copies of
        u_i u_jᵀ. So the sum of A_ii projects on all columns of degree l; and in this subspace the
        columns of a copy, one below the other, are an eigenvector of the matrix of all A_ij.
        """
        columns, place = [], 0
        for k, m in enumerate(counts):
            size = 2 * k + 1
            if m:
                a = coefficients[place : place + size**2].unflatten(0, (size, size))
                whole = a.diagonal(dim1=0, dim2=1).sum(-1)
                inside = torch.linalg.eigh(whole + whole.mT).eigenvectors[:, -m * size :]
                a = (inside.mT @ a @ inside).transpose(1, 2).flatten(2).flatten(0, 1)
                u = torch.linalg.eigh(a + a.mT).eigenvectors[:, -m:].unflatten(0, (size, -1))
                columns.append((inside @ u * size**0.5).permute(1, 2, 0).flatten(1))
            place += size**2
        return columns

    def refuse(self, highest: int) -> None:
        """Say how many rotations are missing."""
        t, needed = len(self.elements), sum((2 * k + 1) ** 2 for k in range(highest + 1))
        more = f"pass {needed - t} more" if t < needed else "pass more, or spread them over SO(3)"
        raise ValueError(
            f"`rotations` must determine the matrix coefficients up to degree {highest}: at least "
            f"{needed} different rotations, or {needed * 3 // 2} random ones, got {t}, whose "
            f"system has the condition {self.condition(highest):.1g}: {more}, or look for lower "
            "degrees."
        )

    def _matrices(self, highest: int) -> list[Tensor]:
        trivial = self.elements.new_ones(len(self.elements), 1, 1)
        higher = wigner(self.elements, couplings(highest)) if highest else []
        return [trivial, *higher]
