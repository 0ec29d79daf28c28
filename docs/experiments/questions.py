"""What can be asked of an encoder about unseen images, and the features that answer."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from common import Group, Row, embed
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import Tensor, nn

from care_loss.actions import CircleAction, fit_circle
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


def fit_states(features: Tensor, states: Tensor) -> Feature:
    """Return what reads a state from features, by least squares for its cosine and sine."""
    target = torch.stack((states.cos(), states.sin()), -1)
    model = LinearRegression().fit(features.numpy(), target.numpy())

    def read(features: Tensor) -> Tensor:
        x, y = torch.as_tensor(model.predict(features.numpy())).unbind(-1)
        return torch.atan2(y, x)

    return read


def error_of(found: Tensor, angles: Tensor) -> float:
    """Return the median error of angles in degrees; NaN if one of them is not defined."""
    error = found - angles
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


def fit_action(encoder: nn.Module, setting: Setting) -> CircleAction:
    """Fit an action to some of the images that fit the probes."""
    some = setting.group.own_turns(setting.images[0][:FITTED])
    angles = 2 * torch.pi / ANGLES * torch.arange(ANGLES, dtype=torch.float64)
    turned = torch.stack([embed(encoder, setting.act(some, angle)) for angle in angles])
    return fit_circle(embed(encoder, some), turned, angles)


def features_of(encoder: nn.Module, action: CircleAction) -> dict[str, Feature]:
    return {
        "invariants": lambda images: action.invariants(embed(encoder, images)),
        "canonical": lambda images: action.canonical(embed(encoder, images)),
    }


def ask(encoder: nn.Module, setting: Setting, *, of_states: bool) -> list[Row]:
    """Ask each feature for the class of images as they are, and in random states.

    The action is asked for the turn from one showing of an image to another, as a pose: nobody has
    told it any state. With `of_states`, features are asked for the class with few labels as well,
    and plain features, which are not meant to lose the state, for the state, by least squares and
    as one of six sectors, for class and sector at once, and for the turn, as the difference of the
    states that least squares find.
    """
    classes = list(setting.classes)
    shown = [setting.group.own_turns(images) for images in setting.images]
    once, again = shown[2][:SOUGHT], setting.group.own_turns(setting.images[2][:SOUGHT])
    turns = setting.state(again) - setting.state(once)
    turning = turns.isfinite()
    angles = [setting.state(images) for images in shown]
    have = [angle.isfinite() for angle in angles]  # a state
    states = [angle[some] for angle, some in zip(angles, have, strict=True)]
    sectors = [(state * SECTORS / (2 * torch.pi)).floor().long() % SECTORS for state in states]
    both = [SECTORS * c[h] + s for c, h, s in zip(classes, have, sectors, strict=True)]
    rows, seed = [], int(torch.randint(2**31, ()))
    action = fit_action(encoder, setting)
    plain = plain_features(encoder)
    for name, feature in (plain | features_of(encoder, action)).items():
        torch.manual_seed(seed)  # all features are asked with the same few labels
        turned = [feature(images) for images in shown]
        answers = classified("as it is, ", [feature(images) for images in setting.images], classes)
        answers |= classified("any state, ", turned, classes)
        one, other = turned[2][:SOUGHT], feature(again)
        answers["found again"] = found_again(one, other)
        if of_states:
            answers["few labels"] = few_labels(turned, classes)
        if of_states and name in plain:
            turned = [x[some] for x, some in zip(turned, have, strict=True)]
            answers["state"] = probe(turned, sectors)
            answers["class and state"] = probe(turned, both)
            read = fit_states(turned[0], states[0])
            answers["state error"] = error_of(read(turned[2]), states[2])
            found = read(other) - read(one)
            answers["turn error"] = error_of(found[turning], turns[turning])
        if name == "embedding":
            found = action.pose(one, other).element
            answers["turn error, action"] = error_of(found[turning], turns[turning])
        rows.append(as_row(name, answers))
    return rows
