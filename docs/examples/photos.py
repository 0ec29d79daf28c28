"""Train a small network on patches of photographs: turn the hue, and does the embedding turn?

The patches are cut from ten colour photographs that come with scikit-image and scikit-learn, so
nothing is downloaded. The left 60 % of each photograph is for training, the rest for testing.

A turn of the hue rotates the RGB values about the grey axis. Turns form a group: two of them are
the turn by the sum of their angles. So the embeddings can turn as well, by rotations that form a
group. Crops and flips are what the embedding shall ignore. Each patch is shown in a random hue,
which is the same in all of its views: a rotation that is fitted for one turn can only be applied
after another one if the network has learned from patches that were turned already.

All arms start from the same weights and see the same patches in the same order; crops, flips and
hues are drawn anew in each arm:

* SimCLR with hue: InfoNCE, each view has its own crop, flip and hue.
* SimCLR without hue: the same without turns of the hue.
* CARE, four forwards: the published form. InfoNCE as in "SimCLR with hue", and the equivariance
  loss on two views with a crop, flip and hue for each chunk.
* CARE, three forwards: InfoNCE as in "SimCLR without hue", and the equivariance loss between its
  first view and the same images with one turn of the hue for each chunk.
* placebo, three forwards: the same, but each image has its own turn, so nothing is shared.
* CARE, uniformity: the uniformity loss takes the place of InfoNCE, in two forwards.
* placebo, uniformity: the same, with one turn for each image.

The main result is the gap ratio of the equivariance report: how much the Gram matrix of held-out
patches changes under turns of the hue that all patches share, divided by how much it changes where
each patch has its own. It is near 0 where a turn of the hue acts as one rotation, and near 1 for an
encoder that ignores the hue. A second table has ordinary augmentations by name, and whether colour
survives.

By default three arms are trained, in less than three minutes on two idle CPU cores: CARE with three
forwards and its two controls, the placebo and SimCLR without hue. The run prints how they compare.
With --full, all arms are trained and measured, in about five minutes per seed, and the run writes
two tables and a figure:

    python docs/examples/photos.py --full --seed 1 --output build/photos
"""

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import kornia.augmentation as K
import matplotlib.style
import torch
import torch.nn.functional as F
from care_loss import CAREloss, InfoNCELoss
from care_loss.functional import uniformity_loss
from care_loss.metrics import Estimate, ReportRow, compare, equivariance_report, frequencies
from care_loss.rotation import fit_rotation
from care_loss.sphere import normalize
from care_loss.views import assert_shared, augment_chunks, shared_views
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from skimage import data
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from tqdm import tqdm

Parts = Mapping[str, Tensor]
Arm = Callable[[nn.Module, Tensor], Parts]

PATCH, BATCH, CHUNKS, DIM = 32, 256, 8, 16
TRAINING, TESTING = 500, 200  # patches of each photograph
ANGLES = 72  # turns of the hue that rotations are fitted for
NEAR = math.pi / 6  # hues that differ by less count as the same
PICTURED = 1100  # the training patch in the figure
CONTROLS = {
    "CARE, four forwards": "SimCLR with hue",
    "CARE, three forwards": "placebo, three forwards",
    "CARE, uniformity": "placebo, uniformity",
}
SHORT = ["CARE, three forwards", "placebo, three forwards", "SimCLR without hue"]
GAP = ["verdict", "gap ratio", "±", "shared hues", "own hues"]
ROTATIONS = ["rotation share", "above chance", "linear share", "composition", "hue error"]
REPRESENTATION = ["multiplicities", "deviation"]
COLOUR = ["kNN", "hue kNN", "same hue", "same hue, turned"]
EMBEDDING = ["effective rank", "mean norm", "s per step"]
ORDINARY = ["transformation", "verdict", "gap_ratio", "gap_ratio_standard_error"]
ORDINARY += ["rotation_share", "share_above_chance", "linear_share"]
ORDINARY += ["invariance_error", "invariance_error_shuffled"]
COMPARED = ["SimCLR with hue", "SimCLR without hue", "CARE, four forwards", "CARE, three forwards"]
GREY, COLOURS = "C5", {"CARE, three forwards": "C0", "CARE, uniformity": "C2"}
COLOURS |= {"placebo, three forwards": "C1", "placebo, uniformity": "C1"}
ARROW = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.3", "color": "C5"}


