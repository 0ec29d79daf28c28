"""Which path is best on this GPU, and does what the code relies on hold there?

    python benchmarks/cuda_paths.py --csv build/cuda/cuda-paths.csv
    python benchmarks/cuda_paths.py --device cpu --quick               # does the script run?

docs/speed.md says which constant or choice of the code follows from which rows. The sections:

* steps: losses whose operations do not make the host wait for the device, and their capture as CUDA
  graphs, replayed and compared.
* values: how far the singular values of each solver are from those of LAPACK, and what it makes of
  values that are 0, in units of eps s_1. The largest of a batch.
* solvers: the time of those solvers, of eigenvectors, and of LAPACK with the way to it and back.
* determinant: whether `determinant` is right where the QR decomposition of the device has another
  convention than that of LAPACK, and other ways to it.
* dense: InfoNCE, forward and backward, with a matrix of all products and by tiles of several sizes,
  for M = 2N rows. The error is that of the gradient, against float64.
* polar: ways to the orthogonal polar factor of a batch. The error is the deviation from
  orthogonality, in units of eps sqrt(D), and how far the factor is from that of LAPACK, times the
  reciprocal of the condition.

Each section has a share of the time; what does not fit into it is left out, with a row that says
so. The sections that decide whether results are right come first.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from cuda import by_svd, graph, products_in, relative
from measuring import Appended, Row, leaves, parser, timed
from torch import Tensor

from care_loss import CAREloss, _polar
from care_loss._autograd import info_nce as kernel
from care_loss.functional import equivariance_loss, info_nce_loss

SOLVERS: dict[str, Callable[[Tensor], Any]] = {
    "default": torch.linalg.svd,
    "gesvd": partial(torch.linalg.svd, driver="gesvd"),
    "gesvdj": partial(torch.linalg.svd, driver="gesvdj"),
    "gesvda": partial(torch.linalg.svd, driver="gesvda"),
    "as in the code": _polar.svd,
}
TILES = ((1024, 1024), (2048, 4096), (4096, 4096), (4096, 8192), (8192, 8192), (8192, 16384))
Call = Callable[[], Any]
EPS = torch.finfo(torch.float64).eps


def gradient(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*inputs), inputs)


def steps(device: str, quick: bool) -> Iterator[Row]:
    """Losses that a GPU must run without waiting, and that a graph must repeat."""
    two, four = (leaves(k, 256, 128, device=device) for k in (2, 4))
    many = leaves(2, 3000, 64, device=device)
    half = [z.detach().bfloat16().requires_grad_() for z in two]
    ids = torch.arange(256) % 16
    # A leaf of its own: the graph of a view of another would belong to the stream that made it.
    queue = leaves(1, 3000, 128, device=device)
    learned = [torch.tensor(0.5, device=place, requires_grad=True) for place in (device, "cpu")]

    def at(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return info_nce_loss(x, y, temperature=t)

    def with_queue(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        return info_nce_loss(x, y, negatives=q)

    cases: dict[str, Call] = {
        "CARE, 16 chunks of 256": partial(gradient, CAREloss(chunks=16), *four),
        "CARE, 16 chunks of 250": partial(
            gradient, CAREloss(chunks=16), *leaves(4, 250, 128, device=device)
        ),
        "InfoNCE": partial(gradient, info_nce_loss, *two),
        "InfoNCE, temperature 0.01": partial(
            gradient, partial(info_nce_loss, temperature=0.01), *two
        ),
        "InfoNCE, bfloat16": partial(gradient, info_nce_loss, *half),
        "InfoNCE, learned temperature": partial(gradient, at, *two, learned[0]),
        "InfoNCE, learned temperature on the CPU": partial(gradient, at, *two, learned[1]),
        "InfoNCE, queue": partial(gradient, with_queue, *two, *queue),
        "InfoNCE, tiled, 6000 rows": partial(gradient, info_nce_loss, *many),
        "equivariance, ids on the CPU": partial(
            gradient, partial(equivariance_loss, chunks=ids), *two
        ),
        "equivariance, ids on the device": partial(
            gradient, partial(equivariance_loss, chunks=ids.to(device)), *two
        ),
    }
    for case, call in list(cases.items())[: 2 if quick else None]:
        yield {"case": case, "contender": "eager"} | timed(call, device)
        if device.startswith("cuda"):
            yield {"case": case, "contender": "host", "note": waits(call)}
            try:
                replay, found = captured(call)
                same = all(torch.equal(a, b) for a, b in zip(found, call(), strict=True))
                note = "equal to eager" if same else "DIFFERS from eager"
                times = timed(replay, device, memory=False)
            except RuntimeError as error:
                note, times = f"NOT CAPTURED: {' '.join(str(error).split())[:200]}", {}
            yield {"case": case, "contender": "replayed"} | times | {"note": note}


def waits(call: Call) -> str:
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
        return "does not wait"
    except RuntimeError as error:
        return f"WAITS: {' '.join(str(error).split())[:200]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call: Call) -> tuple[Call, Any]:
    """Return the replay of a call, and the tensors that the replay writes."""
    kept: list[Any] = []

    def keep() -> None:
        kept.append(call())

    replay = graph(keep)
    replay()
    torch.cuda.synchronize()
    return replay, kept[-1]


def values(device: str, quick: bool) -> Iterator[Row]:
    for d in (3, 16) if quick else (3, 16, 128, 512, 2, 8, 32, 33, 64, 256):
        b = 64 if d <= 32 else 8 if d <= 128 else 2
        for rank in sorted({d - 1, max(1, d // 2)}):
            x = torch.randn(b, d, rank, dtype=torch.float64)
            x = x @ torch.randn(b, rank, d, dtype=torch.float64)
            wanted, here = torch.linalg.svdvals(x), x.to(device)
            for name, solver in SOLVERS.items():
                if name.startswith("ges") and not device.startswith("cuda"):
                    continue
                row: Row = {"case": f"D {d}, rank {rank}", "contender": name}
                try:
                    u, s, vh = solver(here)
                except RuntimeError as error:
                    yield row | {"note": f"failed with {' '.join(str(error).split())[:200]}"}
                    continue
                top = s[:, :1] * EPS
                rest = here @ vh.mT - u * s.unsqueeze(-2)
                residual = torch.linalg.vector_norm(rest, dim=-2) / top
                zeros = (s[:, rank:] / top).max().item()
                off = ((s.cpu() - wanted) / top.cpu()).abs().max().item()
                note = f"zeros {zeros:.1f} (trusted {4 + math.sqrt(d):.1f}), values off by "
                note += f"{off:.1f}, residual {residual.max().item():.1f}, "
                yield row | {"note": note + f"orthogonality {orthogonality(u):.1f}"}


def solvers(device: str, quick: bool) -> Iterator[Row]:
    """What the decompositions of batches take, and those of symmetric matrices."""
    ways = {name: SOLVERS[name] for name in ("default", "gesvd", "as in the code")}
    if not device.startswith("cuda"):
        del ways["gesvd"]
    ways["eigenvectors"] = torch.linalg.eigh
    ways["on the CPU"] = lambda x: [z.to(x.device) for z in torch.linalg.svd(x.cpu())]
    sizes = ((16, 16), (16, 32), (16, 33), (16, 64), (16, 128), (8, 256), (2, 512), (1, 1024))
    for b, d in sizes[: 1 if quick else None]:
        x = torch.randn(b, d, d, device=device, dtype=torch.float64)
        x = x + x.mT
        for name, way in ways.items():
            yield {"case": f"{b} x {d}", "contender": name} | timed(partial(way, x), device)


def orthogonality(r: Tensor) -> float:
    """Return the largest deviation from orthogonality of a batch, in units of eps sqrt(D)."""
    d, eps = r.shape[-1], torch.finfo(r.dtype).eps
    r = r.double()
    identity = torch.eye(d, dtype=r.dtype, device=r.device)
    deviation: Tensor = torch.linalg.matrix_norm(r.mT @ r - identity)
    return deviation.max().item() / eps / math.sqrt(d)


def determinant(device: str, quick: bool) -> Iterator[Row]:
    for b, d in (
        ((64, 3), (64, 16))
        if quick
        else (
            *((64, d) for d in (128, 1, 2, 3, 16, 32)),
            *((2, 512), (100_000, 3), (3, 257), (32, 256)),
        )
    ):
        eye = torch.eye(d, dtype=torch.float64)
        first, last = (torch.diag(1 - 2 * (torch.arange(d) == k).double()) for k in (0, d - 1))
        q = torch.linalg.qr(torch.randn(b, d, d, dtype=torch.float64)).Q
        q = torch.cat((q, torch.stack((eye, -eye, eye.flip(0), first, last, eye.roll(1, 0)))))
        wanted = torch.linalg.det(q).round()
        ways = {
            "as in the code": _polar.determinant,
            "geqrf": _polar.sign_of_reflections,
            "det": torch.linalg.det,
        }
        ways["slogdet"] = lambda x: torch.linalg.slogdet(x).sign
        for name, way in ways.items():
            for dtype in (torch.float64, torch.float32):
                x = q.to(device, dtype)
                found = timed(partial(way, x), device)
                if "µs" in found:
                    wrong = int((way(x).cpu().double().round() != wanted).sum())
                    found["note"] = f"{wrong} of {len(q)} WRONG" if wrong else "right"
                yield {"case": f"{b} x {d}, {str(dtype)[6:]}", "contender": name} | found


def dense(device: str, quick: bool) -> Iterator[Row]:
    sizes = [(m, d) for m in (4096, 8192, 16384, 32768, 65536, 2048) for d in (128, 512)]
    for m, d in [(96, 8)] if quick else sizes:
        tiles = [(16, 32)] if quick else [tile for tile in TILES if tile[0] < m]
        views = leaves(2, m // 2, d, device=device)
        for precision, temperature in (("float32", 0.5), ("TF32", 0.5), ("float32", 0.01)):
            if (precision, temperature) != ("float32", 0.5) and (m != 16384 or d != 128):
                continue  # other settings at one size: whether they move the limit
            case = f"M {m}, D {d}, temperature {temperature}, {precision}"
            loss = partial(info_nce_loss, temperature=temperature)
            with products_in(precision):
                exact = [z.detach().double().requires_grad_() for z in views]
                wanted = torch.cat(gradient(loss, *exact)) if m <= 16384 else None
                ways = {"dense": None} if m <= 32768 else {}  # its matrix has 4 GiB
                ways |= {"tiles of {} x {}".format(*tile): tile for tile in tiles}
                for name, tile in ways.items():
                    with forced(tile):
                        found = timed(partial(gradient, loss, *views), device)
                        if "µs" in found and wanted is not None:
                            found["error"] = relative(torch.cat(gradient(loss, *views)), wanted)
                    yield {"case": case, "contender": name} | found


def forced(tile: tuple[int, int] | None) -> Any:
    """Make InfoNCE take tiles of a size, or with None the dense form."""
    chosen = {"is_dense": lambda *_: tile is None, "tile": lambda _: tile}
    return patch.multiple(kernel, **chosen)


def by_eigenvectors(x: Tensor) -> Tensor:
    """The factor from the eigenvectors of XᵀX, whose condition is the square of that of X."""
    values, vectors = torch.linalg.eigh(x.mT @ x)
    return x @ (vectors * values.clamp_min(1e-300).rsqrt().unsqueeze(-2)) @ vectors.mT


def by_newton_schulz(x: Tensor, steps: int = 40) -> Tensor:
    """The factor by matrix products alone; the number of steps grows with the condition."""
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    for _ in range(steps):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return x


def by_newton(x: Tensor, steps: int = 9) -> Tensor:
    """Higham's scaled iteration, with one inverse in each step."""
    for _ in range(steps):
        inverse = torch.linalg.inv_ex(x)[0].mT
        sizes = (torch.linalg.matrix_norm(z, keepdim=True) for z in (inverse, x))
        scale = (next(sizes) / next(sizes)).sqrt()
        x = 0.5 * (scale * x + inverse / scale)
    return x


