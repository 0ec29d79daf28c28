"""InfoNCE over the rows of two views, with its gradient.

With unit rows u, s_ij = u_i · u_j / τ and the positive p(i) of row i, each anchor has these:

    a_i = log Σ_{j ≠ i, p(i)} exp(s_ij)    `negative`: the log of the sum over its negatives
    ℓ_i = softplus(a_i - s_ip)             `losses`
    t_i = s_ip + ℓ_i                       `total`: the log of the sum over all of its row
    q_i = sigmoid(a_i - s_ip)              `mass`: the part of the negatives in that sum

The gradient of Σ g_i ℓ_i with respect to u is W u / τ. W is symmetric and 0 on the diagonal, and

    W_ij = g_i exp(s_ij - t_i) + g_j exp(s_ij - t_j)        for j ≠ i, p(i)
    W_ip = -g_i q_i - g_p q_p

The dense form keeps one matrix and finds the gradient in the forward. The tiled form keeps none: it
visits the tiles on and above the diagonal, in the forward for the sums and again in the backward,
and each tile serves both its rows and its columns. If the rows belong to several processes, each
compares its own with all others in the same way (:func:`losses_among`, :func:`gradient_among`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from care_loss._autograd.paths import (
    Input,
    Plain,
    cut,
    is_batch_of_gradients,
    is_dense,
    need_gradient,
    plain_gradients,
    tile,
    tiles_of_triangle,
)
from care_loss._autograd.unit_rows import gradient_of_rows, unit_rows
from care_loss._numerics import computed_in, exact, without_autocast

MAX_SCORE = 64  # exponentials of scores, and their sums, need no shift up to there: exp(64) = 6e27


def info_nce(z1: Tensor, z2: Tensor, temperature: Input, *, mean: bool, plain: Plain) -> Tensor:
    """Return the mean loss `()`, or the loss of each anchor `(*, 2, N)`.

    `plain` is the plain composition of the same, a function of the three inputs.
    """
    derive = need_gradient(z1, z2, temperature)
    inputs = (z1, z2, temperature, plain, derive)
    if mean and is_dense(2 * z1.shape[-2], z1.device):
        loss: Tensor = _Dense.apply(*inputs)  # type: ignore[no-untyped-call]
        return loss
    losses: Tensor = _Tiled.apply(*inputs)  # type: ignore[no-untyped-call]
    return losses.mean() if mean else losses


class _Dense(Function):
    """The mean loss."""

    @staticmethod
    def forward(
        ctx: Any, z1: Tensor, z2: Tensor, temperature: Input, plain: Plain, derive: bool
    ) -> Tensor:
        loss, *gradients = dense(z1, z2, temperature, derive)
        if derive:
            save(ctx, z1, z2, temperature, plain, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, by_row, along = ctx.saved_tensors  # once: checkpoints allow no more
        if torch.is_grad_enabled():
            return *second_derivatives(ctx, inputs, gradient), None, None
        return *gradients_of_inputs(ctx, inputs, by_row * gradient, along * gradient), None, None


class _Tiled(Function):
    """The loss of each anchor."""

    @staticmethod
    def forward(
        ctx: Any, z1: Tensor, z2: Tensor, temperature: Input, plain: Plain, derive: bool
    ) -> Tensor:
        losses, *results = tiled(z1, z2, temperature)
        if derive:
            save(ctx, z1, z2, temperature, plain, *results)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, u, length, total, mass = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batch_of_gradients(gradient):
            return *second_derivatives(ctx, inputs, gradient), None, None
        temperature = temperature_of(ctx, inputs)
        rows = gradient_of_tiled(u, length, total, mass, temperature, gradient)
        return *gradients_of_inputs(ctx, inputs, *rows), None, None


def dense(
    z1: Tensor, z2: Tensor, temperature: Input, derive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss `()`, its gradient, and the inner products of that and unit rows.

    The gradient is that of the rows of both views, `(*, 2N, D)`. Without `derive`, both are empty.
    """
    n = z1.shape[-2]
    u, length = _unit_rows(z1, z2)
    with without_autocast(u):
        scaled = u / temperature
        positive = _positive(scaled, u, n)
        scores = scaled @ u.mT
        # The entries (i, i) and (i, p(i)) of all rows, which are no negatives.
        excluded = scores.unflatten(-2, (2, n)).unflatten(-1, (2, n)).diagonal(0, -3, -1)
        if is_bounded(temperature):
            exp_scores = scores.exp_()
            excluded.zero_()
            negative = exp_scores.sum(-1).log()
        else:
            excluded.fill_(-torch.inf)
            negative = scores.logsumexp(-1)
        losses, total, mass = losses_of(positive, negative.unflatten(-1, (2, n)))
        if not derive:
            return losses.mean(), losses.new_empty(0), losses.new_empty(0)
        total = total.flatten(-2)
        # W_ij with g_i = 1; the excluded entries are 0.
        if is_bounded(temperature):
            exp_minus_t = torch.exp(-total)
            weights = exp_scores.mul_(exp_minus_t.unsqueeze(-1) + exp_minus_t.unsqueeze(-2))
        else:
            exp_s_minus_t = scores.sub_(total.unsqueeze(-1)).exp_()
            weights = exp_s_minus_t + exp_s_minus_t.mT
        gradient = weights @ u
        _add_positives(gradient, u, mass.sum(-2))
        gradient.div_(temperature).div_(max(losses.numel(), 1))
        return losses.mean(), *gradient_of_rows(gradient, u, length)


