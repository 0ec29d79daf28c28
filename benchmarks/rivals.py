"""What care_loss is measured against.

The functions called `authors` do the arithmetic of the published code, in the order in which it
does it: masks filled entry by entry at every call, exponentials without log-sum-exp, one chunk
after another.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _mask(rows: int, columns: int, partners: tuple[int, ...]) -> Tensor:
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for i in range(rows):
        for offset in partners:
            mask[i, i + offset] = False
    return mask


def _authors_info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    n = len(z1)
    z = torch.cat((z1, z2))
    scores = torch.exp(z @ z.T.contiguous() / temperature)
    half = _mask(n, 2 * n, (0, n))
    mask = torch.cat((half, half)).to(z.device)
    negative = scores.masked_select(mask).view(2 * n, -1).sum(-1)
    positive = torch.exp((z1 * z2).sum(-1) / temperature).repeat(2)
    return -torch.log(positive / (positive + negative)).mean()


def _authors_equivariance(z1: Tensor, z2: Tensor, chunks: int) -> Tensor:
    n = len(z1) // chunks
    total = z1.new_zeros(())
    for k in range(chunks):
        gram = []
        for z in (z1[k * n : (k + 1) * n], z2[k * n : (k + 1) * n]):
            mask = _mask(n, n, (0,)).to(z.device)
            gram.append((z @ z.T.contiguous()).masked_select(mask).view(n, -1))
        total = total + 2 * (gram[0] - gram[1]).norm(dim=-1).square().mean()
    return total / chunks


def authors_info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Their InfoNCE (their model normalises its output)."""
    return _authors_info_nce(*_normalized(z1, z2), temperature=temperature)


def authors_equivariance(z1: Tensor, z2: Tensor, chunks: int) -> Tensor:
    """Their equivariance loss (`scale="authors"`), which drops the rows after equal chunks."""
    return _authors_equivariance(*_normalized(z1, z2), chunks=chunks)


def authors(views: Tensor, temperature: float, weight: float, chunks: int) -> Tensor:
    """Their loss of four views."""
    z1, z2, e1, e2 = views
    base = authors_info_nce(z1, z2, temperature)
    return base + weight * authors_equivariance(e1, e2, chunks)


def plain_info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent as it is commonly written: the cross-entropy of scores without the diagonal."""
    z = torch.cat(_normalized(z1, z2))
    scores = (z @ z.mT / temperature).fill_diagonal_(-torch.inf)
    positive = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(scores, positive)


def plain_equivariance(z1: Tensor, z2: Tensor, chunks: int) -> Tensor:
    """The difference of Gram matrices, batched over equal chunks (what remains is dropped)."""
    n = len(z1) // chunks
    u, v = (z[: n * chunks].unflatten(0, (chunks, n)) for z in _normalized(z1, z2))
    gap = (u @ u.mT - v @ v.mT).square()
    return gap.triu(1).sum() * 2 / (chunks * n * (n - 1))


def _normalized(*views: Tensor) -> list[Tensor]:
    return [F.normalize(z, dim=-1) for z in views]


def info_nce_rivals(temperature: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return other implementations of NT-Xent, as functions of two views."""
    import_torchvision()
    from lightly.loss import NTXentLoss
    from pytorch_metric_learning.losses import NTXentLoss as MetricLearningNTXent
    from pytorch_metric_learning.losses import SelfSupervisedLoss

    plain = partial(plain_info_nce, temperature=temperature)
    return {
        "authors": partial(authors_info_nce, temperature=temperature),
        "lightly": NTXentLoss(temperature),
        "pytorch-metric-learning": SelfSupervisedLoss(MetricLearningNTXent(temperature)),
        "plain autograd": plain,
        "torch.compile of plain": torch.compile(plain, fullgraph=True),
    }


def info_nce_products(u: Tensor, block: int = 256) -> None:
    """The floor of NT-Xent: the matrix products of rows `(M, D)` alone, 5 M² D operations.

    They are those of a forward that uses the symmetry, block by block, and of a backward that
    computes the blocks of each row again and multiplies them with the rows.
    """
    gradient = torch.zeros_like(u)
    tile = u.new_empty(block, block)
    rows = range(0, len(u), block)
    for i in rows:
        for j in rows[rows.index(i) :]:
            torch.mm(u[i : i + block], u[j : j + block].mT, out=tile)
    for i in rows:
        for j in rows:
            torch.mm(u[i : i + block], u[j : j + block].mT, out=tile)
            gradient[i : i + block].addmm_(tile, u[j : j + block])


def equivariance_products(u: Tensor, v: Tensor, chunks: int) -> None:
    """The floor of the direct form: the Gram matrices, and their products with the rows."""
    for z in (u, v):
        rows = z.unflatten(0, (chunks, -1))
        (rows @ rows.mT) @ rows


def products(views: Tensor, temperature: float, weight: float, chunks: int) -> Tensor:
    """The matrix products of the whole loss as it is commonly written, with autograd."""
    z = views[:2].flatten(0, 1)
    e = views[2:].unflatten(1, (chunks, -1))
    return (z @ z.mT)[0, 0] + (e @ e.mT)[0, 0, 0, 0]


operators: torch.library.Library  # that torchvision needs, where it does


def import_torchvision() -> None:
    """Import torchvision, which lightly and torchmetrics import.

    The CUDA build of torchvision looks for two operators that a CPU build of torch lacks
    (pytorch/vision #9077): declaring them is enough to import it.
    """
    global operators  # declared for as long as the process lives
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def torchmetrics_shape() -> Any:
    """Import torchmetrics.functional.shape."""
    import_torchvision()
    import torchmetrics.functional.shape

    return torchmetrics.functional.shape
