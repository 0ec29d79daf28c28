"""Embeddings of images under draws of named transformations, from one pass through the images."""

import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from care_loss import _checks, _draws

Transform = Callable[[Tensor], Tensor]
OWN_DRAWS = 8  # of the unshared control; each is an average over draws of all images already
PROBED = 8  # images on which a transformation is tried before any work


class Samples(NamedTuple):
    """Embeddings under one transformation, by output of the encoder."""

    clean: dict[str, Tensor]  # (n, D)
    shared: dict[str, Tensor]  # (draws, n, D); one draw if the transformation is fixed
    own: dict[str, Tensor]  # (own draws, n, D), one draw for each image; empty if fixed
    twice: dict[str, Tensor]  # (pairs of draws, n, D), f(b(a(x))); empty if it changes the size


def sample(
    encoder: Callable[[Tensor], Any],
    images: Tensor | Iterable[Any],
    transformations: Mapping[str, Transform],
    *,
    samples: int,
    batch_size: int,
    device: torch.device | None,
    seed: int,
    progress: bool | None,
) -> dict[str, Samples]:
    """Embed all images clean, and under each transformation; draws depend on its name and `seed`.

    A draw is the same for every batch, and whatever the batch size and the other transformations.
    """
    batches, count = _batches(images, batch_size)
    try:
        first = _checks.batch(next(batches))
    except StopIteration:
        first = torch.empty(0, 1)
    _checks.images_to_report(first)
    device = device or _device(encoder) or first.device
    probe = first[:PROBED].to(device)
    plans = {
        name: _plan(name, transform, probe, _seeds(seed, name, samples))
        for name, transform in transformations.items()
    }
    forwards = 1 + sum(len(plan.seeds) + len(plan.pairs) + plan.own for plan in plans.values())
    store: dict[tuple[Any, ...], list[dict[str, Tensor]]] = {}
    done = 0
    with _evaluating(encoder), torch.no_grad(), _bar(progress, count, forwards) as advance:
        for batch in chain([first], batches):
            x = _checks.batch(batch).to(device)
            views = chain([(("clean",), x)], _views(x, transformations, plans, seed, done))
            for key, view in views:
                output = _checks.encoder_outputs(encoder(view), len(x), key)
                # Half types become float32 without loss; on a CPU there is float64 to measure in.
                kept = {k: z.float() if z.itemsize < 4 else z for k, z in output.items()}
                store.setdefault(key, []).append({k: z.cpu() for k, z in kept.items()})
                advance()
            done += len(x)
    _checks.enough_images(done)
    return {name: _collect(store, name) for name in plans}


class _Plan(NamedTuple):
    """How a transformation is drawn: the seeds of its draws, pairs of them that are composed."""

    seeds: list[int]
    pairs: list[tuple[int, int]]
    own: int


def _plan(name: str, transform: Transform, probe: Tensor, seeds: list[int]) -> _Plan:
    """Try a transformation on a few images, and tell whether it is fixed and composes."""
    copies = probe.repeat_interleave(4, 0)
    try:
        view = _replay(name, transform, copies, seeds[0])
        again = _replay(name, transform, copies, seeds[0])
        single = _replay(name, transform, probe[:1], seeds[0])
    except Exception as error:
        _checks.failed(name, error)
        raise
    _checks.finite_images(name, view)
    groups = view.unflatten(0, (len(probe), 4))
    within = _draws.differ(groups, groups[:, :1].expand_as(groups))
    _checks.repeatable(name, within, _draws.differ(view, again), _draws.differ(view[:1], single))
    views = [_replay(name, transform, probe, value) for value in seeds]
    if all(torch.equal(other, views[0]) for other in views[1:]):
        seeds = seeds[:1]
    numbers = list(range(len(seeds)))
    pairs = list(zip(numbers[::2], numbers[1::2], strict=False)) or [(0, 0)]
    same_size = views[0].shape == probe.shape
    return _Plan(seeds, pairs if same_size else [], OWN_DRAWS if len(seeds) > 1 else 0)


