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

The main result is the gap ratio: how much the Gram matrix of held-out patches differs between two
turns of the hue that all patches share, divided by how much it differs where each patch has its
own. It is near 0 where a turn of the hue acts as one rotation, and near 1 for an encoder that
ignores the hue. One seed takes about four minutes on two idle CPU cores. The run writes a table
and a figure:

    python docs/examples/photos.py --seed 1 --output build/photos
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
from typing import NamedTuple

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from skimage import data
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from tqdm import tqdm

from care_loss import CAREloss, InfoNCELoss
from care_loss.functional import equivariance_loss, uniformity_loss
from care_loss.rotation import fit_rotation
from care_loss.sphere import normalize
from care_loss.views import assert_shared, augment_chunks, shared_views

Parts = Mapping[str, Tensor]
Arm = Callable[[nn.Module, Tensor], Parts]

PATCH, BATCH, CHUNKS, DIM = 32, 256, 8, 16
TRAINING, TESTING = 500, 200  # patches of each photograph
ANGLES, PAIRS = 72, 24  # turns that rotations are fitted for, and pairs of them that are composed
SHARED_DRAWS, OWN_DRAWS = 24, 8  # turns to average the gap ratio over
PICTURED = 1100  # the training patch in the figure
CONTROLS = {
    "CARE, four forwards": "SimCLR with hue",
    "CARE, three forwards": "placebo, three forwards",
    "CARE, uniformity": "placebo, uniformity",
}
EQUIVARIANCE = ["gap ratio", "minus control", "±", "shared hues", "own hues", "rotation share"]
EQUIVARIANCE += ["composition"]
EMBEDDING = ["multiplicities", "deviation", "hue error", "kNN", "effective rank", "mean norm"]
EMBEDDING += ["s per step"]
GREY, COLOURS = "#8a8f98", {"CARE, three forwards": "#14746f", "CARE, uniformity": "#36a39a"}
COLOURS |= {"placebo, three forwards": "#d97706", "placebo, uniformity": "#d97706"}
ARROW = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.3", "color": "#57606a"}


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


def network(width: int = 16) -> nn.Sequential:
    """Return a backbone of four convolutions, whose output kNN uses, and a projection head."""
    backbone = nn.Sequential()
    for i, o in pairwise([3, width, 2 * width, 4 * width, 8 * width]):
        backbone.extend([nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()])
    backbone.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    hidden = [nn.Linear(o, o, bias=False), nn.BatchNorm1d(o), nn.ReLU()]
    return nn.Sequential(backbone, nn.Sequential(*hidden, nn.Linear(o, DIM)))


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

    def three_forwards(turn: Callable[[Tensor], Tensor], encoder: nn.Module, x: Tensor) -> Parts:
        x1, x2 = ordinary(x), ordinary(x)
        turned, chunks = augment_chunks(x1, turn, chunks=CHUNKS)
        z1, z2, e = encoder(x1), encoder(x2), encoder(turned)
        return care.forward_components(z1, z2, z1, e, chunks=chunks)._asdict()

    def uniformity(turn: Callable[[Tensor], Tensor], encoder: nn.Module, x: Tensor) -> Parts:
        x1 = ordinary(x)
        turned, chunks = augment_chunks(x1, turn, chunks=CHUNKS)
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
    """What the table says of an encoder; all but kNN is of the head's unit embeddings."""

    gap: Tensor  # the gap ratio without each of the shared turns in turn, (SHARED_DRAWS,)
    shared: float  # its numerator
    own: float  # and its denominator
    share: float
    composition: float
    multiplicities: Tensor  # of the frequencies 0, 1, ...
    deviation: float  # in radians
    angles: Tensor  # eigen-angles of the fitted rotations, (ANGLES, subspace)
    hue_error: float  # in degrees
    accuracy: float
    rank: float
    mean_norm: float


def mean_loss(z: Tensor) -> Tensor:
    """Average L_equi over the pairs of `K` views `(K, n, D)`, leaving out each in turn: `(K,)`."""
    k = len(z)
    loss = torch.zeros(k, k, dtype=torch.float64)
    for i in range(k):
        for j in range(i):
            loss[i, j] = loss[j, i] = equivariance_loss(z[i], z[j], chunks=1)
    return (loss.sum() - 2 * loss.sum(1)) / ((k - 1) * (k - 2))


