"""The monitor: scalars on steps that are due, a training left as it was, warnings in words."""

import math
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reports import Noisy, points, turn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from care_loss.metrics import EquivarianceMonitor, _monitor, equivariance_report

IMAGES = points(100, 4)


def collapsed(x):
    return torch.ones_like(x) + 0.01 * x


def ignoring(x):
    length = 3 * x.norm(dim=1)
    return torch.stack([length.sin(), length.cos()], 1)


def warned_at(encoder_of, steps, **options):
    """The steps at which a monitor warned, and of what."""
    monitor = EquivarianceMonitor(IMAGES, {"turn": turn}, **options)
    found = []
    for step in range(steps):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            monitor(encoder_of(step), step)
        found += [(step, str(warning.message)) for warning in seen]
    return found


def test_scalars_are_those_of_a_report_on_steps_that_are_due():
    monitor = EquivarianceMonitor(IMAGES, {"turn": turn}, every=10, samples=6)
    found = monitor(Noisy(0.3), 20)
    report = equivariance_report(
        Noisy(0.3), IMAGES, {"turn": turn}, samples=6, progress=False
    ).scalars()
    assert found.keys() == report.keys()
    for key, value in report.items():
        # The unshared control, of the gap ratio, has fewer draws.
        tolerance = 0.5 if "gap_ratio" in key else 1e-9
        assert found[key] == pytest.approx(value, rel=tolerance)
    assert monitor(Noisy(0.3), 21) == {}
    assert monitor(Noisy(0.3), 30) == found  # the same draws


def test_a_training_goes_on_as_without_the_monitor():
    def train(monitor):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
        for step in range(4):
            monitor(encoder, step)
            assert encoder.training
            optimizer.zero_grad()
            encoder(torch.randn(16, 4)).square().sum().backward()
            optimizer.step()
        return [*encoder.state_dict().values()], np.random.rand(), random.random()  # noqa: NPY002

    watched = train(EquivarianceMonitor(IMAGES.float(), {"turn": turn}, every=2))
    alone = train(lambda encoder, step: None)
    assert all(map(torch.equal, watched[0], alone[0]))
    assert watched[1:] == alone[1:]


@pytest.mark.parametrize(
    ("encoder", "sentence"),
    [
        (collapsed, "the embeddings collapse (mean norm 1.00): lower the equivariance weight"),
        (ignoring, "the embedding ignores 'turn' (displacement "),
        (Noisy(1.0), "sharing 'turn' makes no difference to the embeddings (gap ratio "),
    ],
)
def test_a_fault_is_told_once_when_it_was_seen_four_times(encoder, sentence):
    ((step, message),) = warned_at(lambda step: encoder, 6)
    assert step == 3
    assert sentence in message


@pytest.mark.parametrize(
    ("verdict", "norm", "gap", "moved", "kind", "health"),
    [
        ("collapsed", 0.0, math.nan, math.nan, "collapse", [1.0]),
        ("not equivariant", 0.98, 0.3, 1.0, "collapse", [0.02]),
        ("invariant", 0.1, 1.0, 0.01, "ignored turn", [0.01]),
        ("not equivariant", 0.1, 0.8, 0.4, "ignored turn", [0.4]),
        ("not equivariant", 0.2, 1.25, 0.9, "unshared turn", [0.8, 0.8]),
        ("partly equivariant", 0.2, 0.5, 0.4, None, None),
    ],
)
def test_a_fault_passes_where_its_figure_grows(verdict, norm, gap, moved, kind, health):
    figures = {"mean_norm": norm, "gap_ratio": gap, "displacement": moved}
    figures = {name: SimpleNamespace(mean=value) for name, value in figures.items()}
    row = SimpleNamespace(transformation="turn", verdict=verdict, figures=figures)
    found = [(fault.kind, list(fault.health)) for fault in _monitor._faults(row)]
    assert found == ([(kind, pytest.approx(health))] if kind else [])


def test_a_warning_names_the_line_of_the_training():
    monitor = EquivarianceMonitor(IMAGES, {"turn": turn})
    for step in range(3):
        monitor(lambda x: 0 * x, step)
    with pytest.warns(UserWarning, match="collapse") as seen:
        monitor(lambda x: 0 * x, 3)
    assert seen[0].filename == __file__
    with pytest.raises(TypeError, match="positional"):
        EquivarianceMonitor(IMAGES, {"turn": turn}, 10)


def test_what_is_seen_now_and_then_is_not_told():
    assert warned_at(lambda step: collapsed if step % 4 else nn.Identity(), 12) == []
    assert warned_at(lambda step: Noisy(0.2), 6) == []


def test_a_fault_that_passes_is_not_told():
    def spreading(step):  # the mean norm falls from 0.999 to 0.9 and below, as training begins
        return lambda x: torch.ones_like(x) + 0.04 * 1.4**step * x

    assert warned_at(spreading, 8) == []
    ((_, message),) = warned_at(lambda step: spreading(min(step, 1)), 6)
    assert "the embeddings collapse" in message


def test_an_embedding_that_hardly_moves_and_shares_nothing_ignores_the_transformation():
    class Ignoring(nn.Module):
        def forward(self, x):
            return torch.cat([ignoring(x), 0.35 * Noisy(1.0)(x)], 1)

    ((_, message),) = warned_at(lambda step: Ignoring(), 4)
    assert "the embedding ignores 'turn' (displacement 0." in message
    assert "gap ratio" in message


def test_each_kind_is_told():
    found = warned_at(lambda step: collapsed if step < 5 else Noisy(1.0), 11)
    assert [step for step, _ in found] == [3, 8]


def test_a_loader_or_many_images_are_kept_up_to_512():
    images = points(600, 4)
    loader = DataLoader(TensorDataset(images, torch.zeros(600)), batch_size=100)
    monitors = [EquivarianceMonitor(x, {"turn": turn}) for x in (images, loader)]
    assert all(torch.equal(monitor.images, images[:512]) for monitor in monitors)


def test_two_outputs_give_the_scalars_of_the_last():
    monitor = EquivarianceMonitor(IMAGES, {"turn": turn})
    found = monitor(lambda x: (Noisy(1.0)(x), x), 0)
    assert found["turn/gap_ratio"] < 0.1


def test_bad_arguments_are_refused_at_once():
    for options, sentence in (
        ({"every": 0}, "`every` must be an int >= 1, got int 0"),
        ({"samples": 2}, "`samples` must be an int >= 4, got int 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            EquivarianceMonitor(IMAGES, {"turn": turn}, **options)
    with pytest.raises(TypeError, match="must be a mapping"):
        EquivarianceMonitor(IMAGES, [turn])
    with pytest.raises(TypeError, match="`images` must be a tensor"):
        EquivarianceMonitor([IMAGES], {"turn": turn})
    monitor = EquivarianceMonitor(IMAGES, {"turn": turn})
    with pytest.raises(ValueError, match="`step` must be an int >= 0, got float"):
        monitor(nn.Identity(), 0.5)
    with pytest.raises(TypeError, match="`encoder` must be a callable"):
        monitor(3, 0)
