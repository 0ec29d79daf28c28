"""The losses as formulas: pure functions of embeddings `(*, N, D)`.

Rows are embeddings, and every function normalises them. Leading dimensions are free: each index of
them is one batch, and `reduction="mean"` averages over them too (the mean over no batch at all is
NaN, as everywhere in PyTorch). Half types are computed in float32 at least and give a float32 loss;
float64 stays float64. No function makes the host wait for a GPU but :func:`cross_fitted`, whose
singular value decompositions do.

InfoNCE and the equivariance loss are stated here as plain compositions of PyTorch operations. Where
first derivatives are enough, they are computed with gradients derived by hand, in less time and
memory; for `torch.compile` they are operators, whose second derivatives are an error. `torch.func`,
forward mode, `torch.export`, second derivatives and a queue that requires a gradient use the plain
composition.

Autocast is disabled around matrix products. InfoNCE follows PyTorch's setting of the precision of
float32 products (TF32, say). The equivariance, uniformity and alignment losses would lose too much
by this: they are computed in float64, or, on a CPU, for chunks up to four times as long as the
embedding dimension whose rows do not nearly coincide, and float32 products that are not rounded
further, in float32. If a backward of the plain composition runs under autocast, the gradient of
InfoNCE is rounded to 16 bits like that of any other layer.
"""

import warnings
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from care_loss import _checks, _chunks
from care_loss._autograd.gram_gap import gram_gap, gram_gap_by_id, pair_weight
from care_loss._autograd.info_nce import info_nce
from care_loss._autograd.operators import compiled_gram_gap, compiled_info_nce
from care_loss._autograd.paths import use_autograd_function
from care_loss._autograd.queue import info_nce_of_queue
from care_loss._checks import check_floating, check_on_device, show
from care_loss._numerics import computed_in, exact, savable, use_operator, without_autocast
from care_loss.rotation import fit_rotation
from care_loss.sphere import normalize

Reduction = Literal["mean", "none"]
Scale = Literal["mean", "authors"]

# With 32 rows in each half, rotations were learned in 16 and in 64 dimensions; with 16 rows,
# embeddings of clouds became invariant in both (docs/experiments/contrast.md).
MIN_ROWS_TO_FIT = 32
_warned: set[str] = set()


