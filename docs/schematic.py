"""Draw the figure of the README: what an augmentation does to embeddings, without CARE and with it.

    python docs/schematic.py

This is a drawing, not a measurement. It writes `docs/schematic.png`.
"""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch

BEFORE, AFTER = "#14746f", "#d97706"
ANGLES = [150, 195, 250]  # of three embeddings on the circle, in degrees
TURN = -130


def at(angle: float, radius: float = 1.0) -> tuple[float, float]:
    return radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))


def circle(ax: Axes, title: str, text: str) -> None:
    ax.add_patch(Circle((0, 0), 1, fill=False, color="#8a8f98", linewidth=1.5))
    ax.set_title(title, fontsize=13, fontweight="bold", color="#1f2328")
    ax.text(0, -1.5, text, ha="center", va="center", fontsize=11, color="#1f2328")
    ax.set(xlim=(-1.5, 1.5), ylim=(-1.75, 1.6), aspect="equal")
    ax.axis("off")


def embeddings(ax: Axes, angles: list[float], colour: str, size: float, label: str) -> None:
    x, y = zip(*(at(angle) for angle in angles), strict=True)
    ax.fill(x, y, color=colour, alpha=0.15)
    ax.scatter(x, y, s=size, color=colour, zorder=3, label=label)


def main() -> None:
    figure = Figure(figsize=(8.4, 4.2), facecolor="white", layout="constrained")
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
        color="#57606a",
    )
    care.add_patch(arrow)
    care.text(*at(103, 1.42), "R", ha="center", va="center", fontsize=13, color="#57606a")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=170)


if __name__ == "__main__":
    main()
