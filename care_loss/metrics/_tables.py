"""What the report holds, and how it prints."""

import html
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from care_loss import _report_checks


class Estimate(NamedTuple):
    """A figure of the report.

    Attributes:
        mean: The mean over the draws.
        error: Its standard error.
        shuffled: What shuffled rows reach, the chance level; NaN where it is not measured.
    """

    mean: float
    error: float
    shuffled: float = math.nan


@dataclass(frozen=True, eq=False)
class ReportRow:
    """What is known of one transformation, for one output of the encoder.

    Attributes:
        transformation: The name of the transformation.
        output: `"embeddings"`, or `"features"` or `"projections"`.
        against: What the transformed images are compared with: `"clean"` images, or `"another
            draw"` of the transformation.
        verdict: One of the verdicts that :func:`equivariance_report` lists.
        images: The number of images.
        dim: The embedding dimension.
        draws: The number of draws, or of pairs of them; 1 for a fixed transformation.
        warnings: What limits the figures.
        figures: An :class:`Estimate` for each name of a figure.
        angles: The principal angles of the rotations of SO(D) that are fitted to all rows, in
            radians, for the first 16 draws, `(min(draws, 16), D // 2)`.
    """

    transformation: str
    output: str
    against: str
    verdict: str
    images: int
    dim: int
    draws: int
    warnings: tuple[str, ...]
    figures: Mapping[str, Estimate] = field(repr=False)
    angles: Tensor = field(repr=False)


CAPTION = "Mean ± standard error over draws:"
COLUMNS = {
    "gap_ratio": "gap ratio",
    "shared_gap": "shared gap",
    "unshared_gap": "unshared gap",
    "rotation_share": "rotation share",
    "share_above_chance": "above chance",
    "linear_share": "linear share",
    "composition_share": "composition share",
    "mrr": "MRR",
    "hits_at_1": "hits@1",
    "hits_at_5": "hits@5",
    "wahba_error": "Wahba error",
    "invariance_error": "invariance error",
    "relative_equivariance": "relative equiv.",
    "mean_of_ratios": "mean of ratios",
    "near_identity": "near identity",
    "composition_error": "composition error",
    "composition_from_direct": "from direct fit",
    "cosine_spread": "cosine spread",
    "angle": "largest angle (rad)",
    "effective_rank": "effective rank",
    "mean_norm": "mean norm",
}
BLOCKS = (
    ("gap_ratio", "rotation_share", "share_above_chance", "linear_share", "composition_share"),
    ("shared_gap", "unshared_gap", "mrr", "hits_at_1", "hits_at_5"),
    ("wahba_error", "invariance_error", "composition_error", "composition_from_direct", "angle"),
    ("relative_equivariance", "mean_of_ratios", "near_identity", "effective_rank", "mean_norm"),
    ("cosine_spread",),
)


@dataclass(frozen=True, repr=False, eq=False)
class EquivarianceReport:
    """The rows of :func:`equivariance_report`; it prints as tables.

    Attributes:
        rows: One :class:`ReportRow` for each transformation, output and kind of pair.
        images: The number of images.
        samples: The number of draws of each transformation that was asked for.
        seed: The seed of the draws.
    """

    rows: tuple[ReportRow, ...]
    images: int
    samples: int
    seed: int

    def row(
        self, transformation: str, *, output: str | None = None, against: str = "clean"
    ) -> ReportRow:
        """Return the row of a transformation; `output` defaults to the encoder's last output."""
        rows = [r for r in self.rows if (r.transformation, r.against) == (transformation, against)]
        rows = [r for r in rows if output in (None, r.output)]
        _report_checks.check_any_row(rows, self.rows, (transformation, output, against))
        return rows[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as Python numbers; the rows are flat, as a table or a log needs them.

        For each figure, a row has its mean under the figure's name, its standard error under
        `<name>_standard_error` and, if it was measured, the chance level under `<name>_shuffled`.
        """
        rows = []
        for row in self.rows:
            names = ("transformation", "output", "against", "verdict", "images", "dim", "draws")
            record = {name: getattr(row, name) for name in names}
            record["warnings"] = list(row.warnings)
            for name, (mean, error, shuffled) in row.figures.items():
                record |= {name: mean, f"{name}_standard_error": error}
                if not math.isnan(shuffled):
                    record[f"{name}_shuffled"] = shuffled
            record["angles"] = row.angles.tolist()
            rows.append(record)
        return {
            "images": self.images,
            "samples": self.samples,
            "seed": self.seed,
            "rows": rows,
        }

    def _tables(self) -> Iterator[tuple[str, list[list[str]]]]:
        """Yield tables as lines of cells, the first of each kind with a title."""
        labels = {
            "transformation": [r.transformation for r in self.rows],
            "against": [r.against for r in self.rows],
        }
        if len({r.output for r in self.rows}) > 1:
            labels["output"] = [r.output for r in self.rows]
        shown = {"verdict": [r.verdict for r in self.rows]}
        for title, cell in (CAPTION, _cell), ("Chance level, of shuffled rows:", _chance):
            for block in BLOCKS:
                for name in block:
                    cells = [cell(r.figures.get(name)) for r in self.rows]
                    shown |= {COLUMNS[name]: cells} if any(cells) else {}
                if shown:
                    columns = labels | shown
                    yield title, [list(columns), *map(list, zip(*columns.values(), strict=True))]
                title, shown = "", {}

    def _notes(self) -> list[str]:
        several = len({r.output for r in self.rows}) > 1
        return [
            f"{r.transformation}, {r.against}{several * f', {r.output}'}: {warning}"
            for r in self.rows
            for warning in r.warnings
        ]

    def __str__(self) -> str:
        text = [f"Equivariance of embeddings of {self.images} images"]
        for title, lines in self._tables():
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            text.append(f"\n{title}".rstrip())
            for cells in lines:
                padded = (c.ljust(w) for c, w in zip(cells, widths, strict=True))
                text.append("  ".join(padded).rstrip())
        return "\n".join([*text, "", *self._notes()]).rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        text = [f"<p>Equivariance of embeddings of {self.images} images</p>"]
        for title, (head, *lines) in self._tables():
            text.append(f"<p>{title}</p><table>")
            text += [_html_line("th", head), *(_html_line("td", line) for line in lines)]
            text.append("</table>")
        return "".join([*text, *(f"<p>{html.escape(note)}</p>" for note in self._notes())])


def _html_line(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 0.005 else f"{value:.3f}"


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate.mean):
        return ""
    return f"{_number(estimate.mean)} ± {_number(estimate.error)}"


def _chance(estimate: Estimate | None) -> str:
    return "" if estimate is None else _number(estimate.shuffled)
