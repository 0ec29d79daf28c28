"""How fast is the batched core on a GPU, how much memory does it need, and how exact is it?

    python benchmarks/cuda.py --csv benchmarks/results/cuda.csv --figure build/cuda.png
    python benchmarks/cuda.py --device cpu --quick                      # does the script run?

Each row has the median and the quartiles of times that CUDA events measured, the ratio to a floor,
the memory at the peak, and the relative errors of the loss and of its gradient. Rows of fits have
how much the objective falls short of the best, and the deviation from orthogonality in units of
eps sqrt(D). A floor is arithmetic at the rates that this run measured: of NT-Xent of M rows,
5 M² D operations (those of an algorithm that computes its products again in the backward), at the
rate of matrix products in the precision of the row, and always at least one read of the inputs and
one write of the results. A contender that runs out of memory has a row that says so, and one that
is not installed has none. For D = 128 the losses are compiled as well, in the first four minutes of
the run.
"""

import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import procrustes
import torch
from measuring import Row, leaves, megabytes, parser, provenance, write_csv
from rivals import authors, authors_info_nce, plain_equivariance, plain_info_nce
from step import CONTENDERS, step
from torch import Tensor
from torch.utils.benchmark import timer as synchronized_clock

from care_loss import CAREloss
from care_loss.functional import equivariance_loss, info_nce_loss
from care_loss.rotation import fit_rotation, nearest_orthogonal

TEMPERATURE, WEIGHT = 0.5, 0.01
ROWS, DIMENSIONS = (256, 1024, 4096, 16384, 32768), (64, 128, 256, 512, 2048)
PRECISIONS = ("float32", "TF32", "bfloat16")
CARE_SIZES = ((256, 128, 16), (250, 128, 16), (4096, 128, 16), (4096, 128, 256))
ORTHOGONAL = ((100_000, 3), (4096, 16), (1024, 64), (1024, 128), (64, 256), (4, 512))
FITS = ((100_000, 8, 3), (4096, 32, 16), (1024, 256, 128), (4, 1024, 512), (64, 16, 512))
MOST_FOR_MASKS = 4096  # rows; the masks of the authors' code are filled entry by entry
START, COMPILE_FOR = synchronized_clock(), 240  # seconds from the start, so that the run ends
Call = Callable[[], Any]


def times(call: Call, device: str, budget: float = 0.2) -> list[float]:
    """Return the seconds of up to 50 calls that together take about `budget`, after a warm-up."""
    for _ in range(2):
        start = synchronized_clock()
        call()
        seconds = synchronized_clock() - start
        if seconds > 1:  # a second run would be the only warm-up that it needs
            break
    count = min(50, max(2, int(budget / max(seconds, 1e-9))))
    if not device.startswith("cuda"):
        found = []
        for _ in range(count):
            start = synchronized_clock()
            call()
            found.append(synchronized_clock() - start)
        return found
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


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
                seconds = statistics.median(times(partial(torch.mm, a, a), device))
            self.products[precision] = 2 * n**3 / seconds
        large = torch.empty(2**16 if quick else 2**28, device=device)
        copy = partial(large.clone().copy_, large)
        self.copying = 2 * large.nbytes / statistics.median(times(copy, device))

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


def relative(found: Tensor, wanted: Tensor) -> str:
    found, wanted = found.detach().double(), wanted.detach().double()
    return f"{((found - wanted).norm() / wanted.norm()).item():.1e}"


def row(call: Call, floor: float, device: str) -> Row:
    """Return the times and the memory of a call, or why there are none."""
    try:
        memory = megabytes(call, device)
        seconds = times(call, device)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"µs": "out of memory"}
    except Exception as error:  # of a rival, at one size: the run goes on
        return {"µs": f"failed with {type(error).__name__}"}
    low, middle, high = (1e6 * q for q in statistics.quantiles(seconds, n=4))
    return {
        "µs": f"{middle:.1f}",
        "µs_low": f"{low:.1f}",
        "µs_high": f"{high:.1f}",
        "ratio to floor": f"{middle / 1e6 / floor:.2f}" if floor else "",
        "MB": f"{memory:.1f}",
    }


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


