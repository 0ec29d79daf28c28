"""The demonstration, as a user starts it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

PHOTOS = Path(__file__).parent.parent / "docs" / "examples" / "photos.py"


def run(output, *options):
    command = [sys.executable, "-W", "error", str(PHOTOS), "--steps", "2", "--output", str(output)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    result = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    with open(output / "photos.csv", newline="", encoding="utf-8") as file:
        return result.stdout, list(csv.DictReader(file))


def test_photos_trains_four_arms_and_is_repeatable(tmp_path):
    printed, rows = run(tmp_path / "first")
    arms = ["untrained", "SimCLR", "placebo", "CARE, four forwards", "CARE, two forwards"]
    assert [row["arm"] for row in rows] == arms
    assert all(arm in printed for arm in arms)
    assert all(0 < float(row["gap ratio"]) < 2 and 0 < float(row["kNN"]) < 1 for row in rows)
    assert (tmp_path / "first" / "photos.png").stat().st_size > 10_000

    _, again = run(tmp_path / "second")
    _, other = run(tmp_path / "third", "--seed", "1")
    for row in rows + again + other:
        del row["s per step"]
    assert again == rows
    assert other != rows
