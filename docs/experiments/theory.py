"""What does an equivariance loss of 0, or near 0, say about the map between two views?

    python docs/experiments/theory.py    # five seeds; writes build/experiments

All embeddings are random unit rows in float64; no encoder is trained. There are four parts:

* bound: rows that one rotation relates but for noise. The distance from one orthogonal map, and
  what the bound of the paper makes of the loss.
* descent: free rows are moved by gradient descent until their Gram matrix is that of given ones,
  chunk by chunk. The chunks are the same in all steps, or drawn anew in each.
* reflection: rows that a reflection relates.
* few rows: a map is fitted to some rows, and applied to others, for rows that one rotation relates
  and for unrelated ones.
"""

import math
from collections import defaultdict

import torch
from common import Row, each_seed, options
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from care_loss.functional import equivariance_loss
from care_loss.rotation import fit_rotation, random_orthogonal
from care_loss.sphere import normalize

DIM, ROWS = 16, 256
CHUNK_SIZES = [2, 4, 8, 16, 32, 64, 256]
COUNTS = [1, 2, 4, 8, 12, 15, 16, 17, 20, 24, 32, 64]
TRIALS, DRAWS = 100, 20
Rows = list[dict[str, object]]
torch.set_default_dtype(torch.float64)


def rows_of(n: int, d: int = DIM) -> Tensor:
    return normalize(torch.randn(n, d))


def bound() -> Rows:
    """One trial a row: noise from 1e-6 to 1, shapes with n >= D, and spectra that decay."""
    rows: Rows = []
    for _ in range(TRIALS):
        d = int(torch.randint(2, 33, ()))
        n = int(d * (1 + 3 * torch.rand(())))
        noise = 10 ** (-6 * torch.rand(()))
        decay = 10 ** (-torch.rand(()) * torch.linspace(0, 1, d))
        a = normalize(torch.randn(n, d) * decay)
        b = normalize(a @ random_orthogonal(d) + noise * torch.randn(n, d) / math.sqrt(d))
        root = (equivariance_loss(a, b) * n * (n - 1)).sqrt()
        smallest = torch.linalg.svdvals(a)[-1]
        truth = fit_rotation(a, b).residual * math.sqrt(n)
        rows.append(
            {
                "n": n,
                "D": d,
                "bound": f"{(1 + math.sqrt(2)) * root / smallest:.3e}",
                "truth": f"{truth:.3e}",
                "holds": bool(truth <= (1 + math.sqrt(2)) * root / smallest),
                "applies": bool(root <= smallest**2 / 2),
            }
        )
    return rows


