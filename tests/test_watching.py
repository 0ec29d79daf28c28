"""What a monitor says of small trainings, each with one deliberate mistake of docs/mistakes.md."""

import functools
import warnings
from typing import NamedTuple

import pytest
import torch
from reports import plane_turn, quiet
from torch import nn

from care_loss import CAREloss
from care_loss.metrics import EquivarianceMonitor, compare
from care_loss.views import augment_chunks

pytestmark = pytest.mark.xdist_group("watching")  # which share their trainings
STEPS, BATCH, POINTS, DIM = 200, 128, 8, 16
HELD_OUT = torch.randn(128, POINTS, 2, generator=torch.Generator().manual_seed(1))
TURN = {"turn": plane_turn}


class Training(NamedTuple):
    """What is left of a training: what was watched, what the monitor measured, and its words."""

    encoder: nn.Module
    scalars: list[dict[str, float]]
    words: list[str]

    @property
    def gap(self):
        return self.scalars[-1]["turn/gap_ratio"]


def turn_each(clouds):
    """Turn each cloud by an angle of its own."""
    angles = 2 * torch.pi * torch.rand(len(clouds))
    c, s = angles.cos(), angles.sin()
    return clouds @ torch.stack([c, s, -s, c], 1).view(-1, 2, 2)


def jitter(clouds):
    return clouds + 0.1 * torch.randn_like(clouds)


@functools.cache
def train(mistake="none", optimizer="AdamW", every=10):
    """Train a small network on clouds of points, in three forwards: turns rotate the embedding."""
    torch.manual_seed(0)
    clouds = torch.randn(1024, POINTS, 2)
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(2 * POINTS, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    )
    encoder = nn.Sequential(body, nn.Linear(64, DIM))
    watched = nn.Sequential(body, nn.Linear(64, DIM)) if mistake == "another head" else encoder
    weight = {"weight of 1000": 1000.0, "no equivariance loss": 0.0}.get(mistake, 10.0)
    criterion = CAREloss(equivariance_weight=weight)
    if optimizer == "SGD":
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.03, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    monitor = EquivarianceMonitor(HELD_OUT, TURN, every=every)
    scalars = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(STEPS + 1):
            if found := monitor(watched, step):
                scalars.append(found)
            batch = clouds[torch.randint(len(clouds), (BATCH,))]
            labels = torch.randint(10, (BATCH,))
            if mistake == "turns in ordinary views":
                x1, x2 = jitter(turn_each(batch)), jitter(turn_each(batch))
            else:
                x1, x2 = jitter(batch), jitter(batch)
            turned, chunks = augment_chunks(x1, plane_turn, chunks=8)
            if mistake == "labels as chunks":
                chunks = labels
            z1, z2, e = encoder(x1), encoder(x2), encoder(turned)
            loss = criterion(z1, z2, z1, e, chunks=chunks)
            if mistake != "no zero_grad":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Training(watched, scalars, [str(warning.message) for warning in seen])


@pytest.mark.parametrize(
    ("optimizer", "every"),
    [("AdamW", 10), ("AdamW", 20), ("SGD", 10), pytest.param("SGD", 20, marks=pytest.mark.deep)],
)
def test_no_false_alarm_in_a_right_training(optimizer, every):
    right = train(optimizer=optimizer, every=every)
    assert right.words == []
    assert right.scalars[0]["turn/gap_ratio"] > 0.5  # untrained
    assert right.gap < 0.1


@pytest.mark.parametrize(
    ("mistake", "optimizer", "sentence"),
    [
        ("weight of 1000", "AdamW", "the embeddings collapse (mean norm "),
        ("turns in ordinary views", "AdamW", "the embedding ignores 'turn' (displacement 0."),
        ("no zero_grad", "SGD", "the embeddings collapse (mean norm "),
    ],
)
def test_a_mistake_is_told(mistake, optimizer, sentence):
    wrong, right = train(mistake, optimizer), train(optimizer=optimizer)
    (words,) = wrong.words
    assert sentence in words
    assert wrong.gap > 10 * right.gap


@pytest.mark.parametrize("mistake", ["labels as chunks", "another head"])
def test_a_mistake_without_a_warning_shows_in_the_gap_ratio(mistake):
    wrong = train(mistake)
    assert wrong.words == []
    assert wrong.gap > 3 * train().gap


def test_a_gap_ratio_that_falls_is_no_evidence():
    control, labels = train("no equivariance loss"), train("labels as chunks")
    assert control.words == []
    # Without any equivariance loss it halves, and with labels as chunks it is higher.
    assert control.gap < 0.6 * control.scalars[0]["turn/gap_ratio"]
    encoders = {"control": control, "labels": labels, "right": train()}
    encoders = {name: training.encoder for name, training in encoders.items()}
    compared = compare(encoders, HELD_OUT, TURN, baseline="control", progress=False)
    for name, sign in (("labels", 1), ("right", -1)):
        found = compared.difference(name, "turn", "gap_ratio")
        assert sign * found.mean > 2 * found.error


def test_the_monitor_agrees_with_the_report():
    right = train()
    report = quiet(right.encoder, HELD_OUT, TURN)
    assert report.row("turn").figures["gap_ratio"].mean == pytest.approx(right.gap, abs=0.05)
