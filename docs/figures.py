"""Draw the figures of the pages that are no results of training or timing.

    python docs/figures.py    # writes docs/schematic.png, rotation.png, sphere.png and distance.png

`schematic.png` is a drawing, not a measurement. The others show what `care_loss.rotation` and
`care_loss.sphere` return, and the errors in benchmarks/results/sphere-errors.csv.
"""

import argparse
import math
from pathlib import Path

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch
from tables import results
from torch import Tensor

from care_loss import sphere
from care_loss.rotation import fit_rotation

DOCS = Path(__file__).parent
matplotlib.style.use(DOCS / "style.mplstyle")
BEFORE, AFTER, OTHER, GREY = "C0", "C1", "C3", "C5"
ANGLES = [150, 195, 250]  # of three embeddings on the circle, in degrees
TURN = -130


def at(angle: float, radius: float = 1.0) -> tuple[float, float]:
    return radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))


def circle(ax: Axes, title: str, text: str) -> None:
    ax.add_patch(Circle((0, 0), 1, fill=False, color=GREY, linewidth=1.5))
    ax.set_title(title, fontsize=13, fontweight="bold")
    ax.text(0, -1.5, text, ha="center", va="center", fontsize=11)
    ax.set(xlim=(-1.5, 1.5), ylim=(-1.75, 1.6), aspect="equal")
    ax.axis("off")


def embeddings(ax: Axes, angles: list[float], colour: str, size: float, label: str) -> None:
    x, y = zip(*(at(angle) for angle in angles), strict=True)
    ax.fill(x, y, color=colour, alpha=0.15)
    ax.scatter(x, y, s=size, color=colour, zorder=3, label=label)


def schematic() -> Figure:
    """What an augmentation does to embeddings, without CARE and with it."""
    figure = Figure(figsize=(8.4, 4.2))
    alone, care = figure.subplots(1, 2)
    circle(alone, "InfoNCE alone", "f(a(x)) ≈ f(x): the embedding\nignores the augmentation")
    embeddings(alone, ANGLES, BEFORE, 150, "f(x) of three images")
    embeddings(alone, [angle - 4 for angle in ANGLES], AFTER, 70, "f(a(x)), one augmentation a")
    circle(
        care, "with the equivariance loss", "f(a(x)) ≈ R f(x): one rotation R\nturns all embeddings"
    )
    embeddings(care, ANGLES, BEFORE, 150, "")
    embeddings(care, [angle + TURN for angle in ANGLES], AFTER, 70, "")
    arrow = FancyArrowPatch(
        at(ANGLES[0] - 12, 1.16),
        at(ANGLES[0] + TURN + 45, 1.16),
        connectionstyle="arc3,rad=-0.35",
        arrowstyle="-|>",
        mutation_scale=18,
        linewidth=1.5,
        color=GREY,
    )
    care.add_patch(arrow)
    care.text(*at(103, 1.42), "R", ha="center", va="center", fontsize=13)
    figure.legend(loc="outside lower center", ncols=2, fontsize=11)
    return figure


def globe(figure: Figure, place: int, title: str) -> Axes:
    """Return axes with the outline of a unit sphere."""
    ax = figure.add_subplot(1, 2, place, projection="3d", computed_zorder=False)
    turn = torch.linspace(0, 2 * torch.pi, 60)
    for height in torch.linspace(-1, 1, 7)[1:-1]:
        radius = (1 - height**2).sqrt()
        ax.plot(radius * turn.cos(), radius * turn.sin(), height, color=GREY, lw=0.5, alpha=0.5)
        x, y = torch.pi * height, turn
        ax.plot(x.cos() * y.cos(), x.sin() * y.cos(), y.sin(), color=GREY, lw=0.5, alpha=0.5)
    ax.set(xlim=(-0.75, 0.75), ylim=(-0.75, 0.75), zlim=(-0.75, 0.75), box_aspect=(1, 1, 1))
    ax.set_title(title)
    ax.axis("off")
    return ax


def dots(ax: Axes, points: Tensor, colour: str, label: str = "") -> None:
    ax.scatter(*points.mT, color=colour, s=30, label=label, depthshade=False)


def joined(ax: Axes, x: Tensor, y: Tensor, colour: str) -> None:
    for start, end in zip(x, y, strict=True):
        ax.plot(*torch.stack((start, end)).mT, color=colour, lw=1)


def rotation() -> Figure:
    """Two sets of points on the sphere, before and after the fit."""
    torch.manual_seed(0)
    source = sphere.normalize(torch.randn(12, 3) + torch.tensor([0.0, -1.5, 0.5]))
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, 1.2, 0], [-1.2, 0, 0.4], [0, -0.4, 0]]))
    target = sphere.normalize(source @ turn + 0.08 * torch.randn(12, 3))
    fit = fit_rotation(source, target, special=True)
    figure = Figure(figsize=(8.4, 4.2))
    before = globe(figure, 1, "source and target")
    joined(before, source, target, GREY)
    dots(before, source, BEFORE, "source")
    dots(before, target, AFTER, "target")
    after = globe(figure, 2, f"source @ rotation: residual {fit.residual:.2f}")
    joined(after, source @ fit.rotation, target, GREY)
    dots(after, source @ fit.rotation, BEFORE)
    dots(after, target, AFTER)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def paths() -> Figure:
    """A shortest path with a tangent vector, and the mean of points."""
    torch.manual_seed(0)
    x = sphere.normalize(torch.tensor([0.8, -1.0, -0.3]))
    y = sphere.normalize(torch.tensor([0.3, 0.2, 1.0]))
    steps = torch.linspace(0, 1, 50)
    figure = Figure(figsize=(8.4, 4.2))
    left = globe(figure, 1, "slerp(x, y, t) and logmap(x, y)")
    left.plot(*sphere.slerp(x, y, steps).mT, color=BEFORE, lw=2)
    left.quiver(*x, *sphere.logmap(x, y), color=AFTER, lw=1.5, arrow_length_ratio=0.12)
    dots(left, torch.stack((x, y)), BEFORE)
    left.text(*(1.15 * x), "x")
    left.text(*(1.1 * y), "y")
    right = globe(figure, 2, "frechet_mean of the points")
    points = sphere.expmap(x, sphere.tangent_projection(x, 0.5 * torch.randn(15, 3)))
    mean = sphere.frechet_mean(points)
    joined(right, points, mean.expand_as(points), GREY)
    dots(right, points, BEFORE)
    dots(right, mean[None], AFTER)
    return figure


def distance() -> Figure:
    """Errors of distances against the angle, from the committed results."""
    rows = results("sphere-errors", question="distance, relative error", dtype="float32")
    figure = Figure(figsize=(6, 3.6))
    ax = figure.subplots()
    contenders = {"care_loss": BEFORE, "acos, clamped": OTHER, "geoopt": AFTER}
    for name, colour in contenders.items():
        ax.loglog(
            *zip(*((float(row["angle"]), float(row[name])) for row in rows), strict=True),
            "o-",
            color=colour,
            label=name,
        )
    ax.axhline(1, color=GREY, lw=1, ls=":")
    ax.text(1e-7, 0.2, "nothing is right above this line", fontsize=8)
    ax.set(xlabel="angle between the points (rad)", ylabel="relative error of the distance")
    ax.grid()
    ax.legend()
    return figure


FIGURES = {"schematic": schematic, "rotation": rotation, "sphere": paths, "distance": distance}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DOCS, help="the folder to write to")
    folder = parser.parse_args().output
    for name, draw in FIGURES.items():
        draw().savefig(folder / f"{name}.png")


if __name__ == "__main__":
    main()
