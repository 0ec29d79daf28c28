"""A short report during training, for a logger, and warnings in words."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from care_loss import _checks, _report_checks
from care_loss.metrics._report import MIN_COLLAPSING_NORM, row_against_clean
from care_loss.metrics._sampling import Transform, sample
from care_loss.metrics._tables import EquivarianceReport, ReportRow

MAX_IMAGES = 512
MIN_SIGHTINGS = 3  # reports in succession that show the same, before there is a warning
UNSHARED_DRAWS = 2  # which take most of the time, as each image is transformed by itself
MIN_UNSHARED_GAP_RATIO = 0.9  # from there on, sharing the draws makes no difference


class EquivarianceMonitor:
    """Report during training how embeddings change under transformations.

    Call it with the encoder and the step. On a step that is due it measures the main figures of
    :func:`equivariance_report` with fewer draws, and returns them as
    :meth:`~EquivarianceReport.scalars` does. It leaves the mode of the encoder and all generators
    as they were. It needs `samples` + 3 forwards of the images, without gradient.

    If three reports in succession show the same fault, it warns, once for each kind:

    * The embeddings collapse: their mean norm is above 0.9.
    * The embedding ignores a transformation: the verdict is invariant or nearly invariant.
    * Sharing makes no difference: the gap ratio is at least 0.9, as for draws of each image.

    Args:
        images: Images `(N, ...)` that are not trained on, or a `DataLoader` of batches of them. The
            first 512 are kept.
        transformations: Maps names to transforms, as for the report.
        every: Report on steps that are multiples of it.
        samples: The number of draws, at least 4.
        batch_size: How many images are embedded at a time.
        device: Where the images are moved to; by default the device of the encoder.
        seed: Determines the draws, which are the same in every report.

    Raises:
        TypeError, ValueError: if an argument is not as described, here or in a call.

    Example:
        >>> encoder = torch.nn.Linear(4, 3)
        >>> monitor = EquivarianceMonitor(torch.randn(64, 4), {"flip": torch.neg}, every=100)
        >>> sorted(monitor(encoder, 0))[:2], monitor(encoder, 1)
        (['flip/displacement', 'flip/effective_rank'], {})
    """

    def __init__(
        self,
        images: Tensor | Iterable[Any],
        transformations: Mapping[str, Transform],
        *,
        every: int = 1,
        samples: int = 4,
        batch_size: int = 256,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        _report_checks.check_transformations(transformations)
        self.images = _first(images)
        self.transformations = dict(transformations)
        self.every = _checks.check_count("every", every, 1)
        self.samples = _checks.check_count("samples", samples, 4)
        self.batch_size, self.seed = batch_size, seed
        self.device = None if device is None else torch.device(device)
        self._sightings: dict[str, int] = {}

    def __call__(self, encoder: Callable[[Tensor], Any], step: int) -> dict[str, float]:
        """Return the scalars of a report if the step is due, otherwise an empty dictionary."""
        if _checks.check_count("step", step, 0) % self.every:
            return {}
        _report_checks.check_encoder(encoder)
        drawn = sample(
            encoder,
            self.images,
            self.transformations,
            samples=self.samples,
            batch_size=self.batch_size,
            device=self.device,
            seed=self.seed,
            progress=False,
            unshared_draws=UNSHARED_DRAWS,
            compose=False,
        )
        rows = [
            row_against_clean(name, list(found.clean)[-1], found) for name, found in drawn.items()
        ]
        self._warn(rows, step)
        return EquivarianceReport(tuple(rows), len(self.images), self.samples, self.seed).scalars()

    def _warn(self, rows: list[ReportRow], step: int) -> None:
        """Warn of what the last reports have shown in succession."""
        faults = dict(fault for row in rows for fault in _faults(row))
        for kind in self._sightings.keys() - faults.keys():
            # What was warned of stays warned of.
            self._sightings[kind] = min(self._sightings[kind], 0)
        for kind, sentence in faults.items():
            seen = self._sightings[kind] = self._sightings.get(kind, 0) + 1
            if seen == MIN_SIGHTINGS:
                self._sightings[kind] = -(2**31)
                warnings.warn(f"step {step}: {sentence}", stacklevel=3)


def _faults(row: ReportRow) -> list[tuple[str, str]]:
    """Return what is wrong, as kinds and sentences."""
    name = row.transformation
    norm, gap, moved = (row.figures[key].mean for key in ("mean_norm", "gap_ratio", "displacement"))
    if row.verdict == "collapsed" or norm > MIN_COLLAPSING_NORM:
        sentence = (
            f"the embeddings collapse (mean norm {norm:.2f}): lower the equivariance weight, and "
            "check that the loss has a base loss, and that gradients are set to zero at each step."
        )
        return [("collapse", sentence)]
    if row.verdict in ("invariant", "nearly invariant"):
        sentence = (
            f"the embedding ignores {name!r} (displacement {moved:.2f} of chance): is it in the "
            "ordinary views?"
        )
        return [(f"ignored {name}", sentence)]
    if gap >= MIN_UNSHARED_GAP_RATIO:
        sentence = (
            f"sharing {name!r} makes no difference to the embeddings (gap ratio {gap:.2f}): does "
            "each chunk share one draw, does the loss get the `chunks` of the views, and does it "
            "get the embeddings of this encoder?"
        )
        return [(f"unshared {name}", sentence)]
    return []


def _first(images: Tensor | Iterable[Any]) -> Tensor:
    """Return the first images, from a tensor or a loader."""
    if isinstance(images, Tensor):
        return _report_checks.as_images(images)[:MAX_IMAGES]
    _report_checks.check_loader(images)
    parts: list[Tensor] = []
    for batch in images:
        parts.append(_report_checks.as_images_of_batch(batch))
        if sum(map(len, parts)) >= MAX_IMAGES:
            break
    return _report_checks.as_images(torch.cat(parts) if parts else None)[:MAX_IMAGES]
