"""Tensors on a device that is not the CPU, and a default device that is not that of the tensors.

In an ordinary run, a process of its own repeats these tests on a device that is made up of tensors
of the CPU (tests/pretend.py), since the device, once registered, is there for the whole process.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import CALLS, results

from care_loss import metrics
from care_loss.views import SharedAugmentCollate

STAY = {
    "ids": 2,
    "cross_fitted, ids": 2,
    "shared_views, ids": 1,
}  # arguments that may be on the CPU, by place


@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_the_cpu_and_on_the_device_of_the_tensors(name, device):
    call, *tensors = CALLS[name]
    found = results(call, [x.to(device) for x in tensors])
    for ours, expected in zip(found, results(call, tensors), strict=True):
        assert ours.device.type == device.type
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_does_not_matter(name, device):
    call, *tensors = CALLS[name]
    expected = results(call, tensors)
    # Tensors of the device meta have no values: whatever is made there by mistake fails.
    with torch.device("meta" if device.type == "cpu" else device):
        found = results(call, tensors)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name, found in CALLS.items() if len(found) > 2])
def test_rows_share_a_device_and_one_number_or_ids_may_be_on_the_cpu(name, device):
    call, *tensors = CALLS[name]
    other = torch.device("meta" if device.type == "cpu" else "cpu")
    for place in range(len(tensors)):
        given = [x.to(other if place == i else device) for i, x in enumerate(tensors)]
        free = [x for i, x in enumerate(given) if x.ndim == 0 or STAY.get(name) == i]
        rows = {x.device.type for x in given if not any(x is one for one in free)}
        if len(rows) == 1 and {x.device.type for x in free} <= rows | {"cpu"}:
            assert results(call, given)[0].device.type in rows
        else:
            with pytest.raises(ValueError, match=r"must (be on the device|have the same device)"):
                call(*given)


def test_the_report_and_the_collate_work_under_a_default_device(device):
    def flip(images):
        return images.flip(-1) if torch.rand((), device="cpu") < 0.5 else images

    images = torch.rand(24, 3, 4, 4)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    expected = metrics.equivariance_report(encoder, images, {"flip": flip}, samples=4)
    with torch.device("meta" if device.type == "cpu" else device):
        found = metrics.equivariance_report(encoder, images, {"flip": flip}, samples=4)
        views, _ = SharedAugmentCollate(torch.neg, chunks=2)([(x, 0) for x in images])
    assert str(found) == str(expected)
    assert views[0].device.type == "cpu"


@pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="starts the run on a device")
def test_a_device_that_is_not_the_cpu():
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no backends that are written in Python")
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "--device", "pretend", "-p", "no:cacheprovider"]
    command += [str(tests / "test_devices.py"), str(tests / "test_modules.py"), "-q"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
