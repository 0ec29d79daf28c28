"""Several processes: gathering rows, and the InfoNCE loss of all processes.

Each process calls the same function with its own rows. A call first checks the arguments and
compares the shapes of all processes, so that a mistake on one of them is an error on all, and none
waits for another.
"""

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from care_loss import _checks, functional
from care_loss._autograd.info_nce import (
    gradient_among,
    gradients_of_inputs,
    losses_among,
    save,
    second_derivatives,
    temperature_of,
)
from care_loss._autograd.paths import (
    Input,
    Plain,
    is_batch_of_gradients,
    need_gradient,
    use_autograd_function,
)
from care_loss._autograd.unit_rows import gradient_of_rows, unit_rows
from care_loss._numerics import computed_in, savable, without_autocast
from care_loss.functional import Reduction

_MAX_MESSAGE_BYTES = 1000  # bytes of a sentence that processes exchange
_DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)


def all_gather(x: Tensor, *, process_group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks.

    The backward sums the gradients that all processes have for a row and returns them to its owner.
    With equal losses on W processes that is W times the gradient of one; averaging over processes,
    as DDP does, brings it back to exactly the gradient of one process with all rows.

    Args:
        x: The rows of this process, `(N, ...)`. N may differ between processes; the dtype and the
            other dimensions may not.
        process_group: The processes to gather from; all of them by default.

    Returns:
        The rows of all processes, `(sum of N, ...)`; `x` itself if there is only one process.

    Raises:
        ValueError: on all processes, if an argument of one is not as described, or if their rows
            differ in shape or dtype; on a process that does not belong to `process_group`.
        NotImplementedError: under a transform of `torch.func`.

    Example:
        >>> all_gather(torch.zeros(2, 3)).shape  # a single process
        torch.Size([2, 3])
    """
    if not _several(process_group):
        _checks.check_rows(x)
        return x
    gathered: Tensor = _eager(_gather_rows)(x, process_group)
    return gathered


def info_nce_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: Reduction = "mean",
    process_group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Contrast the two views of each sample with the rows of all processes.

    It is :func:`care_loss.functional.info_nce_loss` of the views of all processes, whose value each
    process returns. The gradient that a process gets for its own rows is W times that of one
    process with all rows, so that averaging over the W processes, as DDP does, gives exactly the
    gradient of one. It needs no communication in the backward, and expects that all processes
    multiply the loss by the same factor.

    A process compares its own rows with all rows, block by block: no matrix of all products is
    formed. It communicates the embeddings of all processes once, in their own dtype, and two
    numbers per row. Second derivatives gather the embeddings again, and are formed from all rows.

    Args:
        z1: Embeddings of the first view on this process, `(N, D)` with `N >= 1`. N may differ
            between processes.
        z2: Embeddings of the second view on this process, `(N, D)`.
        temperature: A number > 0 or a tensor `()`, which then gets a gradient. It must be the same
            on all processes.
        reduction: `"mean"` for a scalar, `"none"` for one value per anchor of all processes.
        process_group: The processes whose rows are contrasted; all of them by default.

    Returns:
        The loss of all processes: `()`, or `(2, sum of N)` with `reduction="none"`, the processes
        in the order of their ranks.

    Raises:
        TypeError, ValueError: on all processes, if an argument of one is not as described, or
            differs between processes.
        NotImplementedError: under a transform of `torch.func`.

    Example:
        >>> z = torch.eye(4)
        >>> info_nce_loss(z, z, temperature=0.5)  # a single process
        tensor(0.5944)
    """
    return _checked_info_nce_loss(z1, z2, temperature, reduction, process_group, lambda: None)


def _checked_info_nce_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    reduction: Reduction,
    process_group: "dist.ProcessGroup | None",
    also: Callable[[], object],
) -> Tensor:
    """Return :func:`info_nce_loss`; what the function `also` raises is an error on all processes.

    A loss of several parts checks the arguments of all of them before the first communicates.
    """

    def check() -> Input:
        """Check all arguments, and return the temperature."""
        also()
        _checks.check_embeddings(leading=False, rows=1, z1=z1, z2=z2)
        _checks.check_reduction(reduction)
        return _checks.as_temperature(temperature, z1.device)

    if not _several(process_group):
        return functional.info_nce_loss(z1, z2, temperature=check(), reduction=reduction)
    losses: Tensor = _eager(_losses)(z1, z2, check, process_group)
    return losses.mean() if reduction == "mean" else losses


def assert_seeds_differ(*, process_group: "dist.ProcessGroup | None" = None) -> None:
    """Check that no two processes draw the same random numbers.

    Processes with one seed augment their images alike, and shared views then have as many different
    augmentations as one process makes. Call it once, after the seeds have been set:
    `torch.manual_seed(seed + rank)` makes them differ, also in the workers of a `DataLoader`, which
    are seeded from it.

    Args:
        process_group: The processes to compare; all of them by default.

    Raises:
        ValueError: on all processes, if the generator of torch is in the same state on two of them.

    Example:
        >>> assert_seeds_differ()  # a single process: there is nothing to compare
    """
    if not _several(process_group):
        return
    state = zlib.crc32(bytes(torch.get_rng_state().tolist()))
    _check_different_seeds(_exchanged([state], torch.int64, process_group).flatten().tolist())


