"""The report: an encoder under named transformations, with the controls that a claim needs."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from care_loss import _checks, _report_checks
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
from care_loss.metrics._tables import (
    COLUMNS,
    EquivarianceReport,
    Estimate,
    ReportRow,
    standard_error,
)
from care_loss.rotation import rotation_angles

Numbers = dict[str, Tensor]  # by name, one for each draw
MAX_ELEMENTS_PER_BLOCK = 2**20  # elements of embeddings that are measured at once
MAX_CHANCE_DRAWS = 16  # of which the chance level is the mean, and the angles are given
MAX_RETRIEVAL_IMAGES = 1024  # among which a transformed image is looked for
MAX_PAIRED_IMAGES = 256  # of which the paper's mean of ratios takes all pairs
UNKNOWN = Estimate(math.nan, math.nan)
MIN_DISPLACEMENT = 0.01  # of a pair, relative to the mean: the others are near the identity
MIN_COLLAPSED_NORM = 0.99  # the mean norm from which an encoder is called collapsed
MIN_COLLAPSING_NORM = 0.9  # from there on, a warning
MAX_INVARIANT_DISPLACEMENT, MAX_NEARLY_INVARIANT_DISPLACEMENT = 0.05, 0.2  # parts of chance
EQUIVARIANT = 0.1, 0.9  # the highest gap ratio and the lowest share above chance
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
    r"""Measure how embeddings change under transformations of the images, with all controls.

    Each transformation is drawn `samples` times. A draw is shared by all images, and is the same in
    every batch. As the **unshared control**, it is also drawn for each image by itself, eight
    times. The main figure is the **gap ratio**: the equivariance error under shared draws, divided
    by that under unshared ones. It is near 0 if a draw acts on all embeddings as one rotation, and
    near 1 if sharing makes no difference. For an invariant encoder both errors are small and their
    ratio is unstable, so both are reported.

    Rows compare the transformed images with the `"clean"` ones, and with `"another draw"` of the
    same transformation, as in training. All fits are held out. The errors are standard errors over
    the draws; they do not include how the figures vary with the images or with training.

    The verdict of a row is `"no change"` (no draw changed an image), `"collapsed"`, `"invariant"`,
    `"nearly invariant"`, `"too few images"` (fewer than 2 D, so that a fit to a half of them does
    not determine the rotation, or fewer than 4 D, where it is less exact than what it looks for),
    `"equivariant"`, `"partly equivariant"` or `"not equivariant"`. The reason beside it has the
    figures and their thresholds, all of which are in docs/measures.md.

    A transformation whose draws are all equal (a flip of every image) counts as fixed: it has one
    draw and no unshared control, and its verdict depends on the share alone.

    Args:
        encoder: Maps images `(n, ...)` to embeddings `(n, D)`, or to a pair of features and
            projections, both of which are measured. A module, or a method or `functools.partial` of
            one, is brought into eval mode, and back into its mode afterwards. In other callables
            the modules must be in eval mode: it is an error if an embedding depends on its batch.
        images: Images `(N, ...)` with `N >= 4`, or a `DataLoader` of batches of them, alone or
            first in a tuple. It is read once. The embeddings are kept on the CPU.
        transformations: Maps names to transforms of images `(n, ...)` to as many, which draw one
            augmentation for all, from the generators of torch, NumPy or `random` (kornia with
            `same_on_batch=True`, `torchvision.transforms.v2`). For the unshared control they are
            called with one image at a time. They must leave the dtype and the range of values as
            they are: conversion and normalisation belong in the encoder.
        samples: The number of draws, at least 4. Half as many pairs of draws are compared with one
            another, and composed.
        batch_size: How many images are embedded at a time, if `images` is a tensor.
        device: Where the images are moved to; by default the device of the encoder's parameters,
            or, if it has none, that of the images.
        seed: Determines the draws, together with the name of the transformation. The draws do not
            depend on the batch size or on the other transformations. The global generators are left
            as they were.
        progress: Show a progress bar, which needs tqdm. By default it is shown in a terminal or
            notebook if tqdm is installed.

    Returns:
        A report. It prints as one table, with the reason for each verdict; `full()` returns the
        text of all figures. These are, all of unit rows:

        * `gap_ratio`, `shared_gap`, `unshared_gap`: :func:`equivariance_error` under shared and
          unshared draws, and their ratio.
        * `rotation_share`: :func:`rotation_share`, as 1 minus the ratio of the means over draws, so
          that draws that move little do no harm. `share_above_chance`: (share - chance) / (1 -
          chance), with the share of shuffled rows as chance; a direction that all embeddings have
          in common gives a rotation share, but none above chance. `linear_share`: the share of the
          best linear map by least squares, which need not be a rotation (from 4 D images on).
        * `composition_error`, `composition_share`, `composition_from_direct`: the error of
          :func:`composition_error` for two draws in succession, the share of the displacement that
          is explained, and the distance of this prediction from that of the rotation which is
          fitted to both in succession.
        * `mrr`, `hits_at_1`, `hits_at_5`: :func:`transformed_retrieval`, among 1,024 images at
          most.
        * `displacement`: the invariance error, divided by that of shuffled rows.
        * `wahba_error`, `invariance_error` (of the draws that changed an image),
          `relative_equivariance`, `cosine_spread` (for `D = 2`), `effective_rank` and `mean_norm`
          (of the images before the transformation): the functions of this name.
        * `mean_of_ratios`: the relative equivariance as the paper defines it, a mean of ratios over
          pairs of 256 images at most; `near_identity` is the fraction of pairs that are left
          out because they move by less than 1 % of the mean.
        * `angle`: the largest principal angle, in radians, of the rotation of SO(D) that is fitted
          to all rows, for the first 16 draws; NaN with fewer than 2 D images, or if a reflection
          fits much better.

    Raises:
        TypeError, ValueError: if an argument is not as described; if a transformation draws for
            each image by itself, from another generator, or depends on the number of images; or if
            embeddings are not finite, or depend on the batch.

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
    _report_checks.check_encoder(encoder)
    _report_checks.check_transformations(transformations)
    samples = _checks.check_count("samples", samples, 4)
    by_name = sample(
        encoder,
        images,
        transformations,
        samples=samples,
        batch_size=_checks.check_count("batch_size", batch_size, 1),
        device=device,
        seed=_checks.check_count("seed", seed, 0),
        progress=progress if progress is None else _checks.as_boolean("progress", progress),
    )
    rows: list[ReportRow] = []
    for name, samples_of_name in by_name.items():
        for output in samples_of_name.clean:
            rows += _rows(name, output, samples_of_name)
    return EquivarianceReport(tuple(rows), rows[0].images, samples, seed)


