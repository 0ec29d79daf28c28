"""How fast is the batched core on a GPU, how much memory does it need, and how exact is it?

    python benchmarks/cuda.py --csv build/cuda/cuda.csv                  # all sections
    python benchmarks/cuda.py --csv build/cuda/cuda.csv --sections step  # more rows, of one section
    python benchmarks/cuda.py --csv build/cuda/cuda.csv --figure build/cuda/cuda.png --sections
    python benchmarks/cuda.py --device cpu --quick                       # does the script run?

Each row has the median and the quartiles of times that CUDA events measured, the ratio to a floor,
the memory at the peak, and the relative errors of the loss and of its gradient, or a note on why it
has none. It is written as soon as it is measured, and the most important sizes come first. Rows of
fits have how much the objective falls short of the best, and the deviation from orthogonality in
units of eps sqrt(D), of 64 matrices at most. A floor is arithmetic at the rates that this run
measured: of NT-Xent of M rows, 5 M² D operations (those of an algorithm that computes its products
again in the backward), at the rate of matrix products in the precision of the row, and always at
least one read of the inputs and one write of the results. The figure is drawn from all rows of the
file.
"""

import csv
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import procrustes
import torch
from measuring import Appended, Row, leaves, parser, repeated, timed
from rivals import authors, authors_info_nce, plain_equivariance, plain_info_nce
from step import CONTENDERS, step
from torch import Tensor

from care_loss import CAREloss
from care_loss.functional import equivariance_loss, info_nce_loss
from care_loss.rotation import fit_rotation, nearest_orthogonal

TEMPERATURE, WEIGHT = 0.5, 0.01
SIZES = ((256, 128), (4096, 128), (1024, 128), (16384, 128), (4096, 512), (32768, 128))
SIZES += ((256, 512), (16384, 512), (4096, 64), (4096, 2048))  # N and D
COMPILED = ((256, 128), (4096, 128))  # compiling takes most of the time of a row
PRECISIONS = ("float32", "TF32", "bfloat16")
CARE_SIZES = ((256, 128, 16), (4096, 128, 16), (250, 128, 16), (4096, 128, 256))
ORTHOGONAL = ((4096, 16), (100_000, 3), (256, 64), (64, 128), (16, 256), (4, 512))
FITS = ((4096, 32, 16), (64, 16, 512), (64, 256, 128), (100_000, 8, 3), (4, 1024, 512))
MOST_FOR_MASKS = 4096  # rows; the masks of the authors' code are filled entry by entry
CHECKED = 64  # matrices of which errors are computed; a solver that loops gets as many
Call = Callable[[], Any]
Loss = Callable[..., Tensor]


@contextmanager
def products_in(precision: str) -> Iterator[torch.dtype]:
    """Set how float32 products are rounded, and yield the dtype of the embeddings."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
    try:
        yield torch.bfloat16 if precision == "bfloat16" else torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


class Ceilings:
    """The rates of this device, measured: matrix products in each precision, and copying."""

    def __init__(self, device: str, quick: bool) -> None:
        n = 256 if quick else 8192
        self.products = {}
        for precision in PRECISIONS:
            with products_in(precision) as dtype:
                a = torch.randn(n, n, device=device, dtype=dtype)
                self.products[precision] = 2 * n**3 / median(partial(torch.mm, a, a), device)
        large = torch.empty(2**16 if quick else 2**28, device=device)
        self.copying = 2 * large.nbytes / median(partial(large.clone().copy_, large), device)

    def rows(self) -> Iterator[Row]:
        for precision, rate in self.products.items():
            name = f"{precision} products, operations per second"
            yield {"section": "ceilings", "contender": name, "rate": f"{rate:.3e}"}
        name = "copy, bytes per second"
        yield {"section": "ceilings", "contender": name, "rate": f"{self.copying:.3e}"}

    def floor(self, operations: float, numbers: float, precision: str) -> float:
        """Return the seconds that this many operations, or numbers in memory, take at least."""
        size = 2 if precision == "bfloat16" else 4
        return max(operations / self.products[precision], numbers * size / self.copying)


def median(call: Call, device: str) -> float:
    repeated(call, 3, device)
    return statistics.median(repeated(call, 10, device))


def relative(found: Tensor, wanted: Tensor) -> str:
    found, wanted = found.detach().double(), wanted.detach().double()
    return f"{((found - wanted).norm() / wanted.norm()).item():.1e}"


def against(floor: float, found: Row) -> Row:
    """Add the ratio to the floor to a row that has a time."""
    if "µs" in found and floor:
        found["ratio to floor"] = f"{float(str(found['µs'])) / 1e6 / floor:.2f}"
    return found


def graph(call: Call) -> Call:
    """Capture a call as a CUDA graph, and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        call()
    return captured.replay