def _several(group: Any) -> bool:
    """Whether there are other processes, this one being one of the group."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    _check_member(dist.get_rank(group), dist.get_rank())
    return dist.get_world_size(group) > 1


def _eager(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep a function out of compiled code, which could not use the sizes that it reads."""
    compiling = torch.compiler.is_compiling()
    return torch.compiler.disable(function) if compiling else function


def _exchanged(numbers: list[int], dtype: torch.dtype, group: Any) -> Tensor:
    """Return as many numbers of each process, `(processes, numbers)`, on the backend's device."""
    in_memory = dist.get_backend(group) in ("gloo", "mpi")
    device = "cpu" if in_memory else torch.accelerator.current_accelerator()
    tensor = torch.tensor([numbers], dtype=dtype, device=device)
    return _gather(tensor, group, [1] * dist.get_world_size(group))


def _agreed(name: str, x: Any, check: Callable[[], Input], group: Any) -> tuple[Input, list[int]]:
    """Check the arguments of all processes, and compare their rows and temperatures.

    Returns the temperature, and how many rows each process has. What one process refuses, in
    `check`, is an error on all, and none waits for one that has failed.
    """
    _check_no_transform(torch._C._are_functorch_transforms_active())
    refused, description = None, [-1, 0, 0, 0]
    temperature: Input = 0.0
    try:
        temperature = check()
        value = temperature.detach() if isinstance(temperature, Tensor) else temperature
        value = min(float(value), torch.finfo(torch.float32).max)
        # The dtype and the temperature, in float32, share a number.
        bits = int.from_bytes(struct.pack("<f", value), "little")
        kind = _DTYPES.index(x.dtype) << 32 | bits
        description = [len(x), x.ndim, math.prod(x.shape[1:]), kind]
    except (TypeError, ValueError) as error:
        refused = error
    descriptions = _exchanged(description, torch.int64, group).tolist()
    broken = [rank for rank, row in enumerate(descriptions) if row[0] < 0]
    if broken:
        sentence = str(refused or "").encode()[:_MAX_MESSAGE_BYTES].ljust(_MAX_MESSAGE_BYTES)
        sentences = _exchanged(list(sentence), torch.uint8, group).tolist()
        told = bytes(sentences[broken[0]]).decode(errors="ignore").strip()
        _raise_of_another_process(broken[0], told, refused)
    _check_rows_of_processes(name, [(*row[1:3], _DTYPES[row[3] >> 32]) for row in descriptions])
    every = [struct.pack("<I", row[3] & 0xFFFFFFFF) for row in descriptions]
    _check_one_temperature([struct.unpack("<f", bits)[0] for bits in every])
    return temperature, [row[0] for row in descriptions]


def _gather(x: Tensor, group: Any, sizes: list[int]) -> Tensor:
    """Return the rows of all processes, which have as many as `sizes` says."""
    x = x.resolve_conj().resolve_neg()  # views that the bytes in memory do not show
    longest, row = max(sizes), x.shape[1:]
    padded = x.contiguous()
    if len(x) < longest:
        padded = x.new_empty(longest, *row)
        padded[: len(x)] = x
    gathered = x.new_empty(len(sizes) * longest, *row)
    # The second name is that before torch 2.13. Not every backend knows every dtype, so: bytes.
    into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    into(_bytes(gathered), _bytes(padded), group=group)
    if min(sizes) == longest:
        return gathered
    parts = zip(gathered.split(longest), sizes, strict=True)
    with without_autocast(x):
        return torch.cat([part[:n] for part, n in parts])


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _own_rows(sizes: list[int], group: Any) -> slice:
    """Return where the rows of this process are among those of all."""
    rank = dist.get_rank(group)
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])


def _gather_rows(x: Tensor, group: Any) -> Tensor:
    def check() -> Input:
        """Check the rows, which have no temperature."""
        _checks.check_rows(x)
        return 0.0

    _, sizes = _agreed("x", x, check, group)
    gathered: Tensor = _AllGather.apply(x, group, sizes)  # type: ignore[no-untyped-call]
    return gathered


