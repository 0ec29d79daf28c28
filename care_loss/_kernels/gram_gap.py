"""The squared difference of the Gram matrices of two views within chunks, with its gradient.

With the unit rows U and V of a chunk `(n, D)` and Δ = U Uᵀ - V Vᵀ without its diagonal, the loss is
Σ Δ², and its gradients with respect to U and V are 4 Δ U and -4 Δ V.

The direct form computes Δ. For long chunks, the sum over all entries and the products come from
C = [U, V]ᵀ [U, V], `(2D, 2D)`. With C' for C with its off-diagonal blocks negated, the sum is that
of the entries of C times those of C', and [Δ U, -Δ V] = [U, V] C'. The sum and the products lose
digits where the views are close, and are computed in float64. The diagonal of Δ is subtracted: it
is not 0 where one of two rows is.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from care_loss._kernels.paths import (
    Plain,
    is_long,
    need_gradient,
    plain_gradients,
    products_are_rounded,
)
from care_loss._kernels.unit_rows import gradient_of_rows, unit_rows
from care_loss._numerics import computed_in, exact, without_autocast

Runs = list[tuple[int, int]]


def gram_gap(
    z1: Tensor,
    z2: Tensor,
    order: Tensor | None,
    runs: Runs,
    weights: list[float],
    *,
    mean: bool,
    plain: Plain,
) -> Tensor:
    """Return the mean loss `()`, or the loss of each chunk `(*, chunks)`.

    The rows are taken in the given order, or as they are, and cut into runs of k chunks of n rows;
    `weights` has what a pair of rows weighs in each run. `plain` is the plain composition of the
    same, a function of the two views.
    """
    derive = need_gradient(z1, z2)
    loss: Tensor = _GramGap.apply(  # type: ignore[no-untyped-call]
        z1, z2, order, runs, weights, mean, plain, derive
    )
    return loss


class _GramGap(Function):
    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        order: Tensor | None,
        runs: Runs,
        weights: list[float],
        mean: bool,
        plain: Plain,
        derive: bool,
    ) -> Tensor:
        with without_autocast(z1):  # which fails to join float16 on a CPU
            z = torch.stack((z1, z2))
        if order is not None:
            z = z.index_select(-2, order)
        u, length = unit_rows(z.to(computed_in(z)))
        chunks, leading = sum(k for k, _ in runs), z1.shape[:-2]
        shares = (chunks * leading.numel() or math.nan) if mean else 1
        gaps, gradients = [], []
        for rows, lengths, (k, n), weight in zip(
            _cut(u, runs), _cut(length, runs), runs, weights, strict=True
        ):
            share = weight / shares
            gap, gradient = _compare(rows, lengths, 4 * share if derive else None)
            gaps.append((gap.sum() if mean else gap.sum(-1).view(*leading, k)) * share)
            if gradient is not None:
                gradients.append(gradient.view(2, *leading, k * n, u.shape[-1]))
        if derive:
            ctx.save_for_backward(z1, z2, order, _joined(gradients, -2))
            ctx.runs, ctx.plain = runs, plain
        loss = sum(gaps[1:], gaps[0]) if mean else _joined(gaps, -1)
        return loss.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z1, z2, order, by_row = ctx.saved_tensors
        others = (None,) * 6  # of the other arguments
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[:2]
            return *plain_gradients(ctx.plain, (z1, z2), needed, gradient), *others
        if gradient.ndim:  # one for each chunk: repeat it for the rows
            parts = gradient.split([k for k, _ in ctx.runs], -1)
            rows = zip(parts, ctx.runs, strict=True)
            gradient = torch.cat([g.repeat_interleave(n, -1) for g, (_, n) in rows], -1)
            gradient = gradient.unsqueeze(-1)
        found = (by_row * gradient).to(z1.dtype)
        if order is not None:
            found = found.new_zeros(2, *z1.shape).index_copy_(-2, order, found)
        return *found.unbind(), *others


def _cut(x: Tensor, runs: Runs) -> Iterator[Tensor]:
    """Yield the chunks of each run of rows `(*, N, D)` in turn, as `(chunks, n, D)`."""
    pieces = x.split([k * n for k, n in runs], -2) if len(runs) > 1 else (x,)
    for piece, (k, n) in zip(pieces, runs, strict=True):
        yield piece.reshape(piece.shape[:-2].numel() * k, n, piece.shape[-1])


def _compare(x: Tensor, length: Tensor, factor: float | None) -> tuple[Tensor, Tensor | None]:
    """Compare chunks of unit rows `(2k, n, D)`, those of the second view after those of the first.

    Returns parts of the sum Σ Δ² of each chunk, `(k, *)`, and `factor` times the gradient of a
    quarter of it, with respect to the rows before they were divided by `length`.
    """
    n, d = x.shape[-2:]
    with without_autocast(x):
        if is_long(n, d) and x.dtype != torch.float64:
            return _compare_by_columns(x, length, factor)
        if not products_are_rounded():
            return _compare_directly(x, length, factor)
        gap, gradient = _compare_directly(exact(x), length, factor)
        return gap, None if gradient is None else gradient.to(x.dtype)


def _compare_directly(
    x: Tensor, length: Tensor, factor: float | None
) -> tuple[Tensor, Tensor | None]:
    gram = torch.bmm(x, x.mT)
    first, second = gram.chunk(2)
    torch.sub(second, first, out=first)  # -Δ, and exactly 0 for equal views
    first.diagonal(0, -2, -1).zero_()
    gap = first.square().sum(-1)
    if factor is None:
        return gap, None
    # The gradient of a unit row has no part along the row. That of u_i in Σ_j Δ_ij u_j, which is
    # Σ_j Δ_ij u_i·u_j, is subtracted with the diagonal of Δ, which is free for it.
    along = second.mul_(first).sum(-1)
    torch.neg(first, out=second)
    torch.sub(gap, along, out=first.diagonal(0, -2, -1))
    second.diagonal(0, -2, -1).copy_(along)
    return gap, torch.bmm(gram.div_(length / -factor), x)


def _compare_by_columns(
    x: Tensor, length: Tensor, factor: float | None
) -> tuple[Tensor, Tensor | None]:
    """Do the same in float64, where chunks have many more rows than dimensions."""
    k, n, d = len(x) // 2, *x.shape[1:]
    both = x.new_empty(k, n, 2, d, dtype=exact(x[:0]).dtype)
    both.copy_(x.view(2, k, n, d).movedim(0, 2))
    squared = torch.linalg.vector_norm(both, dim=-1).square()
    both = both.view(k, n, 2 * d)
    products = torch.bmm(both.mT, both)
    turned = products.clone()
    turned[:, :d, d:].neg_()
    turned[:, d:, :d].neg_()
    own = (squared[..., 0] - squared[..., 1]).square().sum(-1)
    gap = products.mul_(turned).sum((-2, -1)).sub_(own).unsqueeze(-1)
    gap.clamp_min_(0)  # it is not below 0 but for rounding
    if factor is None:
        return gap, None
    # The diagonal of Δ pulls each row along itself only: it need not be left out.
    gradient = torch.empty_like(x)
    found = torch.bmm(both, turned.mul_(factor)).view(k, n, 2, d)
    gradient.view(2, k, n, d).copy_(found.movedim(2, 0))
    return gap, gradient_of_rows(gradient, x, length)[0]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
