"""Gradient caching (Gao et al., 2021): a large batch with the memory of its micro-batches.

The encoder embeds the batch twice: first without a graph, for the gradient of the loss with respect
to all embeddings, and then one micro-batch at a time, each followed by its backward.

    python docs/examples/gradient_cache.py
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from care_loss import CAREloss
from care_loss.views import augment_chunks
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states


def cached_backward(
    encoder: nn.Module, views: Sequence[Tensor], loss: Callable[..., Tensor], rows: int
) -> Tensor:
    """Add the gradients of `loss(*map(encoder, views))` to the parameters, and return the loss.

    `rows` is the size of a micro-batch: as many rows of a view pass through the encoder at a time.
    The parameters of the loss, such as a learned temperature, get their gradients too.
    """
    parts = [part for view in views for part in view.split(rows)]
    embeddings, states = [], []
    with torch.no_grad():
        for part in parts:
            states.append((torch.get_rng_state(), *get_device_states(part)))
            embeddings.append(encoder(part))
    z = [x.requires_grad_() for x in torch.cat(embeddings).split([len(view) for view in views])]
    value = loss(*z)
    value.backward()
    gradients = [gradient for x in z for gradient in x.grad.split(rows)]
    # DDP averages all gradients once, in the backward of the last micro-batch.
    no_sync = getattr(encoder, "no_sync", nullcontext)
    with torch.random.fork_rng(states[0][1]):
        for i, (part, state, gradient) in enumerate(zip(parts, states, gradients, strict=True), 1):
            torch.set_rng_state(state[0])  # dropout leaves out the same numbers again
            set_device_states(*state[1:])
            with nullcontext() if i == len(parts) else no_sync():
                encoder(part).backward(gradient)
    return value.detach()


def turn(images: Tensor) -> Tensor:
    return images[:, torch.randperm(3)]  # one order of the channels for all images of a call


def main() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.LayerNorm(64))
    optimizer, criterion = torch.optim.AdamW(encoder.parameters()), CAREloss()

    def three_forwards(z1: Tensor, z2: Tensor, e: Tensor, *, chunks: int) -> Tensor:
        return criterion(z1, z2, z1, e, chunks=chunks)

    for images in torch.rand(5, 256, 3, 8, 8):
        x1, x2 = (images + 0.1 * torch.randn_like(images) for _ in range(2))
        turned, chunks = augment_chunks(x1, turn, chunks=8)
        optimizer.zero_grad()
        loss = partial(three_forwards, chunks=chunks)
        print(f"loss {cached_backward(encoder, (x1, x2, turned), loss, rows=32):.4f}")
        optimizer.step()


if __name__ == "__main__":
    main()