def info_nce_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    negatives: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrast the two views of each sample with all other rows (InfoNCE, or NT-Xent).

    With the :math:`2N` unit rows :math:`z` of both views, :math:`s_{ij} = z_i^\top z_j / \tau` and
    :math:`p(i)` the other view of row :math:`i`:

    .. math::
        \ell_i = -\log \frac{e^{s_{i p(i)}}}{\sum_{j \ne i} e^{s_{ij}}}
               = \mathrm{softplus}\Bigl(\log \sum_{j \ne i, p(i)} e^{s_{ij}} - s_{i p(i)}\Bigr)

    The second form is the one computed. The positive is not part of the sum, so no digits cancel
    when positives are close and the temperature is low.

    With `negatives` (the queue of MoCo) the anchors are the rows of `z1`, their positives the rows
    of `z2`, and the only negatives are the rows of the queue.

    Args:
        z1: Embeddings of the first view, `(*, N, D)` with `N >= 2`.
        z2: Embeddings of the second view, `(*, N, D)`.
        temperature: :math:`\tau > 0`, a number or a tensor `()`, which then gets a gradient. Other
            numbers are an error; in a tensor that is not on a CPU, or under `torch.compile`, they
            give NaN.
        negatives: A queue of other embeddings in any floating point dtype, `(K, D)`.
        reduction: `"mean"` for a scalar, `"none"` for one value per anchor.

    Returns:
        The loss, >= 0: `()`; with `reduction="none"` `(*, 2, N)`, where row 0 has the anchors of
        `z1`, or with a queue `(*, N)`. It is :math:`\log(2N - 1)` if all rows coincide.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> z = torch.eye(4)
        >>> info_nce_loss(z, z, temperature=0.5)  # log(1 + 6 exp(-2))
        tensor(0.5944)

    References:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020,
        equation 1. He et al., Momentum Contrast for Unsupervised Visual Representation Learning,
        2020, equation 1.
    """
    _checks.check_embeddings(z1=z1, z2=z2)
    temperature = _checks.as_temperature(temperature, z1.device)
    _checks.check_reduction(reduction)
    z1, z2 = savable(z1, z2)
    if isinstance(temperature, Tensor):
        (temperature,) = savable(temperature)
    mean = reduction == "mean"
    if negatives is None:
        if use_operator():
            return compiled_info_nce(z1, z2, temperature, None, mean=mean)
        plain = partial(_info_nce, mean=mean)
        if use_autograd_function(z1, z2, temperature):
            return info_nce(z1, z2, temperature, mean=mean, plain=plain)
        return plain(z1, z2, temperature)
    _check_queue(negatives, z1)
    plain = partial(_info_nce_of_queue, negatives=negatives)
    if negatives.requires_grad:
        losses = plain(z1, z2, temperature)
    elif use_operator():
        return compiled_info_nce(z1, z2, temperature, negatives, mean=mean)
    elif use_autograd_function(z1, z2, temperature, negatives):
        losses = info_nce_of_queue(z1, z2, temperature, negatives, plain)
    else:
        losses = plain(z1, z2, temperature)
    return losses.mean() if mean else losses


def equivariance_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    chunks: int | Tensor = 1,
    scale: Scale = "mean",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compare the Gram matrices of two views whose augmentation is shared by each chunk.

    For a chunk of :math:`n` unit rows :math:`u` and :math:`v` of the two views:

    .. math::
        \frac{1}{n(n-1)} \sum_{i \ne j} \bigl( u_i^\top u_j - v_i^\top v_j \bigr)^2

    It is 0 exactly when one orthogonal map takes every :math:`u_i` of the chunk to :math:`v_i`. The
    map may be a reflection, which does not change a Gram matrix. The loss is the mean over chunks,
    and long and short chunks have the same weight.

    Args:
        z1: Embeddings of the first view, `(*, N, D)` with `N >= 2`.
        z2: Embeddings of the second view, `(*, N, D)`.
        chunks: The number of contiguous chunks to cut the rows into, at the boundaries of
            `torch.tensor_split`; a batch too small for them gets `N // 2`. Or integer ids `(N,)`:
            rows with the same id form a chunk, and rows whose id is unique are ignored. Ids on the
            CPU are read, whatever the device of the embeddings, and cost little more than an int;
            if no id occurs twice, that is an error. Ids on another device are not read: the
            products of all N x N pairs of rows are computed, and if no id occurs twice, the loss is
            NaN.
        scale: `"mean"` over the pairs, or `"authors"`, the published code's
            :math:`\frac{2}{n} \sum_{i \ne j}`, which is :math:`2(n-1)` times as much.
        reduction: `"mean"` for a scalar, `"none"` for one value per chunk (not with ids).

    Returns:
        The loss, in [0, 4] for `scale="mean"` and [0, 8(n - 1)] for `scale="authors"`: `()`, or
        with `reduction="none"` `(*, chunks)`, at most `N // 2` of them.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> turned = z @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> equivariance_loss(z, turned)
        tensor(0.)
        >>> equivariance_loss(z, torch.ones(3, 2))  # (1 + 2 (1 - cos 45°)²) / 3
        tensor(0.3905)

    References:
        Gupta et al., Structuring Representation Geometry with Rotationally Equivariant Contrastive
        Learning, ICLR 2024, equation 3 and appendix E.
    """
    _checks.check_embeddings(z1=z1, z2=z2)
    chunks = _checks.as_chunks(chunks, z1.shape[-2], z1.device)
    _checks.check_scale(scale)
    _checks.check_reduction(reduction, chunks)
    z1, z2 = savable(z1, z2)
    mean = reduction == "mean"
    if use_operator():
        return compiled_gram_gap(z1, z2, chunks, scale, mean=mean)
    if not isinstance(chunks, Tensor) and _chunks.has_free_size(chunks, z1.shape[-2]):
        loss = _gap_of_padded_chunks(z1, z2, chunks, scale)
        return loss.mean() if mean else loss
    layout = _chunks.layout(chunks, z1.shape[-2])
    if layout is None:
        ids = cast(Tensor, chunks)
        plain = partial(_gap_by_id, ids=ids, scale=scale)
        if use_autograd_function(z1, z2):
            return gram_gap_by_id(z1, z2, ids, scale, plain=plain)
        return plain(z1, z2)
    _checks.check_pairs(layout[1])
    plain = partial(_gap_of_chunks, layout=layout, scale=scale, mean=mean)
    if use_autograd_function(z1, z2):
        return gram_gap(z1, z2, layout, scale, mean=mean, plain=plain)
    return plain(z1, z2)


