"""The experiments: each runs for a few steps, and committed results are those of their commands."""

import csv
import gzip
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "docs" / "experiments"
THREE = "CARE, three forwards"
RUNS = {  # each experiment and each group, with the files of results that it writes
    "theory": ("theory",),
    "ordinary_views --group proteins": ("arms-proteins", "weights-proteins"),
    f"representation --group molecules --dim 16 --arm '{THREE}'": ("representation-molecules",),
    f"uses --group clouds hues sprites --arm '{THREE}'": (
        "uses-clouds",
        "uses-hues",
        "uses-sprites",
    ),
    f"circle --arm '{THREE}' --group upright": ("circle-upright",),
    f"probe --arm '{THREE}'": ("probe-orientations", "probe-similarities"),
    "several --arm 'separate views'": ("several",),
    "contrast --part arms --group crops sprites --dim 16 --arm 'rotation contrast'": (
        "contrast-crops",
        "contrast-sprites",
    ),
    "benefit --part published cost --arm 'SimCLR with the augmentation'": (
        "benefit-published",
        "benefit-cost",
    ),
    "benefit --part rotations upright --arm 'rotation contrast'": (
        "benefit-rotations",
        "benefit-upright",
    ),
    "benefit --part hues crops 'hue turned' 'hue ignored' --arm 'rotation contrast'": (
        "benefit-hues",
        "benefit-crops",
        "benefit-hue turned",
        "benefit-hue ignored",
    ),
}
# Of a run that is long, the part that make test takes; make test-deep takes all of it.
LONG = {
    "ordinary_views --group proteins",
    "benefit --part hues crops 'hue turned' 'hue ignored' --arm 'rotation contrast'",
}
PARTS = {"ordinary_views --group proteins --part arms": ("arms-proteins",)}
COMMANDS = [pytest.param(run, marks=[pytest.mark.deep] * (run in LONG)) for run in RUNS]


def run(name, *options, folder=None):
    command = [sys.executable, "-W", "error", str(FOLDER / f"{name}.py"), *options]
    # One thread for each process: the workers of the tests share the cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def write_fashion(folder):
    """Write a few random pictures in the format of Fashion-MNIST."""
    folder.mkdir(parents=True)
    for part, count in (("train", 3000), ("t10k", 300)):
        for kind, sizes, most in (
            ("images-idx3", [count, 28, 28], 256),
            ("labels-idx1", [count], 10),
        ):
            values = torch.randint(most, sizes, dtype=torch.uint8)
            header = bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes)
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + values.numpy().tobytes())


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_every_experiment_is_run():
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    scripts -= {"common", "fashion", "groups", "patches", "questions"}
    assert scripts == {command.split()[0] for command in RUNS}


@pytest.mark.parametrize("command", [*COMMANDS, *PARTS])
def test_an_experiment_runs_for_a_step(command, tmp_path):
    name, *more = shlex.split(command)
    if name == "benefit":
        write_fashion(tmp_path / "build/fashion-mnist")
    options = ("--steps", "1", "--seed", "0", "--output", str(tmp_path))
    result = run(name, *more, *options, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    for results in (RUNS | PARTS)[command]:
        found = read(tmp_path / f"{results}.csv")
        committed = read(FOLDER / "results" / f"{results}.csv")
        committed = [row for row in committed if row["seed"] == "1"]
        assert found[0].keys() == committed[0].keys()
        if "--arm" in more:
            asked = "untrained", more[more.index("--arm") + 1]
            committed = [row for row in committed if row["arm"] in asked]
        if "--dim" in more:
            committed = [row for row in committed if row["dim"] == "16"]
        assert len(found) == len(committed)
    (figure,) = tmp_path.glob("*.png")
    assert figure.stat().st_size > 10_000


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The results of the theory, seed 0, after a step."""
    path = tmp_path_factory.mktemp("theory") / "theory.csv"
    result = run("theory", "--steps", "1", "--seed", "0", "--output", str(path.parent))
    assert result.returncode == 0, result.stderr
    return path


@pytest.mark.xdist_group("theory")
def test_a_run_goes_on_where_it_was(first):
    options = ("--output", str(first.parent), "--steps", "1", "--seed")
    marked = [row | {"torch": "marked"} for row in read(first)]
    write(first, marked)
    assert run("theory", *options, "0", "1").returncode == 0
    rows = read(first)
    assert [row for row in rows if row["seed"] == "0"] == marked  # it was not run again
    assert {row["seed"] for row in rows} == {"0", "1"}
    result = run("theory", *options, "0", "--steps", "3")
    assert result.returncode != 0
    assert "seed 0" in result.stderr
    assert "was written with --steps 1, got 3: give --again" in result.stderr
    assert run("theory", *options, "0", "--again").returncode == 0
    assert {row["torch"] for row in read(first)} == {torch.__version__}


def test_a_run_with_other_arms_is_refused(tmp_path):
    labels = {"dim": "2", "seed": "0", "steps": "1"}
    rows = [labels | {"arm": arm} for arm in ("untrained", "uniformity")]
    write(tmp_path / "representation-clouds.csv", rows)
    options = ("--output", str(tmp_path), "--steps", "1", "--seed", "0", "--group", "clouds")
    result = run("representation", *options, "--dim", "2", "--arm", "uniformity", THREE)
    assert result.returncode != 0
    refusal = f"was written with --arm ['uniformity'], got ['{THREE}', 'uniformity']: give"
    assert refusal in result.stderr


@pytest.mark.xdist_group("theory")
def test_the_parts_of_the_theory_that_need_no_steps_are_the_committed_ones(first):
    found, expected = (
        [row for row in read(path) if (row["part"], row["seed"]) == ("bound", "0")]
        for path in (first, FOLDER / "results" / first.name)
    )
    assert len(found) == len(expected) == 100
    for row, committed in zip(found, expected, strict=True):
        for column in ("bound", "truth"):
            assert float(row[column]) == pytest.approx(float(committed[column]), rel=1e-2)


def test_fashion_mnist_that_is_not_there_is_asked_for(tmp_path):
    if Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("Fashion-MNIST is installed")
    result = run("benefit", "--part", "published", "--seed", "0", folder=tmp_path)
    assert result.returncode != 0
    assert "apt-get install dataset-fashion-mnist" in result.stderr
