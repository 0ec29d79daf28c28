"""The experiments: each runs for a few steps, and committed results are those of their commands."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "experiments"
RUNS = [("theory", "theory", ())]
RUNS += [
    ("ordinary_views", f"ordinary_views-{group}", ("--group", group))
    for group in ("clouds", "sprites")
]


def run(name, *options):
    command = [sys.executable, "-W", "error", str(FOLDER / f"{name}.py"), *options]
    return subprocess.run(command, capture_output=True, text=True)


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_experiment_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"common", "groups"} | {
        name for name, _, _ in RUNS
    }


@pytest.mark.parametrize(("name", "result_name", "more"), RUNS, ids=[run[1] for run in RUNS])
def test_runs_for_a_few_steps_and_goes_on_where_it_was(name, result_name, more, tmp_path):
    options = (*more, "--steps", "1", "--output", str(tmp_path), "--seed")
    result = run(name, *options, "0")
    assert result.returncode == 0, result.stderr
    first = tmp_path / f"{result_name}-seed0.csv"
    written = first.stat().st_mtime_ns
    result = run(name, *options, "0", "1")
    assert result.returncode == 0, result.stderr
    assert first.stat().st_mtime_ns == written  # it was not run again
    assert read(first)[0].keys() == read(tmp_path / f"{result_name}-seed1.csv")[0].keys()
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    result = run(name, *options, "0", "--steps", "3")
    assert "was written with --steps 1, got 3: give --again" in result.stderr


def test_the_parts_of_the_theory_that_need_no_steps_are_the_committed_ones(tmp_path):
    result = run("theory", "--steps", "1", "--seed", "0", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    found, expected = (
        [row for row in read(path) if row["part"] == "bound"]
        for path in (tmp_path / "theory-seed0.csv", FOLDER / "results" / "theory-seed0.csv")
    )
    assert len(found) == len(expected) == 100
    for row, committed in zip(found, expected, strict=True):
        for column in ("bound", "truth"):
            assert float(row[column]) == pytest.approx(float(committed[column]), rel=1e-2)