def loss_rows(
    losses: dict[str, Loss],
    views: list[Tensor],
    reference: Loss,
    floor: float,
    device: str,
    *,
    compiled: bool,
) -> Iterator[Row]:
    """Yield a row for each loss and mode, with its errors against float64."""
    exact = [z.detach().double().requires_grad_() for z in views]
    try:
        wanted = reference(*exact)
        gradient = torch.cat(torch.autograd.grad(wanted, exact))
    except torch.cuda.OutOfMemoryError:
        wanted = gradient = None
        torch.cuda.empty_cache()
    del exact

    def step(loss: Loss) -> tuple[Tensor, Tensor]:
        value = loss(*views)
        return value, torch.cat(torch.autograd.grad(value, views))

    def measured(loss: Loss) -> Row:
        call = partial(step, loss)
        found = against(floor, timed(call, device))
        if "µs" in found and wanted is not None:
            value, by_view = call()
            found |= {"error": relative(value, wanted)}
            found |= {"gradient error": relative(by_view, gradient)}
        return found

    for name, loss in losses.items():
        yield {"contender": name} | measured(loss)
        if name == "care_loss" and device.startswith("cuda"):
            try:  # the memory of a graph is that of a pool, which says nothing
                replay = graph(partial(step, loss))
                found = against(floor, timed(replay, device, memory=False))
            except RuntimeError as error:
                found = {"note": f"not captured: {' '.join(str(error).split())[:200]}"}
            yield {"contender": "care_loss, CUDA graph"} | found
    for name in ("care_loss", "plain autograd") if compiled else ():
        torch._dynamo.reset()
        loss = torch.compile(losses[name], fullgraph=True)
        yield {"contender": f"torch.compile of {name}"} | measured(loss)


def info_nce_losses() -> dict[str, Loss]:
    """Return care_loss and its rivals that are installed."""
    losses: dict[str, Loss] = {
        "care_loss": partial(info_nce_loss, temperature=TEMPERATURE),
        "plain autograd": partial(plain_info_nce, temperature=TEMPERATURE),
        "authors": partial(authors_info_nce, temperature=TEMPERATURE),
    }
    if importlib.util.find_spec("lightly"):
        from rivals import import_torchvision

        import_torchvision()
        from lightly.loss import NTXentLoss

        losses["lightly"] = NTXentLoss(TEMPERATURE)
    if importlib.util.find_spec("memeff"):
        from memeff import MemoryEfficientQwen3Loss

        # Each view in turn is the query; a margin of 2 masks nothing. Its error tells whether it is
        # NT-Xent.
        half = MemoryEfficientQwen3Loss(temperature=TEMPERATURE, margin=2.0, use_qq_negatives=True)
        losses["memeff"] = lambda z1, z2: (half(z1, z2) + half(z2, z1)) / 2
    return losses


def computed(name: str, precision: str) -> str:
    """Return the precision of the matrix products of a contender."""
    if precision == "bfloat16" and "care_loss" in name:
        return "float32"  # half types are converted first
    return precision