def _rows(name: str, output: str, samples: Samples) -> list[ReportRow]:
    """Return the row against clean images and, unless draws are equal, the one against draws."""
    rows = [row_against_clean(name, output, samples)]
    if output in samples.unshared:
        shared, unshared = samples.shared[output], samples.unshared[output]
        first, second = shared[0:-1:2], shared[1::2]
        control = unshared[0::2], unshared[1::2]
        figures, by_draw = _figures(first, second, samples.differ, control)
        labels = name, output, "another draw"
        rows.append(_row(labels, first, second, samples.differ, figures, by_draw, []))
    return rows


def row_against_clean(name: str, output: str, samples: Samples) -> ReportRow:
    """Compare the transformed images with the clean ones."""
    clean, shared = samples.clean[output], samples.shared[output]
    unshared, twice = samples.unshared.get(output), samples.twice.get(output)
    control = None if unshared is None else (clean, unshared)
    figures, by_draw = _figures(clean, shared, samples.acted, control)
    warnings = []
    if twice is None:
        warnings.append("Composition is not measured, because the size of the images changes.")
    else:
        # Pairs of draws; a transformation whose draws are all equal is paired with itself.
        first, second = (shared[0:-1:2], shared[1::2]) if unshared is not None else (shared, shared)
        figures |= _composition(clean, first, second, twice)
    labels = name, output, "clean"
    return _row(labels, clean, shared, samples.acted, figures, by_draw, warnings)


