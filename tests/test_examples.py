"""The demonstration, as a user starts it, and the parts that its claims rest on."""

import csv
import importlib.util
import math
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

PHOTOS = Path(__file__).parent.parent / "docs" / "examples" / "photos.py"
FLOAT64 = torch.float64
angles = st.floats(-10, 10)


@pytest.fixture(scope="module")
def photos():
    spec = importlib.util.spec_from_file_location("photos", PHOTOS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(output, *options):
    command = [sys.executable, "-W", "error", str(PHOTOS), "--steps", "2", "--output", str(output)]
    command += ["--draws", "8"]
    result = subprocess.run([*command, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = {}
    for path in output.glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            rows[path.stem] = list(csv.DictReader(file))
    return result.stdout, rows


def test_photos_trains_and_measures_all_arms(tmp_path):
    printed, rows = run(tmp_path / "first", "--seed", "0", "1")
    arms = ["untrained", "SimCLR with hue", "SimCLR without hue", "CARE, four forwards"]
    arms += ["CARE, three forwards", "placebo, three forwards"]
    arms += ["CARE, uniformity", "placebo, uniformity"]
    others = rows.pop("ordinary-seed0"), rows.pop("ordinary-seed1")
    assert [row["transformation"] for row in others[0]] == 4 * ["crop", "flip", "colour", "grey"]
    assert set(rows) == {"photos-seed0", "photos-seed1"}
    assert all([row["arm"] for row in table] == arms for table in rows.values())
    assert all(arm in printed for arm in arms)
    for row in rows["photos-seed0"]:
        assert 0 < float(row["gap ratio"]) < 2
        assert 0 < float(row["kNN"]) < 1
        assert 0 < float(row["same hue"]) < 1
    assert (tmp_path / "first" / "photos.png").stat().st_size > 10_000
    assert rows["photos-seed0"] != rows["photos-seed1"]


def test_moco_trains_and_measures_all_arms(tmp_path):
    command = [sys.executable, "-W", "error", str(PHOTOS.with_name("moco.py")), "--steps", "2"]
    command += ["--draws", "8", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "moco-seed0.csv", newline="", encoding="utf-8") as file:
        ratios = {row["arm"]: row["gap ratio"] for row in csv.DictReader(file)}
    assert list(ratios) == ["MoCo"] + [
        f"{arm}, {encoder} encoder" for encoder in ("query", "key") for arm in ("CARE", "placebo")
    ]
    assert len(set(ratios.values())) > 1  # the arms differ


def curves(tmp_path, processes, *options):
    """Run photos_ddp.py, and return the losses of each process by column."""
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(PHOTOS.with_name("photos_ddp.py"))]
    command += ["--steps", "3", "--output", str(tmp_path), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = []
    for path in sorted(tmp_path.glob(f"{processes}-processes-rank*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        found.append({key: [float(row[key]) for row in rows] for key in rows[0]})
    assert len(found) == processes
    return found


def test_the_losses_of_two_processes_are_those_of_one(tmp_path):
    (one,) = curves(tmp_path, 1, "--same-views")
    for process in curves(tmp_path, 2, "--same-views"):
        for part in ("loss", "InfoNCE", "equivariance"):
            assert process[part] == pytest.approx(one[part], rel=1e-4, abs=2e-6)


def test_two_processes_with_views_of_their_own_have_one_info_nce(tmp_path):
    first, second = curves(tmp_path, 2)
    assert first["InfoNCE"] == second["InfoNCE"]


def test_a_seed_determines_the_weights_of_all_arms(photos):
    training, _ = photos.load_patches()

    def weights(seed):
        options = {"steps": 2, "weight": 10.0, "turned": True}
        found, _ = photos.run(seed, training, lambda encoder, **_: encoder.state_dict(), **options)
        return found

    first, again, other = weights(1), weights(1), weights(0)
    assert len(first) == 8
    for arm, state in first.items():
        assert all(torch.equal(state[name], again[arm][name]) for name in state)
        assert not all(torch.equal(state[name], other[arm][name]) for name in state)


@given(angles, angles, st.integers(0, 2**32 - 1))
def test_two_turns_of_the_hue_are_the_turn_by_the_sum(photos, a, b, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 4, 5, generator=generator, dtype=FLOAT64)
    a, b = torch.tensor([a, b], dtype=FLOAT64)
    twice = photos.turn_hue(photos.turn_hue(images, a), b)
    torch.testing.assert_close(twice, photos.turn_hue(images, a + b), atol=1e-13, rtol=0)
    back = photos.turn_hue(photos.turn_hue(images, a), -a)
    torch.testing.assert_close(back, images, atol=1e-13, rtol=0)


def test_a_turn_of_the_hue_rotates_the_colours_and_leaves_grey(photos):
    images = torch.randn(6, 3, 4, 5, dtype=FLOAT64)
    angle = torch.linspace(0, 3, 6, dtype=FLOAT64)
    turned = photos.turn_hue(images, angle)
    for image, theta, one in zip(images, angle, turned, strict=True):
        torch.testing.assert_close(photos.turn_hue(image[None], theta)[0], one)
    torch.testing.assert_close(turned.norm(dim=1), images.norm(dim=1))
    torch.testing.assert_close(turned.mean(1), images.mean(1))
    third = torch.tensor(2 * math.pi / 3)
    red, green = torch.eye(3)[:2, None, :, None, None]
    torch.testing.assert_close(photos.turn_hue(red, third), green)


def test_three_forwards_turn_the_embedding_and_the_placebo_does_not(photos):
    training, testing = photos.load_patches()
    arms = photos.make_arms(weight=10.0)
    torch.manual_seed(7)
    start, order = photos.network(width=8), torch.randint(len(training), (60, 128))
    gaps = {}
    for name in ("CARE, three forwards", "placebo, three forwards"):
        torch.manual_seed(7)
        encoder = deepcopy(start)
        photos.train(name, arms[name], encoder, (photos.own_turns(training[r]) for r in order), 60)
        gaps[name] = (
            photos.measure(encoder, training, testing, draws=16).hue.figures["gap_ratio"].mean
        )
    assert gaps["CARE, three forwards"] < 0.5 * gaps["placebo, three forwards"]


class PlantedEncoder(torch.nn.Sequential):
    """Embed an image by its brightness, its mean chroma and the square of that: an exact answer."""

    def __init__(self):
        super().__init__(torch.nn.Flatten())

    def forward(self, images):
        mean = images.double().mean((2, 3))
        third = 2 * math.pi / 3 * torch.arange(3, dtype=FLOAT64)
        chroma = torch.complex(mean @ torch.cos(third), mean @ torch.sin(third))
        planes = [chroma, chroma**2 / (chroma.abs() + 1e-12)]
        parts = [part for plane in planes for part in (plane.real, plane.imag)]
        return torch.stack([mean.mean(1), *parts], -1)


def test_an_encoder_that_turns_exactly_has_the_exact_measures(photos):
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(7000, 3, 1, 1, generator=generator).expand(-1, -1, 2, 2)  # saturated
    measures = photos.measure(PlantedEncoder(), patches[:5000], patches[5000:])
    figures = measures.hue.figures
    assert measures.hue.verdict == "equivariant"
    assert figures["gap_ratio"].mean < 1e-8
    assert figures["rotation_share"].mean > 1 - 1e-8
    assert figures["composition_share"].mean > 1 - 1e-8
    wanted = torch.tensor([1.0, 1, 1] + [0] * 34, dtype=FLOAT64)
    torch.testing.assert_close(measures.multiplicities, wanted, atol=1e-6, rtol=0)
    assert measures.deviation < 1e-5
    assert measures.hue_error < 2.5  # half a step of the grid
    assert min(measures.same_hue) > 0.9
    assert measures.ordinary == []


@pytest.mark.parametrize(
    "options", ["--steps 0", "--draws 3", "--weight -1", "--weight nan", "--seed 1 1"]
)
def test_photos_refuses_bad_options_before_any_work(photos, monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["photos.py", *options.split()])
    with pytest.raises(SystemExit):
        photos.main()
    assert f"{options.split()[0]} must" in capsys.readouterr().err
