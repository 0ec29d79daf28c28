"""The report: draws, loaders, devices and modes of the encoder."""

import math
from functools import partial

import pytest
import torch
from reports import FLOAT64, IMAGES, Noisy, flip, points, quiet, turn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from care_loss.metrics import _report, equivariance_report


def test_encoders_that_work_in_place_do_no_harm():
    images = points(60, 4)
    before = images.clone()
    found = quiet(lambda x: x.sub_(0.5).div_(0.25), images, {"turn": turn}, samples=4)
    assert torch.equal(images, before)
    expected = quiet(lambda x: (x - 0.5) / 0.25, images, {"turn": turn}, samples=4)
    assert str(found) == str(expected)


def test_a_transformation_that_does_nothing_to_the_first_images_is_not_fixed():
    images = points(60, 4)
    images[:10] = 0
    row = quiet(lambda x: x + 1e-3, images, {"turn": turn}, samples=6).row("turn")
    assert row.draws == 6
    assert "gap_ratio" in row.figures


def test_a_transformation_may_have_any_name():
    images = points(60, 4)
    both = quiet(Noisy(0.3), images, {"clean": flip, "turn": turn}, samples=4)
    alone = quiet(Noisy(0.3), images, {"turn": turn}, samples=4)
    assert both.row("turn").figures == alone.row("turn").figures


def test_modules_in_training_mode_are_found_or_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    images = points(200, 4).float()
    net(images)
    expected = str(quiet(net, images, {"turn": turn}, samples=4))
    for encoder in (net.forward, partial(net), partial(lambda m, x: m(x), net)):
        assert str(quiet(encoder, images, {"turn": turn}, samples=4)) == expected
    with pytest.raises(ValueError, match="`encoder` must embed an image the same way in every"):
        quiet(lambda x: net(x), images, {"turn": turn}, samples=4)
    with pytest.raises(ValueError, match="dropout must be in eval mode"):
        quiet(nn.functional.dropout, images, {"turn": turn}, samples=4)


class Numbered(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return points(40, 4)[index], index


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"num_workers": 2}])
def test_a_loader_gives_one_report_and_leaves_the_generators(options):
    loader = DataLoader(Numbered(), batch_size=16, **options)
    state = torch.get_rng_state()
    first = quiet(nn.Identity(), loader, {"turn": turn}, samples=4)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    assert str(first) == str(quiet(nn.Identity(), loader, {"turn": turn}, samples=4))
    if "shuffle" not in options:
        images = points(40, 4)
        assert str(first) == str(quiet(nn.Identity(), images, {"turn": turn}, samples=4))


def test_images_and_encoders_on_a_device_are_reported_from_there(device):
    torch.manual_seed(0)
    net = nn.Linear(4, 4, dtype=FLOAT64)
    expected = quiet(net, points(40, 4), {"turn": turn}, samples=4).row("turn").figures

    for images in (points(40, 4), points(40, 4).to(device)):
        found = quiet(net.to(device), images, {"turn": turn}, samples=4).row("turn").figures
        for name, estimate in found.items():
            assert estimate.mean == pytest.approx(
                expected[name].mean, rel=1e-6, abs=1e-9, nan_ok=True
            )

    def drawn_there(x):
        return x * (1 + torch.rand((), device=x.device, dtype=x.dtype))

    report = quiet(net, points(40, 4).to(device), {"scale": drawn_there}, samples=4)
    assert report.row("scale").draws == 4


def test_transforms_of_torchvision_are_measured(torchvision):
    v2 = torchvision.transforms.v2
    images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    transformations = {
        "flip": v2.RandomHorizontalFlip(p=0.5),
        "crop": v2.RandomResizedCrop(8, antialias=True),
        "colour": v2.ColorJitter(0.4, 0.4),
    }

    def halves(x):  # a flip exchanges the two
        return torch.cat([x[..., :4].mean((2, 3)), x[..., 4:].mean((2, 3))], 1) - 0.5

    report = quiet(halves, images, transformations, samples=8)
    assert report.row("flip").verdict == "equivariant"
    assert report.row("crop").verdict == "not equivariant"


def test_draws_depend_on_seed_and_name_and_on_nothing_else():
    images = points(50, 4)
    both = {"turn": turn, "other": turn}
    first = quiet(Noisy(0.5), images, both, samples=4, batch_size=50).to_dict()
    again = quiet(Noisy(0.5), images, {"turn": turn}, samples=4, batch_size=7).to_dict()

    def numbers(report, name):
        rows = [row for row in report["rows"] if row["transformation"] == name]
        flat = [v for row in rows for v in row.values() if isinstance(v, float)]
        return torch.tensor(flat, dtype=FLOAT64)

    a, b = numbers(first, "turn"), numbers(again, "turn")
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert (numbers(first, "other") - a).abs().nan_to_num().max() > 1e-3
    other_seed = quiet(Noisy(0.5), images, both, samples=4, seed=1).to_dict()
    assert (numbers(other_seed, "turn") - a).abs().nan_to_num().max() > 1e-3


