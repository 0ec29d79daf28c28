"""Gathering embeddings across processes, with gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(x: Tensor, *, process_group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks.

    The backward sums the gradients that all processes have for a row and returns them to its owner.
    With equal losses on W processes that is W times the gradient of one; averaging over processes,
    as DDP does, brings it back to exactly the gradient of one process with all rows.

    Args:
        x: The rows of this process, `(N, ...)`, with the same shape on every process.
        process_group: The processes to gather from; all of them by default.

    Returns:
        The rows of all processes, `(W * N, ...)`; `x` itself where no group is initialised.

    Example:
        >>> all_gather(torch.zeros(2, 3)).shape  # a single process
        torch.Size([2, 3])
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    gathered: Tensor = _AllGather.apply(x, process_group)  # type: ignore[no-untyped-call]
    return gathered


# Each of the two is the other's derivative, so derivatives of every order are right.


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _SumForOwner.apply(grads[0], ctx.group), None  # type: ignore[no-untyped-call]


class _SumForOwner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)  # all_reduce is in place
        dist.all_reduce(total, group=group)
        return total.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllGather.apply(grads[0], ctx.group), None  # type: ignore[no-untyped-call]
