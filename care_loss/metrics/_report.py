"""The report: an encoder under named transformations, with the controls that a claim needs."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from care_loss import _checks
from care_loss.metrics._measures import (
    across_halves,
    cosine_spread,
    distance,
    effective_rank,
    equivariance_error,
    linear_fit,
    mean_norm,
    retrieval,
    rotation_fit,
    squared_displacements,
    unit_rows,
)
from care_loss.metrics._sampling import Samples, Transform, sample
from care_loss.metrics._tables import COLUMNS, EquivarianceReport, Estimate, ReportRow
from care_loss.rotation import rotation_angles

Numbers = dict[str, Tensor]  # by name, one for each draw
HELD = 2**20  # how many numbers the embeddings of draws that are measured at once may have
CHANCE_DRAWS = 16  # of which the chance level is the mean
RETRIEVED = 1024  # images among which a transformed image is looked for, at most
PAIRED = 256  # images of which the paper's mean of ratios takes all pairs, at most
STILL = 0.01  # pairs that move by less than this share of the mean are near the identity
COLLAPSED = 0.99  # the mean norm from which an encoder is called collapsed
INVARIANT = 0.05  # the displacement, relative to that of shuffled rows, below which it is invariant
EQUIVARIANT = 0.1, 0.9  # the highest gap ratio and the lowest rotation share
PARTLY = 0.5, 0.5


def equivariance_report(
    encoder: Callable[[Tensor], Any],
    images: Tensor | Iterable[Any],
    transformations: Mapping[str, Transform],
    *,
    samples: int = 16,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> EquivarianceReport:
    r"""Measure how an encoder answers to transformations of its input, with all controls.

    Each transformation is drawn `samples` times. A draw is shared by all images, and is the same in
    every batch. As the **unshared control**, it is also drawn for each image by itself, eight
    times. The headline is the **gap ratio**: the equivariance error under shared draws, divided by
    that under unshared ones. It is near 0 where a draw acts on all embeddings as one rotation, and
    near 1 where sharing makes no difference; then both errors can be small, and are reported too.

    Rows compare the transformed images with the `"clean"` ones, and with `"another draw"` of the
    same transformation, as in training. All fits are held out. The errors are standard errors over
    the draws; they do not include how the figures vary with the images or with training.

    The verdict of a row is the first of these that applies:

    * `"collapsed"`: the mean norm is at least 0.99.
    * `"invariant"`: the invariance error is under 5 % of that of shuffled rows. The shares are NaN.
    * `"too few images"`: there are fewer than 2 D. Fits to fewer rows than D cannot tell.
    * `"equivariant"`: the gap ratio is at most 0.1 and the rotation share at least 0.9.
    * `"partly equivariant"`: the gap ratio is at most 0.5 and the rotation share at least 0.5.
    * `"not equivariant"`.

    A transformation whose draws are all equal (a flip of every image) counts as fixed: it has one
    draw and no unshared control, and its verdict depends on the rotation share alone.

    Args:
        encoder: Maps images `(n, ...)` to embeddings `(n, D)`, or to a pair of features and
            projections, which are measured both. A module, or a method of one, is brought into eval
            mode, and back into its mode afterwards. Other callables must use eval mode themselves.
        images: Images `(N, ...)` with `N >= 4`, or a `DataLoader` of batches of them, alone or
            first in a tuple. It is read once. The embeddings are kept on the CPU.
        transformations: Maps names to transforms of images `(n, ...)` to as many, which draw one
            augmentation for all, from the generators of torch, NumPy or `random` (kornia with
            `same_on_batch=True`, `torchvision.transforms.v2`). For the unshared control they are
            called with one image at a time.
        samples: The number of draws, at least 4. Half as many pairs of draws are compared with one
            another, and composed.
        batch_size: How many images are embedded at a time, if `images` is a tensor.
        device: Where the images are moved to; by default the device of the encoder's parameters,
            or, if it has none, that of the images.
        seed: Determines the draws, together with the name of the transformation. Neither the batch
            size nor the other transformations change them. The global generators are left as they
            were.
        progress: Show a progress bar, which needs tqdm. By default it is shown in a terminal or
            notebook if tqdm is installed.

    Returns:
        A report, which prints as tables. Its figures, all of unit rows, are:

        * `gap_ratio`, `shared_gap`, `unshared_gap`: :func:`equivariance_error` under shared and
          unshared draws, and their ratio.
        * `rotation_share`: :func:`rotation_share`, as 1 minus the ratio of the means over draws, so
          that draws that move nothing do no harm. `linear_share`: the same for the best linear map,
          which is not restricted to rotations, by least squares.
        * `composition_error`, `composition_share`, `composition_from_direct`: the error of
          :func:`composition_error` for two draws in succession, the share of the displacement that
          is explained, and the distance of this prediction from that of the rotation which is
          fitted to both in succession.
        * `mrr`, `hits_at_1`, `hits_at_5`: :func:`transformed_retrieval`, among 1,024 images at
          most.
        * `wahba_error`, `invariance_error`, `relative_equivariance`, `cosine_spread` (for `D = 2`),
          `effective_rank` and `mean_norm` (of the transformed images): the functions of this name.
        * `mean_of_ratios`: the relative equivariance as the paper defines it, a mean of ratios over
          pairs of 256 images at most; `near_identity` is the share of pairs that are left out
          because they move by less than 1 % of the mean.
        * `angle`: the largest principal angle, in radians, of the rotation of SO(D) that is fitted
          to all rows.

    Raises:
        TypeError, ValueError: if an argument is not as described; if a transformation draws for
            each image by itself, from another generator, or depends on the number of images; or if
            embeddings are not finite.

    Example:
        >>> def turn(images):  # one rotation of the plane for all images
        ...     angle = 2 * torch.pi * torch.rand(())
        ...     c, s = angle.cos(), angle.sin()
        ...     return images @ torch.stack([c, s, -s, c]).view(2, 2)
        >>> points = torch.randn(100, 2)
        >>> report = equivariance_report(torch.nn.Identity(), points, {"turn": turn})
        >>> report.row("turn").verdict
        'equivariant'
    """
    _checks.encoder(encoder)
    _checks.transformations(transformations)
    samples = _checks.count("samples", samples, 4)
    samples_of = sample(
        encoder,
        images,
        transformations,
        samples=samples,
        batch_size=_checks.count("batch_size", batch_size, 1),
        device=None if device is None else torch.device(device),
        seed=_checks.count("seed", seed, 0),
        progress=progress if progress is None else _checks.boolean("progress", progress),
    )
    rows: list[ReportRow] = []
    for name, found in samples_of.items():
        for output, clean in found.clean.items():
            rows += _rows(name, output, clean, found)
    return EquivarianceReport(tuple(rows), rows[0].images, samples, seed)


def _rows(name: str, output: str, clean: Tensor, samples: Samples) -> list[ReportRow]:
    """Return the row against clean images and, unless draws are equal, the one against draws."""
    shared, own = samples.shared[output], samples.own.get(output)
    twice = samples.twice.get(output)
    figures = _figures(clean, shared, own if own is None else (clean, own))
    warnings = []
    if twice is None:
        warnings.append("composition is not measured, because the size of the images changes.")
    else:
        a, b = (shared[0:-1:2], shared[1::2]) if len(shared) > 1 else (shared, shared)
        figures |= _composition(clean, a, b, twice)
    rows = [_row(name, output, "clean", clean, shared, figures, warnings)]
    if own is not None:
        first, second = shared[0:-1:2], shared[1::2]
        figures = _figures(first, second, (own[0::2], own[1::2]))
        rows.append(_row(name, output, "another draw", first, second, figures, []))
    return rows


def _row(
    name: str,
    output: str,
    against: str,
    z: Tensor,
    moved: Tensor,
    figures: dict[str, Estimate],
    warnings: list[str],
) -> ReportRow:
    """Reach the verdict, and say what limits the figures."""
    draws, n, d = moved.shape
    decided = verdict(figures, n, d)
    if decided == "invariant":
        warnings.append("the gap ratio of an invariant encoder is one of two small errors.")
    if decided == "too few images":
        warnings.append(f"{n} images are fewer than 2 D = {2 * d}, too few to fit rotations to.")
    elif n < 4 * d:
        warnings.append(f"{n} images are fewer than 4 D = {4 * d}: the linear share is too low.")
    if "gap_ratio" not in figures:
        warnings.append("all draws are equal: there is no unshared control.")
    if figures["invariance_error"].mean == 0:
        warnings.append("no embedding moves at all.")
    angles = _by_draws(_angles, z, moved)["angles"]
    if d > 1:
        figures["angle"] = _mean(angles[:, 0])
    shown = {key: figures[key] for key in COLUMNS if key in figures}
    return ReportRow(name, output, against, decided, n, d, draws, tuple(warnings), shown, angles)


def verdict(figures: Mapping[str, Estimate], n: int, d: int) -> str:
    """Return the verdict for `n` images and embeddings of dimension `d`."""
    error = figures["invariance_error"]
    if figures["mean_norm"].mean >= COLLAPSED:
        return "collapsed"
    if error.mean < INVARIANT * error.shuffled:
        return "invariant"
    if n < 2 * d:
        return "too few images"
    gap, share = figures.get("gap_ratio", Estimate(0, 0)).mean, figures["rotation_share"].mean
    for word, (highest, lowest) in ("equivariant", EQUIVARIANT), ("partly equivariant", PARTLY):
        if gap <= highest and share >= lowest:
            return word
    return "not equivariant"


def _figures(z: Tensor, moved: Tensor, own: tuple[Tensor, Tensor] | None) -> dict[str, Estimate]:
    """Measure pairs of embeddings, `(draws, n, D)` or one `(n, D)` for all, with their controls."""
    found = _by_draws(_numbers, z, moved)
    chance = _by_draws(partial(_numbers, shuffled=True), *_few(z, moved))
    alone = _by_draws(_of_moved, z, moved)

    def mean(name: str) -> Estimate:
        """Return the mean of a number over draws."""
        return _mean(found[name], chance[name])

    def share(name: str) -> Estimate:
        """Return the share of the displacement that maps with this error explain."""
        return _share(found[name], found["moved"], chance[name], chance["moved"])

    gap, squared = found["gap"], found["squared"]
    figures = {
        "shared_gap": mean("gap"),
        "rotation_share": share("wahba"),
        "linear_share": share("linear"),
        "mrr": mean("mrr"),
        "hits_at_1": mean("hits_at_1"),
        "hits_at_5": mean("hits_at_5"),
        "wahba_error": mean("wahba"),
        "invariance_error": mean("moved"),
        "relative_equivariance": _ratio(4 * gap, squared, 4 * chance["gap"], chance["squared"]),
        "cosine_spread": mean("spread"),
        **{name: _mean(values) for name, values in alone.items()},
    }
    if own is not None:
        unshared = _mean(_by_draws(lambda *pair: {"gap": equivariance_error(*pair)}, *own)["gap"])
        figures["unshared_gap"] = unshared
        figures["gap_ratio"] = _quotient(figures["shared_gap"], unshared)
    if moved.shape[-1] != 2:
        del figures["cosine_spread"]
    return figures


def _composition(z: Tensor, a: Tensor, b: Tensor, twice: Tensor) -> dict[str, Estimate]:
    """Measure the rotations of two draws one after the other, against what both did."""
    found = _by_draws(_composed, z, a, b, twice)
    chance = _by_draws(partial(_composed, shuffled=True), *_few(z, a, b, twice))
    error, whole = found["error"], found["moved"]
    return {
        "composition_error": _mean(error, chance["error"]),
        "composition_share": _share(error, whole, chance["error"], chance["moved"]),
        "composition_from_direct": _mean(found["direct"]),
    }


def _by_draws(measure: Callable[..., Numbers], *embeddings: Tensor) -> Numbers:
    """Measure a few draws at a time, so that what is held stays small."""
    draws, n, d = embeddings[-1].shape
    step = max(1, HELD // (d * max(n, d)))
    parts = [
        measure(*(z if z.ndim == 2 else z[i : i + step] for z in embeddings))
        for i in range(0, draws, step)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _few(*embeddings: Tensor) -> list[Tensor]:
    """Return the draws that the chance level is measured for."""
    return [z if z.ndim == 2 else z[:CHANCE_DRAWS] for z in embeddings]


def _numbers(z: Tensor, moved: Tensor, *, shuffled: bool = False) -> Numbers:
    """Return what is measured with and without shuffled rows, for each draw."""
    u, v = unit_rows(shuffled, z, moved)
    predicted = across_halves(rotation_fit(False), u, v)
    mrr, hits = retrieval(*(_spaced(x, RETRIEVED) for x in (predicted, v)))
    return {
        "gap": equivariance_error(z, moved, shuffled=shuffled),
        "wahba": distance(predicted, v),
        "linear": distance(across_halves(linear_fit(z), u, v), v),
        "moved": distance(u, v),
        "squared": squared_displacements(u, v),
        "spread": cosine_spread(z, moved, shuffled=shuffled),
        "mrr": mrr,
        "hits_at_1": hits[..., 0],
        "hits_at_5": hits[..., 1],
    }


def _spaced(rows: Tensor, most: int) -> Tensor:
    """Return `most` rows at most, at equal distances."""
    return rows[..., :: -(-rows.shape[-2] // most), :]


def _of_moved(z: Tensor, moved: Tensor) -> Numbers:
    """Return what has no chance level, for each draw."""
    ratios, left_out = _mean_of_ratios(z, moved)
    return {
        "mean_of_ratios": ratios,
        "near_identity": left_out,
        "effective_rank": effective_rank(moved),
        "mean_norm": mean_norm(moved),
    }


def _composed(z: Tensor, a: Tensor, b: Tensor, ab: Tensor, *, shuffled: bool = False) -> Numbers:
    u, a, b, ab = unit_rows(shuffled, z, a, b, ab)
    predicted = across_halves(rotation_fit(False), u, a, b)
    numbers = {"error": distance(predicted, ab), "moved": distance(u, ab)}
    if not shuffled:
        numbers["direct"] = distance(predicted, across_halves(rotation_fit(False), u, ab))
    return numbers


def _angles(z: Tensor, moved: Tensor) -> Numbers:
    """Return the principal angles of the rotations that fit all rows, `(draws, D // 2)`."""
    return {"angles": rotation_angles(rotation_fit(True)(*unit_rows(False, z, moved)))}


def _mean_of_ratios(z: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Return the paper's relative equivariance and the share of pairs left out, `(draws)`."""
    u, v = unit_rows(False, *(_spaced(x, PAIRED) for x in (z, moved)))
    rows = (u - v).square().sum(-1)
    # For unit rows this is the change of the squared distance; the diagonal is left out below.
    change = 2 * (u @ u.mT - v @ v.mT)
    together = rows.unsqueeze(-1) + rows.unsqueeze(-2)
    off = ~torch.eye(rows.shape[-1], dtype=torch.bool)
    kept = (together > STILL * together[..., off].mean(-1)[..., None, None]) & off
    ratios = torch.where(kept, change / together, 0).square()
    pairs = kept.sum((-2, -1))
    return ratios.sum((-2, -1)) / pairs, 1 - pairs / off.sum()


