r"""How the action of any group is fitted to embeddings and their turned ones.

1. A rotation :math:`R_t` is fitted to each element :math:`g_t` (`care_loss._moments`).
2. The multiplicities are the integers nearest to those that explain the traces by characters.
3. The basis is that of the representation nearest to the rotations, in least squares. It starts
   from the matrix coefficients and ascends until it no longer changes.

A group adds its matrix coefficients, its characters, and how a basis starts from coefficients.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from care_loss._characters import nearest_counts
from care_loss._checks import check_embeddings, check_floating, check_on_device, is_real, show
from care_loss._moments import (
    explained_share,
    moments_of,
    principal_directions,
    rotations_of,
    subspace_of,
)
from care_loss._numerics import computed_in
from care_loss._polar import polar_by_products
from care_loss.actions._action import Action

MAX_CONDITION = 1e3  # of the system that determines matrix coefficients
MAX_ITERATIONS, MAX_STEPS = 200, 20  # of the ascent, and of each polar factor in it
Fitted = TypeVar("Fitted", bound=Action)


class Turns(Generic[Fitted]):
    """The elements of a group at which embeddings are given, on the CPU in float64."""

    action: type[Fitted]
    fit_name: str
    elements: Tensor

    def features(self, highest: int) -> Tensor:
        """Return the matrix coefficients up to the highest frequency or degree, `(T, F)`.

        For elements that are uniform they are orthonormal but for the factor √T.
        """
        raise NotImplementedError

    def characters(self, highest: int) -> Tensor:
        """Return the traces of the irreducible parts, `(T, K + 1)`."""
        raise NotImplementedError

    def highest(self) -> Sequence[int]:
        """Return the highest frequencies or degrees that are tried, or raise an error."""
        raise NotImplementedError

    def padded(self, counts: list[int]) -> tuple[int, ...]:
        """Return multiplicities with all entries that are promised."""
        return tuple(counts)

    def start(self, coefficients: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Return columns of length 1 for each k that occurs, from coefficients `(F, D, D)`."""
        raise NotImplementedError

    def refuse(self, highest: int) -> None:
        """Say that the elements do not determine the coefficients."""
        raise NotImplementedError

    def condition(self, highest: int) -> float:
        """Return the condition of the coefficients up to the highest, 1 for uniform elements."""
        features = self.features(highest)
        if features.shape[0] < features.shape[1]:
            return math.inf
        values = torch.linalg.svdvals(features)
        return float(values[0] / values[-1])


def fit_action(
    z: Tensor,
    z_turned: Tensor,
    turns: Turns[Fitted],
    multiplicity: Tensor | Sequence[int] | None,
    subspace: float | None,
) -> Fitted:
    """Fit the action of a group; see `fit_circle` for the arguments."""
    given = None if multiplicity is None else turns.action._as_counts(multiplicity)
    # Decompositions of this size are fastest on the CPU, and complex ones not on every device.
    moments = moments_of(z.detach(), z_turned.detach())
    width = None if given is None else turns.action._width(given)
    directions = principal_directions(moments, z, width, subspace)
    directions, halves = subspace_of(moments, directions, given is None and subspace is None)
    cross = directions.mT @ moments.cross @ directions
    rotations, _ = rotations_of(cross.sum(0))
    if given is not None:
        highest = _highest(given)
        if turns.condition(highest) > MAX_CONDITION:
            turns.refuse(highest)
    counts = given or _multiplicities(rotations, turns)
    basis = _started(rotations, turns, counts)
    identity = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
    ideal = turns.action(identity, counts).rotation(turns.elements)
    basis = _ascended(basis, rotations, ideal, counts, turns)
    action = turns.action((directions @ basis).to(z.device, computed_in(z)), counts)
    bases = [_ascended(basis, half, ideal, counts, turns) for half in halves]
    fitted = torch.stack([b @ ideal @ b.mT for b in bases])
    action.explained.fill_(explained_share(moments, cross, fitted))
    action.explained_free.fill_(explained_share(moments, cross, halves))
    _warn(action, turns)
    return action


def _highest(counts: Sequence[int]) -> int:
    return max((k for k, m in enumerate(counts) if m), default=0)


def _multiplicities(rotations: Tensor, turns: Turns[Fitted]) -> tuple[int, ...]:
    """Return the integers nearest to the coefficients of the traces in characters.

    Of several highest frequencies, that one is taken whose integers are nearest to the traces.
    """
    d = rotations.shape[-1]
    traces = rotations.diagonal(dim1=-2, dim2=-1).sum(-1)
    best, least = [d], math.inf
    for highest in turns.highest():
        characters = turns.characters(highest)
        found = torch.linalg.lstsq(characters, traces.unsqueeze(-1), driver="gelsd").solution
        sizes = [turns.action._size(k) for k in range(highest + 1)]
        counts = nearest_counts(found.squeeze(-1), sizes, d)
        error = float((traces - characters @ counts.to(characters)).square().sum())
        if error < 0.99 * least - 1e-12:
            best, least = counts.tolist(), error
    return turns.padded(best)


