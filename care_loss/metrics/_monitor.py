"""A short report during training, for a logger, and warnings in words."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from care_loss import _checks, _report_checks
from care_loss.metrics._report import MIN_COLLAPSING_NORM, row_against_clean
from care_loss.metrics._sampling import Transform, sample
from care_loss.metrics._tables import EquivarianceReport, ReportRow

MAX_IMAGES = 512
MIN_SIGHTINGS = 4  # reports in succession that show the same, before there is a warning
MIN_IMPROVEMENT = 1.05  # from one report to the next: a fault that passes is not warned of
UNSHARED_DRAWS = 2  # fewer than in a report: in these each image is transformed by itself
MIN_UNSHARED_GAP_RATIO = 0.9  # from there on, sharing the draws makes no difference
# An embedding that moves less, with a gap ratio of no less, is on the way to invariance.
MAX_IGNORED_DISPLACEMENT, MIN_IGNORED_GAP_RATIO = 0.5, 0.75


class _Fault(NamedTuple):
    """What is wrong with an embedding."""

    kind: str
    sentence: str
    health: tuple[float, ...]  # figures of which one grows while it gets better


class EquivarianceMonitor:
    """Report during training how embeddings change under transformations.

    Call it with the encoder and the step. On a step that is due it measures the main figures of
    :func:`equivariance_report` with fewer draws, and returns them as
    :meth:`~EquivarianceReport.scalars` does. It leaves the mode of the encoder and all generators
    as they were. It needs `samples` + 3 forwards of the images, without gradient.

    If four reports in succession show the same fault, and it does not get better from one to the
    next, it warns, once for each kind. These are the faults:

    * The embeddings collapse: their mean norm is above 0.9. That of an untrained network often is,
      too, but it falls as training begins.
    * The embedding ignores a transformation: the verdict is invariant or nearly invariant, or the
      displacement is under half of chance and the gap ratio at least 0.75.
    * Sharing makes no difference: the gap ratio is at least 0.9, as for draws of each image.

    No warning is no evidence. Only :func:`compare` with a control tells whether the equivariance
    loss has an effect: training without sharing can lower the gap ratio as well.

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
        self.batch_size, self.device, self.seed = batch_size, device, seed
        self._sightings: dict[str, tuple[int, tuple[float, ...]]] = {}
        self._warned: set[str] = set()

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
        faults = {fault.kind: fault for row in rows for fault in _faults(row)}
        before, self._sightings = self._sightings, {}
        for kind, (_, sentence, health) in faults.items():
            seen, last = before.get(kind, (0, ()))
            better = any(b > MIN_IMPROVEMENT * a for a, b in zip(last, health, strict=False))
            seen = 1 if better else seen + 1
            self._sightings[kind] = seen, health
            if seen >= MIN_SIGHTINGS and kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(f"step {step}: {sentence}", stacklevel=3)


def _faults(row: ReportRow) -> list[_Fault]:
    """Return what is wrong."""
    name = row.transformation
    norm, gap, moved = (row.figures[key].mean for key in ("mean_norm", "gap_ratio", "displacement"))
    if row.verdict == "collapsed" or norm > MIN_COLLAPSING_NORM:
        sentence = (
            f"the embeddings collapse (mean norm {norm:.2f}): lower the equivariance weight, and "
            "check that the loss has a base loss, and that gradients are set to zero at each step."
        )
        return [_Fault("collapse", sentence, (1 - norm,))]
    if row.verdict in ("invariant", "nearly invariant") or (
        moved < MAX_IGNORED_DISPLACEMENT and gap >= MIN_IGNORED_GAP_RATIO
    ):
        sentence = (
            f"the embedding ignores {name!r} (displacement {moved:.2f} of chance, gap ratio "
            f"{gap:.2f}): is it in the ordinary views, or is the equivariance weight too high?"
        )
        return [_Fault(f"ignored {name}", sentence, (moved,))]
    if gap >= MIN_UNSHARED_GAP_RATIO:
        sentence = (
            f"sharing {name!r} makes no difference to the embeddings (gap ratio {gap:.2f}): does "
            "each chunk share one draw, does the loss get the `chunks` of the views, and does it "
            "get the embeddings of this encoder?"
        )
        # While embeddings still spread, the gap ratio says little.
        return [_Fault(f"unshared {name}", sentence, (1 / gap, 1 - norm))]
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
