"""The demonstration, as a user starts it, and the parts that its claims rest on."""

import csv
import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from processes import ROWS, images, network
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from care_loss import CAREloss, InfoNCELoss
from care_loss.functional import info_nce_loss

PHOTOS = Path(__file__).parent.parent / "docs" / "examples" / "photos.py"
FLOAT64 = torch.float64
angles = st.floats(-10, 10)


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, PHOTOS.with_stem(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos():
    return load("photos")


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


@pytest.mark.parametrize(
    "seeds", [["0"], pytest.param(["0", "1"], marks=pytest.mark.deep)], ids=["one", "two"]
)
def test_photos_trains_and_measures_all_arms(seeds, tmp_path):
    printed, rows = run(tmp_path / "first", "--full", "--seed", *seeds)
    arms = ["untrained", "SimCLR with hue", "SimCLR without hue", "CARE, four forwards"]
    arms += ["CARE, three forwards", "placebo, three forwards"]
    arms += ["CARE, uniformity", "placebo, uniformity"]
    for seed in seeds:
        others = [row["transformation"] for row in rows.pop(f"ordinary-seed{seed}")]
        assert others == 4 * ["crop", "flip", "colour", "grey"]
    assert set(rows) == {f"photos-seed{seed}" for seed in seeds}
    assert all([row["arm"] for row in table] == arms for table in rows.values())
    assert all(arm in printed for arm in arms)
    for row in rows["photos-seed0"]:
        assert 0 < float(row["gap ratio"]) < 2
        assert 0 < float(row["kNN"]) < 1
        assert 0 < float(row["same hue"]) < 1
    assert (tmp_path / "first" / "photos.png").stat().st_size > 10_000
    assert all(table != other for table, other in itertools.combinations(rows.values(), 2))


def test_photos_compares_three_arms_by_default(tmp_path):
    printed, rows = run(tmp_path / "short")
    assert not rows
    assert "3 encoders on 500 images, baseline: SimCLR without hue" in printed
    assert "hue: " in printed
    assert max(map(len, printed.splitlines())) <= 88


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


# Gradient caching


@pytest.fixture(scope="module")
def cached_backward():
    return load("gradient_cache").cached_backward


def of_micro_batches(encoder, views, loss, rows):
    """The plain backward through micro-batches, which keeps the graphs of all of them."""
    parts = [[encoder(part) for part in view.split(rows)] for view in views]
    value = loss(*map(torch.cat, parts))
    value.backward()
    return value.detach()


def of_one_batch(encoder, views, loss, rows):
    value = loss(*map(encoder, views))
    value.backward()
    return value.detach()


def make_encoder(*layers):
    return torch.nn.Sequential(torch.nn.Linear(5, 8), *layers, torch.nn.Linear(8, 4)).double()


def assert_the_same_step(backward, other, encoder, views, loss, rows=7):
    """Two ways to a gradient have one loss, one gradient and one state of the generator."""
    results = []
    for way, model in ((backward, encoder), (other, deepcopy(encoder))):
        torch.manual_seed(3)
        value = way(model, views, loss, rows)
        gradients = [p.grad for p in model.parameters()]
        results.append([value, *gradients, torch.rand(4)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


THREE = CAREloss(), 3, lambda z1, z2, e: (z1, z2, z1, e)
FORWARDS = {
    "two": (CAREloss(shared_views=True), 2, lambda z1, z2: (z1, z2)),
    "three": THREE,
    "four": (CAREloss(), 4, lambda *z: z),
}


def loss_of(forwards):
    criterion, count, arguments = forwards
    views = torch.randn(count, 32, 5, dtype=FLOAT64)
    return views, lambda *z: criterion(*arguments(*z), chunks=4)


@pytest.mark.parametrize("rows", [1, 7, 16, 32, 100])
@pytest.mark.parametrize("forwards", FORWARDS.values(), ids=FORWARDS)
def test_gradient_caching_has_the_gradient_of_the_whole_batch(cached_backward, forwards, rows):
    encoder = make_encoder(torch.nn.LayerNorm(8), torch.nn.Tanh())
    assert_the_same_step(cached_backward, of_one_batch, encoder, *loss_of(forwards), rows)


def test_gradient_caching_draws_the_same_dropout_twice(cached_backward):
    encoder = make_encoder(torch.nn.Dropout(0.5))
    views, loss = loss_of(THREE)

    def drawing(*z):  # what the loss draws is not drawn again
        return loss(*z) * (1 + torch.rand(()))

    assert_the_same_step(cached_backward, of_micro_batches, encoder, views, drawing)


def test_gradient_caching_with_batch_norm_is_that_of_micro_batches(cached_backward):
    encoder = make_encoder(torch.nn.BatchNorm1d(8))
    views, loss = loss_of(THREE)
    assert_the_same_step(cached_backward, of_micro_batches, encoder, views, loss)
    assert encoder[1].num_batches_tracked == 2 * 3 * 5  # each micro-batch, twice
    with pytest.raises(AssertionError):
        assert_the_same_step(cached_backward, of_one_batch, encoder, views, loss)


def test_gradient_caching_differs_from_adding_the_gradients_of_micro_batches(cached_backward):
    def added(encoder, views, loss, rows):
        parts = zip(*(view.split(rows) for view in views), strict=True)
        return sum(of_one_batch(encoder, part, loss, rows) / 4 for part in parts)

    encoder = make_encoder(torch.nn.Tanh())
    with pytest.raises(AssertionError):
        assert_the_same_step(cached_backward, added, encoder, *loss_of(THREE), 8)


def test_gradient_caching_adds_to_gradients_and_reaches_a_learned_temperature(cached_backward):
    learned = torch.nn.Parameter(torch.tensor(0.2, dtype=FLOAT64))
    _, count, arguments = THREE
    views, loss = loss_of((CAREloss(temperature=learned), count, arguments))
    encoder = make_encoder(torch.nn.Tanh())
    gradients = []
    for backward in (of_one_batch, cached_backward):
        for _ in range(2):
            backward(encoder, views, loss, 7)
        gradients.append([p.grad for p in (learned, *encoder.parameters())])
        learned.grad = None
        encoder.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def caching_in_processes(rank, world):
    parts = images(2, [ROWS] * world, FLOAT64)
    one, several = (
        InfoNCELoss(torch.nn.Parameter(torch.tensor(0.2, dtype=FLOAT64)), gather_distributed=gather)
        for gather in (False, True)
    )
    model, averaged = DistributedDataParallel(network(FLOAT64)), []

    def count(state, bucket):
        averaged.append(bucket.index())
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, count)
    load("gradient_cache").cached_backward(model, parts[rank], several, 3)
    assert averaged == [0]  # once, not in every micro-batch
    dist.all_reduce(several.temperature.grad)  # it is not part of the module that DDP wraps
    several.temperature.grad /= world
    whole = network(FLOAT64)
    of_one_batch(whole, torch.cat(parts, 1), one, 3)
    expected = [p.grad for p in (*whole.parameters(), one.temperature)]
    found = [p.grad for p in (*model.parameters(), several.temperature)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.xdist_group("processes")
def test_gradient_caching_in_processes_is_that_of_one(two):
    two.run(caching_in_processes)


def test_the_example_of_gradient_caching_trains(capsys):
    load("gradient_cache").main()
    losses = [float(line.removeprefix("loss ")) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5
    assert losses[-1] < losses[0]


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
        arms = photos.make_arms(10.0)
        trained = photos.trained(seed, training, arms, steps=2, weight=10.0, turned=True)
        return {name: encoder.state_dict() for name, encoder, _ in trained}

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


def test_the_bound_of_the_guide_keeps_a_gradient():
    guide = Path(__file__).parent.parent / "docs" / "guide.md"
    found = re.findall(r"^```python\n(.*?)^```", guide.read_text(encoding="utf-8"), re.M | re.S)
    (block,) = (text for text in found if "class LearnedTemperature" in text)
    names = {"torch": torch, "CAREloss": CAREloss, "info_nce_loss": info_nce_loss}
    exec(block, names)
    criterion = names["criterion"]
    z1, z2 = torch.randn(2, 8, 4)  # at a temperature that is much too low for them
    (log_scale,) = criterion.parameters()
    with torch.no_grad():
        log_scale.fill_(6)
    parts = criterion.forward_components(z1, z2, z1, z2, chunks=2)
    torch.testing.assert_close(parts.base, info_nce_loss(z1, z2, temperature=0.01))
    parts.loss.backward()
    torch.optim.SGD([log_scale], lr=1e-3).step()
    assert log_scale < 4.6  # log 100 is 4.605
