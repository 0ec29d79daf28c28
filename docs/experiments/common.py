"""What the experiments share: arms and their training, seeds that can be resumed, and results."""

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from tqdm import tqdm

from care_loss import CAREloss, InfoNCELoss
from care_loss.functional import info_nce_loss, uniformity_loss
from care_loss.metrics import equivariance_report
from care_loss.sphere import normalize
from care_loss.views import augment_chunks, shared_views

Row = dict[str, str]
Transform = Callable[[Tensor], Tensor]
BATCH, CHUNKS, DIM, WEIGHT, RATE = 256, 8, 16, 10.0, 2e-3
HALVES = slice(0, None, 2), slice(1, None, 2)  # of held-out rows: they show different images
WITH, WITHOUT = "SimCLR with the augmentation", "SimCLR without the augmentation"
THREE, FOUR, UNIFORMITY = "CARE, three forwards", "CARE, four forwards", "uniformity"
FIGURES = ("gap_ratio", "shared_gap", "unshared_gap", "rotation_share", "linear_share")
FIGURES += ("composition_share", "effective_rank", "mean_norm")
DOCS = Path(__file__).parent.parent
sys.path.append(str(DOCS / "examples"))  # for what the demonstration has already
matplotlib.style.use(DOCS / "style.mplstyle")


def placebo(arm: str) -> str:
    """Return the name of the no-sharing control of an arm."""
    return f"placebo of {arm}"


COMPARED = [WITH, WITHOUT]
COMPARED += [name for arm in (FOUR, THREE, UNIFORMITY) for name in (arm, placebo(arm))]


class Group(NamedTuple):
    """Data on which a group acts exactly, and an encoder for them.

    `turn` draws one element of the group for all images of a call, `own_turns` one for each image,
    and `ordinary` a nuisance for each image. Each of `circles` acts by an angle, in radians.
    """

    batch: Callable[[int], Tensor]  # images to train on, in random states of the group
    testing: Tensor  # other images, in random states too
    identity: Tensor  # which image a row of `testing` shows
    turn: Transform
    own_turns: Transform
    ordinary: Transform
    network: Callable[[int], nn.Module]  # of the dimension of its embeddings
    circles: tuple[Callable[[Tensor, Tensor], Tensor], ...]


Measure = Callable[[nn.Module, Group], dict[str, object]]


class Arm(NamedTuple):
    """A way to train: how many forwards a step has, and its loss."""

    forwards: int
    loss: Callable[[nn.Module, Tensor], Tensor]
    share: float = 1.0  # of the images that the others see


