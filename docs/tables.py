"""Write the tables of the pages from the committed results.

    python docs/tables.py

A table follows a line `<!-- table: name -->`. A test compares the pages with what this writes.
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
Row = dict[str, str]
Table = list[list[str]]  # the first line is the header
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(?:\n(?:\|.*\n)+)?\n?")


def read(name: str) -> list[Row]:
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pivot(rows: list[Row], across: str, cell: Callable[[Row], str], *keys: str) -> Table:
    """Make a line of the rows that agree in the keys, with a column for each value of `across`."""
    found = dict.fromkeys(row[across] for row in rows)
    columns = sorted(found, key=lambda name: name != "care_loss")
    table = [[*keys, *columns]]
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        cells = {row[across]: cell(row) for row in rows if tuple(row[k] for k in keys) == key}
        table.append([*key, *(cells.get(column, "") for column in columns)])
    return table


def errors(row: Row) -> str:
    return f"{row['value']} / {row['gradient']}"


def temperatures(dtype: str) -> Table:
    rows = [row for row in read(f"precision-{dtype}") if row["loss"] == "InfoNCE"]
    return pivot(
        [row | {"temperature": row["at"]} for row in rows], "contender", errors, "temperature"
    )


def near_the_minimum(dtype: str, rows_of_a_view: str) -> Table:
    rows = [row for row in read(f"precision-{dtype}") if row["loss"] == "equivariance"]
    rows = [row | {"noise": row["at"]} for row in rows if row["N"] == rows_of_a_view]
    return pivot(rows, "contender", errors, "noise")


def distances() -> Table:
    rows = [row for row in read("sphere-errors") if row["question"] == "distance, relative error"]
    libraries = ("care_loss", "acos", "acos, clamped", "geoopt", "geomstats", "scipy")
    table = [["dtype", "angle", *libraries]]
    return table + [[row["dtype"], row["angle"], *(row[k] for k in libraries)] for row in rows]


def failures(subject: str) -> Table:
    def cell(row: Row) -> str:
        return row["error"] if row["result"] == "wrong" else row["result"]

    def question(row: Row) -> str:
        return f"**{row['case']}**<br>right: {row['right answer']}<br>promised: {row['promise']}"

    rows = [row | {"case": question(row)} for row in read("failures") if row["subject"] == subject]
    return pivot(rows, "library", cell, "case")


def versions() -> Table:
    found = {row["library"]: row["version"] for row in read("failures")}
    return [["library", "version"], *([name, release] for name, release in found.items())]


TABLES: dict[str, Callable[[], Table]] = {
    "temperatures": lambda: temperatures("cpu"),
    "temperatures-bfloat16": lambda: temperatures("cpu-bfloat16"),
    "near-the-minimum": lambda: near_the_minimum("cpu", "256"),
    "near-the-minimum-long": lambda: near_the_minimum("cpu", "2048"),
    "distances": distances,
    "failures-of-rotations": lambda: failures("rotations"),
    "failures-of-info-nce": lambda: failures("InfoNCE"),
    "failures-of-equivariance": lambda: failures("equivariance"),
    "versions": versions,
}


def written(text: str) -> str:
    """Return the text of a page with its tables."""

    def table(match: re.Match[str]) -> str:
        header, *lines = TABLES[match[2]]()
        rows = [header, ["---"] * len(header), *lines]
        lines_of_text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        return f"{match[1]}\n{lines_of_text}\n"

    return MARKED.sub(table, text)


def main() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
