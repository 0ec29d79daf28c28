"""The losses as operators of torch.library, for `torch.compile`.

A compiler takes an operator as it is: the arithmetic is that of eager mode, whose buffers and tiles
it would not find by itself. Here are what it needs to know: shapes, and first derivatives.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from care_loss import _chunks
from care_loss._autograd import gram_gap, info_nce, queue
from care_loss._autograd.paths import Input, is_dense, need_gradient
from care_loss._checks import check_pairs
from care_loss._numerics import computed_in, exact

Three = tuple[Tensor, Tensor, Tensor]


def compiled_info_nce(
    z1: Tensor, z2: Tensor, temperature: Input, negatives: Tensor | None, *, mean: bool
) -> Tensor:
    """Return the mean loss `()`, or the loss of each anchor, `(*, 2, N)` or with a queue `(*, N)`.

    There is no gradient with respect to the queue.
    """
    is_tensor = isinstance(temperature, Tensor)
    inputs = z1, z2, temperature if is_tensor else None, 0.0 if is_tensor else temperature
    derive = need_gradient(z1, z2, temperature)
    if negatives is not None:
        losses: Tensor = _of_queue(*inputs, negatives, derive)[0]
    elif mean and is_dense(2 * z1.shape[-2], z1.device):
        return _dense(*inputs, derive)[0]  # type: ignore[no-any-return]
    else:
        losses = _tiled(*inputs)[0]
    return losses.mean() if mean else losses


def compiled_gram_gap(
    z1: Tensor, z2: Tensor, chunks: int | Tensor, scale: str, *, mean: bool
) -> Tensor:
    """Return the mean loss `()`, or the loss of each chunk `(*, chunks)`."""
    ids, count = (chunks, 0) if isinstance(chunks, Tensor) else (None, chunks)
    derive = need_gradient(z1, z2)
    return _gram_gap(z1, z2, ids, count, scale, mean, derive)[0]  # type: ignore[no-any-return]


def _number_or(temperature: Tensor | None, number: float) -> Input:
    return number if temperature is None else temperature


def _define(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Make an operator of a function on tensors, of what says its shapes, and of its derivative.

    `torch.library.custom_op` checks every call: a small loss would take a tenth more time.
    """
    qualified = f"care_loss::{name}"
    torch.library.define(qualified, torch.library.infer_schema(kernel, mutates_args=()))
    torch.library.impl(qualified, "CompositeExplicitAutograd", kernel)
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=save)
    return getattr(torch.ops.care_loss, name).default


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _copy(gradient: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    return gradient.clone()


def _like_gradient(gradient: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gradient)


# As the views are arguments, the backward of compiled code depends on them. Otherwise its
# derivative, which is an error then, would be taken for 0.
_once_differentiable = _define("once_differentiable", _copy, _like_gradient)


def _checked(gradient: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Return the gradient of a loss, whose own derivative shall be an error."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "second derivatives of the losses must be taken outside of torch.compile, got "
            "create_graph=True: call the loss uncompiled."
        )
    return _once_differentiable(gradient, z1, z2)  # type: ignore[no-any-return]


def _compute_dense(
    z1: Tensor, z2: Tensor, temperature: Tensor | None, number: float, derive: bool
) -> Three:
    return info_nce.dense(z1, z2, _number_or(temperature, number), derive)


def _like_dense(z1: Tensor, z2: Tensor, temperature: Any, number: float, derive: bool) -> Three:
    x = z1.new_empty(*z1.shape[:-2], 2 * z1.shape[-2], z1.shape[-1], dtype=computed_in(z1))
    nothing = x.new_empty(0), x.new_empty(0)
    return x.new_empty(()), *((x, x.new_empty(*x.shape[:-1], 1)) if derive else nothing)


def _dense_backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
    *inputs, by_row, along = ctx.saved_tensors
    gradient = _checked(gradient, *inputs[:2])
    rows = by_row * gradient, along * gradient
    return *info_nce.gradients_of_inputs(ctx, inputs, *rows), None, None


_dense = _define("info_nce_dense", _compute_dense, _like_dense, _save, _dense_backward)


def _compute_tiled(
    z1: Tensor, z2: Tensor, temperature: Tensor | None, number: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return info_nce.tiled(z1, z2, _number_or(temperature, number))


def _like_tiled(z1: Tensor, *_: Any) -> Any:
    *leading, n, d = z1.shape
    u = z1.new_empty(*leading, 2 * n, d, dtype=computed_in(z1))
    losses = u.new_empty(*leading, 2, n)
    total = torch.empty_like(losses, dtype=exact(u[:0]).dtype)
    return losses, u, u.new_empty(*leading, 2 * n, 1), total, torch.empty_like(total)


def _save_tiled(ctx: Any, inputs: Any, output: Any) -> None:
    _save(ctx, inputs, output)
    ctx.number = inputs[3]


def _tiled_backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
    *inputs, u, length, total, mass = ctx.saved_tensors
    gradient = _checked(gradient, *inputs[:2])
    rows = _gradient_of_tiled(u, length, total, mass, inputs[2], ctx.number, gradient)
    return *info_nce.gradients_of_inputs(ctx, inputs, *rows), None


_tiled = _define("info_nce_tiled", _compute_tiled, _like_tiled, _save_tiled, _tiled_backward)


def _compute_gradient_of_tiled(
    u: Tensor,
    length: Tensor,
    total: Tensor,
    mass: Tensor,
    temperature: Tensor | None,
    number: float,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    temperature_or_number = _number_or(temperature, number)
    return info_nce.gradient_of_tiled(u, length, total, mass, temperature_or_number, gradient)


def _like_rows(u: Tensor, length: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(length)


_gradient_of_tiled = _define("info_nce_tiled_backward", _compute_gradient_of_tiled, _like_rows)


def _compute_of_queue(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | None,
    number: float,
    negatives: Tensor,
    derive: bool,
) -> Three:
    return queue.of_queue(z1, z2, _number_or(temperature, number), negatives, derive)


def _like_of_queue(z1: Tensor, *settings: Any) -> Three:
    losses = z1.new_empty(z1.shape[:-1], dtype=computed_in(z1))
    derive = settings[-1]
    if not derive:
        return losses, losses.new_empty(0), losses.new_empty(0)
    rows = losses.new_empty(*z1.shape[:-2], 2 * z1.shape[-2], z1.shape[-1])
    return losses, rows, torch.empty_like(losses)


def _of_queue_backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
    *inputs, by_row, along = ctx.saved_tensors
    gradient = _checked(gradient, *inputs[:2])
    return *queue.gradients_of_rows(ctx, inputs, by_row, along, gradient), None, None, None


_of_queue = _define(
    "info_nce_of_queue", _compute_of_queue, _like_of_queue, _save, _of_queue_backward
)


def _compute_gram_gap(
    z1: Tensor,
    z2: Tensor,
    ids: Tensor | None,
    chunks: int,
    scale: str,
    mean: bool,
    derive: bool,
) -> tuple[Tensor, Tensor]:
    layout = _chunks.layout(chunks if ids is None else ids, z1.shape[-2])
    if layout is None:  # only ids may have none
        return gram_gap.compare_by_id(z1, z2, cast(Tensor, ids), scale, derive=derive)
    check_pairs(layout[1])
    return gram_gap.compare(z1, z2, layout, scale, mean=mean, derive=derive)


def _like_gram_gap(z1: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    *_, chunks, _, mean, derive = settings
    *leading, n, _ = z1.shape
    shape = () if mean else (*leading, torch.sym_min(chunks, n // 2))
    loss = z1.new_empty(shape, dtype=computed_in(z1))
    return loss, loss.new_empty((2, *z1.shape) if derive else 0)


def _save_gram_gap(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[1])


def _gram_gap_backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
    z1, z2, by_row = ctx.saved_tensors
    return *gram_gap.gradients_of_views(by_row, _checked(gradient, z1, z2), z1), *5 * [None]


_gram_gap = _define(
    "gram_gap", _compute_gram_gap, _like_gram_gap, _save_gram_gap, _gram_gap_backward
)