def tiled(
    z1: Tensor, z2: Tensor, temperature: Input
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss of each anchor `(*, 2, N)`, and what its gradient needs.

    These are the unit rows of both views and their lengths, and t_i and q_i of each anchor.
    """
    n = z1.shape[-2]
    u, length = _unit_rows(z1, z2)
    with without_autocast(u):
        positive = _positive(u / temperature, u, n)
        negative = u.new_empty(u.shape[:-1], dtype=exact(u[:0]).dtype)
        for rows, sums in zip(_batches(u), negative.view(-1, 2 * n), strict=True):
            _log_sums(rows, temperature, out=sums)
    losses, total, mass = losses_of(positive, negative.unflatten(-1, (2, n)))
    return losses.to(u.dtype), u, length, total, mass


def gradient_of_tiled(
    u: Tensor, length: Tensor, total: Tensor, mass: Tensor, temperature: Input, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the rows of both views, from that of the losses `(*, 2, N)`.

    And the inner products of that and unit rows.
    """
    n = total.shape[-1]
    gradient, scale = _without_scale(gradient)
    by_row = torch.zeros_like(u)
    with without_autocast(u):
        for rows, t, g, out in zip(
            _batches(u),
            total.view(-1, 2 * n),
            gradient.reshape(-1, 2 * n),
            _batches(by_row),
            strict=True,
        ):
            _weighted_sums(rows, temperature, t, g, out=out)
    _add_positives(by_row, u, (gradient * mass).sum(-2).to(u.dtype))
    by_row.div_(temperature).mul_(scale)
    return gradient_of_rows(by_row, u, length)


def losses_among(u: Tensor, own: slice, temperature: Input) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the log of the sum over all and the mass of the negatives, `(2, N)` each.

    The anchors are the `2N` rows `own` of the unit rows `(M, D)`, both views of N samples. All
    other rows are negatives of each of them.
    """
    anchors = u[own]
    n = len(anchors) // 2
    with without_autocast(u):
        positive = _positive(anchors / temperature, anchors, n)
        negative = u.new_empty(2 * n, dtype=exact(u[:0]).dtype)
        _log_sums(anchors, temperature, out=negative)
        for scores, rows, _ in _rectangles(u, own, temperature):
            sums = scores.exp_().sum(-1).log_() if is_bounded(temperature) else scores.logsumexp(-1)
            part = negative[rows.start - own.start : rows.stop - own.start]
            torch.logaddexp(part, sums.to(part.dtype), out=part)
    return losses_of(positive, negative.view(2, n))


def gradient_among(
    u: Tensor, own: slice, temperature: Input, total: Tensor, mass: Tensor, gradient: Tensor
) -> Tensor:
    """Return the gradient of the sum of all losses, weighted by `gradient` `(M,)`, for some rows.

    These are the unit rows `own` of `(M, D)`, for which `mass` is that of :func:`losses_among`.
    `total` `(M,)` are the logs of the sums of all rows.
    """
    gradient, scale = _without_scale(gradient)
    anchors = u[own]
    out = torch.zeros_like(anchors)
    with without_autocast(u):
        _weighted_sums(anchors, temperature, total[own], gradient[own], out=out)
        weigh = _weights(temperature, total, gradient, u.dtype)
        for scores, rows, columns in _rectangles(u, own, temperature):
            part = out[rows.start - own.start : rows.stop - own.start]
            part.addmm_(weigh(scores, rows, columns), u[columns])
    _add_positives(out, anchors, (gradient[own].view(2, -1) * mass).sum(-2).to(u.dtype))
    return out.div_(temperature).mul_(scale)


def _unit_rows(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    with without_autocast(z1):  # which fails to join float16 on a CPU
        z = torch.cat((z1, z2), -2)
    # cat keeps the memory format of images, say.
    return unit_rows(z.to(computed_in(z1)).contiguous())


def _batches(u: Tensor) -> Tensor:
    return u.view(-1, *u.shape[-2:])


def is_bounded(temperature: Input) -> bool:
    """Whether exponentials of scores and their sums need no shift."""
    return not isinstance(temperature, Tensor) and temperature >= 1 / MAX_SCORE


def _without_scale(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Divide gradients `(*, 2, N)` or `(M,)` by their largest, and return that too.

    A small gradient times exp(-t) could underflow before it meets exp(s).
    """
    dims = tuple(range(-min(gradient.ndim, 2), 0))
    scale = gradient.abs().amax(dims, keepdim=True)
    scale.masked_fill_(scale == 0, 1)
    return gradient / scale, scale


def _positive(scaled: Tensor, u: Tensor, n: int) -> Tensor:
    """Return the scores of positives, `(*, 1, N)`. They carry most weight: a sum rounds less."""
    return (scaled[..., :n, :] * u[..., n:, :]).sum(-1).unsqueeze(-2)


def losses_of(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the log of the sum over all and the mass of the negatives, `(*, 2, N)`."""
    excess = negative - positive
    losses = F.softplus(excess, threshold=60)  # beyond it, log1p adds e^-60 or less
    return losses, positive + losses, torch.sigmoid(excess)


def _add_positives(gradient: Tensor, u: Tensor, mass: Tensor) -> None:
    """Add the entries W_ip, times u, where W u was formed without them; `mass` `(*, N)` is -W_ip.

    They are as large as all others together. Within the sums of products, they would make the
    partial sums large, and these round more.
    """
    pairs = (2, mass.shape[-1])
    other = u.unflatten(-2, pairs).flip(-3)
    mass = mass.unsqueeze(-2).unsqueeze(-1)
    gradient.unflatten(-2, pairs).addcmul_(mass, other, value=-1)


def save(
    ctx: Any, z1: Tensor, z2: Tensor, temperature: Input, plain: Plain, *results: Tensor
) -> None:
    """Keep the arguments of a loss for its backward, and results of the forward."""
    is_tensor = isinstance(temperature, Tensor)
    ctx.temperature, ctx.plain = None if is_tensor else temperature, plain
    ctx.save_for_backward(z1, z2, temperature if is_tensor else None, *results)


def temperature_of(ctx: Any, inputs: Sequence[Tensor | None]) -> Input:
    """Return the temperature, from what :func:`save` has kept."""
    temperature: Input = ctx.temperature if inputs[2] is None else inputs[2]
    return temperature


def gradients_of_inputs(
    ctx: Any, inputs: Sequence[Tensor], by_row: Tensor, along: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the two views and the temperature, from that of the rows of both.

    The loss depends on u_i · u_j / τ only: the gradient of τ follows from those of the rows.
    """
    z1, _, temperature = inputs
    first, second = by_row.to(z1.dtype).chunk(2, -2)
    if not ctx.needs_input_grad[2]:
        return first, second, None
    return first, second, (along.sum() / (-2 * temperature)).to(temperature)


def second_derivatives(ctx: Any, inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor | None]:
    """Return gradients of the two views and the temperature that have derivatives themselves."""
    arguments = (*inputs[:2], temperature_of(ctx, inputs))
    needed = ctx.needs_input_grad[:3]
    return plain_gradients(ctx.plain, arguments, needed, gradient)


class _Tile(NamedTuple):
    """Scores of some rows and columns; all of one loop share a buffer.

    On and above the diagonal, a tile also serves the anchors of its columns, except for its first
    `below` columns: the pairs there are, or mirror, pairs of rows of this tile.
    """

    scores: Tensor
    rows: slice
    columns: slice
    below: int


def _tiles(u: Tensor, temperature: Input) -> Iterator[_Tile]:
    """Yield the tiles on and above the diagonal of the scores of rows `(M, D)`."""
    scaled = u / temperature
    height, width = (min(size, len(u)) for size in tile(u.device))
    buffer = u.new_empty(height * width)
    for rows, columns, below in tiles_of_triangle(len(u), height, width):
        shape = rows.stop - rows.start, columns.stop - columns.start
        scores = buffer[: shape[0] * shape[1]].view(shape)
        torch.mm(scaled[rows], u[columns].mT, out=scores)
        yield _Tile(scores, rows, columns, below)


def _fill(scores: Tensor, rows: slice, columns: slice, n: int, value: float) -> None:
    """Fill the entries (i, i) and (i, p(i)) of a tile."""
    for offset in (0, n, -n):
        scores.diagonal(offset + rows.start - columns.start).fill_(value)  # it may be empty


def _log_sums(u: Tensor, temperature: Input, *, out: Tensor) -> None:
    """Sum the exponentials of the scores of each row over its negatives, `(M, D)` -> `(M,)`."""
    bounded, n = is_bounded(temperature), len(u) // 2
    nothing = 0 if bounded else -torch.inf
    out.fill_(nothing)
    for scores, rows, columns, below in _tiles(u, temperature):
        if bounded:
            scores.exp_()
        _fill(scores, rows, columns, n, nothing)
        for part, dim, where in (
            (scores, -1, rows),
            (scores[:, below:], -2, slice(columns.start + below, columns.stop)),
        ):
            if bounded:
                out[where] += part.sum(dim)
            elif part.numel():
                out[where] = torch.logaddexp(out[where], part.logsumexp(dim).to(out.dtype))
    if bounded:
        out.log_()


def _weighted_sums(
    u: Tensor, temperature: Input, total: Tensor, gradient: Tensor, *, out: Tensor
) -> None:
    """Add W u, without the positives, for rows `(M, D)` whose anchors weigh `gradient` `(M,)`."""
    n, weigh = len(u) // 2, _weights(temperature, total, gradient, u.dtype)
    by_column = out.new_zeros(out.mT.shape)
    for scores, rows, columns, below in _tiles(u, temperature):
        weights = weigh(scores, rows, columns)
        _fill(weights, rows, columns, n, 0)
        out[rows].addmm_(weights, u[columns])
        right = slice(columns.start + below, columns.stop)
        by_column[:, right].addmm_(u[rows].mT, weights[:, below:])
    out.add_(by_column.mT)


def _weights(
    temperature: Input, total: Tensor, gradient: Tensor, dtype: torch.dtype
) -> Callable[[Tensor, slice, slice], Tensor]:
    """Return what turns the scores of some rows and columns into W_ij, in place."""
    g_exp_minus_t, total = (gradient * torch.exp(-total)).to(dtype), total.to(dtype)

    def by_one_exponential(scores: Tensor, rows: slice, columns: slice) -> Tensor:
        """Scores are small enough for one exponential per pair."""
        return scores.exp_().mul_(g_exp_minus_t[rows, None] + g_exp_minus_t[columns])

    def by_two_exponentials(scores: Tensor, rows: slice, columns: slice) -> Tensor:
        """Scores of any size need two, one for each anchor."""
        by_row = (scores - total[rows, None]).exp_().mul_(gradient[rows, None])
        return scores.sub_(total[columns]).exp_().mul_(gradient[columns]).add_(by_row)

    return by_one_exponential if is_bounded(temperature) else by_two_exponentials


def _rectangles(u: Tensor, own: slice, temperature: Input) -> Iterator[tuple[Tensor, slice, slice]]:
    """Yield the scores of the rows `own` with all others, in one buffer, with rows and columns."""
    height, width = tile(u.device)
    buffer = u.new_empty(height * width)
    for rows in cut(own.start, own.stop, height):
        scaled = u[rows] / temperature
        for columns in (*cut(0, own.start, width), *cut(own.stop, len(u), width)):
            shape = len(scaled), columns.stop - columns.start
            scores = buffer[: shape[0] * shape[1]].view(shape)
            yield torch.mm(scaled, u[columns].mT, out=scores), rows, columns