def test_the_generators_and_the_modes_of_the_encoder_are_left_as_they_were():
    encoder = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    encoder.train()
    encoder[2].eval()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    images = points(30, 4, dtype=torch.float32)
    first = quiet(encoder, images, {"turn": turn}, samples=4)
    assert torch.equal(state, torch.get_rng_state())
    assert [part.training for part in encoder.modules()] == [True, True, True, False]
    assert str(first) == str(quiet(encoder.forward, images, {"turn": turn}, samples=4))
    assert all(p.grad is None for p in encoder.parameters())

    def broken(x):
        if len(x) == 30 and torch.rand(()) < 0.5:
            raise RuntimeError("out of bounds")
        return turn(x)

    with pytest.raises(
        ValueError, match=r"transformations\['out'\] .* RuntimeError: out of bounds"
    ):
        quiet(encoder, images, {"out": broken}, samples=16)
    assert [part.training for part in encoder.modules()] == [True, True, True, False]
    assert torch.equal(state, torch.get_rng_state())


def test_transforms_that_work_in_place_do_no_harm():
    def in_place(x):
        return x.mul_(torch.rand(x.shape[1], dtype=x.dtype).exp())

    images = points(30, 4)
    before = images.clone()
    found = quiet(nn.Identity(), images, {"t": in_place}, samples=4)
    assert torch.equal(images, before)

    def copying(x):
        return in_place(x.clone())

    assert str(found) == str(quiet(nn.Identity(), images, {"t": copying}, samples=4))


@pytest.mark.parametrize("labels", [False, True])
def test_a_loader_gives_what_a_tensor_gives(labels):
    images = points(50, 4)
    dataset = TensorDataset(images, torch.arange(50)) if labels else images
    loader = DataLoader(dataset, batch_size=8)
    found = quiet(nn.Identity(), loader, {"turn": turn}, samples=4)
    expected = quiet(nn.Identity(), images, {"turn": turn}, samples=4)
    for row, other in zip(found.rows, expected.rows, strict=True):
        for name, estimate in row.figures.items():
            torch.testing.assert_close(
                estimate, other.figures[name], rtol=1e-9, atol=1e-12, equal_nan=True
            )


def test_features_and_projections_are_measured_both():
    class Both(nn.Module):
        def forward(self, x):
            return x, x[:, :1] * torch.ones(3, dtype=x.dtype)

    report = quiet(Both(), points(64, 4), {"turn": turn}, samples=4)
    assert [r.output for r in report.rows] == ["features"] * 2 + ["projections"] * 2
    assert report.row("turn", output="features").verdict == "equivariant"
    assert report.row("turn") is report.row("turn", output="projections")
    assert report.row("turn").dim == 3
    assert "projections" in str(report)


def test_half_precision_and_images_that_change_size():
    def crop(x):
        return x[..., :3]

    def encoder(x):
        return x[:, :3].bfloat16()

    report = quiet(encoder, points(40, 4).float(), {"crop": crop, "turn": turn})
    assert "Composition is not measured" in str(report)
    assert math.isnan(report.row("crop").figures["composition_share"].mean)
    assert report.row("turn").figures["composition_share"].mean < 1


def test_a_progress_bar_is_shown_on_request(capsys):
    pytest.importorskip("tqdm")
    equivariance_report(nn.Identity(), IMAGES, {"turn": turn}, samples=4, progress=True)
    assert "embedding: 100%" in capsys.readouterr().err
    equivariance_report(nn.Identity(), IMAGES, {"turn": turn}, samples=4)  # no terminal
    assert capsys.readouterr().err == ""


def test_a_progress_bar_needs_tqdm(monkeypatch):
    monkeypatch.setattr("care_loss.metrics._sampling.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`progress` must be False or None"):
        equivariance_report(nn.Identity(), IMAGES, {"turn": turn}, progress=True)
    equivariance_report(nn.Identity(), IMAGES, {"turn": turn}, samples=4)


def test_many_draws_are_measured_a_few_at_a_time(monkeypatch):
    whole = quiet(Noisy(0.3), points(60, 4), {"turn": turn}, samples=7)
    monkeypatch.setattr(_report, "MAX_ELEMENTS_PER_BLOCK", 1)
    parts = quiet(Noisy(0.3), points(60, 4), {"turn": turn}, samples=7)
    assert str(whole) == str(parts)