def cross_fitted(
    z: Tensor, z_turned: Tensor, *, chunks: int | Tensor, special: bool = True
) -> Tensor:
    r"""Predict each turned embedding by the rotation that fits the other half of its chunk.

    Let :math:`u` and :math:`v` be the unit rows of `z` and `z_turned`, and A and B the halves of a
    chunk: its rows of even and of odd place. Row :math:`i` of the result is

    .. math::
        p_i = \begin{cases} u_i R_B & i \in A \\ u_i R_A & i \in B \end{cases}
        \qquad R_H = \operatorname*{arg\,min}_{R^\top R = I,\ \det R = 1}
        \sum_{j \in H} \lVert u_j R - v_j \rVert^2

    No row is predicted by a fit that has seen it, so a prediction is right only where one rotation
    relates rows that were fitted and rows that were not. Compared with `z_turned` by a contrastive
    loss, it trains the augmentation of a chunk to act as one rotation
    (:class:`care_loss.RotationContrastLoss`). The gradient flows through the fits, to `z` and to
    `z_turned`. Where a fit is not unique, both are those of
    :func:`care_loss.rotation.fit_rotation`.

    A half needs enough rows to determine the rotation in the dimensions that the embedding uses.
    With too few, the fits predict nothing, and a contrastive loss then teaches the embedding to
    ignore the augmentation, in silence. The first call with a half of fewer than 2 D and fewer than
    32 rows therefore gives a warning (not under `torch.compile`).

    Args:
        z: Embeddings of the images, `(*, N, D)` with `N >= 4`.
        z_turned: Embeddings of the images under an augmentation that each chunk shares,
            `(*, N, D)`.
        chunks: The number of contiguous chunks to cut the rows into, as for
            :func:`equivariance_loss`. Or integer ids `(N,)`, in any order: rows with the same id
            form a chunk. All chunks must have four rows or more: rows whose id is unique are an
            error, as there is nothing to predict them from. Ids are always read. On a GPU the host
            waits for them, as it does for the fits; under `torch.compile` they cause a graph break.
        special: Fit over SO(D), the rotations of determinant +1, instead of O(D).

    Returns:
        The predictions of the rows of `z_turned`, unit rows in the order of `z`, `(*, N, D)`. A
        zero row stays zero. A row with NaN makes NaN of those of its chunk that its half predicts,
        and of itself.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> z = torch.eye(3).repeat(8, 1)
        >>> turned = torch.cat((z[:12].roll(1, 1), z[12:].roll(2, 1)))  # one rotation per chunk
        >>> torch.allclose(cross_fitted(z, turned, chunks=2), turned)
        True

    References:
        Schönemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika,
        1966. A related idea with general linear maps is in Schmidt et al., Equivariance by
        Contrast, NeurIPS 2025.
    """
    special = _checks.as_boolean("special", special)
    _checks.check_embeddings(z=z, z_turned=z_turned)
    chunks = _checks.as_chunks(chunks, z.shape[-2], z.device)
    _checks.check_not_recorded("rotations", "use torch.export")
    if isinstance(chunks, Tensor) and torch.compiler.is_compiling():
        # Compiled code could not use the sizes that are read.
        uncompiled = torch.compiler.disable(_cross_fitted)
        return cast(Tensor, uncompiled(z, z_turned, chunks, special))
    return _cross_fitted(z, z_turned, chunks, special)