def _row(
    labels: tuple[str, str, str],
    z: Tensor,
    moved: Tensor,
    acted: Tensor,
    figures: dict[str, Estimate],
    by_draw: dict[str, tuple[Tensor, ...]],
    warnings: list[str],
) -> ReportRow:
    """Reach the verdict, and say what limits the figures."""
    draws, n, d = moved.shape
    decided, reason = "no change", "no draw changed an image"
    if acted.any():
        decided, reason = verdict(figures, n, d)
    still, zeros = int((~acted).sum()), int((z == 0).all(-1).sum())
    if still:
        warnings.append(
            f"{still} of {draws} draws change no image, and are left out of the displacement and "
            "the shares."
        )
    norm = figures["mean_norm"].mean
    if decided != "collapsed" and norm > MIN_COLLAPSING_NORM:
        warnings.append(f"The mean norm is {norm:.3f}: the embeddings come near one point.")
    if zeros:
        warnings.append(f"{zeros} embeddings are 0, and have no direction.")
    if decided == "invariant":
        warnings.append("The gap ratio of an invariant encoder is one of two small errors.")
    if decided == "too few images":
        warnings.append(f"{n} images are too few for D = {d}: measure at least 4 D = {4 * d}.")
    elif n < 4 * d:
        warnings.append(
            f"{n} images are fewer than 4 D = {4 * d}: the rotation share is too low, and there is "
            "no linear share."
        )
    if "unshared_gap" not in figures:
        warnings.append("All draws are equal: there is no unshared control.")
    angles = _by_draws(_angles, *_few(z, moved))["angles"]
    if d > 1:
        figures["angle"] = _mean(angles[:, 0])
    shown = {key: figures.get(key, UNKNOWN) for key in COLUMNS}
    return ReportRow(*labels, decided, reason, n, d, draws, tuple(warnings), shown, angles, by_draw)


def verdict(figures: Mapping[str, Estimate], n: int, d: int) -> tuple[str, str]:
    """Return the verdict and its reason, if a draw changed an image.

    There are `n` images, and embeddings of dimension `d`.
    """
    norm, moved = figures["mean_norm"].mean, figures["displacement"].mean
    if math.isnan(figures["effective_rank"].mean):
        return "collapsed", "all embeddings are 0"
    if not norm < MIN_COLLAPSED_NORM:
        return "collapsed", f"mean norm {norm:.3f} ≥ {MIN_COLLAPSED_NORM}"
    for word, highest in (
        ("invariant", MAX_INVARIANT_DISPLACEMENT),
        ("nearly invariant", MAX_NEARLY_INVARIANT_DISPLACEMENT),
    ):
        if moved < highest:
            return word, f"displacement {moved:.3f} < {highest} of chance"
    if n < 2 * d:
        return "too few images", f"{n} images < 2 D = {2 * d}"
    gap, share = figures.get("gap_ratio", UNKNOWN).mean, figures["share_above_chance"].mean
    for word, (highest, lowest) in ("equivariant", EQUIVARIANT), ("partly equivariant", PARTLY):
        # A fixed transformation has no gap ratio.
        of_gap = "" if math.isnan(gap) else f"gap ratio {gap:.3f} ≤ {highest}, "
        if not gap > highest:
            if share >= lowest:
                return word, f"{of_gap}share above chance {share:.3f} ≥ {lowest}"
            if n < 4 * d:  # fits to so few rows are worse than the rotation itself
                return "too few images", f"share above chance {share:.3f}, {n} < 4 D = {4 * d}"
    if gap > PARTLY[0]:
        return "not equivariant", f"gap ratio {gap:.3f} > {PARTLY[0]}"
    return "not equivariant", f"share above chance {share:.3f} < {PARTLY[1]}"


