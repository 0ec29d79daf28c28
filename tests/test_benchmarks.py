"""The benchmarks, as a user starts them: small sizes, and the claims of failures in full."""

import csv
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(name, *options):
    command = [sys.executable, "-W", "error", str(BENCHMARKS / name), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_rotations_are_timed_beside_their_rivals(tmp_path, device):
    path = tmp_path / "procrustes.csv"
    printed = run("procrustes.py", "--quick", "--device", str(device), "--csv", str(path))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    contenders = {row["contender"] for row in rows}
    assert {"floor: the product", "SVD", "care_loss", "care_loss, SO(D)", "roma"} <= contenders
    assert all(contender in printed for contender in contenders)
    ours = [row for row in rows if row["contender"].startswith("care_loss")]
    assert all(float(row["ms"]) > 0 for row in rows)
    for row in ours:
        if row["direction"] == "forward":
            assert float(row["orthogonality"]) < 8
            assert float(row["excess"]) < 1e-6
        else:
            assert float(row["finite gradients"]) == 1


def test_rivals_fail_where_it_is_said_and_care_loss_does_not(tmp_path):
    path = tmp_path / "gradients.csv"
    run("procrustes_gradients.py", "--csv", str(path))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["passed"] == "True" for row in rows if row["contender"] == "care_loss")
    failed = {row["contender"] for row in rows if row["passed"] == "False"}
    assert failed == {"SVD with autograd", "roma", "torchmetrics"}


def test_the_sphere_keeps_its_bounds_beside_its_rivals(tmp_path):
    path = tmp_path / "errors.csv"
    printed = run("sphere.py", "--quick", "--errors", str(path))
    assert "copy of the inputs" in printed
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["question"], row["dtype"], row["angle"]): row for row in rows}
    itself = found["distance of a point to itself", "float32", "0"]
    assert float(itself["care_loss"]) == 0
    assert float(itself["acos, clamped"]) > 1e-4


def test_ways_to_give_chunks_are_timed(tmp_path):
    path = tmp_path / "chunks.csv"
    run("chunks.py", "--quick", "--csv", str(path))
    with path.open(newline="") as file:
        ratios = {row["given as"]: float(row["ratio"]) for row in csv.DictReader(file)}
    assert ratios["a number"] == 1
    assert len(ratios) == 5
