"""Gathering embeddings across processes, with gradient."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
from torch import Tensor


def all_gather(x: Tensor, *, process_group: dist.ProcessGroup | None = None) -> Tensor:
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
    group = dist.group.WORLD if process_group is None else process_group
    return torch.cat(collectives.all_gather(x.contiguous(), group=group))
