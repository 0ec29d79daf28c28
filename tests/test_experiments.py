"""The experiments: each runs for a few steps, and committed results are those of their commands."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "experiments"
RUNS = {  # each experiment and each group, with the files of results that it writes
    "theory": ("theory",),
    "ordinary_views --group proteins": ("arms-proteins", "weights-proteins"),
    "representation --group molecules --dim 16 --arm apart": ("representation-molecules-16",),
    "uses --group clouds hues sprites --arm apart": ("uses-clouds", "uses-hues", "uses-sprites"),
    "circle --arm apart --group upright": ("circle-upright",),
    "probe --arm apart": ("probe-orientations", "probe-similarities"),
}


def run(name, *options):
    command = [sys.executable, "-W", "error", str(FOLDER / f"{name}.py"), *options]
    # One thread for each process: the workers of the tests share the cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_experiment_is_run():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"common", "groups"}
    assert scripts == {command.split()[0] for command in RUNS}


@pytest.mark.parametrize("command", RUNS)
def test_an_experiment_runs_for_a_step(command, tmp_path):
    name, *more = command.split()
    result = run(name, *more, "--steps", "1", "--seed", "0", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for results in RUNS[command]:
        found = read(tmp_path / f"{results}-seed0.csv")
        committed = read(FOLDER / "results" / f"{results}-seed1.csv")
        assert found[0].keys() == committed[0].keys()
        if "--arm" in more:
            committed = [row for row in committed if row["arm"] in ("untrained", "apart")]
        assert len(found) == len(committed)
    (figure,) = tmp_path.glob("*.png")
    assert figure.stat().st_size > 10_000


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The results of the theory, seed 0, after a step."""
    path = tmp_path_factory.mktemp("theory") / "theory-seed0.csv"
    result = run("theory", "--steps", "1", "--seed", "0", "--output", str(path.parent))
    assert result.returncode == 0, result.stderr
    return path


@pytest.mark.xdist_group("theory")
def test_a_run_goes_on_where_it_was(first):
    options = ("--output", str(first.parent), "--steps", "1", "--seed")
    written = first.stat().st_mtime_ns
    assert run("theory", *options, "0", "1").returncode == 0
    assert first.stat().st_mtime_ns == written  # it was not run again
    assert first.with_name("theory-seed1.csv").exists()
    result = run("theory", *options, "0", "--steps", "3")
    assert result.returncode != 0
    assert "was written with --steps 1, got 3: give --again" in result.stderr


def test_a_run_with_other_arms_is_refused(tmp_path):
    written = tmp_path / "representation-clouds-2-seed0.csv"
    written.write_text("arm,steps\nuntrained,1\napart,1\n", encoding="utf-8")
    options = ("--output", str(tmp_path), "--steps", "1", "--seed", "0", "--group", "clouds")
    result = run("representation", *options, "--dim", "2", "--arm", "apart", "uniform")
    assert result.returncode != 0
    assert "was written with --arm ['apart'], got ['apart', 'uniform']: give" in result.stderr


@pytest.mark.xdist_group("theory")
def test_the_parts_of_the_theory_that_need_no_steps_are_the_committed_ones(first):
    found, expected = (
        [row for row in read(path) if row["part"] == "bound"]
        for path in (first, FOLDER / "results" / first.name)
    )
    assert len(found) == len(expected) == 100
    for row, committed in zip(found, expected, strict=True):
        for column in ("bound", "truth"):
            assert float(row[column]) == pytest.approx(float(committed[column]), rel=1e-2)
