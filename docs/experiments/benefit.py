"""Does it help, at the same cost? Classes, states, few labels and search, on unseen images.

    python docs/experiments/benefit.py    # five seeds; writes build/experiments

All arms of a part see the same number of images, but for SimCLR with as many steps as CARE. The
features of an encoder answer each question about unseen images by a linear probe or by the 20
nearest images. The parts are:

* published: the paper's setting on Fashion-MNIST, which has no colour to jitter. All views have all
  augmentations; CARE has four forwards, and a weight of 0.3 or 10. Its rivals are SimCLR with as
  many steps, which cost half, and SimCLR with twice the steps.
* rotations, hues: what shall rotate the embedding stays out of the ordinary views, on Fashion-MNIST
  and on patches of ten photographs, whose class is the photograph. Seed 11 is there to choose
  features, and is left out of the figure.
* upright, crops, hue turned, hue ignored: rotations of Fashion-MNIST where an assumption does not
  hold. Images are upright in training; or crops shall act as rotations; or the images have hues
  that no question asks for, which rotate the embedding as well, or are one more nuisance.
* cost: images per second, and the memory of what autograd keeps for the backward pass.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import fashion
import torch
from common import (
    BATCH,
    FOUR,
    THREE,
    WEIGHT,
    WITH,
    WITHOUT,
    Arm,
    Group,
    Row,
    draw_arms,
    each_seed,
    measure,
    options,
    placebo,
    trained,
)
from contrast import ROTATION, arms
from groups import TEMPLATES, hues, in_plane, pose
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from photos import load_patches, main_hue, turn_hue
from questions import Setting, ask, ask_for_classes
from torch import Tensor, nn

DIM = 32
COLOURED = 0.03  # distance of the mean colour from grey, below which a patch shows no hue
QUARTER, ALL = 25, 100  # per cent of the steps
SAME_STEPS = "SimCLR, as many steps"
AS_PUBLISHED = [(SAME_STEPS, WEIGHT), (WITH, WEIGHT)]
AS_PUBLISHED += [(arm, weight) for weight in (0.3, 10.0) for arm in (FOUR, placebo(FOUR))]
COMPARED = [WITH, WITHOUT, THREE, placebo(THREE), *ROTATION]
SHORT = [WITH, WITHOUT, THREE, ROTATION[0]]
WRONG = {
    "upright": (fashion.upright, SHORT),
    "crops": (fashion.crops, SHORT),
    "hue turned": (fashion.hue_turned, SHORT),
    "hue ignored": (fashion.hue_ignored, [THREE, ROTATION[0]]),
}
CHOSEN_ON, CHOOSING = 11, ("rotations", "hues")  # the seed to choose features on, and of what
SHOWN = {  # in the figure, with a line for the mean of a rival
    "published": ("as it is, probe", "backbone", WITH),
    "rotations": ("turn error, action", "embedding", WITHOUT),
    "hues": ("turn error, action", "embedding", WITHOUT),
}


def drawn(images: Tensor, labels: Tensor, *shares: float) -> list[tuple[Tensor, Tensor]]:
    """Return disjoint random shares of images with their labels."""
    counts = [round(share * len(images)) for share in shares]
    parts = torch.randperm(len(images))[: sum(counts)].split(counts)
    return [(images[part], labels[part]) for part in parts]


def setting_of(
    group: Group,
    parts: list[tuple[Tensor, Tensor]],
    act: Callable[[Tensor, Tensor], Tensor],
    state: Callable[[Tensor], Tensor],
) -> Setting:
    images, classes = zip(*parts, strict=True)
    return Setting(group, images, classes, act, state)


def of_fashion(make: Callable[[Tensor, Tensor], Group]) -> Setting:
    """Return a setting on Fashion-MNIST: probes have 4,000 images, and 4,000 others are scored."""
    train, test = fashion.load("train"), fashion.load("t10k")
    others, scored = drawn(*test, TEMPLATES / len(test[0]), 0.4)
    parts = [*drawn(*train, 4 / 60, 1 / 60), scored]
    if make in (fashion.hue_turned, fashion.hue_ignored):
        parts = [(fashion.coloured(images), labels) for images, labels in parts]
    return setting_of(make(train[0], others[0]), parts, in_plane, lambda shown: pose(shown)[:, 0])


def of_photographs() -> Setting:
    """Return a setting on patches of photographs; those that are scored are of other parts."""
    group = hues()._replace(network=fashion.narrow)
    with torch.random.fork_rng():
        train, test = load_patches()
    photo = torch.arange(10)
    train, test = (
        (images, photo.repeat_interleave(len(images) // len(photo))) for images in (train, test)
    )

    def hue(shown: Tensor) -> Tensor:
        angle, distance = main_hue(shown)
        return angle.where(distance > COLOURED, torch.nan)

    return setting_of(group, [*drawn(*train, 0.8, 0.2), test], turn_hue, hue)


def make_arms(group: Group, weight: float) -> dict[str, Arm]:
    """Return the arms by name, with SimCLR that has as many steps as four forwards."""
    found = arms(group, weight)
    return found | {SAME_STEPS: found[WITH]._replace(share=0.5)}


class Part(NamedTuple):
    """What is trained, and what is asked of it."""

    make: Callable[[], Setting]
    runs: list[tuple[str, float]]  # the name of an arm, and a weight
    ask: Callable[[nn.Module, Setting], list[Row]]
    budgets: tuple[int, ...] = (ALL,)


def with_weight(names: list[str]) -> list[tuple[str, float]]:
    return [(name, WEIGHT) for name in names]


of_all, of_classes = (partial(ask, of_states=of_states) for of_states in (True, False))
published, rotations = (partial(of_fashion, f) for f in (fashion.published, fashion.rotations))
PARTS = {
    "published": Part(published, AS_PUBLISHED, ask_for_classes, (QUARTER, ALL)),
    "rotations": Part(rotations, with_weight(COMPARED), of_all, (QUARTER, ALL)),
    "hues": Part(of_photographs, with_weight(COMPARED), of_all),
}
PARTS |= {
    name: Part(partial(of_fashion, make), with_weight(names), of_classes, (QUARTER,))
    for name, (make, names) in WRONG.items()
}


def run(part: Part, budget: int, seed: int, steps: int) -> list[dict[str, object]]:
    """Train the arms, and return a row for each and each of its features."""
    torch.manual_seed(seed)
    setting, rows = part.make(), []
    steps = max(1, steps * budget // ALL)
    for label, encoder in trained(setting.group, part.runs, seed, steps, DIM, make_arms):
        torch.manual_seed(seed)  # all are measured and asked with the same draws
        label |= measure(encoder, setting.group)
        with torch.no_grad():
            rows += [label | row for row in part.ask(encoder.eval(), setting)]
    return rows


def step_of(group: Group, arm: Arm) -> tuple[float, int]:
    """Return the seconds of a step, and the bytes that autograd keeps for its backward pass."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    encoder, images, begin = group.network(DIM), group.batch(BATCH), time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = arm.loss(encoder, images)
    loss.backward()
    return time.perf_counter() - begin, sum(storages.values())