def with_error(left_out: Tensor) -> tuple[float, float]:
    """Return a number and its jackknife standard error, from its `K` values without one draw."""
    return left_out.mean().item(), ((len(left_out) - 1) * left_out.var(correction=0)).sqrt().item()


def explained(z: Tensor, predicted: Tensor, moved: Tensor) -> float:
    """Return the share of the displacement from `z` to `moved` that a prediction explains."""
    return 1 - ((predicted - moved).square().sum() / (z - moved).square().sum()).item()


def wrap(angle: Tensor) -> Tensor:
    """Return the angle in [-pi, pi) of the same direction."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def frequencies(rotations: Tensor) -> tuple[Tensor, Tensor, float]:
    """Compare rotations `(T, d, d)` of uniform angles with a representation of the circle.

    Return how often each frequency occurs, by characters (the mean of tr R cos k theta), the
    eigen-angles `(T, d)`, and their mean distance from those of the nearest integer multiplicities.
    """
    t, d, _ = rotations.shape
    traces = rotations.diagonal(dim1=1, dim2=2).sum(1)
    multiplicities = torch.fft.rfft(traces).real[: t // 2] / t
    counts = torch.zeros_like(multiplicities)
    counts[0] = d
    # The nearest counts have the least sum of absolute differences over all directions. Each term
    # is convex, so turning two constant directions into the best plane, one at a time, finds them.
    for _ in range(d // 2):
        distance = (multiplicities - counts).abs()
        gain = 2 * (distance - (multiplicities - counts - 1).abs())
        gain += distance[0] - (multiplicities[0] - counts[0] + 2).abs()
        gain[0] = 0
        if gain.max() <= 0:
            break
        counts[0] -= 2
        counts[gain.argmax()] += 1
    ks = torch.arange(len(counts)).repeat_interleave(counts.long())
    ks = torch.cat([ks, -ks[ks > 0]])
    theta = 2 * math.pi / t * torch.arange(t, dtype=traces.dtype)
    wanted = wrap(theta[:, None] * ks).sort().values
    found = torch.linalg.eigvals(rotations).angle().sort().values
    # On a circle, the best assignment of sorted points is one of the cyclic shifts.
    shifts = [wrap(found - wanted.roll(s, 1)).abs().mean(1) for s in range(d)]
    return multiplicities, found, torch.stack(shifts).amin(0).mean().item()


def fit_rotations(z: Tensor, turned: Tensor) -> Tensor:
    """Fit a rotation of SO(d) to each turn: rows `(n, d)` and `(T, n, d)` to `(T, d, d)`."""
    return fit_rotation(z.expand_as(turned), turned, special=True).rotation


def principal_subspace(z: Tensor, share: float = 0.95) -> Tensor:
    """Return a basis `(D, d)` of the directions that hold this share of the mean square of rows."""
    values, vectors = torch.linalg.eigh(z.mT @ z)
    held = values.flip(0).cumsum(0) / values.sum()
    return vectors.flip(1)[:, : int((held < share).sum()) + 1]


def effective_rank(z: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values (Roy and Vetterli, 2007)."""
    s = torch.linalg.svdvals(z)
    return torch.special.entr(s / s.sum()).sum().exp().item()


