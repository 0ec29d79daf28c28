"""Train SimCLR, a placebo and CARE on patches of photographs, and see which learned to rotate.

The data are 32×32 colour patches of ten photographs that the wheels of scikit-image and
scikit-learn carry, so nothing is downloaded. The left 60 % of each photograph is for training, the
rest for testing. Four arms start from the same weights and see the same minibatches:

* SimCLR: InfoNCE alone.
* placebo: the CARE loss, but its equivariance term gets views that were augmented patch by patch.
  Whatever this arm gains does not come from sharing an augmentation.
* CARE, four forwards: ordinary views for InfoNCE, chunk-shared views for the equivariance term.
* CARE, two forwards: one pair of chunk-shared views serves both terms.

The headline is the gap ratio: how much the Gram matrix of held-out patches differs between two
augmentations that all patches share, divided by how much it differs where each patch has its own.
It is low where an augmentation acts as one rotation. The default run takes about a minute on two
idle CPU cores, several times that on busy ones, and writes a table and a figure:

    python docs/examples/photos.py --seed 1 --output build/photos
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from skimage import data
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from tqdm import tqdm

from care_loss import CAREloss, InfoNCELoss
from care_loss.functional import equivariance_loss
from care_loss.rotation import fit_rotation
from care_loss.sphere import normalize
from care_loss.views import assert_shared, shared_views

Views = Callable[[Tensor], tuple[Tensor, ...]]
PATCH, BATCH, CHUNKS = 32, 256, 8
TRAINING, TESTING = 500, 200  # patches of each photograph
SHARED_DRAWS, OWN_DRAWS = 24, 8  # augmentations to average a measurement over
COLOURS = ["#a9afb8", "#d9a441", "#14746f", "#36a39a"]


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


def augmentation(*, shared: bool) -> nn.Module:
    """Return a transform of images `(n, 3, 32, 32)`, with one draw for all or one for each."""
    return nn.Sequential(
        K.RandomResizedCrop((PATCH, PATCH), scale=(0.3, 1.0), same_on_batch=shared),
        K.RandomHorizontalFlip(same_on_batch=shared),
        K.ColorJitter(0.4, 0.4, 0.4, 0.2, p=0.8, same_on_batch=shared),
        K.RandomGrayscale(p=0.2, same_on_batch=shared),
    )


def network(width: int = 32, dim: int = 64) -> nn.Sequential:
    """Return a backbone of four convolutions, whose output kNN uses, and a projection head."""
    backbone = nn.Sequential()
    for i, o in pairwise([3, width, 2 * width, 4 * width, 8 * width]):
        backbone.extend([nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()])
    backbone.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    hidden = [nn.Linear(o, o, bias=False), nn.BatchNorm1d(o), nn.ReLU()]
    return nn.Sequential(backbone, nn.Sequential(*hidden, nn.Linear(o, dim)))


def train(
    name: str, encoder: nn.Module, loss: nn.Module, views: Views, images: Tensor, order: Tensor
) -> float:
    """Train in place on the rows that `order` `(steps, BATCH)` names; return the median s/step."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    seconds = []
    with tqdm(order, desc=f"{name:19}", unit="step") as bar:
        for rows in bar:
            begin = time.perf_counter()
            # One forward for all chunks of a view: where a batch has seen one augmentation only,
            # batch normalisation can undo it.
            z = [encoder(view) for view in views(images[rows])]
            if isinstance(loss, CAREloss):
                parts = loss.forward_components(*z)._asdict()
            else:
                parts = {"loss": loss(*z)}
            optimizer.zero_grad()
            parts["loss"].backward()
            optimizer.step()
            bar.set_postfix({key: f"{part.item():.4f}" for key, part in parts.items()})
            seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[len(seconds) // 2]


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


def rotation_share(z: Tensor, moved: Tensor) -> float:
    """Return the share of the displacement that a rotation fitted on other rows explains."""
    z, moved = normalize(z.double()), normalize(moved.double())
    residual = 0.0
    for fit, score in ((0, 1), (1, 0)):  # the even rows and the odd ones
        rotation = fit_rotation(z[fit::2], moved[fit::2]).rotation
        residual += (z[score::2] @ rotation - moved[score::2]).square().sum().item()
    return 1 - residual / (z - moved).square().sum().item()


def effective_rank(z: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values (Roy and Vetterli, 2007)."""
    s = torch.linalg.svdvals(normalize(z.double()))
    return torch.special.entr(s / s.sum()).sum().exp().item()


def knn_accuracy(backbone: nn.Module, training: Tensor, testing: Tensor, k: int = 20) -> float:
    """Ask the nearest training patches, by cosine, which photograph a test patch is from."""
    x, y = (torch.cat([backbone(part) for part in t.split(BATCH)]) for t in (training, testing))
    nearest = (normalize(y) @ normalize(x).mT).topk(k).indices
    guess = (nearest // TRAINING).mode().values  # the patches stand photograph by photograph
    return (guess == torch.arange(len(y), device=y.device) // TESTING).double().mean().item()


class Measures(NamedTuple):
    """What the table says of an encoder; all but kNN is of the head's unit embeddings."""

    gap: Tensor  # the gap ratio without each of the shared draws in turn, (SHARED_DRAWS,)
    share: float
    accuracy: float
    rank: float
    mean_norm: float


@torch.no_grad()
def measure(
    encoder: nn.Sequential, training: Tensor, testing: Tensor, together: Tensor, apart: Tensor
) -> Measures:
    """Measure an encoder in eval mode, on views `(draws, n, 3, 32, 32)` of every fourth patch."""
    encoder.eval()
    z, *moved = (encoder(images) for images in (testing[::4], *together))
    own = torch.stack([encoder(images) for images in apart])
    return Measures(
        gap=mean_loss(torch.stack(moved)) / mean_loss(own).mean(),
        share=sum(rotation_share(z, za) for za in moved) / len(moved),
        accuracy=knn_accuracy(encoder[0], training, testing),
        rank=effective_rank(z),
        mean_norm=normalize(z).mean(0).norm().item(),
    )


def table(results: dict[str, Measures], seconds: dict[str, float]) -> list[list[str]]:
    """Return a header and a row an arm."""
    names = "arm/gap ratio/minus placebo/±/rotation share/kNN/effective rank/mean norm/s per step"
    rows = [names.split("/")]
    for name, m in results.items():
        difference, error = with_error(m.gap - results["placebo"].gap)
        row = [name, f"{m.gap.mean():.3f}", f"{difference:+.3f}", f"{error:.3f}", f"{m.share:.3f}"]
        row += [f"{m.accuracy:.3f}", f"{m.rank:.1f}", f"{m.mean_norm:.3f}"]
        rows.append([*row, f"{seconds[name]:.2f}" if name in seconds else ""])
    return rows


def print_findings(results: dict[str, Measures]) -> None:
    """Print what this run says, and what it cannot say."""
    for care in ("CARE, four forwards", "CARE, two forwards"):
        for other in ("placebo", "SimCLR"):
            difference, error = with_error(results[care].gap - results[other].gap)
            word = "below" if difference < 0 else "ABOVE"
            if abs(difference) < 2 * error:
                word = "not distinguishable from"
            print(f"{care}: gap ratio {word} that of {other} ({difference:+.2f} ± {error:.2f}).")
    base, placebo, *shares = (m.share for name, m in results.items() if name != "untrained")
    gains = " and ".join(f"{share - base:+.2f}" for share in shares)
    print(f"Rotation share over SimCLR's: CARE {gains}, the placebo {placebo - base:+.2f}.")
    accuracies = [m.accuracy for name, m in results.items() if name != "untrained"]
    spread, p = max(accuracies) - min(accuracies), sum(accuracies) / len(accuracies)
    noise = 1.96 * (2 * p * (1 - p) / (10 * TESTING)) ** 0.5
    print(f"kNN: the trained arms are within {spread:.3f}; less than {noise:.3f} is noise", end=" ")
    print("(binomial, 95 %; more, as patches overlap).")
    print(
        "± is one standard error over shared draws. One seed is no evidence: try --seed 1, 2, ..."
    )


def figure(path: Path, results: dict[str, Measures], images: dict[str, Tensor]) -> None:
    """Draw the kinds of views beside the two measures of equivariance."""
    fig = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(1, 1.1), wspace=0.05)
    left.suptitle("What the arms see", fontweight="bold")
    right.suptitle("What they learned, on parts of the photographs never seen", fontweight="bold")
    for ax, (label, batch) in zip(left.subplots(len(images), 1), images.items(), strict=True):
        row = torch.cat(list(F.pad(batch, (1, 1, 1, 1), value=1.0)), -1)
        ax.imshow(row.clamp(0, 1).permute(1, 2, 0).cpu().numpy())
        ax.set_title(label, fontsize=10, loc="left")
        ax.axis("off")
    gap, share = right.subplots(1, 2, sharey=True)
    trained = {name: m for name, m in results.items() if name != "untrained"}
    errors = [2 * with_error(m.gap - results["placebo"].gap)[1] for m in trained.values()]
    ratios, shares = zip(*((m.gap.mean().item(), m.share) for m in trained.values()), strict=True)
    for ax, values, whiskers in ((gap, ratios, errors), (share, shares, None)):
        bars = ax.barh(list(trained), values, xerr=whiskers, color=COLOURS, ecolor="#333333")
        ax.bar_label(bars, fmt="%.2f", padding=4)
        ax.margins(x=0.15)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(left=False)
    gap.invert_yaxis()
    gap.set(
        title="gap ratio",
        xlabel="lower is better; whiskers: 2 s.e.\nof the difference from placebo",
    )
    share.set(title="rotation share", xlabel="higher is better;\nthe placebo shares nothing")
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80, help="training steps of an arm")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentations")
    parser.add_argument("--weight", type=float, default=3.0, help="weight of the equivariance term")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("build/photos"))
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")

    torch.manual_seed(0)  # every seed has the same patches
    pieces: tuple[list[Tensor], list[Tensor]] = [], []
    for photo in photographs():
        border = round(0.6 * photo.shape[2])
        pieces[0].extend(patches(photo[..., :border], TRAINING))
        pieces[1].extend(patches(photo[..., border:], TESTING))
    training, testing = (torch.stack(part).to(args.device) for part in pieces)
    own, shared = augmentation(shared=False), augmentation(shared=True)
    assert_shared(shared, training[0])

    torch.manual_seed(args.seed)
    untrained = network().to(args.device)
    order = torch.stack([torch.randperm(len(training))[:BATCH] for _ in range(max(args.steps, 20))])
    with torch.no_grad():
        for rows in order[:20]:  # the statistics that batch normalisation needs in eval mode
            untrained(training[rows])

    def ordinary(images: Tensor) -> tuple[Tensor, ...]:
        return own(images), own(images)

    def chunked(images: Tensor) -> tuple[Tensor, ...]:
        return shared_views(images, shared, chunks=CHUNKS)[:2]

    care = CAREloss(equivariance_weight=args.weight, chunks=CHUNKS)
    care_shared = CAREloss(equivariance_weight=args.weight, chunks=CHUNKS, shared_views=True)
    encoders, seconds = {"untrained": untrained}, {}
    for name, loss, views in (
        ("SimCLR", InfoNCELoss(), ordinary),
        ("placebo", care, lambda images: ordinary(images) + ordinary(images)),
        ("CARE, four forwards", care, lambda images: ordinary(images) + chunked(images)),
        ("CARE, two forwards", care_shared, chunked),
    ):
        torch.manual_seed(args.seed)
        encoders[name] = deepcopy(untrained)
        seconds[name] = train(name, encoders[name], loss, views, training, order[: args.steps])

    torch.manual_seed(0)  # every seed is measured under the same draws
    together = torch.stack([shared(testing[::4]) for _ in range(SHARED_DRAWS)])
    apart = torch.stack([own(testing[::4]) for _ in range(OWN_DRAWS)])
    results = {
        name: measure(encoder, training, testing, together, apart)
        for name, encoder in encoders.items()
    }
    rows = table(results, seconds)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        texts = (text.rjust(width) for text, width in zip(cells, widths[1:], strict=True))
        print(name.ljust(widths[0]), *texts, sep="  ")
    print_findings(results)

    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / "photos.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    torch.manual_seed(10)  # of draws that are easy to tell apart
    sample = training[237::TRAINING]  # one of each photograph
    kinds = {
        "patches, one of each photograph": sample,
        "ordinary view: every patch has its own augmentation": own(sample),
        "chunk-shared view: one augmentation for all patches": shared(sample),
        "the other chunk-shared view: another one for all": shared(sample),
    }
    figure(args.output / "photos.png", results, kinds)
    print("Wrote", args.output / "photos.csv", "and", args.output / "photos.png")


if __name__ == "__main__":
    main()