def _views(
    x: Tensor,
    transformations: Mapping[str, Transform],
    plans: dict[str, _Plan],
    seed: int,
    done: int,
) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield the views of a batch, which follows `done` images; two draws at once are held."""
    for name, transform in transformations.items():
        plan = plans[name]
        second = dict(plan.pairs)
        for k, value in enumerate(plan.seeds):
            view = _replay(name, transform, x, value)
            yield (name, "shared", k), view
            if k in second:
                view = _replay(name, transform, view, plan.seeds[second[k]])
                yield (name, "twice", k), view
        for k in range(plan.own):
            yield (name, "own", k), _own(name, transform, x, f"{seed} {name} own {k}", done)


def _replay(name: str, transform: Transform, images: Tensor, seed: int) -> Tensor:
    """Transform images with the draw of a seed, and leave the generators as they were."""
    with _draws.kept(images.device):
        _draws.seed(seed, images.device)
        # A clone, for transforms that work in place, or return their input.
        return _checks.transformed_images(name, transform(images.clone()), len(images))


def _own(name: str, transform: Transform, images: Tensor, stream: str, done: int) -> Tensor:
    """Transform each image with a draw of its own, which depends on its number in the pass."""
    views = []
    with _draws.kept(images.device):
        for number, image in enumerate(images.clone().split(1), done):
            _draws.seed(random.Random(f"{stream} {number}").getrandbits(32), images.device)
            views.append(_checks.transformed_images(name, transform(image), 1))
    return torch.cat(views)


def _seeds(seed: int, name: str, samples: int) -> list[int]:
    return [random.Random(f"{seed} {name} {k}").getrandbits(32) for k in range(samples)]


def _collect(store: dict[tuple[Any, ...], list[dict[str, Tensor]]], name: str) -> Samples:
    """Join the batches of each draw, and the draws of each kind."""
    joined = {
        key: {output: torch.cat([part[output] for part in parts]) for output in parts[0]}
        for key, parts in store.items()
        if key[0] in ("clean", name)
    }
    clean = joined[("clean",)]
    kinds = []
    for kind in ("shared", "own", "twice"):
        draws = [joined[key] for key in sorted(k for k in joined if k[1:2] == (kind,))]
        stacked = {output: torch.stack([d[output] for d in draws]) for output in clean if draws}
        kinds.append(stacked)
    return Samples(clean, *kinds)


def _batches(images: Any, batch_size: int) -> tuple[Iterator[Any], int | None]:
    """Return batches of images and, where it is known, their number."""
    if isinstance(images, Tensor):
        return iter(images.split(batch_size)), -(-len(images) // batch_size)
    _checks.loader(images, isinstance(images, DataLoader))
    try:
        return iter(images), len(images)
    except TypeError:  # of a dataset without a length
        return iter(images), None


def _module(encoder: Any) -> nn.Module | None:
    """Return the module behind an encoder: itself, or the one that a bound method belongs to."""
    while isinstance(encoder, functools.partial):
        encoder = encoder.func
    encoder = getattr(encoder, "__self__", encoder)
    return encoder if isinstance(encoder, nn.Module) else None


def _device(encoder: Any) -> torch.device | None:
    module = _module(encoder)
    return next((p.device for p in module.parameters()), None) if module else None


@contextmanager
def _evaluating(encoder: Any) -> Iterator[None]:
    """Bring a module into eval mode, and each of its parts back into its own mode."""
    module = _module(encoder)
    modes = [(part, part.training) for part in module.modules()] if module else []
    if module:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _bar(progress: bool | None, batches: int | None, forwards: int) -> Iterator[Callable[[], Any]]:
    """Show a progress bar where someone sees it, and yield the function that advances it."""
    installed = find_spec("tqdm") is not None
    _checks.can_show_progress(progress, installed)
    seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    if progress is False or (progress is None and not (installed and seen)):
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=batches and batches * forwards, desc="embedding", unit="batch") as bar:
        yield bar.update
