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

from care_loss import _report_checks, _rng, _view_checks

Transform = Callable[[Tensor], Tensor]
UNSHARED_DRAWS = 8  # of the unshared control; each is an average over draws of all images already
MAX_PROBED_IMAGES = 8  # on which a transformation is tried before any work


class Samples(NamedTuple):
    """Embeddings under one transformation, by output of the encoder, and what its draws did."""

    clean: dict[str, Tensor]  # (n, D)
    shared: dict[str, Tensor]  # (draws, n, D); one draw if all are equal
    unshared: dict[str, Tensor]  # (draws, n, D), one draw for each image; empty if all are equal
    twice: dict[str, Tensor]  # (pairs of draws, n, D), f(b(a(x))); empty if it changes the size
    acted: Tensor  # whether a draw changed any image, (draws,)
    differ: Tensor  # whether the two draws of a pair made different images, (pairs of draws,)


def sample(
    encoder: Callable[[Tensor], Any],
    images: Tensor | Iterable[Any],
    transformations: Mapping[str, Transform],
    *,
    samples: int,
    batch_size: int,
    device: torch.device | str | None,
    seed: int,
    progress: bool | None,
    unshared_draws: int = UNSHARED_DRAWS,
    compose: bool = True,
) -> dict[str, Samples]:
    """Embed all images clean, and under each transformation; draws depend on its name and `seed`.

    A draw is the same for every batch, and whatever the batch size and the other transformations.
    Without `compose` no image is transformed twice.
    """
    with _rng.preserved(), _evaluating(encoder), torch.no_grad():
        _rng.seed(seed % 2**32)  # the order of a loader that shuffles
        count, batches = _batches(images, batch_size)
        first = _report_checks.as_images(next(batches, None))
        device = torch.device(device or _device(encoder) or first.device)
        drawn = [
            _Drawn(
                name,
                transform,
                first[:MAX_PROBED_IMAGES].to(device),
                seed,
                samples,
                unshared_draws,
                compose,
            )
            for name, transform in transformations.items()
        ]
        embed = _Embedder(encoder)
        embed.check(first.to(device))
        done = 0
        with _bar(progress, count, 1 + sum(one.forwards for one in drawn)) as advance:
            for batch in chain([first], batches):
                x = _report_checks.as_images_of_batch(batch).to(device)
                embed(None, "clean", 0, x)
                advance()
                for one in drawn:
                    for kind, k, view in one.views(x, done):
                        embed(one.name, kind, k, view)
                        advance()
                done += len(x)
    _report_checks.check_enough_images(done)
    return {one.name: one.collect(embed) for one in drawn}


class _Embedder:
    """The encoder, and what it has returned so far."""

    def __init__(self, encoder: Callable[[Tensor], Any]) -> None:
        self.encoder = encoder
        self.store: dict[tuple[str | None, str, int], list[dict[str, Tensor]]] = {}

    def outputs(self, name: str | None, view: Tensor) -> dict[str, Tensor]:
        """Return the embeddings of a view by output, on the CPU."""
        # A clone, for encoders that work in place.
        outputs = _report_checks.as_outputs(self.encoder(view.clone()), len(view), name)
        # Half types become float32 without loss; on a CPU there is float64 to measure in.
        return {k: (z.float() if z.itemsize < 4 else z).cpu() for k, z in outputs.items()}

    def check(self, images: Tensor) -> None:
        """Check that an embedding depends on its image alone."""
        if len(images) > 1:
            whole = self.outputs(None, images)
            halves = [self.outputs(None, part) for part in images.chunk(2)]
            for output, z in whole.items():
                _report_checks.check_batch_independent(
                    z, torch.cat([half[output] for half in halves])
                )

    def __call__(self, name: str | None, kind: str, k: int, view: Tensor) -> None:
        self.store.setdefault((name, kind, k), []).append(self.outputs(name, view))

    def stacked(self, name: str | None, kind: str) -> dict[str, Tensor]:
        """Join the batches of each draw, and the draws, `(draws, n, D)`."""
        keys = sorted(k for k in self.store if k[:2] == (name, kind))
        outputs = self.store[keys[0]][0] if keys else ()
        return {
            output: torch.stack([torch.cat([b[output] for b in self.store[key]]) for key in keys])
            for output in outputs
        }


