"""Must what shall rotate the embedding stay out of the ordinary views?

    python docs/experiments/ordinary_views.py    # five seeds; writes build/experiments

Point clouds of eight points of four kinds, on which SO(3) acts exactly; each view jitters the
points. Ten arms are trained from the same weights, and see equally many images. The weight of the
equivariance loss is that of the demonstration, and was not chosen for these data. "published" and
"apart" are trained with other weights, too.
"""

from collections import defaultdict
from copy import deepcopy
from itertools import pairwise

import torch
from common import BATCH, DIM, Group, arms, each_seed, options, train
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from care_loss.metrics import equivariance_report
from care_loss.rotation import random_orthogonal
from care_loss.sphere import normalize

POINTS, KINDS, TEMPLATES, COPIES, JITTER = 8, 4, 50, 8, 0.1
WEIGHT, WEIGHTS = 10.0, (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
FIGURES = ("gap_ratio", "shared_gap", "unshared_gap", "rotation_share", "linear_share")
FIGURES += ("composition_share", "effective_rank", "mean_norm")


def rotate(clouds: Tensor, rotation: Tensor) -> Tensor:
    return torch.cat((clouds[..., :3] @ rotation, clouds[..., 3:]), -1)


def turn(clouds: Tensor) -> Tensor:
    """Rotate all clouds by one random rotation of space."""
    return rotate(clouds, random_orthogonal(3, special=True))


def own_turns(clouds: Tensor) -> Tensor:
    """Rotate each cloud by a rotation of its own."""
    return rotate(clouds, random_orthogonal(3, batch_shape=(len(clouds),), special=True))


def jitter(clouds: Tensor) -> Tensor:
    """Move each point a little."""
    noise = JITTER * torch.randn(*clouds.shape[:-1], 3)
    return torch.cat((clouds[..., :3] + noise, clouds[..., 3:]), -1)


class DeepSets(nn.Sequential):
    """The mean over points of a network of each point, and a projection head."""

    def __init__(self, width: int = 64) -> None:
        def layers(*sizes: int) -> list[nn.Module]:
            return [
                layer
                for i, o in pairwise(sizes)
                for layer in (nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.ReLU())
            ]

        super().__init__(
            nn.Sequential(*layers(3 + KINDS, width, width)),
            nn.Sequential(*layers(width, width), nn.Linear(width, DIM)),
        )

    def forward(self, clouds: Tensor) -> Tensor:
        points, head = self
        features: Tensor = points(clouds.flatten(0, 1)).unflatten(0, clouds.shape[:2]).mean(1)
        z: Tensor = head(features)
        return z


def clouds() -> Group:
    def templates() -> Tensor:
        place = torch.randn(TEMPLATES, POINTS, 3)
        kind = torch.eye(KINDS)[torch.randint(KINDS, (TEMPLATES, POINTS))]
        return torch.cat((place - place.mean(1, keepdim=True), kind), -1)

    training, identity = templates(), torch.arange(TEMPLATES).repeat(COPIES)
    testing = jitter(own_turns(templates()[identity]))

    def batch(n: int) -> Tensor:
        return own_turns(training[torch.randint(TEMPLATES, (n,))])

    return Group(batch, testing, identity, turn, own_turns, jitter, DeepSets)


def nearest(z: Tensor, identity: Tensor, k: int = 5) -> float:
    """Return how often most of the k nearest other rows show the same image."""
    cosine = (normalize(z) @ normalize(z).mT).fill_diagonal_(-2)
    found = identity[cosine.topk(k).indices].mode(-1).values
    return (found == identity).double().mean().item()


def measure(encoder: nn.Module, group: Group) -> dict[str, object]:
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


def run(seed: int, steps: int) -> list[dict[str, object]]:
    torch.manual_seed(seed)
    group = clouds()
    untrained = group.network()
    with torch.no_grad():
        for _ in range(20):  # the statistics that batch normalisation needs in eval mode
            untrained(group.batch(BATCH))
    runs = [(name, WEIGHT) for name in arms(group, WEIGHT)]
    runs += [(name, w) for name in ("published", "apart") for w in WEIGHTS if w != WEIGHT]
    start: dict[str, object] = {"arm": "untrained", "weight": "", "forwards": ""}
    rows = [start | measure(deepcopy(untrained), group)]
    for name, weight in tqdm(runs, desc="arms", leave=False):
        torch.manual_seed(seed)
        encoder, arm = deepcopy(untrained), arms(group, weight)[name]
        train(arm, group, encoder, steps)
        label: dict[str, object] = {"arm": name, "weight": weight, "forwards": arm.forwards}
        rows.append(label | measure(encoder, group))
    return rows


def main() -> None:
    found = options(__doc__, steps=300, seeds=[1, 2, 3, 4, 5])
    rows = [row for seed in each_seed("ordinary_views", found, run) for row in seed]
    figure = Figure(figsize=(8, 4))
    ax = figure.subplots()
    for name, style in (("published", "C3o-"), ("apart", "C0D-")):
        points = defaultdict(list)
        collapsed = set()
        for row in rows:
            if row["arm"] == name:
                points[float(row["weight"])].append(float(row["gap_ratio"]))
                if float(row["mean_norm"]) > 0.5:
                    collapsed.add(float(row["weight"]))
        weights = sorted(points)
        means = [sum(points[w]) / len(points[w]) for w in weights]
        ax.loglog(weights, means, style, label=name)
        for w in weights:
            ax.loglog([w] * len(points[w]), points[w], style[:3], ms=3, alpha=0.6)
            if w in collapsed:
                ax.annotate("collapsed", (w, max(points[w])), fontsize=8, ha="center", va="bottom")
    for name, style in (("placebo of apart", "C1--"), ("SimCLR without", "C5--")):
        ratios = [float(row["gap_ratio"]) for row in rows if row["arm"] == name]
        ax.axhline(sum(ratios) / len(ratios), color=style[:2], ls="--", lw=1, label=name)
    ax.set(xlabel="weight of the equivariance loss", ylabel="gap ratio")
    ax.grid()
    ax.legend(fontsize=8)
    figure.savefig(found.output / "ordinary_views.png")
    print("Wrote", found.output / "ordinary_views.png")


if __name__ == "__main__":
    main()