def descend(u: Tensor, size: int, steps: int, *, anew: bool) -> Tensor:
    """Move random rows until their Gram matrix is that of u within chunks of a size."""
    v = torch.nn.Parameter(rows_of(*u.shape))
    optimizer = torch.optim.Adam([v], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.arange(len(u))
    for _ in range(steps):
        if anew:
            order = torch.randperm(len(u))
        loss = equivariance_loss(u[order], v[order], chunks=len(u) // size)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return v.detach()


def descent(steps: int) -> Rows:
    rows: Rows = []
    u = rows_of(ROWS)
    kinds = [(size, anew) for size in CHUNK_SIZES for anew in (False, True)]
    for size, anew in tqdm(kinds, desc="descent", leave=False):
        v = normalize(descend(u, size, steps, anew=anew))
        rows.append(
            {
                "chunks": "drawn anew" if anew else "the same",
                "n": size,
                "loss": f"{equivariance_loss(u, v, chunks=ROWS // size):.2e}",
                "loss of all pairs": f"{equivariance_loss(u, v):.2e}",
                "residual": f"{fit_rotation(u, v).residual:.2e}",
            }
        )
    return rows


def reflection() -> Rows:
    rows: Rows = []
    for n in COUNTS[1:]:
        u = rows_of(n)
        v = u @ random_orthogonal(DIM, special=True)
        v = v - 2 * v[:, :1] * torch.eye(DIM)[0]  # the first coordinate changes its sign
        rows.append(
            {
                "n": n,
                "loss": f"{equivariance_loss(u, v):.1e}",
                "residual": f"{fit_rotation(u, v).residual:.1e}",
                "residual, SO(D)": f"{fit_rotation(u, v, special=True).residual:.3f}",
            }
        )
    return rows


def few_rows() -> Rows:
    rows: Rows = []
    for n in COUNTS:
        u = torch.stack([rows_of(n + ROWS) for _ in range(DRAWS)])
        turned = u @ random_orthogonal(DIM, batch_shape=(DRAWS,))
        for name, v in {"one rotation": turned, "unrelated": u.roll(1, 0)}.items():
            fit = fit_rotation(u[:, :n], v[:, :n])
            errors = (u[:, n:] @ fit.rotation - v[:, n:]).square().sum(-1).mean(-1).sqrt()
            rows.append(
                {
                    "rows": name,
                    "n": n,
                    "fitted": f"{fit.residual.mean():.3f}",
                    "others": f"{errors.mean():.3f}",
                }
            )
    return rows


def run(seed: int, steps: int) -> Rows:
    torch.manual_seed(seed)
    parts = {
        "bound": bound(),
        "descent": descent(steps),
        "reflection": reflection(),
        "few rows": few_rows(),
    }
    columns = dict.fromkeys(key for rows in parts.values() for row in rows for key in row)
    return [
        {"part": part} | dict.fromkeys(columns, "") | row
        for part, rows in parts.items()
        for row in rows
    ]


def means(every: list[Row], x: str, y: str, **wanted: str) -> tuple[list[float], list[float]]:
    """Return the means of y over seeds, for each x of the rows that have what is wanted."""
    found = defaultdict(list)
    for row in every:
        if all(row[key] == value for key, value in wanted.items()):
            found[float(row[x])].append(float(row[y]))
    return list(found), [sum(values) / len(values) for values in found.values()]


def count_rows(ax: Axes) -> None:
    """Give the axis of numbers of rows a logarithmic scale, and mark the dimension."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.axvline(DIM, color="C5", lw=1, ls=":")


def draw_bound(ax: Axes, rows: list[Row]) -> None:
    for applies, colour in (("True", "C0"), ("False", "C1")):
        some = [row for row in rows if row["part"] == "bound" and row["applies"] == applies]
        x, y = ([float(row[key]) for row in some] for key in ("bound", "truth"))
        label = "within its condition" if applies == "True" else "outside of it"
        ax.loglog(x, y, ".", color=colour, label=label)
    limits = ax.get_xlim()
    ax.loglog(limits, limits, color="C5", lw=1)
    ax.set(xlabel="bound from the loss", ylabel="distance from one orthogonal map", title="bound")
    ax.legend(fontsize=8)


def draw_descent(ax: Axes, rows: list[Row]) -> None:
    for kind, style in (("the same", "C3o-"), ("drawn anew", "C0D-")):
        x, y = means(rows, "n", "residual", part="descent", chunks=kind)
        ax.loglog(x, y, style, ms=5, label=f"chunks {kind}")
    count_rows(ax)
    ax.set(xlabel="rows of a chunk", ylabel="residual of one map for all rows", title="descent")
    ax.legend(fontsize=8)


def draw_reflection(ax: Axes, rows: list[Row]) -> None:
    for key, style in (("residual", "C0D-"), ("residual, SO(D)", "C3o-")):
        x, y = means(rows, "n", key, part="reflection")
        ax.plot(x, y, style, ms=5, label="O(D)" if key == "residual" else "SO(D)")
    count_rows(ax)
    ax.set(xlabel="rows", ylabel="residual", title="a reflection: the loss is 0")
    ax.legend(fontsize=8)


def draw_few_rows(ax: Axes, rows: list[Row]) -> None:
    for kind, colour in (("one rotation", "C0"), ("unrelated", "C3")):
        for key, label, style in (("fitted", "fitted", "--"), ("others", "other", "-")):
            x, y = means(rows, "n", key, part="few rows", rows=kind)
            ax.plot(x, y, style, color=colour, label=f"{kind}, {label} rows")
    count_rows(ax)
    ax.set(xlabel="rows that are fitted", ylabel="error of a row", title="few rows")
    ax.legend(fontsize=8)


def main() -> None:
    found = options(__doc__, steps=2000, seeds=[0, 1, 2, 3, 4])
    rows = [row for seed in each_seed("theory", found, run) for row in seed]
    figure = Figure(figsize=(10, 7.5))
    panels = figure.subplots(2, 2).flat
    for draw, ax in zip(
        (draw_bound, draw_descent, draw_reflection, draw_few_rows), panels, strict=True
    ):
        draw(ax, rows)
        ax.grid()
    figure.savefig(found.output / "theory.png")
    print("Wrote", found.output / "theory.png")


if __name__ == "__main__":
    main()