def modes(name: str, loss: Callable[..., Tensor], d: int) -> Iterator[tuple[str, Any]]:
    """Yield a loss as it is and, for one dimension, compiled: compiling takes most of the time."""
    yield name, loss
    if d == 128 and name != "authors" and synchronized_clock() - START < COMPILE_FOR:
        torch._dynamo.reset()
        yield f"torch.compile of {name}", torch.compile(loss, fullgraph=True)


def loss_rows(
    losses: dict[str, Callable[..., Tensor]],
    views: list[Tensor],
    reference: Callable[..., Tensor],
    floor: float,
    device: str,
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

    def step(loss: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        value = loss(*views)
        return value, torch.cat(torch.autograd.grad(value, views))

    for plain_name, plain_loss in losses.items():
        for name, loss in modes(plain_name, plain_loss, views[0].shape[1]):
            call = partial(step, loss)
            found = row(call, floor, device)
            if "MB" in found and wanted is not None:
                value, by_view = call()
                found |= {"error": relative(value, wanted)}
                found |= {"gradient error": relative(by_view, gradient)}
            yield {"contender": name} | found
            if name == "care_loss" and "MB" in found and device.startswith("cuda"):
                try:
                    found = row(graph(call), floor, device)
                except RuntimeError as error:
                    found = {"µs": f"not captured: {error}"}
                yield {"contender": "care_loss, CUDA graph"} | found


def nt_xent(ceilings: Ceilings, device: str, quick: bool) -> Iterator[Row]:
    losses: dict[str, Callable[..., Tensor]] = {
        "authors": partial(authors_info_nce, temperature=TEMPERATURE),
        "plain autograd": partial(plain_info_nce, temperature=TEMPERATURE),
        "care_loss": partial(info_nce_loss, temperature=TEMPERATURE),
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
    if importlib.util.find_spec("inf_cl"):
        from inf_cl import cal_inf_loss

        def one_side(z1: Tensor, z2: Tensor) -> Tensor:
            u, v = (torch.nn.functional.normalize(z, dim=-1) for z in (z1, z2))
            loss: Tensor = cal_inf_loss(u / TEMPERATURE, v, head_dim=min(z1.shape[1], 256))
            return loss

        losses["inf-cl (one side of CLIP, another loss)"] = one_side
    for n in ROWS[: 1 if quick else None]:
        for d in DIMENSIONS[: 1 if quick else None]:
            for precision in PRECISIONS:
                with products_in(precision) as dtype:
                    views = leaves(2, n, d, device=device, dtype=dtype)
                    floor = ceilings.floor(5 * (2 * n) ** 2 * d, 8 * n * d, precision)
                    some = {
                        name: loss
                        for name, loss in losses.items()
                        if name != "authors" or n <= MOST_FOR_MASKS
                    }
                    rows = loss_rows(some, views, losses["care_loss"], floor, device)
                    size = {"section": "NT-Xent", "N": n, "D": d, "precision": precision}
                    yield from (size | found for found in rows)


def care(ceilings: Ceilings, device: str, quick: bool) -> Iterator[Row]:
    """The whole loss of four views, and the equivariance loss of two."""
    for n, d, chunks in CARE_SIZES[: 1 if quick else None]:
        size = {"N": n, "D": d, "chunks": chunks, "precision": "float32"}
        m = n // chunks
        gap_floor = ceilings.floor(8 * n * m * d, 4 * n * d, "float32")
        floor = gap_floor + ceilings.floor(5 * (2 * n) ** 2 * d, 8 * n * d, "float32")
        whole = CAREloss(TEMPERATURE, WEIGHT, chunks=chunks, scale="authors")

        def plain(*z: Tensor, chunks: int = chunks, m: int = m) -> Tensor:
            gap = plain_equivariance(z[2], z[3], chunks) * 2 * (m - 1)
            return plain_info_nce(z[0], z[1], TEMPERATURE) + WEIGHT * gap

        def by_authors(*z: Tensor, chunks: int = chunks) -> Tensor:
            return authors(torch.stack(z), TEMPERATURE, WEIGHT, chunks)

        losses = {"authors": by_authors, "plain autograd": plain, "care_loss": whole}
        views = leaves(4, n, d, device=device)
        for found in loss_rows(losses, views, whole, floor, device):
            yield {"section": "CARE"} | size | found
        gaps = {
            "plain autograd": partial(plain_equivariance, chunks=chunks),
            "care_loss": partial(equivariance_loss, chunks=chunks),
        }
        for found in loss_rows(gaps, views[:2], gaps["care_loss"], gap_floor, device):
            yield {"section": "equivariance"} | size | found


def drivers(device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the polar factor by each way that PyTorch has of decomposing a batch."""

    def by_svd(m: Tensor, driver: str | None = None) -> Tensor:
        u, _, vh = torch.linalg.svd(m, driver=driver)
        return u @ vh

    names = ["gesvd", "gesvdj", "gesvda"] if device.startswith("cuda") else []
    return {"SVD": by_svd} | {f"SVD, {name}": partial(by_svd, driver=name) for name in names}


def polar(ceilings: Ceilings, device: str, quick: bool) -> Iterator[Row]:
    for b, d in ORTHOGONAL[: 1 if quick else None]:
        b = 16 if quick else b
        m = torch.randn(b, d, d, device=device)
        identity = torch.eye(d, device=device).expand_as(m)  # the fit to it is that to M
        floor = ceilings.floor(0, 2 * b * d * d, "float32")
        contenders = drivers(device) | {"care_loss": nearest_orthogonal}
        contenders["care_loss, SO(D)"] = partial(nearest_orthogonal, special=True)
        for name, fit in contenders.items():
            found = row(partial(fit, m), floor, device)
            if "MB" in found:
                found |= fit_errors(identity, m, fit(m), name)
            yield {"section": "nearest_orthogonal", "N": b, "D": d, "contender": name} | found


def fit_errors(source: Tensor, target: Tensor, rotation: Tensor, name: str) -> Row:
    errors = procrustes.errors(source, target, rotation, "SO" in name)
    return {"error": errors["excess"], "orthogonality": errors["orthogonality"]}


def fits(ceilings: Ceilings, device: str, quick: bool) -> Iterator[Row]:
    ways: dict[str, procrustes.Fit] = {
        "SVD": procrustes.svd,
        "care_loss": lambda x, y: fit_rotation(x, y).rotation,
        "care_loss, SO(D)": lambda x, y: fit_rotation(x, y, special=True).rotation,
    }
    for b, n, d in FITS[: 1 if quick else None]:
        b = 16 if quick else b
        pair = procrustes.problem(b, n, d, device)
        floor = ceilings.floor(2 * b * n * d * d, 2 * b * n * d + b * d * d, "float32")
        for name, fit in ways.items():
            found = row(partial(fit, *pair), floor, device)
            if "MB" in found:
                found |= fit_errors(*pair, fit(*pair), name)
            size = {"section": "fit_rotation", "N": b, "rows": n, "D": d, "precision": "float32"}
            yield size | {"contender": name} | found


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

    def by_svd(x: Tensor) -> Tensor:
        return torch.linalg.svd(x.mT, full_matrices=False).U.mT

    ways = {"QR": by_qr, "Cholesky": by_cholesky, "eigh": by_eigenvectors, "SVD": by_svd}
    for b, n, d in ((64, 16, 512), (8192, 4, 32), (1, 64, 2048))[: 1 if quick else None]:
        x = torch.randn(b, n, d, device=device, dtype=torch.float64)
        floor = ceilings.floor(0, 4 * x.numel(), "float32")
        cases = {"random": x, "equal": x[:, :1].expand_as(x).contiguous()}
        cases["dependent"] = torch.cat((x[:, : n // 2], x[:, : n - n // 2]), 1)
        for case, rows in cases.items():
            for name, way in ways.items():
                found = row(partial(way, rows), floor, device)
                if "MB" in found:
                    basis = way(rows)
                    missed = rows - (rows @ basis.mT) @ basis
                    found["error"] = f"{(missed.norm() / rows.norm()).item():.1e}"
                size = {"section": "few rows", "N": b, "rows": n, "D": d, "precision": "float64"}
                yield size | {"contender": f"{name}, {case} rows"} | found


def training(ceilings: Ceilings, device: str, quick: bool) -> Iterator[Row]:
    """A step of a ResNet-50 with two and four forwards, with the CARE term and without."""
    if not importlib.util.find_spec("torchvision"):
        yield {"section": "step", "contender": "torchvision is not installed"}
        return
    from rivals import import_torchvision

    import_torchvision()
    names = ["care_loss, two forwards", "care_loss, four forwards"]
    names = ["lightly" if importlib.util.find_spec("lightly") else "InfoNCE alone", *names]
    batch = 8 if quick else 256
    for name in names[: 1 if quick else None]:
        train = step(name, batch, device=device, model="resnet18" if quick else "resnet50")
        found = row(train, 0, device)
        if "MB" in found:
            found["images/s"] = f"{batch / float(found['µs']) * 1e6:.0f}"
        size = {"section": "step", "N": batch, "precision": "float32"}
        yield size | {"contender": f"{name} ({CONTENDERS[name]} forwards)"} | found


SECTIONS = {
    "NT-Xent": nt_xent,
    "CARE": care,
    "nearest_orthogonal": polar,
    "fit_rotation": fits,
    "few rows": few_rows,
    "step": training,
}


def figure(path: Path, rows: list[Row]) -> None:
    """Draw the ratio to the floor of NT-Xent against N, for D = 128 or the only D there is."""
    import matplotlib.style
    from matplotlib.figure import Figure

    matplotlib.style.use(Path(__file__).parent.parent / "docs" / "style.mplstyle")
    points = [row for row in rows if row["section"] == "NT-Xent" and row["ratio to floor"]]
    shown = 128 if any(row["D"] == 128 for row in points) else points[0]["D"]
    fig = Figure(figsize=(10, 3.5))
    for ax, precision in zip(fig.subplots(1, 3, sharey=True), PRECISIONS, strict=True):
        some = [row for row in points if row["precision"] == precision and row["D"] == shown]
        for name in dict.fromkeys(row["contender"] for row in some):
            line = [row for row in some if row["contender"] == name]
            ratios = [float(str(row["ratio to floor"])) for row in line]
            ax.plot([row["N"] for row in line], ratios, "o-", label=str(name), markersize=4)
        ax.set(xscale="log", yscale="log", xlabel="N", title=precision)
        ax.spines[["top", "right"]].set_visible(False)
    fig.axes[0].set_ylabel("time, in units of the floor")
    fig.axes[-1].legend(fontsize=8)
    fig.savefig(path)


COLUMNS = ("section", "N", "rows", "D", "chunks", "precision", "contender", "µs", "µs_low")
COLUMNS += ("µs_high", "ratio to floor", "MB", "error", "gradient error", "orthogonality")
COLUMNS += ("images/s", "rate")


def main() -> None:
    accepted = parser(__doc__)
    accepted.set_defaults(device="cuda")
    accepted.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    accepted.add_argument("--figure", type=Path, help="draw the ratios of NT-Xent here")
    options = accepted.parse_args()
    torch.set_num_threads(options.threads)
    ceilings = Ceilings(options.device, options.quick)
    where = ceilings, options.device, options.quick
    sections = (SECTIONS[name](*where) for name in options.sections)
    origin = provenance(options.device)
    rows: list[Row] = []
    for found in (one for part in (ceilings.rows(), *sections) for one in part):
        rows.append({column: found.get(column, "") for column in COLUMNS} | origin)
        print(*(f"{key} {value}" for key, value in found.items() if value != ""), sep=", ")
        sys.stdout.flush()
        write_csv(options.csv, rows)  # after every row, for a run that is cut short
    if options.figure:
        figure(options.figure, rows)


if __name__ == "__main__":
    main()
