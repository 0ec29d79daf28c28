"""What care_loss is measured against.

The losses are functions of four views that return the whole loss. `authors` does the arithmetic of
the published code, in the order in which it does it: masks filled entry by entry at every call,
exponentials without log-sum-exp, one chunk after another.
"""

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


def authors(views: Tensor, temperature: float, weight: float, chunks: int) -> Tensor:
    """The published arithmetic (their model normalises its output)."""
    z1, z2, e1, e2 = F.normalize(views, dim=-1)
    base = _authors_info_nce(z1, z2, temperature)
    return base + weight * _authors_equivariance(e1, e2, chunks)


def products(views: Tensor, temperature: float, weight: float, chunks: int) -> Tensor:
    """The floor: the matrix products of the loss, and nothing else."""
    z = views[:2].flatten(0, 1)
    e = views[2:].unflatten(1, (chunks, -1))
    return (z @ z.mT)[0, 0] + (e @ e.mT)[0, 0, 0, 0]


def torchmetrics_shape() -> Any:
    """Import torchmetrics.functional.shape, which imports torchvision.

    The CUDA build of torchvision looks for two operators that a CPU build of torch lacks
    (pytorch/vision #9077): declaring them is enough to import it.
    """
    global operators
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchmetrics.functional.shape

    return torchmetrics.functional.shape
