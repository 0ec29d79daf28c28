"""The squared difference of the Gram matrices of two views within chunks, with its gradient.

With the unit rows U and V of a chunk `(n, D)` and Δ = U Uᵀ - V Vᵀ without its diagonal, the loss is
Σ Δ², and its gradients with respect to U and V are 4 Δ U and -4 Δ V.

The direct form computes Δ. For long chunks, the sum over all entries and the products come from
C = [A, B]ᵀ [A, B], `(2D, 2D)`, of the rows A = U - 1 mᵀ and B = V - 1 m'ᵀ without their means. With
p = A m + |m|²/2, the same p' of V, and r = p - p', it is Δ = A Aᵀ - B Bᵀ + r 1ᵀ + 1 rᵀ, where the
columns of A and B sum to 0. With C' for C with its off-diagonal blocks negated, and q = n r + Σ r:

    Σ Δ² = Σ C ∘ C' + 2 n Σ r² + 2 (Σ r)²
    [Δ U, -Δ V] = [A, B] C' + 1 [rᵀ A, -rᵀ B] + q [m, -m']ᵀ

The sums lose digits where the views are close, and are computed in float64. The diagonal of Δ is
subtracted: it is not 0 where one of two rows is.

Where the rows of a chunk nearly coincide, as in a network at its start, the errors of their lengths
in float32 are larger than Δ. Then, and where values are not read, all is computed in float64 (on
Apple's GPUs, which have none, in float32).
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from care_loss._autograd.paths import (
    Plain,
    is_long,
    need_gradient,
    plain_gradients,
    products_are_rounded,
    reads_values,
    tile,
    tiles_of_triangle,
)
from care_loss._autograd.unit_rows import gradient_of_rows, unit_rows
from care_loss._chunks import chunk_of_rows
from care_loss._numerics import computed_in, exact, without_autocast

Stacks = list[tuple[int, int]]
Layout = tuple[Tensor | None, Stacks]
Size = TypeVar("Size", float, Tensor)
MAX_MEAN_COSINE = 0.6  # of the rows of a chunk, for float32


def gram_gap(
    z1: Tensor, z2: Tensor, layout: Layout, scale: str, *, mean: bool, plain: Plain
) -> Tensor:
    """Return the mean loss `()`, or the loss of each chunk `(*, chunks)`.

    `plain` is the plain composition of the same, a function of the two views.
    """
    return _with_gradient(z1, z2, partial(compare, layout=layout, scale=scale, mean=mean), plain)


def gram_gap_by_id(z1: Tensor, z2: Tensor, ids: Tensor, scale: str, *, plain: Plain) -> Tensor:
    """Return the mean loss `()` of the chunks that ids `(N,)` name, without reading them."""
    return _with_gradient(z1, z2, partial(compare_by_id, ids=ids, scale=scale), plain)


def pair_weight(n: Size, scale: str) -> Size:
    """Return what each of the pairs (i, j) and (j, i) weighs in a chunk of `n` rows."""
    mean = 1 / (n * (n - 1))
    return mean if scale == "mean" else 2 * (n - 1) * mean


def _with_gradient(
    z1: Tensor, z2: Tensor, compare: Callable[..., tuple[Tensor, Tensor]], plain: Plain
) -> Tensor:
    derive = need_gradient(z1, z2)
    loss: Tensor = _GramGap.apply(z1, z2, compare, plain, derive)  # type: ignore[no-untyped-call]
    return loss


class _GramGap(Function):
    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        compare: Callable[..., tuple[Tensor, Tensor]],
        plain: Plain,
        derive: bool,
    ) -> Tensor:
        loss, by_row = compare(z1, z2, derive=derive)
        if derive:
            ctx.save_for_backward(z1, z2, by_row)
            ctx.plain = plain
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z1, z2, by_row = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[:2]
            return *plain_gradients(ctx.plain, (z1, z2), needed, gradient), None, None, None
        return *gradients_of_views(by_row, gradient, z1), None, None, None


def gradients_of_views(by_row: Tensor, gradient: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of both views, from those of the loss `()` or of chunks `(*, chunks)`.

    `by_row` `(2, *, N, D)` has the gradient of the sum of the losses.
    """
    if gradient.ndim:
        chunk = chunk_of_rows(gradient.shape[-1], z.shape[-2], z.device)
        gradient = gradient.index_select(-1, chunk).unsqueeze(-1)
    return (by_row * gradient).to(z.dtype).unbind()