def uniformity_loss(z: Tensor, *, t: float = 2.0) -> Tensor:
    r"""Measure how evenly embeddings spread over the sphere; lower is more even.

    .. math:: \log \frac{1}{N(N-1)} \sum_{i \ne j} e^{-t \lVert z_i - z_j \rVert^2}

    With `t=0.5` it is :math:`L_{unif} - 1` of the CARE paper. Together with
    :func:`equivariance_loss` it is the paper's objective without an invariance term.

    Args:
        z: Embeddings, `(*, N, D)` with `N >= 2`.
        t: The scale of the Gaussian kernel, > 0.

    Returns:
        The loss, in [-4t, 0], the mean over leading dimensions: `()`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> uniformity_loss(torch.eye(3))  # all at squared distance 2
        tensor(-4.)

    References:
        Wang and Isola, Understanding Contrastive Representation Learning through Alignment and
        Uniformity on the Hypersphere, ICML 2020, section 4.1.
    """
    _checks.check_embeddings(z=z)
    t = _checks.as_number("t", t)
    u = _exact_unit_rows(z)
    n = z.shape[-2]
    with without_autocast(z):
        squared_norm = u.square().sum(-1, keepdim=True)  # 1, or 0 for a zero row
        squared_distance = squared_norm + squared_norm.mT - 2 * u @ u.mT
        diagonal = torch.eye(n, dtype=torch.bool, device=z.device)
        exponents = (-t * squared_distance).masked_fill(diagonal, -torch.inf)
        pairs = (~diagonal).sum().to(u.dtype)  # not of the number n, which a tracer would keep
        loss = exponents.logsumexp((-2, -1)) - pairs.log()
    return loss.mean().to(computed_in(z))


def alignment_loss(z1: Tensor, z2: Tensor, *, alpha: float = 2.0) -> Tensor:
    r"""Measure how far apart the two views of each sample are.

    .. math:: \frac{1}{N} \sum_i \lVert z_{1,i} - z_{2,i} \rVert^\alpha

    With `alpha=1` it is :math:`L_{inv}` of the CARE paper, as printed there. If two rows coincide,
    their gradient is 0 for every `alpha`.

    Args:
        z1: Embeddings of the first view, `(*, N, D)` with `N >= 2`.
        z2: Embeddings of the second view, `(*, N, D)`.
        alpha: The power of the distance, > 0.

    Returns:
        The loss, in [0, 2**alpha], the mean over leading dimensions: `()`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> alignment_loss(torch.eye(3), torch.eye(3).roll(1, 0))
        tensor(2.)

    References:
        Wang and Isola, 2020, section 4.1, as for :func:`uniformity_loss`.
    """
    _checks.check_embeddings(z1=z1, z2=z2)
    alpha = _checks.as_number("alpha", alpha)
    # Where rows nearly coincide, rounding unit rows to float32 would be the larger part.
    distance = (_exact_unit_rows(z1) - _exact_unit_rows(z2)).square().sum(-1)
    if alpha != 2:
        # A power other than 1 of the squared distance has no usable derivative at 0: rows that
        # coincide go around it.
        coincide = distance == 0
        distance = distance.masked_fill(coincide, 1).pow(alpha / 2).masked_fill(coincide, 0)
    return distance.mean().to(computed_in(z1))


def _unit_rows(z: Tensor) -> Tensor:
    return normalize(z.to(computed_in(z)))


def _exact_unit_rows(z: Tensor) -> Tensor:
    """Return unit rows in float64, for small differences of products that are near 1."""
    return normalize(exact(z))


def _info_nce(z1: Tensor, z2: Tensor, temperature: float | Tensor, *, mean: bool) -> Tensor:
    """Return the loss of the rows of two views, from the products of all rows."""
    u, v = _unit_rows(z1), _unit_rows(z2)
    with without_autocast(z1):
        scaled = u / temperature
        diagonal = torch.eye(z1.shape[-2], dtype=torch.bool, device=z1.device)
        # One block of products serves the anchors of both views, by rows and by columns.
        across = (scaled @ v.mT).masked_fill_(diagonal, -torch.inf)
        within1 = (scaled @ u.mT).masked_fill_(diagonal, -torch.inf)
        within2 = (v / temperature @ v.mT).masked_fill_(diagonal, -torch.inf)
        negative1 = torch.logaddexp(within1.logsumexp(-1), across.logsumexp(-1))
        negative2 = torch.logaddexp(within2.logsumexp(-1), across.logsumexp(-2))
        negative = torch.stack((negative1, negative2), -2)
        loss = _contrast((scaled * v).sum(-1).unsqueeze(-2), negative)
    return loss.mean() if mean else loss


