"""Random draws that can be repeated: the states of the generators that transforms draw from."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

States = tuple[Tensor, Any, Any, Tensor | None]


def states(device: torch.device | None = None) -> States:
    """Return the states of the generators of torch, `random`, and NumPy if somebody imported it.

    Of an accelerator, its own generator too.
    """
    numpy = sys.modules.get("numpy")
    generator = _generator_of(device)
    accelerator = generator.get_rng_state(device) if generator else None
    return (
        torch.get_rng_state(),
        random.getstate(),
        numpy and numpy.random.get_state(),
        accelerator,
    )


def seed(value: int, device: torch.device | None = None) -> None:
    """Bring all these generators into the state of a seed below 2**32."""
    # Not torch.manual_seed: that would set the generators of every GPU too.
    torch.default_generator.manual_seed(value)
    random.seed(value)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(value)
    if generator := _generator_of(device):
        state = torch.Generator(device).manual_seed(value).get_state()
        generator.set_rng_state(state, device)


@contextmanager
def preserved(device: torch.device | None = None) -> Iterator[None]:
    """Leave the generators as they were before the block."""
    before = states(device)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        if before[2]:
            sys.modules["numpy"].random.set_state(before[2])
        if generator := _generator_of(device):
            generator.set_rng_state(before[3], device)


def same_states(a: States, b: States) -> bool:
    """Tell whether two states of the generators of the CPU are equal."""
    equal = torch.equal(a[0], b[0]) and a[1] == b[1]
    if a[2] and b[2]:  # a name, an array of integers, and numbers
        equal = equal and a[2][1].tobytes() == b[2][1].tobytes() and a[2][2:] == b[2][2:]
    return equal


def _generator_of(device: torch.device | None) -> Any:
    """Return the module of a device that has a random generator of its own, or None."""
    has_generator = device is not None and device.type in ("cuda", "mps", "xpu")
    return torch.get_device_module(device) if has_generator else None
