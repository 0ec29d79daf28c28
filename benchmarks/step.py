"""How long does a whole training step take, and how much memory, with each loss?

    python benchmarks/step.py                            # a table
    python benchmarks/step.py --csv benchmarks/results/step-cpu.csv

A step of SGD trains a ResNet-18 with a projection head on 256 images of 32 x 32 pixels, at the
recipe of CIFAR-10. With two forwards, the views serve both losses; with three or four, the views
whose augmentation is shared are forwards of their own. The rotation contrast has four chunks, the
others 16. The views are made beforehand. Times are ratios to the step with lightly's loss, which
has two forwards and no equivariance.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measuring import (
    RATIO,
    Row,
    megabytes,
    parser,
    printed_by_another_process,
    ratio_columns,
    report,
    start,
    take_turns,
)
from rivals import authors, import_torchvision
from torch import Tensor, nn

from care_loss import CAREloss, InfoNCELoss, RotationContrastLoss

BATCH, DIM, CHUNKS, CHUNKS_TO_FIT = 256, 128, 16, 4
TEMPERATURE, WEIGHT = 0.5, 0.01
CONTENDERS = {  # the number of forwards
    "lightly": 2,
    "InfoNCE alone": 2,
    "authors, two forwards": 2,
    "care_loss, two forwards": 2,
    "rotation contrast, two forwards": 2,
    "care_loss, three forwards": 3,
    "authors, four forwards": 4,
    "care_loss, four forwards": 4,
}


def losses(contender: str) -> Callable[..., Tensor]:
    """Return a loss as a function of the embeddings of all forwards."""
    if contender == "lightly":
        from lightly.loss import NTXentLoss

        loss: Callable[..., Tensor] = NTXentLoss(TEMPERATURE)
        return loss
    if contender == "InfoNCE alone":
        return InfoNCELoss(TEMPERATURE)
    if contender == "rotation contrast, two forwards":
        return RotationContrastLoss(temperature=TEMPERATURE, chunks=CHUNKS_TO_FIT)
    settings = (TEMPERATURE, WEIGHT, CHUNKS)
    if contender == "authors, two forwards":
        return lambda z1, z2: authors(torch.stack((z1, z2, z1, z2)), *settings)
    if contender == "authors, four forwards":
        return lambda *z: authors(torch.stack(z), *settings)
    shared = CONTENDERS[contender] == 2
    care = CAREloss(
        temperature=TEMPERATURE,
        equivariance_weight=WEIGHT,
        chunks=CHUNKS,
        scale="authors",
        shared_views=shared,
    )
    if contender == "care_loss, three forwards":
        return lambda z1, z2, e: care(z1, z2, z1, e)
    return care


def step(
    contender: str, batch: int, *, model: str = "resnet18", **tensor: Any
) -> Callable[[], None]:
    """Return a step of training."""
    from torchvision import models

    encoder = getattr(models, model)(num_classes=512)
    head = nn.Sequential(nn.ReLU(), nn.Linear(512, DIM))
    network = nn.Sequential(encoder, head).to(**tensor)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    views = torch.randn(CONTENDERS[contender], batch, 3, 32, 32, **tensor)
    loss = losses(contender)

    def train() -> None:
        optimizer.zero_grad()
        loss(*(network(view) for view in views)).backward()
        optimizer.step()

    return train


def measure(options: argparse.Namespace, batch: int, **tensor: Any) -> Iterator[Row]:
    names = ["lightly", "care_loss, two forwards"] if options.quick else list(CONTENDERS)
    seconds = take_turns({name: step(name, batch, **tensor) for name in names}, options.rounds)
    quick = ["--quick"] if options.quick else []
    for name, times in seconds.items():
        memory = printed_by_another_process(__file__, options, "--one", name, *quick)
        row: Row = {"contender": name, "images/s": f"{batch / statistics.median(times):.1f}"}
        yield row | {"MB": f"{float(memory):.0f}"} | ratio_columns(times, seconds["lightly"])


def main() -> None:
    accepted = parser(__doc__, rounds=5)
    accepted.add_argument("--one", help=argparse.SUPPRESS)
    options = accepted.parse_args()
    tensor = start(options)
    import_torchvision()
    batch = 32 if options.quick else BATCH
    if options.one:
        train = step(options.one, batch, **tensor)
        train()
        print(megabytes(train, options.device))
        return
    print(f"{'':<28}images/s        MB  ratio to lightly's")
    line = "{contender:<28}{images/s:>8}  {MB:>8}  " + RATIO
    report(options, measure(options, batch, **tensor), line)


if __name__ == "__main__":
    main()