def photographs() -> Iterator[Tensor]:
    """Yield ten photographs `(3, 320, W)` with values in [0, 1]."""
    photos = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    photos += [data.hubble_deep_field(), data.retina(), data.immunohistochemistry()]
    for photo in [*photos, data.stereo_motorcycle()[0], *load_sample_images().images]:
        size = (320, round(320 * photo.shape[1] / photo.shape[0]))
        image = torch.tensor(photo).permute(2, 0, 1)[None] / 255
        yield F.interpolate(image, size, mode="bilinear", antialias=True)[0]


def patches(photo: Tensor, count: int) -> list[Tensor]:
    """Cut `count` patches `(3, 32, 32)` at random places of a photograph."""
    rows, columns = (torch.randint(size - PATCH + 1, (count,)).tolist() for size in photo.shape[1:])
    return [photo[:, i : i + PATCH, j : j + PATCH] for i, j in zip(rows, columns, strict=True)]


def turn_hue(images: Tensor, angle: Tensor) -> Tensor:
    """Rotate the RGB values of images `(n, 3, H, W)` about the grey axis, without clipping.

    The angle, in radians, is one for all images `()` or one for each `(n,)`. A turn by a and then
    by b is the turn by a + b.
    """
    # Red, green and blue lie 120 degrees apart about the axis; a turn by 120 makes red green.
    thirds = 2 * math.pi / 3 * torch.arange(3).to(images)
    rotation = (1 + 2 * torch.cos(angle.to(images)[..., None, None] + thirds - thirds[:, None])) / 3
    return (rotation @ images.flatten(2)).view_as(images)


