"""Momentum contrast on photographs: which encoder shall embed the view whose hue is turned?

The data, the network and the measures are those of photos.py. All arms are trained as in MoCo: the
query encoder embeds the first ordinary view; the key encoder, a moving average of it, embeds the
second, and its last embeddings are the negatives. The equivariance loss compares the query
encoder's embeddings of the first view with those of the same images under one turn of the hue for
each chunk, which are embedded either by the query encoder too, so that the gradient passes through
both, or by the key encoder. In the placebo arms each image has its own turn.

    python docs/examples/moco.py --seed 0 1 2 --output build/moco
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from care_loss import CAREloss
from care_loss.functional import info_nce_loss
from care_loss.views import augment_chunks
from torch import Tensor, nn

import photos

TEMPERATURE, MOMENTUM, QUEUE = 0.2, 0.99, 2048


class MoCo:
    """An arm: it keeps the key encoder and the queue of negatives."""

    def __init__(
        self, encoder: nn.Module, turn: Callable[[Tensor], Tensor], *, weight: float, by_query: bool
    ) -> None:
        self.key_encoder = deepcopy(encoder).requires_grad_(False)
        self.queue = torch.randn(QUEUE, photos.DIM)
        self.criterion = CAREloss(equivariance_weight=weight, base_loss=self.base_loss)
        self.ordinary, self.turn, self.by_query = photos.crop_and_flip(), turn, by_query

    def base_loss(self, query: Tensor, key: Tensor) -> Tensor:
        loss = info_nce_loss(query, key, temperature=TEMPERATURE, negatives=self.queue)
        self.queue = torch.cat([key, self.queue])[:QUEUE]
        return loss

    def __call__(self, encoder: nn.Module, images: Tensor) -> photos.Parts:
        for key, query in zip(self.key_encoder.parameters(), encoder.parameters(), strict=True):
            key.lerp_(query.detach(), 1 - MOMENTUM)
        x1, x2 = self.ordinary(images), self.ordinary(images)
        turned, chunks = augment_chunks(x1, self.turn, chunks=photos.CHUNKS, check=False)
        query, key = encoder(x1), self.key_encoder(x2)
        e = encoder(turned) if self.by_query else self.key_encoder(turned)
        return self.criterion.forward_components(query, key, query, e, chunks=chunks)._asdict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps of an arm")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--weight", type=float, default=10.0, help="of the equivariance loss")
    parser.add_argument("--draws", type=int, default=96, help="turns of the hue in the report")
    parser.add_argument("--output", type=Path, default=Path("build/moco"))
    args = parser.parse_args()
    arms = {
        "MoCo": (photos.one_turn, 0.0, True),
        "CARE, query encoder": (photos.one_turn, args.weight, True),
        "placebo, query encoder": (photos.own_turns, args.weight, True),
        "CARE, key encoder": (photos.one_turn, args.weight, False),
        "placebo, key encoder": (photos.own_turns, args.weight, False),
    }
    training, testing = photos.load_patches()
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seed:
        torch.manual_seed(seed)
        untrained = photos.network()
        order = [torch.randperm(len(training))[: photos.BATCH] for _ in range(args.steps)]
        results, seconds = {}, {}
        for name, (turn, weight, by_query) in arms.items():
            torch.manual_seed(seed)
            encoder = deepcopy(untrained)
            arm = MoCo(encoder, turn, weight=weight, by_query=by_query)
            batches = (
                photos.turn_hue(training[rows], photos.random_angles(photos.BATCH))
                for rows in order
            )
            seconds[name] = photos.train(name, arm, encoder, batches, args.steps)
            results[name] = photos.measure(encoder, training, testing, draws=args.draws)
        rows = photos.table(results, seconds)
        photos.print_table(rows, ["arm", *photos.GAP, "rotation share", "kNN", "effective rank"])
        photos.write(args.output / f"moco-seed{seed}.csv", rows)


if __name__ == "__main__":
    main()
