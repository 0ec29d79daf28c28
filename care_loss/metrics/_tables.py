"""What the report holds, and how it prints."""

import html
import math
import textwrap
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
        reason: The figures that led to the verdict, beside their thresholds.
        images: The number of images.
        dim: The embedding dimension.
        draws: The number of draws, or of pairs of them; 1 for a fixed transformation.
        warnings: What limits the figures.
        figures: An :class:`Estimate` for each name of a figure.
        angles: The principal angles of the rotations of SO(D) that are fitted to all rows, in
            radians, for the first 16 draws, `(min(draws, 16), D // 2)`.
        by_draw: For the gap ratio, the share above chance and the displacement, what each draw adds
            to the mean, linearised. Their variances give the errors, and those of their differences
            the error of a difference under the same draws.
    """

    transformation: str
    output: str
    against: str
    verdict: str
    reason: str
    images: int
    dim: int
    draws: int
    warnings: tuple[str, ...]
    figures: Mapping[str, Estimate] = field(repr=False)
    angles: Tensor = field(repr=False)
    by_draw: Mapping[str, tuple[Tensor, ...]] = field(repr=False)


WIDTH = 88  # of what is printed
MAIN = {
    "gap_ratio": "gap ratio",
    "share_above_chance": "share above chance",
    "displacement": "displacement",
    "mean_norm": "mean norm",
}
SCALARS = (*MAIN, "effective_rank")
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
    "displacement": "displacement",
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
LEGEND = (
    "gap ratio: how much the Gram matrix changes under draws that all images share, relative to "
    "draws for each image. share above chance: the part of the displacement that one rotation "
    "explains. displacement: in units of the distance between different images. "
    ".full() has all figures."
)
BLOCKS = (
    ("gap_ratio", "rotation_share", "share_above_chance", "linear_share", "composition_share"),
    ("shared_gap", "unshared_gap", "mrr", "hits_at_1", "hits_at_5"),
    ("wahba_error", "invariance_error", "displacement", "composition_error"),
    ("composition_from_direct", "angle"),
    ("relative_equivariance", "mean_of_ratios", "near_identity", "effective_rank", "mean_norm"),
    ("cosine_spread",),
)


@dataclass(frozen=True, repr=False, eq=False)
class EquivarianceReport:
    """The rows of :func:`equivariance_report`; it prints as one table of the main figures.

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
            names = ["transformation", "output", "against", "verdict", "reason"]
            names += ["images", "dim", "draws"]
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

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Return the main figures as a flat dictionary, for a logger.

        The keys are `prefix`, the name of the transformation, and `/gap_ratio`,
        `/share_above_chance`, `/displacement` (in units of chance), `/mean_norm` and
        `/effective_rank`. All keys are always there; a figure that is not defined is NaN. They are
        of the clean images against the transformed ones, for the encoder's last output.
        """
        names = dict.fromkeys(row.transformation for row in self.rows)
        return {
            f"{prefix}{name}/{key}": self.row(name).figures[key].mean
            for name in names
            for key in SCALARS
        }

    def _entries(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """Yield the label, the cells and the sentences of each line of the short table."""
        several = len({row.output for row in self.rows}) > 1
        for row in self.rows:
            if row.against == "clean":
                label = f"{row.transformation}, {row.output}" if several else row.transformation
                cells = [_short_cell(name, row.figures[name]) for name in MAIN]
                yield label, cells, [f"{row.verdict}: {row.reason}.", *row.warnings]

    def __str__(self) -> str:
        entries = list(self._entries())
        table = [["", *MAIN.values()], *([label, *cells] for label, cells, _ in entries)]
        text = text_table(table, [[], *(sentences for *_, sentences in entries)])
        return "\n".join(
            [*textwrap.wrap(self._title(), WIDTH), "", *text, "", *textwrap.wrap(LEGEND, WIDTH)]
        )

    __repr__ = __str__

    def _title(self) -> str:
        dims = ", ".join(map(str, dict.fromkeys(row.dim for row in self.rows)))
        return (
            f"Equivariance of embeddings of {self.images} images, D = {dims} "
            "(mean ± standard error over draws)"
        )

    def full(self) -> str:
        """Return all figures as text: also against another draw, and with the chance level."""
        text = [f"Equivariance of embeddings of {self.images} images"]
        for title, lines in self._tables():
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            text.append(f"\n{title}".rstrip())
            for cells in lines:
                padded = (c.ljust(w) for c, w in zip(cells, widths, strict=True))
                text.append("  ".join(padded).rstrip())
        return "\n".join([*text, "", *self._notes()]).rstrip()

    def _repr_html_(self) -> str:
        head = ["", *MAIN.values(), "verdict"]
        lines = [[label, *cells, " ".join(text)] for label, cells, text in self._entries()]
        full = "".join(html_table(table, [], title) for title, table in self._tables())
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return (
            html_table([head, *lines], [LEGEND], self._title())
            + f"<details><summary>all figures</summary>{full}{notes}</details>"
        )


def text_table(table: list[list[str]], below: list[list[str]] | None = None) -> list[str]:
    """Return lines of cells as aligned text of `WIDTH` columns, whose labels are wrapped.

    Below each line come its sentences, if there are any.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    widths[0] = min(widths[0], max(8, WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    text = []
    for (label, *cells), sentences in zip(table, below or [[]] * len(table), strict=True):
        *above, last = textwrap.wrap(label, widths[0]) or [""]
        padded = (cell.ljust(width) for cell, width in zip([last, *cells], widths, strict=True))
        text += [*above, "  ".join(padded).rstrip()]
        for sentence in sentences:
            text += textwrap.wrap(sentence, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return text


def html_table(table: list[list[str]], sentences: list[str], title: str = "") -> str:
    """Return lines of cells as HTML, of which the first has the heads, and sentences below."""
    above, *below = (f"<p>{html.escape(text)}</p>" for text in (title, *sentences))
    head, *lines = table
    rows = [_html_line("th", head), *(_html_line("td", line) for line in lines)]
    return "".join([above if title else "", "<table>", *rows, "</table>", *below])


def _html_line(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def standard_error(values: Tensor) -> float:
    """Return the standard error of a mean over draws, 0 for a single one."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 0.005 else f"{value:.3f}"


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate.mean):
        return ""
    return f"{_number(estimate.mean)} ± {_number(estimate.error)}"


def _short_cell(name: str, estimate: Estimate) -> str:
    if math.isnan(estimate.mean):
        return "-"
    # The images before the transformation, whose mean this is, are the same for all draws.
    error = "" if name == "mean_norm" else f" ± {estimate.error:.3f}"
    return f"{estimate.mean:.3f}{error}"


def _chance(estimate: Estimate | None) -> str:
    return "" if estimate is None else _number(estimate.shuffled)