# Each of the two is the other's derivative, so derivatives of every order are right.


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, sizes: list[int]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return _gather(x, group, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        summed: Tensor = _SumForOwner.apply(grads[0], ctx.group, ctx.sizes)  # type: ignore[no-untyped-call]
        return summed, None, None


class _SumForOwner(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, sizes: list[int]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        total = x.clone(memory_format=torch.contiguous_format)  # all_reduce is in place
        dist.all_reduce(total, group=group)
        return total[_own_rows(sizes, group)].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gathered: Tensor = _AllGather.apply(grads[0], ctx.group, ctx.sizes)  # type: ignore[no-untyped-call]
        return gathered, None, None


def _losses(z1: Tensor, z2: Tensor, check: Callable[[], Input], group: Any) -> Tensor:
    """Return the losses of the anchors of all processes, `(2, sum of N)`."""
    temperature, sizes = _agreed("z1", z1, check, group)
    z1, z2 = savable(z1, z2)
    plain = partial(_plain_losses, group)
    if not use_autograd_function(z1, z2, temperature):
        return plain(z1, z2, temperature)
    derive = need_gradient(z1, z2, temperature)
    losses: Tensor = _InfoNCE.apply(z1, z2, temperature, group, sizes, plain, derive)  # type: ignore[no-untyped-call]
    return losses


def _plain_losses(group: Any, z1: Tensor, z2: Tensor, temperature: Input) -> Tensor:
    z1, z2 = (all_gather(z, process_group=group) for z in (z1, z2))
    return functional.info_nce_loss(z1, z2, temperature=temperature, reduction="none")


class _InfoNCE(Function):
    """The loss of each anchor of all processes.

    The rows of all processes are kept as they are gathered: of each process, both views.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        temperature: Input,
        group: Any,
        sizes: list[int],
        plain: Plain,
        derive: bool,
    ) -> Tensor:
        rows = [2 * n for n in sizes]
        own = _own_rows(rows, group)
        with without_autocast(z1):
            everything = _gather(torch.cat((z1, z2)), group, rows)
        u, length = unit_rows(everything.to(computed_in(z1)))
        losses, total, mass = losses_among(u, own, temperature)
        by_anchor = _gather(torch.stack((losses.flatten(), total.flatten()), -1), group, rows)
        if derive:
            ctx.own, ctx.sizes = own, sizes
            save(ctx, z1, z2, temperature, plain, u, length[own], by_anchor[:, 1], mass)
        by_rank = by_anchor[:, 0].to(u.dtype).split(rows)
        return torch.cat([part.view(2, -1) for part in by_rank], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, u, length, total, mass = ctx.saved_tensors
        nothing = (None,) * 4
        if torch.is_grad_enabled() or is_batch_of_gradients(gradient):
            return *second_derivatives(ctx, inputs, gradient), *nothing
        # The processes have the same loss, and each adds up its gradients: W times those of one.
        gradient = gradient * len(ctx.sizes)
        weights = torch.cat([part.flatten() for part in gradient.split(ctx.sizes, -1)])
        temperature = temperature_of(ctx, inputs)
        by_row = gradient_among(u, ctx.own, temperature, total, mass, weights)
        rows = gradient_of_rows(by_row, u[ctx.own], length)
        return *gradients_of_inputs(ctx, inputs, *rows), *nothing


def _check_rows_of_processes(name: str, shapes: Sequence[tuple[int, int, torch.dtype]]) -> None:
    """Require that rows have one number of dimensions and of values, and one dtype, everywhere."""
    different = next((rank for rank, shape in enumerate(shapes) if shape != shapes[0]), None)
    if different is not None:
        described = [
            f"{ndim - 1}-dimensional rows of {values} values of {dtype} on process {rank}"
            for rank, (ndim, values, dtype) in ((0, shapes[0]), (different, shapes[different]))
        ]
        raise ValueError(
            f"`{name}` must have rows of one shape and dtype on all processes, got "
            f"{' and '.join(described)}: use the same encoder and the same precision on all. Only "
            "the number of rows may differ."
        )


def _check_one_temperature(temperatures: Sequence[float]) -> None:
    """Require that all processes have the same temperature, in float32."""
    first = temperatures[0]
    for rank, other in enumerate(temperatures):
        if other != first and not (math.isnan(other) and math.isnan(first)):
            raise ValueError(
                f"`temperature` must be the same on all processes, got {first:.6g} on process 0 "
                f"and {other:.6g} on process {rank}: a learned one belongs to the module that "
                "DistributedDataParallel wraps."
            )


def _raise_of_another_process(rank: int, sentence: str, error: Exception | None) -> None:
    """Raise on all processes what one of them has refused."""
    kind = type(error) if error else ValueError
    raise kind(f"on process {rank}: {sentence}") from error


def _check_no_transform(active: bool) -> None:
    """Require a call outside of the transforms of torch.func, which cannot communicate."""
    if active:
        raise NotImplementedError(
            "rows of several processes must be gathered outside of torch.func transforms, got a "
            "call under one (grad, vmap, jvp): use torch.autograd.grad."
        )


def _check_member(rank: int, global_rank: int) -> None:
    """Require that this process belongs to a group, in which it has a rank."""
    if rank < 0:
        raise ValueError(
            "`process_group` must contain this process, got a group without process "
            f"{global_rank}: call the function only on the processes of the group."
        )


def _check_different_seeds(states: Sequence[int]) -> None:
    """Require that no two processes have a random generator in one state."""
    for rank, state in enumerate(states):
        if (first := states.index(state)) < rank:
            raise ValueError(
                "processes must draw different random numbers, got the same state of the generator "
                f"of torch on processes {first} and {rank}: call torch.manual_seed(seed + rank) on "
                "each."
            )