def costs(names: list[str], seed: int, steps: int) -> list[dict[str, object]]:
    """Take steps of all arms in turns: a tenth of those that train them."""
    torch.manual_seed(seed)
    rows: list[dict[str, object]] = []
    for name in SHOWN:
        group, runs = PARTS[name].make().group, dict(PARTS[name].runs)
        found = {arm: make_arms(group, WEIGHT)[arm] for arm in runs if arm in names}
        count = max(2, steps // 10)
        taken = [{arm: step_of(group, found[arm]) for arm in found} for _ in range(count)]
        for arm, of_arm in found.items():
            seconds = statistics.median(step[arm][0] for step in taken)
            row = {"part": name, "arm": arm, "forwards": of_arm.forwards}
            row["images/s"] = f"{BATCH / seconds:.0f}"
            rows.append(row | {"MB kept": f"{taken[-1][arm][1] / 2**20:.1f}"})
    return rows


def draw_answers(ax: Axes, name: str, rows: list[Row]) -> None:
    """Draw the answers to a question of a part, and a line for SimCLR."""
    question, feature, rival = SHOWN[name]
    shown = [
        row | {"arm": f"{row['arm']}, {row['weight']}" if FOUR in row["arm"] else row["arm"]}
        for row in rows
        if row["feature"] == feature and row["budget"] == str(ALL) and row["seed"] != str(CHOSEN_ON)
    ]
    found = [float(row[question]) for row in shown if row["arm"] == rival] or [0.0]
    draw_arms(ax, shown, question, chance=statistics.mean(found))
    ax.set_ylim(len(ax.get_yticks()) - 0.5, -0.5)
    if "error" in question:
        ax.set(xlim=(0.9, 110), xscale="log", xlabel="error of the turn, degrees")
        ax.xaxis.set_major_formatter("{x:g}")
    else:
        ax.set_xlabel(f"accuracy, {feature}")
    ax.set_title(name)


def main() -> None:
    found = options(
        __doc__,
        steps=300,
        seeds=[1, 2, 3, 4, 5, CHOSEN_ON],
        part=[*PARTS, "cost"],
        arm=[SAME_STEPS, *COMPARED, FOUR, placebo(FOUR)],
    )
    warnings.filterwarnings("ignore", "the action that|fit_.* found")  # controls do not turn
    torch.set_num_threads(1)  # results do not depend on the cores; seeds can run side by side
    shown = {}
    for name, part in PARTS.items():
        if name not in found.part:
            continue
        runs = [(arm, weight) for arm, weight in part.runs if arm in found.arm]
        seeds = [seed for seed in found.seed if seed != CHOSEN_ON or name in CHOOSING]
        some = argparse.Namespace(**vars(found) | {"arm": list(dict(runs)), "seed": seeds})
        rows = []
        for budget in part.budgets:
            run_part = partial(run, part._replace(runs=runs), budget)
            for seed in each_seed(f"benefit-{name}", some, run_part, budget=budget):
                rows += seed
        if name in SHOWN:
            shown[name] = rows
    if "cost" in found.part:
        some = argparse.Namespace(**vars(found) | {"seed": found.seed[:1]})
        each_seed("benefit-cost", some, partial(costs, found.arm))
    if shown:
        figure = Figure(figsize=(11, 3.2))
        for number, (name, rows) in enumerate(shown.items(), 1):
            draw_answers(figure.add_subplot(1, len(shown), number), name, rows)
        if {"rotations", "hues"} <= shown.keys():
            figure.axes[-1].set_yticklabels([])  # the arms of the panel on its left
        path = found.output / "benefit.png"
        figure.savefig(path)
        print("Wrote", path)


if __name__ == "__main__":
    main()