def compare(
    z1: Tensor, z2: Tensor, layout: Layout, scale: str, *, mean: bool, derive: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean loss `()` or that of each chunk `(*, chunks)`, and the gradient of its sum.

    The rows are taken in the order of the layout, or as they are, and cut into its stacks `(k, n)`,
    k chunks of n rows each. The gradient is `(2, *, N, D)`, or empty without `derive`.
    """
    order, stacks = layout
    if order is not None:
        order = order.to(z1.device, non_blocking=True)
    dtype = computed_in(z1)
    u, length = _unit_rows(z1, z2, order, dtype if reads_values(z1) else exact(z1[:0]).dtype)
    pieces = list(_cut(u, stacks))
    if u.dtype == torch.float32 and reads_values(z1) and any(map(_nearly_coincide, pieces)):
        u, length = _unit_rows(z1, z2, order, torch.float64)
        pieces = list(_cut(u, stacks))
    by_columns = dtype != torch.float64
    chunks, leading = sum(k for k, _ in stacks), z1.shape[:-2]
    averaged = (chunks * leading.numel() or math.nan) if mean else 1
    gaps, gradients = [], []
    for rows, lengths, (k, n) in zip(pieces, _cut(length, stacks), stacks, strict=True):
        weight = pair_weight(n, scale) / averaged
        factor = 4 * weight if derive else None
        gap, gradient = _compare(rows, lengths, factor, by_columns=by_columns)
        gaps.append((gap.sum() if mean else gap.sum(-1).view(*leading, k)) * weight)
        if gradient is not None:
            gradients.append(gradient.view(2, *leading, k * n, u.shape[-1]))
    loss = sum(gaps[1:], gaps[0]) if mean else _joined(gaps, -1)
    loss = loss.to(dtype)
    if not derive:
        return loss, loss.new_empty(0)
    by_row = _joined(gradients, -2).to(dtype)
    if order is not None:
        by_row = by_row.new_zeros(2, *z1.shape).index_copy_(-2, order, by_row)
    return loss, by_row


def compare_by_id(
    z1: Tensor, z2: Tensor, ids: Tensor, scale: str, *, derive: bool
) -> tuple[Tensor, Tensor]:
    """Do the same for the mean loss of chunks of the same id `(N,)`, without reading the ids.

    No tile of the matrix of all pairs of rows can be left out, but each serves its rows and its
    columns. With W_ij for what a pair weighs, 0 of two different chunks, a tile of Δ comes from
    one product of [U, V] and [U, -V]ᵀ, and [Δ U, -Δ V] from those of W ∘ Δ and [U, -V].
    """
    ids = ids.to(z1.device, non_blocking=True)
    in_order = ids.sort().values
    first, behind = (torch.searchsorted(in_order, ids, right=right) for right in (False, True))
    n = behind - first  # for each row, the size of its chunk
    leading, (rows, d) = z1.shape[:-2], z1.shape[-2:]
    alone = n < 2
    z1, z2 = (z.masked_fill(alone.unsqueeze(-1), 0) for z in (z1, z2))
    u, length = _unit_rows(z1, z2, None, exact(z1[:0]).dtype)
    # The clamp keeps rows without a partner finite; no pair carries their weight.
    sizes = n.to(u.dtype)
    chunks = (~alone / sizes).sum()  # 0 where no id occurs twice: the loss is NaN
    weight = pair_weight(sizes.clamp_min(2), scale) / (chunks * leading.numel())
    loss = u.new_full((), 0 if leading.numel() else math.nan)
    by_row = u.new_zeros(2, leading.numel(), rows, d)
    with without_autocast(u):
        for (a, b), out in zip(u.reshape(by_row.shape).unbind(1), by_row.unbind(1), strict=True):
            left, right = torch.cat((a, b), -1), torch.cat((a, -b), -1)
            gap, products = _compare_pairs(left, right, ids, weight, derive=derive)
            loss += gap
            out.copy_(products.view(rows, 2, d).movedim(1, 0))
    dtype = computed_in(z1)
    if not derive:
        return loss.to(dtype), loss.new_empty(0)
    by_row = by_row.mul_(4).view(2, *z1.shape)
    return loss.to(dtype), gradient_of_rows(by_row, u, length)[0].to(dtype)


def _compare_pairs(
    left: Tensor, right: Tensor, ids: Tensor, weight: Tensor, *, derive: bool
) -> tuple[Tensor, Tensor]:
    """Return Σ W ∘ Δ² and (W ∘ Δ) [U, -V] of [U, V] and [U, -V] `(N, 2D)`.

    W_ij is `weight` `(N,)` of either of two rows of the same id. Without `derive` there are no
    products: the second result is 0.
    """
    gap, products = left.new_zeros(()), torch.zeros_like(left)
    height, width = (min(size, len(left)) for size in tile(left.device))
    buffer = left.new_empty(height * width)
    for i, j, below in tiles_of_triangle(len(left), height, width):
        shape = i.stop - i.start, j.stop - j.start
        delta = torch.mm(left[i], right[j].mT, out=buffer[: shape[0] * shape[1]].view(shape))
        delta.masked_fill_(ids[i].unsqueeze(-1) != ids[j], 0)
        delta.diagonal(i.start - j.start).zero_()
        weighted = delta * weight[i].unsqueeze(-1)
        squares = delta.mul_(weighted).sum(0)
        gap += squares.sum() + squares[below:].sum()
        if derive:
            products[i].addmm_(weighted, right[j])
            mirrored = slice(j.start + below, j.stop)
            products[mirrored].addmm_(weighted[:, below:].mT, right[i])
    return gap, products


def _cut(x: Tensor, stacks: Stacks) -> Iterator[Tensor]:
    """Yield the chunks of each stack of rows `(*, N, D)` in turn, as `(chunks, n, D)`."""
    pieces = x.split([k * n for k, n in stacks], -2) if len(stacks) > 1 else (x,)
    for piece, (k, n) in zip(pieces, stacks, strict=True):
        yield piece.reshape(piece.shape[:-2].numel() * k, n, piece.shape[-1])


def _unit_rows(
    z1: Tensor, z2: Tensor, order: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with without_autocast(z1):  # which fails to join float16 on a CPU
        z = torch.stack((z1, z2))
    if order is not None:
        z = z.index_select(-2, order)
    return unit_rows(z.to(dtype))


def _nearly_coincide(u: Tensor) -> bool:
    """Whether the unit rows of any chunk `(*, n, D)` are so close that rounding counts beside Δ.

    An error of the lengths changes all products of a row alike, by parts of the cosines. Their mean
    over the pairs follows from the length of the mean of the rows.
    """
    n = u.shape[-2]
    if not u.numel():
        return False
    lengths = torch.linalg.vector_norm(u.mean(-2), dim=-1)
    try:
        longest: float = lengths.max().item()
        return longest > math.sqrt((1 + MAX_MEAN_COSINE * (n - 1)) / n)
    except RuntimeError:  # fake tensors have no values
        return True


def _compare(
    x: Tensor, length: Tensor, factor: float | None, *, by_columns: bool
) -> tuple[Tensor, Tensor | None]:
    """Compare chunks of unit rows `(2k, n, D)`, those of the second view after those of the first.

    Long chunks are compared by columns where `by_columns` permits it: float64 embeddings would lose
    digits.

    Returns parts of the sum Σ Δ² of each chunk, `(k, *)`, and `factor` times the gradient of a
    quarter of it, with respect to the rows before they were divided by `length`.
    """
    n, d = x.shape[-2:]
    with without_autocast(x):
        if is_long(n, d) and by_columns:
            return _compare_by_columns(x, length, factor)
        if x.dtype == torch.float64 or not products_are_rounded():
            return _compare_directly(x, length, factor)
        gap, gradient = _compare_directly(exact(x), length, factor)
        return gap, None if gradient is None else gradient.to(x.dtype)


def _compare_directly(
    x: Tensor, length: Tensor, factor: float | None
) -> tuple[Tensor, Tensor | None]:
    gram = torch.bmm(x, x.mT)
    gram1, gram2 = gram.chunk(2)
    minus_delta = torch.sub(gram2, gram1, out=gram1)  # exactly 0 for equal views
    minus_delta.diagonal(0, -2, -1).zero_()
    gap = minus_delta.square().sum(-1)  # Σ_j Δ_ij²
    if factor is None:
        return gap, None
    # The gradient of a unit row has no part along the row. These parts are subtracted with the
    # diagonal of Δ, which is free for them. With a_i = Σ_j Δ_ij u_i·u_j and b_i = Σ_j Δ_ij v_i·v_j,
    # where a_i - b_i = Σ_j Δ_ij², the gradients are
    #     (Δ - diag a) U   and   -(Δ - diag b) V
    # `gram` becomes the two matrices with the opposite signs, and is divided by -length / factor.
    minus_b = gram2.mul_(minus_delta).sum(-1)
    delta = torch.neg(minus_delta, out=gram2)
    torch.sub(gap, minus_b, out=minus_delta.diagonal(0, -2, -1))
    delta.diagonal(0, -2, -1).copy_(minus_b)
    return gap, torch.bmm(gram.div_(length / -factor), x)


def _compare_by_columns(
    x: Tensor, length: Tensor, factor: float | None
) -> tuple[Tensor, Tensor | None]:
    """Do the same in float64, where chunks have many more rows than dimensions."""
    k, n, d = len(x) // 2, *x.shape[1:]
    uv = x.new_empty(k, n, 2, d, dtype=exact(x[:0]).dtype)
    uv.copy_(x.view(2, k, n, d).movedim(0, 2))
    squares = torch.linalg.vector_norm(uv, dim=-1).square()
    diagonal = (squares[..., 0] - squares[..., 1]).square().sum(-1)  # Σ Δ_ii²
    m = uv.mean(1, keepdim=True)
    ab = uv.sub_(m).view(k, n, 2 * d)
    m_by_view = m.new_zeros(k, 2, d, 2)
    m_by_view.diagonal(0, 1, 3).copy_(m.squeeze(1).mT)
    p = torch.bmm(ab, m_by_view.view(k, 2 * d, 2)).add_(m.square().sum(-1), alpha=0.5)
    r = torch.sub(*p.unbind(-1))
    sum_r = r.sum(-1, keepdim=True)
    c = torch.bmm(ab.mT, ab)
    c_negated = c.clone()
    c_negated[:, :d, d:].neg_()
    c_negated[:, d:, :d].neg_()
    gap = c.mul_(c_negated).sum((-2, -1), keepdim=True).squeeze(-1)
    gap += 2 * n * r.square().sum(-1, keepdim=True) + 2 * sum_r.square() - diagonal.unsqueeze(-1)
    gap.clamp_min_(0)  # it is not below 0 but for rounding
    if factor is None:
        return gap, None
    # The diagonal of Δ pulls each row along itself only: it need not be left out. The two products
    # of a column and a row, 1 [rᵀ A, -rᵀ B] and q [m, -m']ᵀ, are one product.
    columns = torch.stack((torch.ones_like(r), n * r + sum_r), -1)
    rows = torch.cat((torch.bmm(r.unsqueeze(1), ab), m.view(k, 1, 2 * d)), 1)
    rows[..., d:].neg_()
    product = torch.bmm(ab, c_negated).baddbmm_(columns, rows, beta=factor, alpha=factor)
    gradient = torch.empty_like(x)
    gradient.view(2, k, n, d).copy_(product.view(k, n, 2, d).movedim(2, 0))
    return gap, gradient_of_rows(gradient, x, length)[0]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
