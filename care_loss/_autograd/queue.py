"""InfoNCE with a queue of negatives, with its gradient.

With unit rows u_i of the anchors, v_i of their positives and x_k of the queue, each anchor has

    a_i = log Σ_k exp(u_i · x_k / τ)       `negative`
    ℓ_i = softplus(a_i - u_i · v_i / τ)    the loss
    q_i = sigmoid(a_i - u_i · v_i / τ)     `mass`: the part of the negatives in the sum of the row
    m_i = Σ_k exp(u_i · x_k / τ - a_i) x_k `mean`: the mean of the queue, as the anchor weighs it

    ∂ℓ_i/∂u_i = q_i (m_i - v_i) / τ        ∂ℓ_i/∂v_i = -q_i u_i / τ

One pass over tiles of the queue adds up the exponentials and their products with the queue, and no
matrix of all scores is kept. Where exponentials could overflow, both are relative to the largest
score so far.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from care_loss._autograd.info_nce import (
    gradients_of_inputs,
    is_bounded,
    losses_of,
    save,
    second_derivatives,
)
from care_loss._autograd.paths import Input, Plain, cut, need_gradient, tile
from care_loss._autograd.unit_rows import gradient_of_rows, unit_rows
from care_loss._numerics import computed_in, exact, without_autocast


def info_nce_of_queue(
    z1: Tensor, z2: Tensor, temperature: Input, negatives: Tensor, plain: Plain
) -> Tensor:
    """Return the loss of each anchor, `(*, N)`.

    `plain` is the plain composition of the same, a function of the first three inputs. There is no
    gradient with respect to the queue.
    """
    derive = need_gradient(z1, z2, temperature)
    losses: Tensor = _OfQueue.apply(  # type: ignore[no-untyped-call]
        z1, z2, temperature, negatives, plain, derive
    )
    return losses


class _OfQueue(Function):
    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        temperature: Input,
        negatives: Tensor,
        plain: Plain,
        derive: bool,
    ) -> Tensor:
        losses, *gradients = of_queue(z1, z2, temperature, negatives, derive)
        if derive:
            save(ctx, z1, z2, temperature, plain, *gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, by_row, along = ctx.saved_tensors
        nothing = None, None, None
        if torch.is_grad_enabled():
            return *second_derivatives(ctx, inputs, gradient), *nothing
        return *gradients_of_rows(ctx, inputs, by_row, along, gradient), *nothing


def gradients_of_rows(
    ctx: Any, inputs: Sequence[Tensor], by_row: Tensor, along: Tensor, gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs, from that of the losses `(*, N)`."""
    rows = by_row * torch.cat((gradient, gradient), -1).unsqueeze(-1)
    # All scores are products with u_i: the gradient of τ follows from that of the anchors alone.
    return gradients_of_inputs(ctx, inputs, rows, 2 * along * gradient)


def of_queue(
    z1: Tensor, z2: Tensor, temperature: Input, negatives: Tensor, derive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each anchor `(*, N)`, its gradient, and products of that and unit rows.

    The gradient is that of loss i with respect to row i of both views, `(*, 2N, D)`; the products
    of u_i and the gradient with respect to u_i are `(*, N)`. Without `derive`, both are empty.
    """
    dtype = computed_in(z1)
    (u, u_length), (v, v_length) = (unit_rows(z.to(dtype, copy=True)) for z in (z1, z2))
    with without_autocast(u):
        scaled = u / temperature
        positive = (scaled * v).sum(-1)
        flat = scaled.reshape(-1, u.shape[-1])
        negative, mean = _weighed_sums(flat, negatives, is_bounded(temperature), derive)
    losses, _, mass = losses_of(positive, negative.view_as(positive))
    losses = losses.to(dtype)
    if not derive:
        return losses, losses.new_empty(0), losses.new_empty(0)
    mass = (mass / temperature).to(dtype).unsqueeze(-1)
    by_u, along = gradient_of_rows((mean.view_as(u) - v).mul_(mass), u, u_length)
    by_v, _ = gradient_of_rows(mass.neg() * u, v, v_length)
    return losses, torch.cat((by_u, by_v), -2), along.squeeze(-1)


def _weighed_sums(
    scaled: Tensor, negatives: Tensor, bounded: bool, derive: bool
) -> tuple[Tensor, Tensor]:
    """Return a_i `(M,)` and m_i `(M, D)` of scaled anchors `(M, D)`; without `derive`, m_i is 0."""
    m, (height, width) = len(scaled), tile(scaled.device)
    sums = scaled.new_zeros(m, dtype=exact(scaled[:0]).dtype)
    mean = torch.zeros_like(scaled)
    largest = scaled.new_full((m,), 0 if bounded else -torch.inf)
    buffer = scaled.new_empty(min(height, m) * min(width, len(negatives)))
    for some in cut(0, len(negatives), width):
        wider = torch.promote_types(negatives.dtype, scaled.dtype)
        x = unit_rows(negatives[some].to(wider, copy=True))[0].to(scaled.dtype)
        for rows in cut(0, m, height):
            shape = rows.stop - rows.start, len(x)
            scores = torch.mm(scaled[rows], x.mT, out=buffer[: shape[0] * shape[1]].view(shape))
            if not bounded:
                higher = torch.maximum(largest[rows], scores.amax(-1))
                shrink = torch.exp(largest[rows] - higher)
                largest[rows] = higher
                sums[rows] *= shrink
                mean[rows] *= shrink.unsqueeze(-1)
                scores.sub_(higher.unsqueeze(-1))
            sums[rows] += scores.exp_().sum(-1)
            if derive:
                mean[rows].addmm_(scores, x)
    mean.div_(sums.unsqueeze(-1).to(mean.dtype))
    return largest + sums.log_(), mean