class _Drawn:
    """A transformation with the seeds of its draws, and what these have done to the images."""

    def __init__(
        self,
        name: str,
        transform: Transform,
        probe: Tensor,
        seed: int,
        samples: int,
        unshared_draws: int,
        compose: bool,
    ) -> None:
        self.name, self.transform, self.seed = name, transform, seed
        self.seeds = [_seed(f"{seed} {name} {k}") for k in range(samples)]
        self.unshared_draws = unshared_draws
        self._try(probe)
        self.composes &= compose
        self.acted = [False] * len(self.seeds)
        self.new = [False] * len(self.seeds)  # whether a draw was unlike the first
        self.differ = [False] * max(1, len(self.seeds) // 2)
        self.forwards = len(self.seeds) + self.unshared_draws + len(self.differ) * self.composes

    def _try(self, probe: Tensor) -> None:
        """Try the transformation on copies of a few images, before any work."""
        copies = probe.repeat_interleave(4, 0)
        view = self._replay(copies, self.seeds[0])
        _report_checks.check_finite(self.name, view)
        groups = view.unflatten(0, (len(probe), 4))
        within = _view_checks.views_differ(groups, groups[:, :1].expand_as(groups))
        again = _view_checks.views_differ(view, self._replay(copies, self.seeds[0]))
        single = self._replay(probe[:1], self.seeds[0])
        _report_checks.check_repeatable(
            self.name, within, again, _view_checks.views_differ(view[:1], single)
        )
        self.composes = view.shape[1:] == probe.shape[1:]
        with _rng.preserved(probe.device), _report_checks.naming(self.name):
            before = _rng.states()
            self.transform(probe.clone())
            drew = not _rng.same_states(before, _rng.states())
        views = [self._replay(probe, value) for value in self.seeds]
        if not drew and all(torch.equal(other, views[0]) for other in views[1:]):
            self.seeds, self.unshared_draws = self.seeds[:1], 0

    def views(self, x: Tensor, done: int) -> Iterator[tuple[str, int, Tensor]]:
        """Yield the views of a batch that follows `done` images; some draws at once are held."""
        first = last = x
        for k, value in enumerate(self.seeds):
            view = self._replay(x, value)
            first = first if k else view
            self.acted[k] |= not torch.equal(view, x)
            self.new[k] |= not torch.equal(view, first)
            if k % 2:
                self.differ[k // 2] |= not torch.equal(view, last)
            last = view
            yield "shared", k, view
            second = min(k + 1, len(self.seeds) - 1)
            if self.composes and k % 2 == 0 and k // 2 < len(self.differ):
                yield "twice", k, self._replay(view, self.seeds[second])
        for k in range(self.unshared_draws):
            yield "unshared", k, self._unshared(x, k, done)

    def collect(self, embed: _Embedder) -> Samples:
        """Return the embeddings of the draws."""
        clean = {output: z[0] for output, z in embed.stacked(None, "clean").items()}
        shared, unshared, twice = (
            embed.stacked(self.name, k) for k in ("shared", "unshared", "twice")
        )
        # With the embeddings, whatever the default device is.
        acted, differ = (torch.tensor(x, device="cpu") for x in (self.acted, self.differ))
        if any(self.new):
            return Samples(clean, shared, unshared, twice, acted, differ)
        # All draws are equal on all images: one of them has everything, and none has a control.
        shared, twice = ({k: z[:1] for k, z in part.items()} for part in (shared, twice))
        return Samples(clean, shared, {}, twice, acted[:1], differ[:1])

    def _replay(self, images: Tensor, seed: int) -> Tensor:
        """Transform images with the draw of a seed, and leave the generators as they were."""
        with _rng.preserved(images.device), _report_checks.naming(self.name):
            _rng.seed(seed, images.device)
            # A clone, for transforms that work in place, or return their input.
            return _report_checks.as_transformed(self.name, self.transform(images.clone()), images)

    def _unshared(self, images: Tensor, k: int, done: int) -> Tensor:
        """Transform each image with a draw of its own, which depends on its number in the pass."""
        views = []
        with _rng.preserved(images.device), _report_checks.naming(self.name):
            for number, image in enumerate(images.clone().split(1), done):
                _rng.seed(_seed(f"{self.seed} {self.name} own {k} {number}"), images.device)
                views.append(_report_checks.as_transformed(self.name, self.transform(image), image))
            return torch.cat(views)


def _seed(stream: str) -> int:
    return random.Random(stream).getrandbits(32)


def _batches(images: Any, batch_size: int) -> tuple[int | None, Iterator[Any]]:
    """Return the number of batches of images, where it is known, and the batches."""
    if isinstance(images, Tensor):
        return -(-len(images) // batch_size), iter(images.split(batch_size))
    _report_checks.check_loader(images)
    try:
        count = len(images)
    except TypeError:  # of a dataset without a length
        count = None
    return count, iter(images)


def _module(encoder: Any) -> nn.Module | None:
    """Return the module behind an encoder: itself, or the one that a method or partial is of."""
    while isinstance(encoder, functools.partial):
        given = (*encoder.args, *encoder.keywords.values())
        encoder = next((x for x in given if isinstance(x, nn.Module)), encoder.func)
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
    _report_checks.check_progress(progress, installed)
    seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    if progress is False or (progress is None and not (installed and seen)):
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=batches and batches * forwards, desc="embedding", unit="batch") as bar:
        yield bar.update