def nt_xent(ceilings: Ceilings, device: str, quick: bool) -> Iterator[Row]:
    losses = info_nce_losses()
    for n, d in SIZES[: 1 if quick else None]:
        some = {k: loss for k, loss in losses.items() if k != "authors" or n <= MOST_FOR_MASKS}
        for precision in PRECISIONS:
            with products_in(precision) as dtype:
                views = leaves(2, n, d, device=device, dtype=dtype)
                floor = ceilings.floor(5 * (2 * n) ** 2 * d, 8 * n * d, precision)
                compiled = (n, d) in COMPILED and precision == "float32" and not quick
                size = {"section": "NT-Xent", "N": n, "D": d, "embeddings": str(dtype)[6:]}
                for found in loss_rows(
                    some, views, losses["care_loss"], floor, device, compiled=compiled
                ):
                    products = computed(str(found["contender"]), precision)
                    yield size | {"products": products} | found


def care(ceilings: Ceilings, device: str, quick: bool) -> Iterator[Row]:
    """The whole loss of four views, and the equivariance loss of two."""
    for n, d, chunks in CARE_SIZES[: 1 if quick else None]:
        size = {"N": n, "D": d, "chunks": chunks, "embeddings": "float32", "products": "float32"}
        m = n // chunks
        gap_floor = ceilings.floor(8 * n * m * d, 4 * n * d, "float32")
        floor = gap_floor + ceilings.floor(5 * (2 * n) ** 2 * d, 8 * n * d, "float32")
        whole = CAREloss(
            temperature=TEMPERATURE, equivariance_weight=WEIGHT, chunks=chunks, scale="authors"
        )

        def plain(*z: Tensor, chunks: int = chunks, m: int = m) -> Tensor:
            gap = plain_equivariance(z[2], z[3], chunks) * 2 * (m - 1)
            return plain_info_nce(z[0], z[1], TEMPERATURE) + WEIGHT * gap

        def by_authors(*z: Tensor, chunks: int = chunks) -> Tensor:
            return authors(torch.stack(z), TEMPERATURE, WEIGHT, chunks)

        losses = {"care_loss": whole}
        if n % chunks == 0:  # the others cut off the rest
            losses |= {"plain autograd": plain, "authors": by_authors}
        views = leaves(4, n, d, device=device)
        compiled = (n, d, chunks) == CARE_SIZES[0] and not quick
        for found in loss_rows(losses, views, whole, floor, device, compiled=compiled):
            yield {"section": "CARE"} | size | found
        gaps = {"care_loss": partial(equivariance_loss, chunks=chunks)}
        if n % chunks == 0:
            gaps["plain autograd"] = partial(plain_equivariance, chunks=chunks)
        for found in loss_rows(
            gaps, views[:2], gaps["care_loss"], gap_floor, device, compiled=False
        ):
            yield {"section": "equivariance"} | size | found


def by_svd(m: Tensor, driver: str | None = None) -> Tensor:
    """The polar factor, by one of PyTorch's ways to decompose a batch."""
    u, _, vh = torch.linalg.svd(m, driver=driver)
    return u @ vh