def random_angles(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    return 2 * math.pi * torch.rand(shape, generator=generator, dtype=torch.float64)


def one_turn(images: Tensor) -> Tensor:
    """Turn the hue of all images by one random angle."""
    return turn_hue(images, random_angles())


def own_turns(images: Tensor) -> Tensor:
    """Turn the hue of each image by a random angle of its own."""
    return turn_hue(images, random_angles(len(images)))


def crop_and_flip(*, shared: bool = False) -> nn.Module:
    """Return a transform of images `(n, 3, 32, 32)`, with one draw for all or one for each."""
    return nn.Sequential(
        K.RandomResizedCrop((PATCH, PATCH), scale=(0.3, 1.0), same_on_batch=shared),
        K.RandomHorizontalFlip(same_on_batch=shared),
    )


def network(dim: int = DIM, width: int = 16) -> nn.Sequential:
    """Return a backbone of four convolutions, whose output kNN uses, and a projection head."""
    backbone = nn.Sequential()
    for i, o in pairwise([3, width, 2 * width, 4 * width, 8 * width]):
        backbone.extend([nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()])
    backbone.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    hidden = [nn.Linear(o, o, bias=False), nn.BatchNorm1d(o), nn.ReLU()]
    return nn.Sequential(backbone, nn.Sequential(*hidden, nn.Linear(o, dim)))


def make_arms(weight: float) -> dict[str, Arm]:
    """Return the arms by name; each maps an encoder and a batch to the parts of its loss."""
    info_nce, care = InfoNCELoss(), CAREloss(equivariance_weight=weight)
    uniform = CAREloss(equivariance_weight=weight, base_loss=lambda z, _: uniformity_loss(z))
    ordinary, together = crop_and_flip(), crop_and_flip(shared=True)

    def simclr_with_hue(encoder: nn.Module, images: Tensor) -> Parts:
        x1, x2 = own_turns(ordinary(images)), own_turns(ordinary(images))
        return {"loss": info_nce(encoder(x1), encoder(x2))}

    def simclr_without_hue(encoder: nn.Module, images: Tensor) -> Parts:
        x1, x2 = ordinary(images), ordinary(images)
        return {"loss": info_nce(encoder(x1), encoder(x2))}

    def four_forwards(encoder: nn.Module, images: Tensor) -> Parts:
        x1, x2 = own_turns(ordinary(images)), own_turns(ordinary(images))
        a1, a2, chunks = shared_views(images, lambda x: one_turn(together(x)), chunks=CHUNKS)
        z1, z2, e1, e2 = encoder(x1), encoder(x2), encoder(a1), encoder(a2)
        return care.forward_components(z1, z2, e1, e2, chunks=chunks)._asdict()

    # Placebos share nothing, so views are made without the check that they do.
    def three_forwards(turn: Callable[[Tensor], Tensor], encoder: nn.Module, x: Tensor) -> Parts:
        x1, x2 = ordinary(x), ordinary(x)
        turned, chunks = augment_chunks(x1, turn, chunks=CHUNKS, check=False)
        z1, z2, e = encoder(x1), encoder(x2), encoder(turned)
        return care.forward_components(z1, z2, z1, e, chunks=chunks)._asdict()

    def uniformity(turn: Callable[[Tensor], Tensor], encoder: nn.Module, x: Tensor) -> Parts:
        x1 = ordinary(x)
        turned, chunks = augment_chunks(x1, turn, chunks=CHUNKS, check=False)
        z1, e = encoder(x1), encoder(turned)
        return uniform.forward_components(z1, z1, z1, e, chunks=chunks)._asdict()

    return {
        "SimCLR with hue": simclr_with_hue,
        "SimCLR without hue": simclr_without_hue,
        "CARE, four forwards": four_forwards,
        "CARE, three forwards": partial(three_forwards, one_turn),
        "placebo, three forwards": partial(three_forwards, own_turns),
        "CARE, uniformity": partial(uniformity, one_turn),
        "placebo, uniformity": partial(uniformity, own_turns),
    }


def train(name: str, arm: Arm, encoder: nn.Module, batches: Iterable[Tensor], steps: int) -> float:
    """Train in place, with a learning rate that rises and falls; return the median s/step."""
    optimizer = torch.optim.AdamW(encoder.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    seconds = []
    with tqdm(batches, desc=f"{name:23}", total=steps, unit="step") as bar:
        for images in bar:
            begin = time.perf_counter()
            # All chunks of a view go through the encoder in one forward: where a batch has seen
            # one augmentation only, batch normalisation can undo it.
            parts = arm(encoder, images)
            optimizer.zero_grad()
            parts["loss"].backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix({key: f"{part.item():.4f}" for key, part in parts.items()})
            seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[len(seconds) // 2]


class Measures(NamedTuple):
    """What the tables say of an encoder; all but kNN is of the head's unit embeddings."""

    hue: ReportRow
    ordinary: list[dict[str, Any]]
    multiplicities: Tensor  # of the frequencies 0, 1, ...
    deviation: float  # in radians
    angles: Tensor  # eigen-angles of the fitted rotations, (ANGLES, subspace)
    hue_error: float  # in degrees
    accuracy: float
    hue_accuracy: float
    same_hue: tuple[float, float]  # before and after a turn of the hue


def wrap(angle: Tensor) -> Tensor:
    """Return the angle in [-pi, pi) of the same direction."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def main_hue(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the angle of the mean colour about the grey axis, and its distance from the axis."""
    thirds = 2 * math.pi / 3 * torch.arange(3).to(images)
    mean = images.mean((2, 3))
    colour = torch.complex(mean @ torch.cos(thirds), mean @ torch.sin(thirds))
    return colour.angle(), colour.abs()


def fit_rotations(z: Tensor, turned: Tensor) -> Tensor:
    """Fit a rotation of SO(d) to each turn: rows `(n, d)` and `(T, n, d)` to `(T, d, d)`."""
    return fit_rotation(z.expand_as(turned), turned, special=True).rotation


def principal_subspace(z: Tensor, share: float = 0.95) -> Tensor:
    """Return a basis `(D, d)` of the directions that hold this share of the mean square of rows."""
    values, vectors = torch.linalg.eigh(z.mT @ z)
    held = values.flip(0).cumsum(0) / values.sum()
    return vectors.flip(1)[:, : int((held < share).sum()) + 1]


def relative_hue_error(z: Tensor, z_turned: Tensor, z_asked: Tensor, asked: Tensor) -> float:
    """Read off the turn between two patches; return the median error in degrees.

    It is the turn whose rotation, fitted to the other half, takes one nearest to the other.
    """
    distance = torch.empty(z_turned.shape[:2], dtype=z.dtype)
    halves = slice(0, None, 2), slice(1, None, 2)
    for fit, score in (halves, halves[::-1]):
        predicted = z[score] @ fit_rotations(z[fit], z_turned[:, fit])
        distance[:, score] = torch.linalg.vector_norm(predicted - z_asked[score], dim=-1)
    found = 2 * math.pi / ANGLES * distance.argmin(0)
    return wrap(found - asked).abs().median().rad2deg().item()


def nearest(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    """Return the indices of the k rows of the gallery with the highest cosine, `(n, k)`."""
    return (normalize(queries) @ normalize(gallery).mT).topk(k).indices.cpu()


def knn_accuracy(embed: Callable[[Tensor], Tensor], data: list[Tensor], k: int = 20) -> float:
    """Ask the nearest training patches for the label of a test patch."""
    training, labels, testing, wanted = data
    guess = labels[nearest(embed(testing), embed(training), k)].mode().values
    return (guess == wanted).double().mean().item()


def same_hue(embed: Callable[[Tensor], Tensor], images: Tensor, angle: float, k: int = 10) -> float:
    """Turn the hue of each patch, and return how many of its nearest patches have its new hue."""
    hue, _ = main_hue(images)
    gallery = embed(images)
    found = nearest(embed(turn_hue(images, torch.tensor(angle))), gallery, k + 1)
    own = torch.arange(len(images)).unsqueeze(1)
    # The patch itself is left out: the nearest of the others are the first k that are not it.
    others = found[(found != own) & ((found != own).cumsum(1) <= k)].view(len(images), k)
    return (wrap(hue[others] - hue.unsqueeze(1) - angle).abs() < NEAR).double().mean().item()


def alternating(images: Tensor) -> Tensor:
    """Bring patches into an order in which even and odd rows are from different photographs.

    Patches of one photograph overlap, and rotations are fitted to one half and scored on the other.
    """
    return torch.stack(images.chunk(2), 1).flatten(0, 1)


def held_out(testing: Tensor, turned: bool, generator: torch.Generator) -> Tensor:
    """Return a quarter of the patches for testing, in random hues."""
    images = alternating(testing[::4])
    return turn_hue(images, random_angles(len(images), generator=generator) * turned)


@torch.no_grad()
def measure(
    encoder: nn.Sequential,
    training: Tensor,
    testing: Tensor,
    *,
    turned: bool = True,
    ordinary: bool = False,
    draws: int = 96,
) -> Measures:
    """Measure an encoder in eval mode, on held-out patches."""
    encoder.eval()
    generator = torch.Generator().manual_seed(0)  # every arm and seed is measured alike
    draw = partial(random_angles, generator=generator)
    images = held_out(testing, turned, generator)
    grid = 2 * math.pi / ANGLES * torch.arange(ANGLES, dtype=torch.float64)
    asked = draw(len(images))

    def features(images: Tensor) -> Tensor:
        return torch.cat([encoder[0](part) for part in images.split(BATCH)])

    def embed(images: Tensor) -> Tensor:
        return torch.cat([normalize(encoder(p).cpu().double()) for p in images.split(BATCH)])

    report = partial(equivariance_report, encoder, progress=False)
    z, z_asked = embed(images), embed(turn_hue(images, asked))
    z_turned = torch.stack([embed(turn_hue(images, angle)) for angle in grid])
    basis = principal_subspace(z_turned.flatten(0, 1))
    rotations = fit_rotations(z @ basis, z_turned @ basis)
    multiplicity, deviation = frequencies(rotations, grid)

    photographs = [torch.arange(10).repeat_interleave(n).to(z) for n in (TRAINING, TESTING)]
    hues = [turn_hue(part, draw(len(part))) for part in (training, testing)]
    coloured = [part[main_hue(part)[1] > 0.1] for part in hues]  # of a grey patch there is no hue
    sixths = [wrap(main_hue(part)[0]).div(math.pi / 3).floor().cpu() for part in coloured]
    by_name = []
    if ordinary:
        some = alternating(testing[::20])
        by_name = report(some, augmentations(), samples=max(4, draws // 4)).to_dict()["rows"]
    return Measures(
        hue=report(images, {"hue": one_turn}, samples=draws).row("hue"),
        ordinary=[row for row in by_name if row["against"] == "clean"],
        multiplicities=multiplicity,
        deviation=deviation.item(),
        angles=torch.linalg.eigvals(rotations).angle().sort().values,
        hue_error=relative_hue_error(z, z_turned, z_asked, asked),
        accuracy=knn_accuracy(features, [training, photographs[0], testing, photographs[1]]),
        hue_accuracy=knn_accuracy(features, [coloured[0], sixths[0], coloured[1], sixths[1]]),
        same_hue=(same_hue(embed, coloured[1], 0.0), same_hue(embed, coloured[1], 2 * math.pi / 3)),
    )


def augmentations() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return augmentations by name, each with one draw for all images of a call."""
    colour = K.ColorJiggle(0.4, 0.4, 0.4, 0.1, p=1.0, same_on_batch=True)
    return {
        "crop": K.RandomResizedCrop((PATCH, PATCH), scale=(0.3, 1.0), same_on_batch=True),
        "flip": K.RandomHorizontalFlip(p=1.0),
        "colour": lambda images: colour(images.clamp(0, 1)),
        "grey": K.RandomGrayscale(p=1.0),
    }


def number(estimate: Estimate, digits: str = ".3f") -> str:
    return "" if math.isnan(estimate.mean) else format(estimate.mean, digits)


def table(results: dict[str, Measures], seconds: dict[str, float]) -> list[dict[str, str]]:
    """Return a row for each arm, by column."""
    rows = []
    for name, m in results.items():
        figures = m.hue.figures
        shown = 1 + int((m.multiplicities.abs() >= 0.05).nonzero().max())  # the rest are zeros
        before, after = m.same_hue
        rows.append(
            {
                "arm": name,
                "verdict": m.hue.verdict,
                "gap ratio": number(figures["gap_ratio"]),
                "±": f"{figures['gap_ratio'].error:.3f}",
                "shared hues": number(figures["shared_gap"], ".1e"),
                "own hues": number(figures["unshared_gap"], ".1e"),
                "rotation share": number(figures["rotation_share"]),
                "above chance": number(figures["share_above_chance"]),
                "linear share": number(figures["linear_share"]),
                "composition": number(figures["composition_share"]),
                "hue error": f"{m.hue_error:.1f}",
                "multiplicities": " ".join(f"{k:.2f}" for k in m.multiplicities[:shown].tolist()),
                "deviation": f"{m.deviation:.4f}",
                "kNN": f"{m.accuracy:.3f}",
                "hue kNN": f"{m.hue_accuracy:.3f}",
                "same hue": f"{before:.3f}",
                "same hue, turned": f"{after:.3f}",
                "effective rank": number(figures["effective_rank"], ".1f"),
                "mean norm": number(figures["mean_norm"]),
                "s per step": f"{seconds[name]:.3f}" if name in seconds else "",
            }
        )
    return rows


def ordinary_table(results: dict[str, Measures]) -> list[dict[str, str]]:
    """Return a row for each arm and ordinary augmentation, as the report names the figures."""
    return [
        {"arm": name}
        | {k: f"{v:.3f}" if isinstance(v := record.get(k, ""), float) else v for k in ORDINARY}
        for name, m in results.items()
        for record in m.ordinary
    ]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("Wrote", path)


def print_table(rows: list[dict[str, str]], columns: list[str]) -> None:
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        texts = (text.rjust(width) for text, width in zip(cells, widths[1:], strict=True))
        print(name.ljust(widths[0]), *texts, sep="  ")
    print()


def print_findings(results: dict[str, Measures]) -> None:
    """Print what this run says, and what it cannot say."""
    for care, control in CONTROLS.items():
        ours, theirs = (results[arm].hue.figures["gap_ratio"] for arm in (care, control))
        difference, error = ours.mean - theirs.mean, math.hypot(ours.error, theirs.error)
        word = "not distinguishable from"
        if abs(difference) > 2 * error:
            word = "below" if difference < 0 else "ABOVE"
        print(f"{care}: gap ratio {word} that of {control} ({difference:+.2f} ± {error:.2f}).")
    loss = results["SimCLR without hue"].accuracy - results["CARE, three forwards"].accuracy
    print(f"kNN of SimCLR without hue minus that of CARE, three forwards: {loss:+.3f}.")
    print("± is one standard error over the turns. One seed is no evidence: try --seed 0 1 2.")


def ring_of_hues(ax: Axes, patch: Tensor, count: int = 12) -> None:
    """Draw a patch `(3, 32, 32)` in several hues, at their angles on a circle."""
    for angle in 2 * math.pi / count * torch.arange(count):
        x, y = 3 * torch.cos(angle).item(), 3 * torch.sin(angle).item()
        turned = turn_hue(patch[None], angle)[0].clamp(0, 1)
        ax.imshow(
            turned.permute(1, 2, 0).cpu().numpy(), extent=(x - 0.68, x + 0.68, y - 0.68, y + 0.68)
        )
    ax.annotate("", (1.2, 1.2), (1.7, 0), arrowprops=ARROW)
    ax.text(0, 0, "θ", ha="center", va="center", fontsize=18)
    ax.set(xlim=(-3.8, 3.8), ylim=(-3.8, 3.8))
    ax.set_title("hue turned by θ", fontsize=11)
    ax.axis("off")


def eigen_angles(axes: Iterable[Axes], results: dict[str, Measures]) -> None:
    """Draw the eigen-angles of the fitted rotations against the angle of the turn."""
    theta = (360 / ANGLES * torch.arange(ANGLES)).numpy()
    for ax, (name, m) in zip(axes, results.items(), strict=True):
        colour = COLOURS.get(name, GREY)
        for column in m.angles.rad2deg().mT.numpy():
            ax.plot(theta, column, ".", markersize=2.5, color=colour)
        ax.set_title(name.replace(", ", ",\n").replace(" without", "\nwithout"), fontsize=10)
        ax.set(xticks=[0, 180, 360], yticks=[-180, 0, 180], ylim=(-190, 190))
        ax.spines[["top", "right"]].set_visible(False)


def gap_ratios(ax: Axes, runs: list[list[dict[str, str]]]) -> None:
    """Draw the gap ratios of the arms, a dot for each seed."""
    for place, arm in enumerate(zip(*runs, strict=True)):
        name, ratios = arm[0]["arm"], [float(row["gap ratio"]) for row in arm]
        ratios = [min(max(ratio, 0.01), 1.6) for ratio in ratios]  # the limits of the axis
        ax.plot(ratios, [place] * len(ratios), "o", color=COLOURS.get(name, GREY), alpha=0.8)
    ax.axvline(1, color=GREY, linewidth=1)
    ax.set_yticks(range(len(runs[0])), [row["arm"] for row in runs[0]])
    ax.set(xscale="log", xlim=(0.01, 1.6), xticks=[0.01, 0.1, 1])
    ax.set_xticklabels(["0.01", "0.1", "1"])
    ax.set_xlabel("gap ratio" + (f" ({len(runs)} seeds)" if len(runs) > 1 else ""))
    ax.invert_yaxis()
    ax.tick_params(left=False)
    ax.spines[["top", "right", "left"]].set_visible(False)


def figure(
    path: Path, patch: Tensor, results: dict[str, Measures], runs: list[list[dict[str, str]]]
) -> None:
    """Draw the turns, what they do to the embeddings, and the gap ratios of all seeds."""
    matplotlib.style.use(Path(__file__).parent.parent / "style.mplstyle")
    fig = Figure(figsize=(10, 4))
    left, middle, right = fig.subfigures(1, 3, width_ratios=(1, 2, 1.7))
    ring_of_hues(left.subplots(), patch)
    names = ["SimCLR without hue", "placebo, three forwards", "CARE, three forwards"]
    axes = middle.subplots(1, 3, sharey=True)
    eigen_angles(axes, {name: results[name] for name in names})
    axes[0].set_ylabel("eigen-angles of the rotation (degrees)")
    axes[1].set_xlabel("θ (degrees)")
    gap_ratios(right.subplots(), runs)
    fig.savefig(path)


def load_patches() -> tuple[Tensor, Tensor]:
    """Return the patches for training and for testing; every seed has the same."""
    torch.manual_seed(0)
    training, testing = [], []
    for photo in photographs():
        border = round(0.6 * photo.shape[2])
        training.extend(patches(photo[..., :border], TRAINING))
        testing.extend(patches(photo[..., border:], TESTING))
    return torch.stack(training), torch.stack(testing)


def trained(
    seed: int,
    training: Tensor,
    names: Iterable[str],
    *,
    steps: int,
    weight: float,
    turned: bool,
) -> Iterator[tuple[str, nn.Sequential, float]]:
    """Yield the untrained encoder and that of each arm, with the seconds per step."""
    torch.manual_seed(seed)
    untrained = network().to(training.device)
    order = torch.stack([torch.randperm(len(training))[:BATCH] for _ in range(max(steps, 20))])
    with torch.no_grad():
        for rows in order[:20]:  # the statistics that batch normalisation needs in eval mode
            untrained(training[rows])
    yield "untrained", deepcopy(untrained), math.nan
    arms = make_arms(weight)
    for name in names:
        torch.manual_seed(seed)
        encoder = deepcopy(untrained)
        batches = (
            turn_hue(training[rows], random_angles(BATCH) * turned) for rows in order[:steps]
        )
        seconds = train(name, arms[name], encoder, batches, steps)
        if not all(parameter.isfinite().all() for parameter in encoder.parameters()):
            sys.exit(f"{name}: the training diverged, its weights are not finite; lower --weight")
        yield name, encoder, seconds


def run(
    encoders: Iterable[tuple[str, nn.Sequential, float]], measured: Callable[..., Measures]
) -> tuple[dict[str, Measures], dict[str, float]]:
    """Measure all encoders; return the measures and the seconds per step by arm."""
    results, seconds = {}, {}
    for name, encoder, seconds_per_step in encoders:
        results[name] = measured(encoder, ordinary=name in COMPARED)
        if name != "untrained":
            seconds[name] = seconds_per_step
    return results, seconds


def print_comparison(
    encoders: Iterable[tuple[str, nn.Sequential, float]], images: Tensor, draws: int
) -> None:
    """Print how CARE compares with the stronger of its controls, on held-out patches."""
    found = {name: encoder for name, encoder, _ in encoders if name != "untrained"}
    comparison = compare(
        found,
        images,
        {"hue": one_turn},
        baseline="SimCLR without hue",
        samples=draws,
        progress=False,
    )
    print(comparison)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="training steps of an arm (250, full 300)")
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="of weights, order and augmentations"
    )
    parser.add_argument("--weight", type=float, default=10.0, help="of the equivariance loss")
    parser.add_argument(
        "--natural", action="store_true", help="show each patch in its own hue, not in a random one"
    )
    parser.add_argument(
        "--full", action="store_true", help="train all arms, write tables and a figure"
    )
    parser.add_argument("--draws", type=int, help="turns of the hue in the report (16, full 96)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("build/photos"))
    args = parser.parse_args()
    if args.steps is None:
        args.steps = 300 if args.full else 250
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    args.draws = args.draws or (96 if args.full else 16)
    if args.draws < 4:
        parser.error(f"--draws must be at least 4, got {args.draws}")
    if not 0 <= args.weight < math.inf:
        parser.error(f"--weight must be finite and at least 0, got {args.weight}")
    if len(set(args.seed)) < len(args.seed):
        parser.error(f"--seed must not name a seed twice, got {args.seed}")

    training, testing = (part.to(args.device) for part in load_patches())
    assert_shared(one_turn, training[0])
    turned = not args.natural
    options = {"steps": args.steps, "weight": args.weight, "turned": turned}
    if not args.full:
        images = held_out(testing, turned, torch.Generator().manual_seed(0))
        for seed in args.seed:
            print_comparison(trained(seed, training, SHORT, **options), images, args.draws)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    measured = partial(measure, training=training, testing=testing, turned=turned, draws=args.draws)
    first, runs = None, []
    for seed in args.seed:
        arms = make_arms(args.weight)
        results, seconds = run(trained(seed, training, arms, **options), measured)
        first = first or results
        rows = table(results, seconds)
        runs.append(rows)
        for columns in (GAP, ROTATIONS + REPRESENTATION, COLOUR + EMBEDDING):
            print_table(rows, ["arm", *columns])
        others = ordinary_table(results)
        print_table(others, list(others[0]))
        print_findings(results)
        write(args.output / f"photos-seed{seed}.csv", rows)
        write(args.output / f"ordinary-seed{seed}.csv", others)
    figure(args.output / "photos.png", training[PICTURED], first, runs)
    print("Wrote", args.output / "photos.png")


if __name__ == "__main__":
    main()
