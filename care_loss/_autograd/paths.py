"""Which path computes a loss: decided here, from the kind of call, the shapes and the settings.

The numbers for CPUs were measured on two of them, those for other devices on one GPU: docs/speed.md
has both, and says which rows of benchmarks/cuda_paths.py decide.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

Input = Tensor | float
Plain = Callable[..., Tensor]

# From there on products of the columns, though in float64, take less time.
MIN_ROWS_PER_DIMENSION = 4

# Rows of both views of which InfoNCE keeps all products. In float32 these have 4 MiB, which fit a
# cache, or 256 MiB.
MAX_DENSE_ROWS_ON_CPU, MAX_DENSE_ROWS = 1024, 8192

# Rows and columns that InfoNCE takes at a time otherwise. On a CPU a tile and its weights fit a
# second-level cache. Several threads wait for each other after each operation, for long where other
# processes use the cores; on a GPU each operation costs a launch: large tiles make up for both.
TILE_ON_CPU, TILE_OF_THREADS, TILE = (256, 1024), (1024, 4096), (4096, 8192)


def use_autograd_function(*inputs: Input) -> bool:
    """Whether an `autograd.Function` can serve this call; otherwise the plain composition must."""
    # Tracers shall record operations.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_proxied():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if torch._C._are_functorch_transforms_active():  # there is no public way to ask
        return False
    tensors = (x for x in inputs if isinstance(x, Tensor))
    return all(forward_ad.unpack_dual(x).tangent is None for x in tensors)


def is_proxied() -> bool:
    """Whether `make_fx` records the operations; its module would take long to import."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_batch_of_gradients(gradient: Tensor) -> bool:
    """Whether a backward is given many gradients at once, with `is_grads_batched=True`."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def is_dense(rows: int, device: torch.device) -> bool:
    """Whether InfoNCE keeps the matrix of all products of its rows."""
    return rows <= (MAX_DENSE_ROWS_ON_CPU if device.type == "cpu" else MAX_DENSE_ROWS)


def tile(device: torch.device) -> tuple[int, int]:
    """Return how many rows and columns InfoNCE takes at a time where it keeps no matrix."""
    if device.type != "cpu":
        return TILE
    return TILE_ON_CPU if torch.get_num_threads() == 1 else TILE_OF_THREADS


def cut(start: int, stop: int, size: int) -> Iterator[slice]:
    """Yield slices of this size, and a shorter last one."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def tiles_of_triangle(m: int, height: int, width: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield rows and columns of the tiles on and above the diagonal of a matrix `(m, m)`.

    And the number of columns of each in which it has, or mirrors, pairs of rows of the tile.
    """
    for rows in cut(0, m, height):
        for columns in cut(rows.start, m, width):
            below = min(max(rows.stop - columns.start, 0), columns.stop - columns.start)
            yield rows, columns, below


def reads_values(x: Tensor) -> bool:
    """Whether the values of a tensor may decide: on a GPU, reading them makes the host wait."""
    return x.device.type == "cpu"


def is_long(n: int, d: int) -> bool:
    """Whether the Gram matrices of chunks `(n, d)` are compared by products `(d, d)`."""
    return n > MIN_ROWS_PER_DIMENSION * d


def products_are_rounded() -> bool:
    """Whether PyTorch may round float32 matrix products to TF32 or bfloat16, on any device."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the newer settings, of each backend, are in use
        return True


def need_gradient(*inputs: Input) -> bool:
    """Whether a gradient of any input is recorded (inside a Function it is never)."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs if isinstance(x, Tensor))


def plain_gradients(
    plain: Plain, inputs: Sequence[Input], needed: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """Differentiate the plain composition, which gives gradients that have derivatives."""
    with torch.enable_grad():
        # Views keep inputs apart that are one tensor, or depend on one another.
        views = [x.view_as(x) if isinstance(x, Tensor) else x for x in inputs]
        wanted = [cast(Tensor, x) for x, need in zip(views, needed, strict=True) if need]
        gradients = iter(torch.autograd.grad(plain(*views), wanted, gradient, create_graph=True))
    return [next(gradients) if need else None for need in needed]