def _figures(
    z: Tensor, moved: Tensor, acted: Tensor, control: tuple[Tensor, Tensor] | None
) -> tuple[dict[str, Estimate], dict[str, tuple[Tensor, ...]]]:
    """Measure pairs of embeddings, `(draws, n, D)` or one `(n, D)` for all, with their controls.

    Returns the figures, and for the main ones what each draw adds to them, linearised.
    """
    n, d = moved.shape[-2:]
    numbers = _by_draws(_numbers, z, moved)
    chance = _by_draws(partial(_numbers, shuffled=True), *_few(z, moved))
    # A draw that changes no image says nothing of the encoder.
    error = _mean(numbers["moved"][acted], chance["moved"])

    def share(name: str) -> Estimate:
        """Return the share of the displacement that maps with this error explain."""
        return _share(numbers[name][acted], numbers["moved"][acted], chance[name], chance["moved"])

    rotation = share("wahba")
    linear = share("linear") if n >= 4 * d else UNKNOWN
    gap, squared = numbers["gap"], numbers["squared"]
    ratios, left_out = _by_draws(_mean_of_ratios, z, moved).values()
    of_z = z if z.ndim == 3 else z.unsqueeze(0)
    figures = {
        "shared_gap": _mean(gap, chance["gap"]),
        "rotation_share": rotation,
        "share_above_chance": _above_chance(rotation),
        "linear_share": linear,
        "wahba_error": _mean(numbers["wahba"], chance["wahba"]),
        "invariance_error": error,
        "displacement": _in_units_of_chance(error),
        "relative_equivariance": _ratio(4 * gap, squared, 4 * chance["gap"], chance["squared"]),
        "mean_of_ratios": _mean(ratios),
        "near_identity": _mean(left_out),
        "effective_rank": _mean(_by_draws(lambda x: {"rank": effective_rank(x)}, of_z)["rank"]),
        "mean_norm": _mean(_by_draws(lambda x: {"norm": mean_norm(x)}, of_z)["norm"]),
    }
    for name in ("mrr", "hits_at_1", "hits_at_5", "cosine_spread"):
        figures[name] = _mean(numbers[name], chance[name])
    if d != 2:
        del figures["cosine_spread"]
    squares, errors = (numbers[name][acted].square() for name in ("moved", "wahba"))
    rest = (1 - rotation.mean) * squares - errors
    by_draw: dict[str, tuple[Tensor, ...]] = {
        "displacement": (numbers["moved"][acted] / chance["moved"].mean(),),
        "share_above_chance": (rest / squares.mean() / (1 - rotation.shuffled or math.nan),),
    }
    if control is not None:
        gaps = _by_draws(lambda *pair: {"gap": equivariance_error(*pair)}, *control)["gap"]
        unshared = _mean(gaps)
        figures["unshared_gap"] = unshared
        figures["gap_ratio"] = ratio = _quotient(figures["shared_gap"], unshared)
        by_draw["gap_ratio"] = gap / gaps.mean(), -ratio.mean * gaps / gaps.mean()
    return figures, by_draw


def _composition(z: Tensor, a: Tensor, b: Tensor, twice: Tensor) -> dict[str, Estimate]:
    """Measure the rotations of two draws one after the other, against what both did."""
    numbers = _by_draws(_composed, z, a, b, twice)
    chance = _by_draws(partial(_composed, shuffled=True), *_few(z, a, b, twice))
    error, whole = numbers["error"], numbers["moved"]
    return {
        "composition_error": _mean(error, chance["error"]),
        "composition_share": _share(error, whole, chance["error"], chance["moved"]),
        "composition_from_direct": _mean(numbers["direct"]),
    }


