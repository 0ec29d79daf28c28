"""What can be asked of an encoder about unseen images, and the features that answer."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from common import Group, Row, embed
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import Tensor, nn

from care_loss.actions import fit_circle
from care_loss.sphere import normalize

NEAREST, FEW, FEW_DRAWS = 20, 10, 3
STRENGTHS = [1e-2, 1e-1, 1.0]  # scikit-learn's C, the inverse of the regularisation
ANGLES, FITTED, SECTORS, SOUGHT = 36, 500, 6, 500
Feature = Callable[[Tensor], Tensor]


class Setting(NamedTuple):
    """A group, and images with their classes: to fit a probe, to choose its C, and to score it.

    `act` shows images under an angle, and `state` is the angle that an image shows, or NaN.
    """

    group: Group
    images: tuple[Tensor, ...]
    classes: tuple[Tensor, ...]
    act: Callable[[Tensor, Tensor], Tensor]
    state: Callable[[Tensor], Tensor]


def probe(features: list[Tensor], classes: list[Tensor]) -> float:
    """Return the accuracy on the last part of a logistic regression that the first part fits.

    Its regularisation is the one that does best on the second part.
    """
    mean, deviation = features[0].mean(0), features[0].std(0).clamp_min(1e-9)
    x, validation, scored = (((part - mean) / deviation).numpy() for part in features)
    models = [
        LogisticRegression(C=strength, max_iter=1000, tol=1e-3).fit(x, classes[0])
        for strength in STRENGTHS
    ]
    best = max(models, key=lambda model: float(model.score(validation, classes[1])))
    return float(best.score(scored, classes[2]))


def few_labels(features: list[Tensor], classes: list[Tensor]) -> float:
    """Return the mean accuracy of probes that are fitted to ten images of each class."""
    found = []
    for _ in range(FEW_DRAWS):
        order = torch.randperm(len(classes[0]))
        some = torch.cat([order[classes[0][order] == c][:FEW] for c in classes[0].unique()])
        found.append(probe([features[0][some], *features[1:]], [classes[0][some], *classes[1:]]))
    return sum(found) / len(found)


def nearest(features: list[Tensor], classes: list[Tensor]) -> float:
    """Return how often most of the 20 nearest images, in cosine, have the class."""
    fitted, _, scored = (normalize(part) for part in features)
    guess = classes[0][(scored @ fitted.mT).topk(NEAREST).indices].mode().values
    return (guess == classes[2]).double().mean().item()


def state_error(features: list[Tensor], states: list[Tensor]) -> float:
    """Return the median error in degrees, of least squares for the cosine and the sine."""
    target = torch.stack((states[0].cos(), states[0].sin()), -1)
    model = LinearRegression().fit(features[0].numpy(), target.numpy())
    x, y = torch.as_tensor(model.predict(features[2].numpy())).unbind(-1)
    error = torch.atan2(y, x) - states[2]
    return torch.atan2(error.sin(), error.cos()).abs().median().rad2deg().item()


def found_again(one: Tensor, other: Tensor) -> float:
    """Return how often the nearest of all images in other states is the same image, in cosine."""
    best = (normalize(one) @ normalize(other).mT).argmax(-1)
    return (best == torch.arange(len(one))).double().mean().item()


def classified(prefix: str, features: list[Tensor], classes: list[Tensor]) -> dict[str, float]:
    names = f"{prefix}probe", f"{prefix}kNN"
    return dict(zip(names, (probe(features, classes), nearest(features, classes)), strict=True))


def as_row(feature: str, answers: dict[str, float]) -> Row:
    return {"feature": feature} | {name: f"{value:.4g}" for name, value in answers.items()}


def plain_features(encoder: nn.Module) -> dict[str, Feature]:
    backbone = encoder[:-1]  # of a sequence that ends in its head
    return {
        "backbone": lambda images: backbone(images).double(),
        "embedding": partial(embed, encoder),
    }


def ask_for_classes(encoder: nn.Module, setting: Setting) -> list[Row]:
    """Ask the backbone and the embedding for the class of images as they are."""
    rows = []
    for name, feature in plain_features(encoder).items():
        features = [feature(images) for images in setting.images]
        rows.append(as_row(name, classified("as it is, ", features, list(setting.classes))))
    return rows


def features_of(encoder: nn.Module, setting: Setting) -> dict[str, Feature]:
    """Return plain features and those of the action, fitted to images that fit the probes too."""
    some = setting.group.own_turns(setting.images[0][:FITTED])
    angles = 2 * torch.pi / ANGLES * torch.arange(ANGLES, dtype=torch.float64)
    turned = torch.stack([embed(encoder, setting.act(some, angle)) for angle in angles])
    action = fit_circle(embed(encoder, some), turned, angles)
    return plain_features(encoder) | {
        "invariants": lambda images: action.invariants(embed(encoder, images)),
        "canonical": lambda images: action.canonical(embed(encoder, images)),
    }


def ask(encoder: nn.Module, setting: Setting, *, of_states: bool) -> list[Row]:
    """Ask each feature for the class of images as they are, and in random states.

    With `of_states`, it is asked for the state as well, by least squares and as one of six sectors,
    for class and sector at once, and for the class with few labels.
    """
    classes = list(setting.classes)
    shown = [setting.group.own_turns(images) for images in setting.images]
    again = setting.group.own_turns(setting.images[2][:SOUGHT])
    angles = [setting.state(images) for images in shown]
    have = [angle.isfinite() for angle in angles]  # a state
    states = [angle[some] for angle, some in zip(angles, have, strict=True)]
    sectors = [(state * SECTORS / (2 * torch.pi)).floor().long() % SECTORS for state in states]
    both = [SECTORS * c[h] + s for c, h, s in zip(classes, have, sectors, strict=True)]
    rows, seed = [], int(torch.randint(2**31, ()))
    for name, feature in features_of(encoder, setting).items():
        torch.manual_seed(seed)  # all features are asked with the same few labels
        turned = [feature(images) for images in shown]
        answers = classified("as it is, ", [feature(images) for images in setting.images], classes)
        answers |= classified("any state, ", turned, classes)
        answers["found again"] = found_again(turned[2][:SOUGHT], feature(again))
        if of_states:
            answers["few labels"] = few_labels(turned, classes)
            turned = [x[some] for x, some in zip(turned, have, strict=True)]
            answers["state"] = probe(turned, sectors)
            answers["state error"] = state_error(turned, states)
            answers["class and state"] = probe(turned, both)
        rows.append(as_row(name, answers))
    return rows