def knn_accuracy(backbone: nn.Module, training: Tensor, testing: Tensor, k: int = 20) -> float:
    """Ask the nearest training patches, by cosine, which photograph a test patch is from."""
    x, y = (torch.cat([backbone(part) for part in t.split(BATCH)]) for t in (training, testing))
    nearest = (normalize(y) @ normalize(x).mT).topk(k).indices
    guess = (nearest // TRAINING).mode().values  # the patches stand photograph by photograph
    return (guess == torch.arange(len(y), device=y.device) // TESTING).double().mean().item()


@torch.no_grad()
def measure(
    encoder: nn.Sequential, training: Tensor, testing: Tensor, *, turned: bool = True
) -> Measures:
    """Measure an encoder in eval mode; turns of the hue on every fourth of the held-out patches."""
    encoder.eval()
    generator = torch.Generator().manual_seed(0)  # every arm and seed is measured alike
    draw = partial(random_angles, generator=generator)
    images = turn_hue(testing[::4], draw(len(testing[::4])) * turned)
    grid = 2 * math.pi / ANGLES * torch.arange(ANGLES, dtype=torch.float64)
    pairs = torch.randint(ANGLES, (2, PAIRS), generator=generator)
    asked = draw(len(images))

    def embed(images: Tensor) -> Tensor:
        return normalize(encoder(images).cpu().double())

    def embed_turned(angles: Iterable[Tensor]) -> Tensor:
        return torch.stack([embed(turn_hue(images, angle)) for angle in angles])

    shared = mean_loss(embed_turned(draw(SHARED_DRAWS)))
    own = mean_loss(embed_turned(draw(OWN_DRAWS, len(images)))).mean()
    z, z_turned, z_asked = embed(images), embed_turned(grid), embed_turned([asked])[0]
    twice = [turn_hue(turn_hue(images, a), b) for a, b in zip(*grid[pairs], strict=True)]
    z_twice = torch.stack([embed(batch) for batch in twice])

    predicted, composed = torch.empty_like(z_turned), torch.empty_like(z_twice)
    # Patches of one photograph overlap, so the halves are photographs: five, and the other five.
    halves = torch.arange(len(z)).chunk(2)
    for fit, score in (halves, halves[::-1]):
        rotations = fit_rotations(z[fit], z_turned[:, fit])
        predicted[:, score] = z[score] @ rotations
        composed[:, score] = z[score] @ rotations[pairs[0]] @ rotations[pairs[1]]
    nearest = torch.linalg.vector_norm(predicted - z_asked, dim=-1).argmin(0)

    basis = principal_subspace(z_turned.flatten(0, 1))
    multiplicities, angles, deviation = frequencies(fit_rotations(z @ basis, z_turned @ basis))
    return Measures(
        gap=shared / own,
        shared=shared.mean().item(),
        own=own.item(),
        share=explained(z, predicted, z_turned),
        composition=explained(z, composed, z_twice),
        multiplicities=multiplicities,
        deviation=deviation,
        angles=angles,
        hue_error=wrap(grid[nearest] - asked).abs().median().rad2deg().item(),
        accuracy=knn_accuracy(encoder[0], training, testing),
        rank=effective_rank(z),
        mean_norm=z.mean(0).norm().item(),
    )


def table(results: dict[str, Measures], seconds: dict[str, float]) -> list[dict[str, str]]:
    """Return a row for each arm, by column."""
    rows = []
    for name, m in results.items():
        control = results.get(CONTROLS.get(name, ""))
        difference, error = with_error(m.gap - control.gap) if control else (0.0, 0.0)
        shown = 1 + int((m.multiplicities.abs() >= 0.05).nonzero().max())  # the rest are zeros
        rows.append(
            {
                "arm": name,
                "gap ratio": f"{m.gap.mean():.3f}",
                "minus control": f"{difference:+.3f}" if control else "",
                "±": f"{error:.3f}" if control else "",
                "shared hues": f"{m.shared:.1e}",
                "own hues": f"{m.own:.1e}",
                "rotation share": f"{m.share:.3f}",
                "composition": f"{m.composition:.3f}",
                "multiplicities": " ".join(f"{k:.2f}" for k in m.multiplicities[:shown].tolist()),
                "deviation": f"{m.deviation:.4f}",
                "hue error": f"{m.hue_error:.1f}",
                "kNN": f"{m.accuracy:.3f}",
                "effective rank": f"{m.rank:.1f}",
                "mean norm": f"{m.mean_norm:.3f}",
                "s per step": f"{seconds[name]:.3f}" if name in seconds else "",
            }
        )
    return rows


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
        difference, error = with_error(results[care].gap - results[control].gap)
        word = "not distinguishable from"
        if abs(difference) > 2 * error:
            word = "below" if difference < 0 else "ABOVE"
        print(f"{care}: gap ratio {word} that of {control} ({difference:+.2f} ± {error:.2f}).")
    loss = results["SimCLR without hue"].accuracy - results["CARE, three forwards"].accuracy
    print(f"kNN of SimCLR without hue minus that of CARE, three forwards: {loss:+.3f}.")
    print(
        "± is one standard error over the shared turns. One seed is no evidence: try --seed 0 1 2."
    )


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
    fig = Figure(figsize=(10, 4), facecolor="white", layout="constrained")
    left, middle, right = fig.subfigures(1, 3, width_ratios=(1, 2, 1.7))
    ring_of_hues(left.subplots(), patch)
    names = ["SimCLR without hue", "placebo, three forwards", "CARE, three forwards"]
    axes = middle.subplots(1, 3, sharey=True)
    eigen_angles(axes, {name: results[name] for name in names})
    axes[0].set_ylabel("eigen-angles of the rotation (degrees)")
    axes[1].set_xlabel("θ (degrees)")
    gap_ratios(right.subplots(), runs)
    fig.savefig(path, dpi=150)


def load_patches() -> tuple[Tensor, Tensor]:
    """Return the patches for training and for testing; every seed has the same."""
    torch.manual_seed(0)
    training, testing = [], []
    for photo in photographs():
        border = round(0.6 * photo.shape[2])
        training.extend(patches(photo[..., :border], TRAINING))
        testing.extend(patches(photo[..., border:], TESTING))
    return torch.stack(training), torch.stack(testing)


def run(
    seed: int, training: Tensor, testing: Tensor, *, steps: int, weight: float, turned: bool
) -> tuple[dict[str, Measures], dict[str, float]]:
    """Train and measure all arms; return the measures and the seconds per step by arm."""
    torch.manual_seed(seed)
    untrained = network().to(training.device)
    order = torch.stack([torch.randperm(len(training))[:BATCH] for _ in range(max(steps, 20))])
    with torch.no_grad():
        for rows in order[:20]:  # the statistics that batch normalisation needs in eval mode
            untrained(training[rows])
    results = {"untrained": measure(deepcopy(untrained), training, testing, turned=turned)}
    seconds = {}
    for name, arm in make_arms(weight).items():
        torch.manual_seed(seed)
        encoder = deepcopy(untrained)
        batches = (
            turn_hue(training[rows], random_angles(BATCH) * turned) for rows in order[:steps]
        )
        seconds[name] = train(name, arm, encoder, batches, steps)
        if not all(parameter.isfinite().all() for parameter in encoder.parameters()):
            sys.exit(f"{name}: the training diverged, its weights are not finite; lower --weight")
        results[name] = measure(encoder, training, testing, turned=turned)
    return results, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps of an arm")
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="of weights, order and augmentations"
    )
    parser.add_argument("--weight", type=float, default=10.0, help="of the equivariance loss")
    parser.add_argument(
        "--natural", action="store_true", help="show each patch in its own hue, not in a random one"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("build/photos"))
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if not 0 <= args.weight < math.inf:
        parser.error(f"--weight must be finite and at least 0, got {args.weight}")
    if len(set(args.seed)) < len(args.seed):
        parser.error(f"--seed must not name a seed twice, got {args.seed}")

    training, testing = (part.to(args.device) for part in load_patches())
    assert_shared(one_turn, training[0])
    args.output.mkdir(parents=True, exist_ok=True)
    first, runs = None, []
    for seed in args.seed:
        results, seconds = run(
            seed,
            training,
            testing,
            steps=args.steps,
            weight=args.weight,
            turned=not args.natural,
        )
        first = first or results
        rows = table(results, seconds)
        runs.append(rows)
        for columns in (EQUIVARIANCE, EMBEDDING):
            print_table(rows, ["arm", *columns])
        print_findings(results)
        path = args.output / f"photos-seed{seed}.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print("Wrote", path)
    figure(args.output / "photos.png", training[PICTURED], first, runs)
    print("Wrote", args.output / "photos.png")


if __name__ == "__main__":
    main()