def by_qdwh(x: Tensor, steps: int = 6) -> Tensor:
    """The iteration QDWH with Cholesky factors (Nakatsukasa and Higham, 2013), never waiting."""
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    low = 1e-9 if x.dtype == torch.float64 else 1e-5  # a lower bound of the singular values
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(steps):
        square = low * low
        root = (4 * (1 - square) / square**2) ** (1 / 3)
        a = math.sqrt(1 + root)
        a += 0.5 * math.sqrt(8 - 4 * root + 8 * (2 - square) / (square * math.sqrt(1 + root)))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        low = min(low * (a + b * square) / (1 + c * square), 1)
        factor, _ = torch.linalg.cholesky_ex(identity + c * (x.mT @ x))
        x = b / c * x + (a - b / c) * torch.cholesky_solve(x.mT, factor).mT
    return x


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "SVD": by_svd,
    "eigenvectors": by_eigenvectors,
    "QDWH": by_qdwh,
    "Newton": by_newton,
    "Newton-Schulz": by_newton_schulz,
}


def polar(device: str, quick: bool) -> Iterator[Row]:
    sizes = ((4096, 16), (256, 64), (64, 128), (100_000, 3), (1024, 32), (16, 256), (4, 512))
    for b, d in sizes[:1] if quick else sizes:
        for dtype in (torch.float64, torch.float32):
            m = torch.randn(16 if quick else b, d, d, device=device, dtype=dtype)
            u, s, vh = torch.linalg.svd(m[:64].cpu().double())
            ways = dict(WAYS)
            if device.startswith("cuda"):
                ways["SVD, gesvda"] = partial(by_svd, driver="gesvda")
            for name, way in ways.items():
                found = timed(partial(way, m), device)
                if "µs" in found:
                    r = way(m[:64])
                    off = torch.linalg.matrix_norm(r.cpu().double() - u @ vh) * s[:, -1] / s[:, 0]
                    found["error"] = f"{orthogonality(r):.1f}; {off.max().item():.1e}"
                yield {"case": f"{len(m)} x {d}, {str(dtype)[6:]}", "contender": name} | found


SECTIONS: dict[str, tuple[Callable[[str, bool], Iterator[Row]], int]] = {  # with their seconds
    "steps": (steps, 15),
    "values": (values, 14),
    "solvers": (solvers, 12),
    "determinant": (determinant, 14),
    "dense": (dense, 30),
    "polar": (polar, 30),
}
COLUMNS = ("section", "case", "contender", "µs", "µs_low", "µs_high", "MB", "error", "note")


def main() -> None:
    accepted = parser(__doc__)
    accepted.set_defaults(device="cuda")
    accepted.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    options = accepted.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    results = Appended(options.csv, COLUMNS, options.device)
    for name in options.sections:
        section, seconds = SECTIONS[name]
        end = time.monotonic() + seconds
        for row in section(options.device, options.quick):
            results.add({"section": name} | row)
            if time.monotonic() > end:
                results.add({"section": name, "note": f"the rest was left out after {seconds} s"})
                break


if __name__ == "__main__":
    main()
