"""Which rows form a chunk: the one rule, for the losses and for the views."""

import torch
from torch import Tensor

TRACERS_KNOW = torch.__version__ >= (2, 8)  # type: ignore[operator]  # a TorchVersion


def stack_sizes(chunks: int, n: int) -> list[tuple[int, int]]:
    """Cut `n >= 2` rows into contiguous chunks with the boundaries of `torch.tensor_split`.

    Returns one or two stacks, pairs (k, n) of k chunks of n rows each, the longer chunks first.
    At most `n // 2` chunks are made, so that every chunk has two rows or more.

    >>> stack_sizes(3, 11), stack_sizes(8, 13)
    ([(2, 4), (1, 3)], [(1, 3), (5, 2)])
    """
    chunks = chunks if n >= 2 * chunks else n // 2  # a tracer takes long to simplify a minimum
    rows, longer = n // chunks, n % chunks
    return [(k, m) for k, m in ((longer, rows + 1), (chunks - longer, rows)) if k]


def padded_rows(chunks: int, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the row numbers `(k, m)` of k chunks, which of them exist, and the lengths `(k, 1)`.

    These are the chunks of :func:`stack_sizes`, all of the length m of the longest. The number of
    rows may be a symbol of a tracer: all that depends on its value is whether there are rows for
    all chunks.

    >>> padded_rows(2, 5, torch.device("cpu"))[0]
    tensor([[0, 1, 2],
            [3, 4, 0]])
    """
    count, longest = (chunks, (n + chunks - 1) // chunks) if n >= 2 * chunks else (n // 2, 3)
    short, longer = n // count, n % count
    chunk = torch.arange(count, device=device).unsqueeze(-1)
    place = torch.arange(longest, device=device)
    lengths = short + (chunk < longer).to(place.dtype)
    exist = place < lengths
    rows = chunk * short + chunk.clamp_max(longer) + place
    return torch.where(exist, rows, 0), exist, lengths


def chunk_of_rows(chunks: int, n: int, device: torch.device) -> Tensor:
    """Return which of `chunks` contiguous chunks each of `n` rows is in, `(n,)`.

    >>> chunk_of_rows(3, 11, torch.device("cpu"))
    tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    """
    rows, short, longer = torch.arange(n, device=device), n // chunks, n % chunks
    # As if all chunks were long, and as if all were short, counted from the end.
    return torch.maximum(rows // (short + 1), (rows - longer) // short)


def has_free_size(chunks: int, n: int) -> bool:
    """Whether a tracer records for other numbers of rows than `n` too: its remainder is not known.

    Tracers of older versions of torch cannot tell. They record for numbers of the same remainder.
    """
    tracing = torch.compiler.is_compiling() or isinstance(n, torch.SymInt)
    if not tracing or not TRACERS_KNOW:
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true as known

    return not known(n % chunks == 0) and not known(n % chunks != 0)


def layout(chunks: int | Tensor, n: int) -> tuple[Tensor | None, list[tuple[int, int]]] | None:
    """Return how to cut `n` rows into chunks: the order to bring them into, and the stacks.

    The order is None where the rows stay as they are. There is no layout for ids that are not read:
    on a GPU reading makes the host wait, under `vmap` it is impossible, and a tracer would take the
    ids that it sees for constants (an operator reads those that it is called with).
    """
    if not isinstance(chunks, Tensor):
        return None, stack_sizes(chunks, n)
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if chunks.device.type != "cpu" or tracing:
        return None
    try:
        return layout_of_ids(chunks)
    except RuntimeError:
        return None


def layout_of_ids(ids: Tensor) -> tuple[Tensor | None, list[tuple[int, int]]]:
    """Return the layout of chunks that ids `(N,)` name: long chunks first, then by ids.

    Rows whose id is unique are left out.

    >>> layout_of_ids(torch.tensor([7, 5, 7, 5, 5, 9]))
    (tensor([1, 3, 4, 0, 2]), [(1, 3), (1, 2)])
    """
    by_id, order = ids.sort(stable=True)
    lengths = by_id.unique_consecutive(return_counts=True)[1]
    counts = lengths.bincount().tolist()
    stacks = [(counts[m], m) for m in range(len(counts) - 1, 1, -1) if counts[m]]
    if len(stacks) > 1 or counts[1]:
        by_length = lengths.repeat_interleave(lengths).sort(stable=True, descending=True).indices
        order = order[by_length][: sum(k * m for k, m in stacks)]
    in_place = torch.equal(order, torch.arange(len(ids), device="cpu"))
    return None if in_place else order, stacks


def halves(
    order: Tensor | None, stacks: list[tuple[int, int]], n: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Return row numbers `(k, m)` of halves of chunks, and those `(k, m')` of their other halves.

    The halves of a chunk are its rows of even and of odd place. Those of all chunks of an even
    length come together, and those of an odd length in two groups.

    >>> halves(None, [(1, 5)], 5, torch.device("cpu"))
    [(tensor([[0, 2, 4]]), tensor([[1, 3]])), (tensor([[1, 3]]), tensor([[0, 2, 4]]))]
    """
    rows = torch.arange(n, device=device) if order is None else order.to(device, non_blocking=True)
    pairs = []
    for part, stack in zip(rows.split([k * m for k, m in stacks]), stacks, strict=True):
        even, odd = (part.view(stack)[:, first::2] for first in (0, 1))
        if stack[1] % 2:
            pairs += [(even, odd), (odd, even)]
        else:
            pairs.append((torch.cat((even, odd)), torch.cat((odd, even))))
    return pairs


def split(z: Tensor, stacks: list[tuple[int, int]]) -> list[Tensor]:
    """Cut rows `(*, N, D)` into stacks of equally long chunks, `(*, k, n, D)` each."""
    parts = z.split([k * m for k, m in stacks], dim=-2)
    return [part.unflatten(-2, stack) for part, stack in zip(parts, stacks, strict=True)]


def members(chunks: int | Tensor, n: int) -> list[Tensor]:
    """Return the row numbers of each chunk in turn."""
    if isinstance(chunks, Tensor):
        return [(chunks == chunk).nonzero().squeeze(-1) for chunk in chunks.unique()]
    rows = torch.arange(n, device="cpu")  # whatever the default device is
    return list(rows.split([m for k, m in stack_sizes(chunks, n) for _ in range(k)]))