def polar(ceilings: Ceilings, device: str, quick: bool) -> Iterator[Row]:
    for b, d in ORTHOGONAL[: 1 if quick else None]:
        b = 16 if quick else b
        m = torch.randn(b, d, d, device=device)
        contenders: dict[str, Callable[[Tensor], Tensor]] = {
            "care_loss": nearest_orthogonal,
            "care_loss, SO(D)": partial(nearest_orthogonal, special=True),
            "SVD": by_svd,
            "SVD on the CPU": lambda m: by_svd(m.cpu()).to(m.device),
        }
        if device.startswith("cuda"):
            contenders |= {f"SVD, {x}": partial(by_svd, driver=x) for x in ("gesvda", "gesvdj")}
            contenders["SVD, gesvd"] = partial(by_svd, driver="gesvd")
        for name, fit in contenders.items():
            # gesvd takes the matrices of a batch one by one, and gesvdj those beyond 32 x 32.
            loops = name == "SVD, gesvd" or (name in ("SVD", "SVD, gesvdj") and d > 32)
            some = m[: max(1, CHECKED * 32 // max(d, 32))] if loops else m
            floor = ceilings.floor(0, 2 * len(some) * d * d, "float32")
            found = against(floor, timed(partial(fit, some), device))
            if "µs" in found:
                checked = some[:CHECKED]  # the fit of the identity to M is the factor of M
                identity = torch.eye(d, device=device).expand_as(checked)
                found |= fit_errors(identity, checked, fit(checked), name)
            size = {"section": "nearest_orthogonal", "N": len(some), "D": d}
            yield size | precisions(name) | {"contender": name} | found


def precisions(name: str) -> Row:
    return {"embeddings": "float32", "products": "float64" if "care_loss" in name else "float32"}


def fit_errors(source: Tensor, target: Tensor, rotation: Tensor, name: str) -> Row:
    errors = procrustes.errors(source, target, rotation, "SO" in name)
    return {"error": errors["excess"], "orthogonality": errors["orthogonality"]}


def fits(ceilings: Ceilings, device: str, quick: bool) -> Iterator[Row]:
    ways: dict[str, procrustes.Fit] = {
        "care_loss": lambda x, y: fit_rotation(x, y).rotation,
        "care_loss, SO(D)": lambda x, y: fit_rotation(x, y, special=True).rotation,
        "SVD": procrustes.svd,
    }
    for b, n, d in FITS[: 1 if quick else None]:
        b = 16 if quick else b
        pair = procrustes.problem(b, n, d, device)
        floor = ceilings.floor(2 * b * n * d * d, 2 * b * n * d + b * d * d, "float32")
        for name, fit in ways.items():
            found = against(floor, timed(partial(fit, *pair), device))
            if "µs" in found:
                checked = [z[:CHECKED] for z in pair]
                found |= fit_errors(checked[0], checked[1], fit(*checked), name)
            size = {"section": "fit_rotation", "N": b, "rows": n, "D": d}
            yield size | precisions(name) | {"contender": name} | found


def few_rows(ceilings: Ceilings, device: str, quick: bool) -> Iterator[Row]:
    """Bases of the span of few rows: the error is the part of the rows that a basis misses."""

    def by_qr(x: Tensor) -> Tensor:
        return torch.linalg.qr(x.mT).Q.mT

    def by_cholesky(x: Tensor) -> Tensor:
        """Two rounds of Cholesky-QR; where rows are dependent, the factor does not exist."""
        for _ in range(2):
            factor, _ = torch.linalg.cholesky_ex(x @ x.mT)
            x = torch.linalg.solve_triangular(factor, x, upper=False)
        return x

    def by_eigenvectors(x: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(x @ x.mT)
        kept = values > values[..., -1:] * x.shape[-1] * torch.finfo(x.dtype).eps
        scale = torch.where(kept, values, torch.inf).rsqrt()
        return (vectors * scale.unsqueeze(-2)).mT @ x

    def by_decomposition(x: Tensor) -> Tensor:
        return torch.linalg.svd(x.mT, full_matrices=False).U.mT

    ways = {"SVD": by_decomposition, "eigh": by_eigenvectors, "Cholesky": by_cholesky, "QR": by_qr}
    for b, n, d in ((64, 16, 512), (1, 64, 2048), (8192, 4, 32))[: 1 if quick else None]:
        x = torch.randn(b, n, d, device=device, dtype=torch.float64)
        floor = ceilings.floor(0, 4 * x.numel(), "float32")
        cases = {"random": x, "equal": x[:, :1].expand_as(x).contiguous()}
        cases["dependent"] = torch.cat((x[:, : n // 2], x[:, : n - n // 2]), 1)
        for case, rows in cases.items():
            for name, way in ways.items():
                found = against(floor, timed(partial(way, rows), device))
                if "µs" in found:
                    checked = rows[:CHECKED]
                    basis = way(checked)
                    missed = checked - (checked @ basis.mT) @ basis
                    found["error"] = f"{(missed.norm() / checked.norm()).item():.1e}"
                size = {"section": "few rows", "N": b, "rows": n, "D": d}
                size |= {"embeddings": "float64", "products": "float64"}
                yield size | {"contender": f"{name}, {case} rows"} | found


def training(ceilings: Ceilings, device: str, quick: bool) -> Iterator[Row]:
    """A step of a ResNet-50 with two and four forwards, with the CARE term and without."""
    if not importlib.util.find_spec("torchvision"):
        yield {"section": "step", "note": "torchvision is not installed"}
        return
    from rivals import import_torchvision

    import_torchvision()
    names = ["care_loss, two forwards", "care_loss, three forwards", "care_loss, four forwards"]
    names += ["lightly" if importlib.util.find_spec("lightly") else "InfoNCE alone"]
    batch = 8 if quick else 256
    tf32 = device.startswith("cuda") and torch.backends.cudnn.allow_tf32  # the default of PyTorch
    products = "float32, of convolutions TF32" if tf32 else "float32"
    for name in names[: 1 if quick else None]:
        train = step(name, batch, device=device, model="resnet18" if quick else "resnet50")
        found = timed(train, device, budget=0.5)
        if "µs" in found:
            found["images/s"] = f"{batch / float(str(found['µs'])) * 1e6:.0f}"
        size = {"section": "step", "N": batch, "embeddings": "float32", "products": products}
        yield size | {"contender": f"{name} ({CONTENDERS[name]} forwards)"} | found


SECTIONS = {
    "step": training,
    "CARE": care,
    "NT-Xent": nt_xent,
    "nearest_orthogonal": polar,
    "fit_rotation": fits,
    "few rows": few_rows,
}


def figure(path: Path, rows: list[dict[str, str]]) -> None:
    """Draw the ratio to the floor of NT-Xent of float32 embeddings against N, for D = 128."""
    import matplotlib.style
    from matplotlib.figure import Figure

    matplotlib.style.use(Path(__file__).parent.parent / "docs" / "style.mplstyle")
    points = [row for row in rows if row["section"] == "NT-Xent" and row["D"] == "128"]
    points = [row for row in points if row["ratio to floor"]]
    fig = Figure(figsize=(10, 3.5))
    for ax, title in zip(fig.subplots(1, 3, sharey=True), PRECISIONS, strict=True):
        # The rows of a contender that converts bfloat16 embeddings belong to these embeddings.
        dtype = "bfloat16" if title == "bfloat16" else "float32"
        some = [row for row in points if row["embeddings"] == dtype]
        some = [row for row in some if row["products"] == title or title == "bfloat16"]
        for name in dict.fromkeys(row["contender"] for row in some):
            own = [row for row in some if row["contender"] == name]
            line = sorted((int(row["N"]), float(row["ratio to floor"])) for row in own)
            ax.plot(*zip(*line, strict=True), "o-", label=name, markersize=4)
        ax.set(xscale="log", yscale="log", xlabel="N", title=f"{title} at D = 128")
        ax.spines[["top", "right"]].set_visible(False)
    fig.axes[0].set_ylabel("time, in units of the floor")
    fig.axes[0].legend(fontsize=7)
    fig.savefig(path)


COLUMNS = ("section", "N", "rows", "D", "chunks", "embeddings", "products", "contender")
COLUMNS += ("µs", "µs_low", "µs_high", "ratio to floor", "MB", "error", "gradient error")
COLUMNS += ("orthogonality", "images/s", "rate", "note")


def main() -> None:
    accepted = parser(__doc__)
    accepted.set_defaults(device="cuda")
    accepted.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    accepted.add_argument("--figure", type=Path, help="draw the ratios of NT-Xent here")
    options = accepted.parse_args()
    torch.set_num_threads(options.threads)
    if options.sections:
        results = Appended(options.csv, COLUMNS, options.device)
        ceilings = Ceilings(options.device, options.quick)
        for row in ceilings.rows():
            results.add(row)
        for name in options.sections:
            for row in SECTIONS[name](ceilings, options.device, options.quick):
                results.add(row)
    if options.figure:
        with options.csv.open(newline="") as file:
            figure(options.figure, list(csv.DictReader(file)))


if __name__ == "__main__":
    main()
