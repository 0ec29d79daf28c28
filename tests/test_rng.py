"""The states of the random generators: read, set, compared and brought back."""

import random
import sys

import numpy as np
import pytest
import torch

from care_loss import _rng

DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "random": random.random,
    "numpy": np.random.random_sample,
    "numpy, one of a pair": np.random.standard_normal,
}


@pytest.fixture(autouse=True)
def generators_as_before():
    with _rng.preserved():
        _rng.seed(0)
        yield


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_changes_the_states_and_a_seed_repeats_it(draw):
    before, first = _rng.states(), draw()
    after = _rng.states()
    assert not _rng.same_states(before, after)
    assert not _rng.same_states(after, before)
    _rng.seed(0)
    assert _rng.same_states(before, _rng.states())
    assert draw() == first
    assert _rng.same_states(after, _rng.states())
    second = draw()
    _rng.seed(1)
    assert len({first, second, draw()}) == 3


def test_what_is_kept_of_a_pair_belongs_to_the_state():
    DRAWS["numpy, one of a pair"]()
    with_one_left = _rng.states()
    name, keys, place, _, left = with_one_left[2]
    for other in (
        (name, keys, place, 0, 0.0),
        (name, keys, place, 1, left + 1),
        (name, keys[::-1].copy(), place, 1, left),
    ):
        assert not _rng.same_states(with_one_left, (*with_one_left[:2], other, None))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_a_block_draws_is_forgotten_even_if_it_fails(draw):
    before = _rng.states()

    def block():
        with _rng.preserved():
            draw()
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert _rng.same_states(before, _rng.states())


def test_numpy_may_be_absent(monkeypatch):
    with_numpy = _rng.states()
    monkeypatch.delitem(sys.modules, "numpy")
    before = _rng.states()
    assert before[2] is None
    with _rng.preserved():
        _rng.seed(5)
        assert not _rng.same_states(before, _rng.states())
    for one, other in ((before, _rng.states()), (before, with_numpy), (with_numpy, before)):
        assert _rng.same_states(one, other)


def test_an_accelerator_has_its_own_generator(monkeypatch):
    class Accelerator:
        def __init__(self):
            self.state = torch.Generator().manual_seed(7).get_state()

        def get_rng_state(self, device):
            assert device == "the device"
            return self.state.clone()

        def set_rng_state(self, state, device):
            assert device == "the device"
            self.state = state

    accelerator = Accelerator()
    monkeypatch.setattr(_rng, "_generator_of", lambda device: device and accelerator)
    assert _rng.states()[3] is None
    before = accelerator.state
    with _rng.preserved("the device"):
        assert torch.equal(_rng.states("the device")[3], before)
        accelerator.state = before.flip(0)
    assert torch.equal(accelerator.state, before)
