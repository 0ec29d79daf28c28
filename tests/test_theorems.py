"""What the paper proves and what the formulas imply, for every input that Hypothesis can draw."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import embeddings, orthogonal, seeds

from care_loss.functional import (
    alignment_loss,
    equivariance_loss,
    info_nce_loss,
    uniformity_loss,
)
from care_loss.sphere import normalize

chunk_counts = st.integers(1, 8)
scales = st.sampled_from(["mean", "authors"])
booleans = st.booleans()


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-14)


def rotated_by_chunk(z, chunks, seed, reflect):
    """Give each chunk an orthogonal map of its own."""
    parts = z.tensor_split(min(chunks, len(z) // 2))
    maps = (orthogonal(z.shape[-1], seed + k, reflect=reflect) for k in range(len(parts)))
    return torch.cat([part @ map_ for part, map_ in zip(parts, maps, strict=True)])


@given(embeddings(), chunk_counts, seeds, booleans)
def test_zero_when_one_orthogonal_map_relates_the_views_of_each_chunk(z, chunks, seed, reflect):
    views = z, rotated_by_chunk(z, chunks, seed, reflect)
    assert equivariance_loss(*views, chunks=chunks) < 1e-28
    assert equivariance_loss(*views, chunks=chunks, scale="authors") < 1e-27


@given(embeddings(min_n=4, max_d=8), seeds)
def test_not_zero_when_each_chunk_has_a_map_of_its_own_and_is_taken_for_one(z, seed):
    views = z, rotated_by_chunk(z, 2, seed, reflect=False)
    u, v = (normalize(view) for view in views)
    # Across the two chunks the inner products are u_i R1 R2' u_j, not u_i u_j.
    gap = (u @ u.mT - v @ v.mT).square().sum().item() / (len(u) * (len(u) - 1))
    assume(gap > 1e-12)
    assert equivariance_loss(*views).item() == pytest.approx(gap, rel=1e-9)


@given(embeddings(), chunk_counts, seeds, booleans)
def test_two_shared_augmentations_in_one_view_are_one(z, chunks, seed, reflect):
    composed = rotated_by_chunk(rotated_by_chunk(z, chunks, seed, reflect), chunks, seed + 9, False)
    assert equivariance_loss(z, composed, chunks=chunks) < 1e-28


@given(embeddings(min_n=18), st.integers(2, 4), seeds)
def test_a_composition_is_shared_by_the_rows_that_share_both_draws(z, chunks, seed):
    first, second = torch.arange(len(z)) % chunks, torch.arange(len(z)) // (2 * chunks)
    composed = z
    for number, ids in enumerate((first, second)):
        maps = [orthogonal(z.shape[-1], seed + 100 * number + k) for k in range(int(ids.max()) + 1)]
        composed = (composed.unsqueeze(-2) @ torch.stack(maps)[ids]).squeeze(-2)
    shared = len(z) * first + second
    assert equivariance_loss(z, composed, chunks=shared) < 1e-28
    # Rows of one chunk of the first have seen different draws of the second.
    u, v = (normalize(view) for view in (z, composed))
    same = (first == first[:, None]) & ~torch.eye(len(z), dtype=torch.bool)
    assume((u @ u.mT - v @ v.mT)[same].abs().max() > 1e-6)
    assert equivariance_loss(z, composed, chunks=first) > 1e-14


@given(embeddings(count=2))
def test_zero_exactly_when_one_orthogonal_map_relates_the_views(pair):
    # With r the residual of the best orthogonal map and g the norm of the Gram difference,
    # r^2 <= sqrt(n) g (Powers and Stormer) and g <= 2 sqrt(n) r: both are 0, or neither is.
    u, v = (normalize(z) for z in pair)
    n = len(u)
    left, _, right = torch.linalg.svd(u.mT @ v)
    residual = (u @ (left @ right) - v).norm()
    gap = (equivariance_loss(*pair) * n * (n - 1)).sqrt()
    assert residual**2 <= math.sqrt(n) * gap + 1e-14
    assert gap <= 2 * math.sqrt(n) * residual + 1e-14


@given(embeddings(count=2), chunk_counts, seeds, booleans)
def test_unchanged_by_an_orthogonal_map_on_each_side(pair, chunks, seed, reflect):
    z1, z2 = pair
    d = z1.shape[-1]
    r1, r2 = orthogonal(d, seed, reflect=reflect), orthogonal(d, seed + 1)
    close(
        equivariance_loss(z1 @ r1, z2 @ r2, chunks=chunks), equivariance_loss(z1, z2, chunks=chunks)
    )


@given(embeddings(count=2), seeds)
def test_unchanged_by_a_common_permutation_of_a_chunk(pair, seed):
    z1, z2 = pair
    order = torch.randperm(len(z1), generator=torch.Generator().manual_seed(seed))
    close(equivariance_loss(z1[order], z2[order]), equivariance_loss(z1, z2))
    close(info_nce_loss(z1[order], z2[order]), info_nce_loss(z1, z2))


@given(embeddings(count=2), chunk_counts, seeds)
def test_ids_that_travel_with_their_rows_give_the_chunks_in_any_order(pair, chunks, seed):
    z1, z2 = pair
    count = min(chunks, len(z1) // 2)
    parts = torch.arange(len(z1)).tensor_split(count)
    ids = torch.cat([torch.full_like(part, 7 * k - 3) for k, part in enumerate(parts)])
    order = torch.randperm(len(z1), generator=torch.Generator().manual_seed(seed))
    for scale in ("mean", "authors"):
        close(
            equivariance_loss(z1[order], z2[order], chunks=ids[order], scale=scale),
            equivariance_loss(z1, z2, chunks=chunks, scale=scale),
        )


@given(embeddings(count=2), chunk_counts, seeds)
def test_unchanged_by_scaling_any_row(pair, chunks, seed):
    z1, z2 = pair
    generator = torch.Generator().manual_seed(seed)
    factors = 10 ** (8 * torch.rand(2, len(z1), 1, dtype=z1.dtype, generator=generator) - 4)
    scaled = z1 * factors[0], z2 * factors[1]
    close(equivariance_loss(*scaled, chunks=chunks), equivariance_loss(*pair, chunks=chunks))
    close(info_nce_loss(*scaled), info_nce_loss(*pair))
    close(alignment_loss(*scaled), alignment_loss(*pair))
    close(uniformity_loss(scaled[0]), uniformity_loss(pair[0]))


@given(embeddings(count=2), chunk_counts, scales)
def test_symmetric_in_the_views(pair, chunks, scale):
    z1, z2 = pair
    close(
        equivariance_loss(z1, z2, chunks=chunks, scale=scale),
        equivariance_loss(z2, z1, chunks=chunks, scale=scale),
    )
    close(info_nce_loss(z1, z2), info_nce_loss(z2, z1))
    close(alignment_loss(z1, z2), alignment_loss(z2, z1))


@given(embeddings(count=2, min_d=1), chunk_counts)
def test_equivariance_lies_in_0_to_4(pair, chunks):
    loss = equivariance_loss(*pair, chunks=chunks, reduction="none")
    assert (loss >= 0).all()
    assert (loss <= 4 + 1e-12).all()


def test_equivariance_is_4_where_equal_rows_become_opposite():
    assert equivariance_loss(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])) == 4


@given(embeddings(count=2), chunk_counts)
def test_the_authors_scale_is_2_n_minus_1_times_the_mean(pair, chunks):
    z1, z2 = pair
    count = min(chunks, len(z1) // 2)
    n = torch.tensor([len(part) for part in z1.tensor_split(count)])
    mean = equivariance_loss(z1, z2, chunks=chunks, reduction="none")
    authors = equivariance_loss(z1, z2, chunks=chunks, scale="authors", reduction="none")
    close(authors, 2 * (n - 1) * mean)


@given(embeddings(count=2), chunk_counts)
def test_the_mean_weighs_every_chunk_the_same(pair, chunks):
    each = equivariance_loss(*pair, chunks=chunks, reduction="none")
    close(equivariance_loss(*pair, chunks=chunks), each.mean())


@given(embeddings(min_n=12, max_n=24, max_d=8), st.floats(1e-6, 1e-2), seeds)
def test_small_loss_bounds_the_distance_to_one_orthogonal_map(z, noise, seed):
    # min_R ||A - B R|| <= (1 + sqrt 2) sqrt(L) / smallest singular value of A, with L the sum over
    # all pairs, wherever sqrt(L) ||A^+||^2 <= 1/2.
    generator = torch.Generator().manual_seed(seed)
    a = normalize(z)
    step = torch.randn(z.shape, dtype=z.dtype, generator=generator)
    b = normalize(a @ orthogonal(z.shape[-1], seed) + noise * step)
    n = len(a)
    root = (equivariance_loss(a, b) * n * (n - 1)).sqrt()
    smallest = torch.linalg.svdvals(a)[-1]
    assume(root <= 0.5 * smallest**2)  # the theorem speaks of nothing else
    left, _, right = torch.linalg.svd(b.mT @ a)
    distance = (a - b @ (left @ right)).norm()
    assert distance <= (1 + math.sqrt(2)) * root / smallest + 1e-12


@given(st.integers(2, 40), st.integers(1, 8), st.floats(0.005, 2), seeds)
def test_info_nce_is_log_2n_minus_1_when_all_rows_coincide(n, d, temperature, seed):
    row = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss = info_nce_loss(row.expand(n, d), row.expand(n, d), temperature=temperature)
    assert loss.item() == pytest.approx(math.log(2 * n - 1), rel=1e-12)


@given(embeddings(count=2), seeds, booleans)
def test_info_nce_is_unchanged_by_one_common_orthogonal_map(pair, seed, reflect):
    r = orthogonal(pair[0].shape[-1], seed, reflect=reflect)
    close(info_nce_loss(*(z @ r for z in pair)), info_nce_loss(*pair))
    close(uniformity_loss(pair[0] @ r), uniformity_loss(pair[0]))
    close(alignment_loss(*(z @ r for z in pair)), alignment_loss(*pair))


@given(embeddings(count=2, min_d=4), seeds)
def test_info_nce_is_changed_by_a_map_on_one_side_only(pair, seed):
    z1, z2 = pair
    turned = info_nce_loss(z1, z2 @ -torch.eye(z2.shape[-1], dtype=z2.dtype))
    cosines = (normalize(z1) * normalize(z2)).sum(-1)
    assume(abs(cosines.sum()) > 1e-3)
    assert abs(turned - info_nce_loss(z1, z2)) > 1e-9


@given(embeddings(count=3), st.floats(0.05, 2))
def test_a_queue_of_all_other_rows_is_the_in_batch_loss(triple, temperature):
    z1, z2, _ = triple
    in_batch = info_nce_loss(z1, z2, temperature=temperature, reduction="none")
    for i in range(len(z1)):
        others = torch.cat([torch.cat((z[:i], z[i + 1 :])) for z in (z1, z2)])
        beside_queue = info_nce_loss(
            z1, z2, temperature=temperature, negatives=others, reduction="none"
        )
        close(beside_queue[i], in_batch[0, i])


@given(embeddings(count=2), st.floats(0.05, 2))
def test_info_nce_falls_when_the_positives_come_nearer(pair, temperature):
    z1, z2 = (normalize(z) for z in pair)
    queue = torch.cat((z1, z2))
    far = info_nce_loss(z1, z2, temperature=temperature, negatives=queue, reduction="none")
    near = info_nce_loss(z1, z1 + z2, temperature=temperature, negatives=queue, reduction="none")
    assert (near <= far + 1e-12)[(z1 + z2).norm(dim=-1) > 1e-6].all()


@given(embeddings(), st.floats(0.1, 4))
def test_uniformity_lies_between_all_apart_and_all_together(z, t):
    assert -4 * t - 1e-12 <= uniformity_loss(z, t=t) <= 1e-12
    together = z[:1].expand(len(z), -1)
    assert abs(uniformity_loss(together, t=t)) < 1e-12


@given(embeddings())
def test_uniformity_at_one_half_is_the_papers_less_1(z):
    u = normalize(z)
    off_diagonal = ~torch.eye(len(u), dtype=torch.bool)
    papers = (u @ u.mT)[off_diagonal].exp().mean().log()
    close(uniformity_loss(z, t=0.5), papers - 1)


@given(embeddings(), st.floats(0.5, 4))
def test_alignment_is_zero_for_equal_views_and_2_to_alpha_for_opposite_ones(z, alpha):
    assert alignment_loss(z, 3 * z, alpha=alpha) < 1e-7
    close(alignment_loss(z, -z, alpha=alpha), torch.tensor(2.0**alpha, dtype=z.dtype))


@given(embeddings())
def test_normalize_gives_unit_rows_that_point_the_same_way(z):
    u = normalize(z)
    close(u.norm(dim=-1), torch.ones(len(z), dtype=z.dtype))
    close(u * z.norm(dim=-1, keepdim=True), z)
    close(normalize(u), u)