def _info_nce_of_queue(
    z1: Tensor, z2: Tensor, temperature: float | Tensor, *, negatives: Tensor
) -> Tensor:
    """Return the loss `(*, N)` of each anchor of `z1`, whose only negatives are those given."""
    u, v = _unit_rows(z1), _unit_rows(z2)
    with without_autocast(z1):
        scaled = u / temperature
        wider = torch.promote_types(negatives.dtype, u.dtype)
        queue = normalize(negatives.to(wider)).to(u.dtype)
        return _contrast((scaled * v).sum(-1), (scaled @ queue.mT).logsumexp(-1))


def _contrast(positive: Tensor, negative: Tensor) -> Tensor:
    """Return the loss, from the score of the positive and the log of the sum over negatives."""
    # Not F.softplus: it drops e^-20 = 2e-9 beyond its threshold, a relative 1e-10.
    return -F.logsigmoid(positive - negative)


def _cross_fitted(z: Tensor, z_turned: Tensor, chunks: int | Tensor, special: bool) -> Tensor:
    """Return the rows of `z`, each moved by the rotation that fits the other half of its chunk."""
    n, d = z.shape[-2:]
    order, stacks = _layout_to_fit(chunks, n)
    _warn_of_few_rows(stacks[-1][1] // 2, d)
    u, v = (_exact_unit_rows(x) for x in savable(z, z_turned))
    parts: list[Tensor] = []
    places: list[Tensor] = []
    for fitted, moved in _chunks.halves(order, stacks, n, z.device):
        source, target = (_rows_at(x, fitted) for x in (u, v))
        with without_autocast(z):
            rotation = fit_rotation(source, target, special=special).rotation
            parts.append((_rows_at(u, moved) @ rotation).flatten(-3, -2))
        places.append(moved.flatten())
    back = torch.cat(places).argsort()
    return torch.cat(parts, -2).index_select(-2, back).to(computed_in(z))


def _rows_at(x: Tensor, numbers: Tensor) -> Tensor:
    """Return the rows `(*, k, m, D)` of `x` `(*, N, D)` that have the numbers `(k, m)`."""
    rows: Tensor = x.index_select(-2, numbers.flatten()).unflatten(-2, numbers.shape)
    return rows


def _layout_to_fit(chunks: int | Tensor, n: int) -> tuple[Tensor | None, list[tuple[int, int]]]:
    """Return the order and the stacks of chunks of at least four rows, which hold all `n` rows."""
    if not isinstance(chunks, Tensor):
        order, stacks = None, _chunks.stack_sizes(chunks, n)
    else:
        try:
            order, stacks = _chunks.layout_of_ids(chunks.detach().cpu())
        except RuntimeError as error:
            raise ValueError(
                "`chunks` given as ids must have values that can be read, got ids under a "
                "transform of torch.func, or on a device without memory: pass an int, or keep the "
                "ids out of the transform."
            ) from error
    # Long chunks come first. Rows that are in none have ids that are unique.
    shortest = stacks[-1][1] if sum(k * m for k, m in stacks) == n else 1
    if shortest < 4:
        ids = " Ids are those of chunks, not of samples." if isinstance(chunks, Tensor) else ""
        raise ValueError(
            f"`chunks` must form chunks of at least four rows, got one of {shortest} among {n} "
            "rows: each half of a chunk needs two rows, to fit the rotation of the other. Use "
            f"fewer chunks, and leave out short last batches with drop_last=True.{ids}"
        )
    return order, stacks


def _warn_of_few_rows(rows: int, d: int) -> None:
    """Warn, once per process, where rotations are fitted to too few rows to predict others."""
    if torch.compiler.is_compiling() or _warned:  # first: a tracer would record the sizes
        return
    least = min(2 * d, MIN_ROWS_TO_FIT)
    if rows >= least:
        return
    warnings.warn(
        f"the halves of chunks should have {least} rows or more for embeddings "
        f"of dimension {d}, got {rows}: rotations fitted to fewer may predict nothing of the other "
        "rows, and the embedding then learns to ignore the augmentation. Use fewer chunks, a "
        "larger batch, or a smaller head.",
        stacklevel=4,
    )
    _warned.add("few rows")


def _share_explained(z: Tensor, z_turned: Tensor, prediction: Tensor) -> Tensor:
    """Return the share `()` of the displacement that a prediction explains, without gradient."""
    # Rounded as the prediction is: it equals the unit rows exactly where nothing moves.
    u, v = (_exact_unit_rows(x.detach()).to(prediction.dtype) for x in (z, z_turned))
    missed, moved = ((x - v).square().sum() for x in (prediction.detach(), u))
    return 1 - missed / moved


def _gap_of_chunks(
    z1: Tensor,
    z2: Tensor,
    *,
    layout: tuple[Tensor | None, list[tuple[int, int]]],
    scale: Scale,
    mean: bool,
) -> Tensor:
    """Return the loss of chunks, from the Gram matrices of each."""
    order, stacks = layout
    if order is not None:
        order = order.to(z1.device, non_blocking=True)
        z1, z2 = (z.index_select(-2, order) for z in (z1, z2))
    u, v = (_chunks.split(_exact_unit_rows(z), stacks) for z in (z1, z2))
    gaps = [
        _squared_gap(p, q).sum((-2, -1)) * pair_weight(n, scale)
        for p, q, (_, n) in zip(u, v, stacks, strict=True)
    ]
    loss = torch.cat(gaps, -1).to(computed_in(z1))
    return loss.mean() if mean else loss


def _gap_of_padded_chunks(z1: Tensor, z2: Tensor, chunks: int, scale: Scale) -> Tensor:
    """Return the loss of each chunk, where the number of rows may be a symbol of a tracer."""
    rows, exist, lengths = _chunks.padded_rows(chunks, z1.shape[-2], z1.device)
    # A row that does not exist is 0, and so are its products.
    taken = (z.index_select(-2, rows.flatten()).unflatten(-2, rows.shape) for z in (z1, z2))
    u, v = (_exact_unit_rows(z.masked_fill(~exist.unsqueeze(-1), 0)) for z in taken)
    # An eye would make exporters compare strides.
    diagonal = rows.unsqueeze(-1) == rows.unsqueeze(-2)
    weight = pair_weight(lengths.to(u.dtype), scale).squeeze(-1)
    return (_squared_gap(u, v, diagonal).sum((-2, -1)) * weight).to(computed_in(z1))


def _gap_by_id(z1: Tensor, z2: Tensor, *, ids: Tensor, scale: Scale) -> Tensor:
    """Return the mean loss `()` of the chunks that `ids` `(N,)` name, without reading them."""
    ids = ids.to(z1.device, non_blocking=True)
    together = ids.unsqueeze(-1) == ids
    n = together.sum(-1)  # for each row, the size of its chunk
    unpaired = (n == 1).unsqueeze(-1)
    u, v = (_exact_unit_rows(z.masked_fill(unpaired, 0)) for z in (z1, z2))
    n = n.to(u.dtype)
    # The clamp keeps rows without a partner finite; no pair carries their weight.
    weight = together * pair_weight(n.clamp_min(2), scale)
    chunks = ((n > 1) / n).sum()  # 0 where no id occurs twice: the loss is NaN
    return ((_squared_gap(u, v) * weight).sum((-2, -1)) / chunks).mean().to(computed_in(z1))


def _squared_gap(u: Tensor, v: Tensor, diagonal: Tensor | None = None) -> Tensor:
    """Square the differences of Gram matrices off the diagonal, `(*, n, D)` -> `(*, n, n)`."""
    if diagonal is None:
        diagonal = torch.eye(u.shape[-2], dtype=torch.bool, device=u.device)
    with without_autocast(u):
        return (u @ u.mT - v @ v.mT).masked_fill(diagonal, 0).square()


def _check_queue(negatives: Any, z: Tensor) -> None:
    """Require negatives of shape `(K, D)` beside embeddings `z` of shape `(*, N, D)`."""
    check_floating("negatives", negatives)
    if negatives.ndim != 2 or not len(negatives) or negatives.shape[1] != z.shape[-1]:
        raise ValueError(
            f"`negatives` must have shape (K, {z.shape[-1]}) with K >= 1, the embedding dimension "
            f"of `z1`, got {show(negatives)}: store one negative per row."
        )
    check_on_device("negatives", negatives, z.device)