def _by_draws(measure: Callable[..., Numbers], *embeddings: Tensor) -> Numbers:
    """Measure a few draws at a time, so that what is held stays small."""
    draws, n, d = embeddings[-1].shape
    step = max(1, MAX_ELEMENTS_PER_BLOCK // (d * max(n, d)))
    parts = [
        measure(*(z if z.ndim == 2 else z[i : i + step] for z in embeddings))
        for i in range(0, draws, step)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _few(*embeddings: Tensor) -> list[Tensor]:
    """Return the first draws, for what need not be known of each."""
    return [z if z.ndim == 2 else z[:MAX_CHANCE_DRAWS] for z in embeddings]


def _numbers(z: Tensor, moved: Tensor, *, shuffled: bool = False) -> Numbers:
    """Return what is measured with and without shuffled rows, for each draw."""
    u, v = unit_rows(shuffled, z, moved)
    predicted = across_halves(rotation_fit(False), u, v)
    mrr, hits = retrieval(*(_spaced(x, MAX_RETRIEVAL_IMAGES) for x in (predicted, v)))
    return {
        "gap": equivariance_error(z, moved, shuffled=shuffled),
        "wahba": distance(predicted, v),
        "linear": distance(across_halves(linear_fit(z), u, v), v),
        "moved": distance(u, v),
        "squared": squared_displacements(u, v),
        "cosine_spread": cosine_spread(z, moved, shuffled=shuffled),
        "mrr": mrr,
        "hits_at_1": hits[..., 0],
        "hits_at_5": hits[..., 1],
    }


def _spaced(rows: Tensor, most: int) -> Tensor:
    """Return `most` rows at most, at equal distances, of both halves alike."""
    step = -(-rows.shape[-2] // most)
    return rows[..., :: step if step == 1 else step | 1, :]


def _composed(z: Tensor, a: Tensor, b: Tensor, ab: Tensor, *, shuffled: bool = False) -> Numbers:
    u, a, b, ab = unit_rows(shuffled, z, a, b, ab)
    predicted = across_halves(rotation_fit(False), u, a, b)
    numbers = {"error": distance(predicted, ab), "moved": distance(u, ab)}
    if not shuffled:
        numbers["direct"] = distance(predicted, across_halves(rotation_fit(False), u, ab))
    return numbers


def _angles(z: Tensor, moved: Tensor) -> Numbers:
    """Return the principal angles of the rotations that fit all rows, `(draws, D // 2)`.

    They are NaN where fits cannot tell, and where a reflection fits much better than any rotation.
    """
    u, v = unit_rows(False, z, moved)
    rotation, reflection = (rotation_fit(special)(u, v) for special in (True, False))
    lost = distance(u @ rotation, v).square() - distance(u @ reflection, v).square()
    unknown = (lost > 0.1 * distance(u, v).square()) | (u.shape[-2] < 2 * u.shape[-1])
    angles = rotation_angles(rotation)
    return {"angles": angles.masked_fill(unknown.unsqueeze(-1), torch.nan)}


def _mean_of_ratios(z: Tensor, moved: Tensor) -> Numbers:
    """Return the paper's relative equivariance and the fraction of pairs left out, by draw."""
    u, v = unit_rows(False, *(_spaced(x, MAX_PAIRED_IMAGES) for x in (z, moved)))
    rows = (u - v).square().sum(-1)
    # For unit rows this is the change of the squared distance; the diagonal is left out below.
    change = 2 * (u @ u.mT - v @ v.mT)
    together = rows.unsqueeze(-1) + rows.unsqueeze(-2)
    off = ~torch.eye(rows.shape[-1], dtype=torch.bool, device=rows.device)
    kept = (together > MIN_DISPLACEMENT * together[..., off].mean(-1)[..., None, None]) & off
    ratios = torch.where(kept, change / together, 0).square()
    pairs = kept.sum((-2, -1))
    return {"ratios": ratios.sum((-2, -1)) / pairs, "left out": 1 - pairs / off.sum()}


def _mean(values: Tensor, shuffled: Tensor | None = None) -> Estimate:
    chance = math.nan if shuffled is None else shuffled.mean().item()
    return Estimate(values.mean().item(), standard_error(values), chance)


def _ratio(top: Tensor, bottom: Tensor, *shuffled: Tensor) -> Estimate:
    """Return the ratio of the means over draws; its error is that of the linearised ratio."""
    ratio = top.mean() / bottom.mean()
    error = standard_error((top - ratio * bottom) / bottom.mean())
    return Estimate(ratio.item(), error, _ratio(*shuffled).mean if shuffled else math.nan)


def _quotient(top: Estimate, bottom: Estimate) -> Estimate:
    """Return the ratio of two means over draws that are independent of each other."""
    if not bottom.mean:
        return Estimate(math.nan, math.nan)
    ratio = top.mean / bottom.mean
    return Estimate(ratio, math.hypot(top.error, ratio * bottom.error) / bottom.mean)


def _share(error: Tensor, moved: Tensor, chance: Tensor, chance_moved: Tensor) -> Estimate:
    """Return the share of the displacement that is explained; NaN if an encoder is invariant."""
    if moved.mean() < MAX_INVARIANT_DISPLACEMENT * chance_moved.mean():
        return UNKNOWN
    rest = _ratio(*(x.square() for x in (error, moved, chance, chance_moved)))
    return Estimate(1 - rest.mean, rest.error, 1 - rest.shuffled)


def _in_units_of_chance(error: Estimate) -> Estimate:
    """Return an error divided by that of shuffled rows."""
    chance = error.shuffled
    return Estimate(error.mean / chance, error.error / chance) if chance else UNKNOWN


def _above_chance(share: Estimate) -> Estimate:
    """Return the share in units of what chance leaves: 0 for shuffled rows, 1 for a rotation."""
    left = 1 - share.shuffled
    return Estimate(1 - (1 - share.mean) / left, share.error / left) if left else UNKNOWN
