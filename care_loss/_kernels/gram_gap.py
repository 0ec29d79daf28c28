"""The squared difference of the Gram matrices of two views within chunks, with its gradient.

With the unit rows U and V of a chunk `(n, D)` and Δ = U Uᵀ - V Vᵀ without its diagonal, the loss is
Σ Δ², and its gradients with respect to U and V are 4 Δ U and -4 Δ V.

The direct form computes Δ. For long chunks, the sum over all entries and the products come from
C = [U, V]ᵀ [U, V], `(2D, 2D)`: with C' = C but for the signs of its off-diagonal blocks, which are
turned, the sum is that of C C' (entry by entry), and [Δ U, -Δ V] = [U, V] C'. Both cancel where
the views are close, and are computed in float64. The diagonal is subtracted: it is not 0 where one
of two rows is.
"""

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
        z = torch.stack((z1, z2))
        if order is not None:
            z = z.index_select(-2, order)
        u, length = unit_rows(z.to(computed_in(z)))
        losses, gradients = [], []
        chunks = sum(k for k, _ in runs)
        shares = max(chunks * z1.shape[:-2].numel(), 1) if mean else 1
        pieces = u.split([k * n for k, n in runs], -2)
        for piece, (k, n), weight in zip(pieces, runs, weights, strict=True):
            gap, gradient = _compare(piece.unflatten(-2, (k, n)), derive)
            losses.append(gap.mul_(weight).view(*z1.shape[:-2], k))
            if gradient is not None:
                gradients.append(gradient.mul_(4 * weight / shares).view(piece.shape))
        if derive:
            by_row = _joined(gradients, -2)
            by_row, _ = gradient_of_rows(by_row, u, length)
            ctx.save_for_backward(z1, z2, order, by_row)
            ctx.runs, ctx.plain = runs, plain
        loss = _joined(losses, -1)
        return (loss.mean() if mean else loss).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z1, z2, order, by_row = ctx.saved_tensors
        others = (None,) * 6
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[:2]
            return *plain_gradients(ctx.plain, (z1, z2), needed, gradient), None, *others
        if gradient.ndim:  # one for each chunk: repeat it for the rows
            parts = gradient.split([k for k, _ in ctx.runs], -1)
            rows = zip(parts, ctx.runs, strict=True)
            gradient = torch.cat([g.repeat_interleave(n, -1) for g, (_, n) in rows], -1)
            gradient = gradient.unsqueeze(-1)
        found = (by_row * gradient).to(z1.dtype)
        if order is not None:
            found = found.new_zeros(2, *z1.shape).index_copy_(-2, order, found)
        return *found.unbind(), None, *others


def _compare(u: Tensor, derive: bool) -> tuple[Tensor, Tensor | None]:
    """Return Σ Δ² and [Δ U, -Δ V] for the chunks of both views, `(2, *, k, n, D)`."""
    n, d = u.shape[-2:]
    x = u.flatten(0, -3)
    with without_autocast(u):
        if is_long(n, d) and x.dtype != torch.float64:
            return _compare_by_columns(exact(x), derive)
        return _compare_directly(exact(x) if products_are_rounded() else x, derive)


def _compare_directly(x: Tensor, derive: bool) -> tuple[Tensor, Tensor | None]:
    gram = torch.bmm(x, x.mT)
    difference, negated = gram.chunk(2)
    difference.sub_(negated)  # exactly 0 for equal views
    difference.diagonal(0, -2, -1).zero_()
    gap = exact(difference.square().sum(-1)).sum(-1)
    if not derive:
        return gap, None
    torch.neg(difference, out=negated)
    return gap, torch.bmm(gram, x)


def _compare_by_columns(x: Tensor, derive: bool) -> tuple[Tensor, Tensor | None]:
    """Do the same where chunks have many more rows than dimensions."""
    d = x.shape[-1]
    u, v = x.chunk(2)
    both = torch.cat((u, v), -1)
    products = torch.bmm(both.mT, both)
    turned = products.clone()
    turned[..., :d, d:].neg_()
    turned[..., d:, :d].neg_()
    excess = u.square().sum(-1) - v.square().sum(-1)
    gap = (products * turned).sum((-2, -1)) - excess.square().sum(-1)
    gap.clamp_min_(0)  # it is not below 0 but for rounding
    if not derive:
        return gap, None
    first, second = torch.bmm(both, turned).split(d, -1)
    excess = excess.unsqueeze(-1)
    return gap, torch.cat((first - excess * u, second + excess * v))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