def _mean(values: Tensor, shuffled: Tensor | None = None) -> Estimate:
    chance = math.nan if shuffled is None else shuffled.mean().item()
    return Estimate(values.mean().item(), _standard_error(values), chance)


def _ratio(top: Tensor, bottom: Tensor, *shuffled: Tensor) -> Estimate:
    """Return the ratio of the means over draws; its error is that of the linearised ratio."""
    ratio = top.mean() / bottom.mean()
    error = _standard_error((top - ratio * bottom) / bottom.mean())
    return Estimate(ratio.item(), error, _ratio(*shuffled).mean if shuffled else math.nan)


def _quotient(top: Estimate, bottom: Estimate) -> Estimate:
    """Return the ratio of two means over draws that are independent of each other."""
    if not bottom.mean:
        return Estimate(math.nan, math.nan)
    ratio = top.mean / bottom.mean
    return Estimate(ratio, math.hypot(top.error, ratio * bottom.error) / bottom.mean)


def _share(error: Tensor, moved: Tensor, chance: Tensor, chance_moved: Tensor) -> Estimate:
    """Return the share of the displacement that is explained; NaN if an encoder is invariant."""
    if moved.mean() < INVARIANT * chance_moved.mean():
        return Estimate(math.nan, math.nan)
    rest = _ratio(*(x.square() for x in (error, moved, chance, chance_moved)))
    return Estimate(1 - rest.mean, rest.error, 1 - rest.shuffled)


def _standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0
