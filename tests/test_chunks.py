"""Which rows form a chunk: the same for known sizes, for tracers, for ids and for views."""

import pytest
import torch

from care_loss import _chunks

CPU = torch.device("cpu")
SIZES = [(chunks, n) for n in range(2, 14) for chunks in range(1, 9)]


def chunks_of(chunks, n):
    """The row numbers of the chunks, at most n // 2 of them."""
    return list(torch.arange(n).tensor_split(min(chunks, n // 2)))


@pytest.mark.parametrize(("chunks", "n"), SIZES)
def test_every_form_cuts_at_the_boundaries_of_tensor_split(chunks, n):
    expected = [rows.tolist() for rows in chunks_of(chunks, n)]
    assert [rows.tolist() for rows in _chunks.members(chunks, n)] == expected
    stacks = _chunks.stack_sizes(chunks, n)
    assert [m for k, m in stacks for _ in range(k)] == [len(rows) for rows in expected]
    rows, exist, lengths = _chunks.padded_rows(chunks, n, CPU)
    longest = max(map(len, expected)) if n >= 2 * chunks else 3
    assert rows.shape == exist.shape == (len(expected), longest)
    assert [row[e].tolist() for row, e in zip(rows, exist, strict=True)] == expected
    assert lengths.flatten().tolist() == [len(rows) for rows in expected]
    number = torch.cat([torch.full((len(r),), i) for i, r in enumerate(expected)])
    assert _chunks.chunk_of_rows(len(expected), n, CPU).equal(number)


@pytest.mark.parametrize(("chunks", "n"), SIZES)
def test_halves_are_the_even_and_the_odd_places_once_each(chunks, n):
    stacks = _chunks.stack_sizes(chunks, n)
    pairs = _chunks.halves(None, stacks, n, CPU)
    found = {
        (tuple(half.tolist()), tuple(other.tolist()))
        for halves, others in pairs
        for half, other in zip(halves, others, strict=True)
    }
    expected = {
        (tuple(rows[first::2].tolist()), tuple(rows[1 - first :: 2].tolist()))
        for rows in chunks_of(chunks, n)
        for first in (0, 1)
    }
    assert found == expected
    # One batch of fits for the chunks of an even length, two for those of an odd one.
    assert len(pairs) == sum(1 + m % 2 for _, m in stacks)


def test_ids_name_the_members_of_each_chunk():
    ids = torch.tensor([7, 5, 7, 5, 5, 9])
    members = [rows.tolist() for rows in _chunks.members(ids, 6)]
    assert members == [[1, 3, 4], [0, 2], [5]]
    order, stacks = _chunks.layout_of_ids(ids)
    assert (order.tolist(), stacks) == ([1, 3, 4, 0, 2], [(1, 3), (1, 2)])
    assert _chunks.layout_of_ids(torch.tensor([3, 3, 4, 4])) == (None, [(2, 2)])


def test_a_size_is_free_only_where_a_tracer_says_so():
    assert not _chunks.has_free_size(2, 8)
    seen = []

    def record(x):
        seen.append(_chunks.has_free_size(2, x.shape[0]))
        return x + 1

    for n, dynamic in ((8, False), (9, False), (8, True)):
        torch.compiler.reset()
        torch.compile(record, backend="eager", dynamic=dynamic)(torch.ones(n))
    assert seen == [False, False, _chunks.TRACERS_KNOW]