def _started(rotations: Tensor, turns: Turns[Fitted], counts: Sequence[int]) -> Tensor:
    """Return an orthonormal basis `(D, D)` from the coefficients of the rotations."""
    features = turns.features(_highest(counts))
    coefficients = torch.linalg.pinv(features) @ rotations.flatten(1)
    columns = turns.start(coefficients.unflatten(-1, rotations.shape[1:]), counts)
    start = torch.cat(columns, -1)
    factor, converged = polar_by_products(start, 60)
    if not converged:  # columns of several parts coincide: there is no action to be found
        factor = torch.linalg.qr(start).Q
    return factor


def _gradient(basis: Tensor, means: list[Tensor], counts: Sequence[int]) -> Tensor:
    """Return half the gradient of the objective, with columns ordered as those of the basis."""
    columns, place = [], 0
    for mean, m in zip(means, [m for m in counts if m], strict=True):
        size = mean.shape[-2]
        block = basis[:, place : place + m * size].unflatten(-1, (m, size))
        columns.append(torch.tensordot(mean, block, ((2, 3), (2, 0))).permute(1, 2, 0).flatten(-2))
        place += m * size
    return torch.cat(columns, -1)


def _means(
    rotations: Tensor, ideal: Tensor, counts: Sequence[int], turns: Turns[Fitted]
) -> list[Tensor]:
    """Return the means of ρ_ij R_ab for the irreducible parts ρ that occur, `(i, a, j, b)`.

    With the columns u_i of one copy of ρ, B ρ(g) Bᵀ is the sum of all ρ_ij u_i u_jᵀ. So the
    objective, the mean of tr(Rᵀ B ρ Bᵀ), is the sum over copies of u · M u, of which the symmetric
    part is enough. All irreducible parts are taken from `ideal`, the action in its own basis.
    """
    found, place = [], 0
    for k, m in enumerate(counts):
        if m:
            size = turns.action._size(k)
            part = ideal[:, place : place + size, place : place + size]
            mean = torch.einsum("tij,tab->iajb", part, rotations) / len(rotations)
            found.append((mean + mean.permute(2, 3, 0, 1)) / 2)
            place += m * size
    return found


def _ascended(
    basis: Tensor, rotations: Tensor, ideal: Tensor, counts: Sequence[int], turns: Turns[Fitted]
) -> Tensor:
    """Maximise the objective over orthonormal bases, by polar factors of the gradient G.

    The objective f is a quadratic form in B whose eigenvalues are in [-1, 1], since it is a mean of
    products of orthogonal matrices. So f(B) + 2 ‖B‖² is convex, above its tangents: the polar
    factor of G + 2 B, which maximises the tangent at B, cannot lessen it, and ‖B‖² is constant.
    The singular values of G + 2 B are in [1, 3], so this factor always exists. That of G makes
    longer steps; it is taken where it exists and does not lessen f.
    """
    means = _means(rotations, ideal, counts, turns)
    gradient = _gradient(basis, means, counts)
    noise = 32 * len(basis) ** 0.5 * torch.finfo(basis.dtype).eps
    for _ in range(MAX_ITERATIONS):
        following, converged = polar_by_products(gradient, MAX_STEPS)
        slope = _gradient(following, means, counts)
        if not converged or (following * slope).sum() < (basis * gradient).sum():
            following, _ = polar_by_products(gradient + 2 * basis, MAX_STEPS)
            slope = _gradient(following, means, counts)
        change = (following - basis).abs().max()
        basis, gradient = following, slope
        if change <= noise:
            break
    return basis


def _warn(action: Action, turns: Turns[Fitted]) -> None:
    explained = float(action.explained)
    if not any(action.multiplicity.tolist()[1:]):
        warnings.warn(
            f"{turns.fit_name} found {action._label} 0 only: the turns do not move these "
            "embeddings by rotations that follow the group, and all poses are NaN.",
            stacklevel=4,
        )
    elif explained < 0.5:
        warnings.warn(
            f"the action that {turns.fit_name} found explains {explained:.2f} of the displacement "
            f"of held-out embeddings (free rotations: {float(action.explained_free):.2f}): poses "
            "and invariants mean little. Measure the encoder with metrics.equivariance_report, or "
            f"try more turns and a higher {action._label} if free rotations explain far more.",
            stacklevel=4,
        )


def check_turns(
    z: Any,
    z_turned: Any,
    name: str,
    elements: Any,
    multiplicity: Any,
    subspace: Any,
) -> None:
    """Require embeddings `(N, D)`, those of each element `(T, N, D)`, and settings that agree.

    The shape of the elements has been checked.
    """
    check_embeddings(leading=False, z=z)
    for other, x in {"z_turned": z_turned, name: elements}.items():
        check_floating(other, x)
        check_on_device(other, x, z.device, "`z`")
    if z_turned.shape != (len(elements), *z.shape) or z_turned.dtype != z.dtype:
        raise ValueError(
            f"`z_turned` must be {z.dtype} of shape (T, N, D) = {(len(elements), *z.shape)}, got "
            f"{show(z_turned)}: pass the embeddings of the samples of `z` at each of the {name}."
        )
    if not elements.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or an infinity.")
    if subspace is not None and (not is_real(subspace) or not 0 < subspace <= 1):
        raise ValueError(
            f"`subspace` must be a share in (0, 1] or None, got {show(subspace)}: pass 0.95, say."
        )
    if multiplicity is not None and subspace is not None:
        raise ValueError(
            "`subspace` must be None when `multiplicity` is given, got both: the multiplicities "
            "say how many directions there are."
        )