def arms(group: Group, weight: float) -> dict[str, Arm]:
    """Return the arms by name. A placebo is the same with a turn of its own for each image."""
    info_nce, care = InfoNCELoss(), CAREloss(equivariance_weight=weight)
    uniform = CAREloss(equivariance_weight=weight, base_loss=lambda z, _: uniformity_loss(z))
    ordinary = group.ordinary
    # The turns of placebos share nothing, so views are made without the check that they do.

    def simclr(encoder: nn.Module, x: Tensor) -> Tensor:
        return info_nce(encoder(ordinary(x)), encoder(ordinary(x)))

    def simclr_with_group(encoder: nn.Module, x: Tensor) -> Tensor:
        x1, x2 = (group.own_turns(ordinary(x)) for _ in range(2))
        return info_nce(encoder(x1), encoder(x2))

    def four_forwards(turn: Transform) -> Arm:
        def loss(encoder: nn.Module, x: Tensor) -> Tensor:
            x1, x2 = (group.own_turns(ordinary(x)) for _ in range(2))
            a1, a2, chunks = shared_views(ordinary(x), turn, chunks=CHUNKS, check=False)
            return care(*(encoder(view) for view in (x1, x2, a1, a2)), chunks=chunks)

        return Arm(4, loss)

    def three_forwards(turn: Transform) -> Arm:
        def loss(encoder: nn.Module, x: Tensor) -> Tensor:
            x1, x2 = ordinary(x), ordinary(x)
            turned, chunks = augment_chunks(x1, turn, chunks=CHUNKS, check=False)
            z1, z2, e = encoder(x1), encoder(x2), encoder(turned)
            return care(z1, z2, z1, e, chunks=chunks)

        return Arm(3, loss)

    def uniformity(turn: Transform) -> Arm:
        def loss(encoder: nn.Module, x: Tensor) -> Tensor:
            x1 = ordinary(x)
            turned, chunks = augment_chunks(x1, turn, chunks=CHUNKS, check=False)
            z, e = encoder(x1), encoder(turned)
            return uniform(z, z, z, e, chunks=chunks)

        return Arm(2, loss)

    def ce_ssl(turn: Transform, share: float) -> Arm:
        """Mix InfoNCE with InfoNCE of the changes of two images that share both turns."""

        def loss(encoder: nn.Module, x: Tensor) -> Tensor:
            a1, a2, _ = shared_views(ordinary(x), turn, chunks=len(x) // 2, check=False)
            z1, z2 = encoder(a1), encoder(a2)
            change = z1 - z2
            of_changes = info_nce_loss(change[0::2], change[1::2])
            return (1 - share) * info_nce(z1, z2) + share * of_changes

        return Arm(2, loss)

    own = group.own_turns
    return {
        WITH: Arm(2, simclr_with_group),
        WITHOUT: Arm(2, simclr),
        FOUR: four_forwards(group.turn),
        placebo(FOUR): four_forwards(own),
        THREE: three_forwards(group.turn),
        placebo(THREE): three_forwards(own),
        UNIFORMITY: uniformity(group.turn),
        placebo(UNIFORMITY): uniformity(own),
        "CE-SSL": ce_ssl(group.turn, 0.5),
        "placebo of CE-SSL": ce_ssl(own, 0.5),
        "CE-SSL, changes": ce_ssl(group.turn, 1.0),
        "placebo of CE-SSL, changes": ce_ssl(own, 1.0),
    }


def train(arm: Arm, group: Group, encoder: nn.Module, steps: int, rate: float = RATE) -> None:
    """Train in place. Arms see their share of the images of `steps` steps of three forwards."""
    steps = max(1, int(3 * steps * arm.share) // arm.forwards)
    optimizer = torch.optim.AdamW(encoder.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    for _ in range(steps):
        loss = arm.loss(encoder, group.batch(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def trained(
    group: Group,
    runs: list[tuple[str, float]],
    seed: int,
    steps: int,
    dim: int = DIM,
    make_arms: Callable[[Group, float], dict[str, Arm]] = arms,
    rate: float = RATE,
    kept: Path | None = None,
) -> Iterator[tuple[dict[str, object], nn.Module]]:
    """Yield the untrained encoder, and one for each arm and weight, with what a row says of it.

    With a folder `kept`, encoders are written there, and those that are there are not trained.
    """
    untrained = group.network(dim)
    with torch.no_grad():
        for _ in range(20):  # the statistics that batch normalisation needs in eval mode
            untrained(group.batch(BATCH))
    yield {"arm": "untrained", "weight": "", "forwards": ""}, deepcopy(untrained)
    for name, weight in tqdm(runs, desc="arms", leave=False):
        torch.manual_seed(seed)
        encoder, arm = deepcopy(untrained), make_arms(group, weight)[name]
        path = kept and kept / f"{name}, {dim} dimensions, seed {seed}, {steps} steps.pt"
        if path and path.exists():
            encoder.load_state_dict(torch.load(path, weights_only=True))
        else:
            train(arm, group, encoder, steps, rate)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(encoder.state_dict(), path)
        yield {"arm": name, "weight": weight, "forwards": arm.forwards}, encoder


def nearest(z: Tensor, identity: Tensor, k: int = 5) -> float:
    """Return how often most of the k nearest other rows show the same image."""
    cosine = (normalize(z) @ normalize(z).mT).fill_diagonal_(-2)
    found = identity[cosine.topk(k).indices].mode(-1).values
    return (found == identity).double().mean().item()


def measure(encoder: nn.Module, group: Group) -> dict[str, object]:
    """Return the figures of the report on the images for measuring, and the accuracy of kNN."""
    report = equivariance_report(
        encoder, group.testing, {"turn": group.turn}, samples=32, progress=False
    )
    row = report.row("turn")
    with torch.no_grad():
        accuracy = nearest(encoder.eval()(group.testing), group.identity)
    return {
        "verdict": row.verdict,
        **{name: f"{row.figures[name].mean:.4g}" for name in FIGURES},
        "kNN": f"{accuracy:.3f}",
    }


def embed(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the unit embeddings of an encoder in eval mode, in float64."""
    return normalize(encoder.eval()(images).double())


def measured(
    make: Callable[[], Group],
    names: list[str],
    measures: list[Measure],
    seed: int,
    steps: int,
    dim: int = DIM,
    weight: float = WEIGHT,
    make_arms: Callable[[Group, float], dict[str, Arm]] = arms,
    rate: float = RATE,
    kept: Path | None = None,
) -> list[dict[str, object]]:
    """Train arms with one weight; return a row of measures for each, and for no training."""
    torch.manual_seed(seed)
    group = make()
    rows = []
    runs = [(name, weight) for name in names]
    for row, encoder in trained(group, runs, seed, steps, dim, make_arms, rate, kept):
        torch.manual_seed(seed)  # all are measured with the same draws
        for measure_of in measures:
            row |= measure_of(encoder, group)
        rows.append(row)
    return rows


def colour(arm: str) -> str:
    if arm.startswith("placebo"):
        return "C1"
    ours = THREE, UNIFORMITY, "separate views", "composed view"
    ours += "rotation contrast", "rotation contrast, O(D)"
    return "C0" if arm in ours else "C5"


def draw_arms(
    ax: Axes, rows: list[Row], figure: str, *, chance: float, names: list[str] | None = None
) -> None:
    """Draw a figure of each arm, a dot for each seed, and a line where chance is.

    Panels that share an axis, but not all of their arms, need the names of all.
    """
    names = names or list(dict.fromkeys(row["arm"] for row in rows))
    for place, name in enumerate(names):
        values = [float(row[figure]) for row in rows if row["arm"] == name]
        ax.plot(values, [place] * len(values), "o", color=colour(name), alpha=0.8)
    ax.axvline(chance, color="C5", lw=1)
    ax.set_yticks(range(len(names)), names)
    ax.grid(axis="x")


def options(
    question: str, *, steps: int, seeds: list[int], **choices: list[str]
) -> argparse.Namespace:
    """Return the options that experiments share, and choices of some values of each name."""
    parser = argparse.ArgumentParser(description=question.splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps, help="training steps of an arm")
    parser.add_argument("--seed", type=int, nargs="+", default=seeds)
    for name, values in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=values)
    parser.add_argument("--output", type=Path, default=Path("build/experiments"))
    parser.add_argument("--again", action="store_true", help="run seeds that have a result, too")
    found = parser.parse_args()
    if found.steps < 1:
        parser.error(f"--steps must be at least 1, got {found.steps}")
    for name in ("seed", *choices):
        values = getattr(found, name)
        if len(set(values)) < len(values):
            parser.error(f"--{name} must not name a value twice, got {values}")
    return found


def read(path: Path) -> list[Row]:
    """Return the rows of a file, none if there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    """Write rows, which may have different columns; a file is replaced only when all is written."""
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(column for row in rows for column in row))
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def each_seed(
    name: str,
    options: argparse.Namespace,
    run: Callable[[int, int], list[dict[str, object]]],
    **settings: int,
) -> list[list[Row]]:
    """Run the seeds that have no result yet, add theirs to the file, and return the rows of all.

    The file has a column for the seed, and one for each of the settings. It is written whenever a
    seed is done, so you can resume an interrupted run.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{name}.csv"
    found = []
    for seed in tqdm(options.seed, desc=name, unit="seed"):
        key = {column: str(value) for column, value in (settings | {"seed": seed}).items()}
        rows = [row for row in read(path) if key.items() <= row.items()]
        if options.again or not rows:
            origin = {"steps": options.steps, "torch": torch.__version__}
            new = [key | row | origin for row in run(seed, options.steps)]
            rows = [{column: str(value) for column, value in row.items()} for row in new]
            others = [row for row in read(path) if not key.items() <= row.items()]
            in_order = sorted(others + rows, key=lambda row: [int(row[column]) for column in key])
            write(path, in_order)
        arms = {row["arm"] for row in rows} - {"untrained"} if "arm" in options else set()
        was = {"steps": rows[0]["steps"], "arm": sorted(arms)}
        asked = {"steps": str(options.steps), "arm": sorted(getattr(options, "arm", []))}
        for option in was:
            if was[option] != asked[option]:
                sys.exit(
                    f"seed {seed} of {path} was written with --{option} {was[option]}, got "
                    f"{asked[option]}: give --again to replace it, or another --output."
                )
        found.append(rows)
    return found
