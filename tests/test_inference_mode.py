"""Tensors that were made under inference mode, such as those of a teacher or a key encoder."""

import pytest
import torch
from calls import CALLS, results


def inference_tensor(x):
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("name", [name for name, found in CALLS.items() if len(found) > 2])
def test_a_tensor_made_under_inference_mode_is_like_its_clone(name, device):
    call, *tensors = CALLS[name]
    for dtype in (torch.float32, torch.float64):
        given = [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in tensors]
        for place in range(len(given)):
            found, expected = (
                results(call, [make(x) if i == place else x for i, x in enumerate(given)], place)
                for make in (inference_tensor, torch.clone)
            )
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_results_under_inference_mode_are_those_without(name, device):
    call, *tensors = CALLS[name]
    tensors = [x.to(device) for x in tensors]
    expected = call(*tensors)
    with torch.inference_mode():
        found = call(*tensors)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
