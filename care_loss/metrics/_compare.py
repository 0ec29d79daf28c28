"""Several encoders under the same draws, against one of them."""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from care_loss import _report_checks
from care_loss.metrics._report import MIN_COLLAPSING_NORM, equivariance_report
from care_loss.metrics._sampling import Transform
from care_loss.metrics._tables import (
    MAIN,
    WIDTH,
    EquivarianceReport,
    Estimate,
    ReportRow,
    html_table,
    standard_error,
    text_table,
)

MIN_ERRORS = 2  # standard errors from which a difference is called one
IGNORES = ("invariant", "nearly invariant")
NOTE = "Errors are over draws, not over trainings: train several seeds before you conclude."


@dataclass(frozen=True, repr=False, eq=False)
class Comparison:
    """The reports of several encoders under the same draws; it prints as a table and sentences.

    Attributes:
        reports: The :class:`EquivarianceReport` of each encoder, by its name.
        baseline: The name of the encoder that the others are compared with.
    """

    reports: Mapping[str, EquivarianceReport]
    baseline: str

    def difference(self, name: str, transformation: str, figure: str) -> Estimate:
        """Return a figure of an encoder minus that of the baseline.

        Both are measured under the same draws, so what these have in common does not count: the
        standard error is that of the differences, draw by draw.

        Args:
            name: The name of an encoder.
            transformation: The name of a transformation.
            figure: `"gap_ratio"`, `"share_above_chance"` or `"displacement"`.

        Returns:
            An :class:`Estimate`, NaN where one of the two figures is not defined.
        """
        row, base = (self.reports[key].row(transformation) for key in (name, self.baseline))
        mean = row.figures[figure].mean - base.figures[figure].mean
        if math.isnan(mean):
            return Estimate(math.nan, math.nan)
        pairs = zip(row.by_draw[figure], base.by_draw[figure], strict=True)
        return Estimate(mean, math.hypot(*(standard_error(a - b) for a, b in pairs)))

    def to_dict(self) -> dict[str, Any]:
        """Return the name of the baseline, and the dictionary of each report by its name."""
        reports = {name: report.to_dict() for name, report in self.reports.items()}
        return {"baseline": self.baseline, "reports": reports}

    def _transformations(self) -> list[str]:
        return list(dict.fromkeys(row.transformation for row in self.reports[self.baseline].rows))

    def _table(self, transformation: str) -> list[list[str]]:
        """Return lines of cells, of which the first has the heads."""
        table = [[transformation, "gap ratio", "difference", "share", "difference", "verdict"]]
        for name, report in self.reports.items():
            row, cells = report.row(transformation), [name]
            for figure in ("gap_ratio", "share_above_chance"):
                value = row.figures[figure].mean
                cells.append("-" if math.isnan(value) else f"{value:.3f}")
                cells.append(self._difference(name, transformation, figure))
            table.append([*cells, row.verdict])
        return table

    def _difference(self, name: str, transformation: str, figure: str) -> str:
        if name == self.baseline:
            return "baseline"
        mean, error, _ = self.difference(name, transformation, figure)
        return "-" if math.isnan(mean) else f"{mean:+.3f} ± {error:.3f}"

    def _order(self, name: str, transformation: str) -> str:
        """Return in words whether an encoder is more equivariant than the baseline."""
        gap, share = (
            self.difference(name, transformation, figure)
            for figure in ("gap_ratio", "share_above_chance")
        )
        # Of a fixed transformation, and where an encoder is invariant, one of the two is not known.
        signs = [_sign(share), -_sign(gap)]
        if min(signs) < 0 < max(signs):
            return "neither more nor less equivariant than"
        if not any(signs):
            return "not clearly different from"
        return "more equivariant than" if max(signs) > 0 else "less equivariant than"

    def _sentence(self, transformation: str) -> str:
        """Return the conclusion about one transformation."""
        rows = {name: report.row(transformation) for name, report in self.reports.items()}
        base = rows[self.baseline]
        reason = _no_evidence(base)
        if reason and base.verdict not in IGNORES:
            return f"{transformation}: nothing can be concluded, as '{self.baseline}' is {reason}."
        sentences = []
        for name, row in rows.items():
            if name == self.baseline:
                continue
            if reason := _no_evidence(row):
                sentences.append(f"'{name}' is no evidence: it is {reason}.")
                continue
            sentences.append(
                f"'{name}' ({row.verdict}) is {self._order(name, transformation)} the baseline "
                f"'{self.baseline}': {self._against(name, transformation, row, base)}."
            )
        best, *others = sorted(rows, key=lambda name: _gap(rows[name]))
        if others and others[0] != self.baseline != best and _gap(rows[others[0]]) < _gap(base):
            sentences.append(
                f"'{others[0]}' is nearer to '{best}' than the baseline, with a gap ratio of "
                f"{_gap(rows[others[0]]):.3f}: if it is a control, it is the one that counts."
            )
        if base.verdict in IGNORES:
            sentences.append(
                f"The baseline is {base.verdict}: do its views contain '{transformation}'? Compare "
                "with a training whose views do not."
            )
        return f"{transformation}: {' '.join(sentences)}"

    def _against(self, name: str, transformation: str, row: ReportRow, base: ReportRow) -> str:
        parts = []
        for figure in ("gap_ratio", "share_above_chance"):
            if not math.isnan(self.difference(name, transformation, figure).mean):
                values = (r.figures[figure].mean for r in (row, base))
                parts.append("{} {:.3f} against {:.3f}".format(MAIN[figure], *values))
        return ", ".join(parts) or row.reason

    def __str__(self) -> str:
        report = self.reports[self.baseline]
        title = f"{len(self.reports)} encoders on {report.images} images, baseline: {self.baseline}"
        text = textwrap.wrap(title, WIDTH)
        for transformation in self._transformations():
            text += ["", *text_table(self._table(transformation))]
        text.append("")
        for transformation in self._transformations():
            text += textwrap.wrap(self._sentence(transformation), WIDTH, subsequent_indent="  ")
        return "\n".join([*text, *textwrap.wrap(NOTE, WIDTH)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(
            html_table(self._table(transformation), [self._sentence(transformation)])
            for transformation in self._transformations()
        )


def compare(
    encoders: Mapping[str, Callable[[Tensor], Any]],
    images: Tensor | Iterable[Any],
    transformations: Mapping[str, Transform],
    *,
    baseline: str,
    samples: int = 16,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Comparison:
    """Measure several encoders under the same draws, and compare them with one of them.

    A gap ratio says nothing without one to compare it with. There are two controls: a training
    without the augmentation in its views, and the no-sharing control (placebo), which is the same
    training with a draw of the augmentation for each image. The stronger of the two counts, the one
    with the lower gap ratio: name it as the baseline, and give the other one too.

    The comparison prints a table for each transformation, with the differences from the baseline
    and their standard errors over the draws, and a sentence that says which encoder is more
    equivariant than the baseline: its gap ratio is lower or its share above chance is higher, by
    more than two standard errors, and neither is the other way round. Encoders that ignore the
    transformation, or whose embeddings come near one point (a mean norm above 0.9), are no
    evidence. Errors over draws do not include how the figures vary with the training: compare
    several seeds.

    Args:
        encoders: Maps two names or more to encoders, as :func:`equivariance_report` takes them.
        images: As there. A `DataLoader` is read once for each encoder, in the same order.
        transformations: As there.
        baseline: The name of the encoder that the others are compared with.
        samples: As there, and so are the others.
        batch_size: How many images are embedded at a time, if `images` is a tensor.
        device: Where the images are moved to; by default the device of each encoder.
        seed: Determines the draws.
        progress: Show progress bars, which need tqdm.

    Returns:
        A :class:`Comparison`.

    Raises:
        TypeError, ValueError: if an argument is not as described, here or for the report.

    Example:
        >>> def turn(images):  # one rotation of the plane for all images
        ...     angle = 2 * torch.pi * torch.rand(())
        ...     c, s = angle.cos(), angle.sin()
        ...     return images @ torch.stack([c, s, -s, c]).view(2, 2)
        >>> points = torch.randn(100, 2)
        >>> encoders = {"ours": torch.nn.Identity(), "theirs": lambda x: x.square()}
        >>> comparison = compare(encoders, points, {"turn": turn}, baseline="theirs")
        >>> comparison.difference("ours", "turn", "gap_ratio").mean < 0
        True
    """
    _report_checks.check_encoders(encoders, baseline)
    reports = {
        name: equivariance_report(
            encoder,
            images,
            transformations,
            samples=samples,
            batch_size=batch_size,
            device=device,
            seed=seed,
            progress=progress,
        )
        for name, encoder in encoders.items()
    }
    return Comparison(reports, baseline)


def _sign(difference: Estimate) -> int:
    """Return 1 or -1 for a difference beyond its error, else 0."""
    mean, error, _ = difference
    return int(mean > MIN_ERRORS * error) - int(mean < -MIN_ERRORS * error)


def _gap(row: ReportRow) -> float:
    """Return the gap ratio of an encoder that it says something about, else infinity."""
    gap = row.figures["gap_ratio"].mean
    return math.inf if _no_evidence(row) or math.isnan(gap) else gap


def _no_evidence(row: ReportRow) -> str:
    """Return why a row says nothing of a rotation, or an empty text if it does."""
    norm = row.figures["mean_norm"].mean
    if row.verdict in ("no change", "too few images"):
        return f"measured on {row.verdict} ({row.reason})"
    if row.verdict in ("collapsed", *IGNORES):
        return f"{row.verdict} ({row.reason})"
    return f"near collapse (mean norm {norm:.3f})" if norm > MIN_COLLAPSING_NORM else ""
