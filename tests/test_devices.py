"""Tensors on a device that is not the CPU, and a default device that is not that of the tensors.

In an ordinary run, a process of its own repeats these tests on a device that is made up of tensors
of the CPU (tests/pretend.py), since the device, once registered, is there for the whole process.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from care_loss import CAREloss, EquivarianceLoss, InfoNCELoss, functional, metrics, rotation, sphere
from care_loss.views import SharedAugmentCollate, augment_chunks, shared_views

Z1, Z2, Z3, Z4 = torch.randn(4, 12, 4, generator=torch.Generator().manual_seed(0))
UNIT = [sphere.normalize(z) for z in (Z1, Z2)]
T = torch.tensor(0.3)
IDS = torch.arange(12) % 5
WEIGHTS = torch.rand(12, generator=torch.Generator().manual_seed(0))
R = rotation.nearest_orthogonal(Z1[:4], special=True)
CIRCLE = torch.linalg.matrix_exp(
    (2 * torch.pi / 8 * torch.arange(8.0))[:, None, None] * torch.tensor([[0.0, 1], [-1, 0]])
)

# Each call with the tensors that it is given. A tensor of one number may stay on the CPU.
CALLS = {
    "info_nce": (functional.info_nce_loss, Z1, Z2),
    "info_nce, learned": (lambda x, y, t: functional.info_nce_loss(x, y, temperature=t), Z1, Z2, T),
    "info_nce, none": (lambda x, y: functional.info_nce_loss(x, y, reduction="none"), Z1, Z2),
    "queue": (lambda x, y, q: functional.info_nce_loss(x, y, negatives=q), Z1, Z2, Z3),
    "queue, learned": (
        lambda x, y, q, t: functional.info_nce_loss(x, y, temperature=t, negatives=q),
        *(Z1, Z2, Z3, T),
    ),
    "equivariance": (lambda x, y: functional.equivariance_loss(x, y, chunks=3), Z1, Z2),
    "ids": (lambda x, y, ids: functional.equivariance_loss(x, y, chunks=ids), Z1, Z2, IDS),
    "uniformity": (functional.uniformity_loss, Z1),
    "alignment": (functional.alignment_loss, Z1, Z2),
    "CAREloss": (CAREloss(chunks=3), Z1, Z2, Z3, Z4),
    "InfoNCELoss": (InfoNCELoss(), Z1, Z2),
    "EquivarianceLoss": (EquivarianceLoss(3), Z1, Z2),
    "fit_rotation": (rotation.fit_rotation, Z1, Z2),
    "fit_rotation, few rows": (rotation.fit_rotation, Z1[:2], Z2[:2]),
    "fit_rotation, weights": (
        lambda x, y, w: rotation.fit_rotation(x, y, weights=w, special=True),
        *(Z1, Z2, WEIGHTS),
    ),
    "nearest_orthogonal": (rotation.nearest_orthogonal, Z1[:4]),
    "rotation_angles": (rotation.rotation_angles, R),
    "rotation_distance": (rotation.rotation_distance, R, R.mT),
    "normalize": (sphere.normalize, Z1),
    "geodesic_distance": (sphere.geodesic_distance, *UNIT),
    "slerp": (sphere.slerp, *UNIT, T),
    "slerp, several": (sphere.slerp, *UNIT, WEIGHTS),
    "expmap": (sphere.expmap, UNIT[0], Z2),
    "logmap": (sphere.logmap, *UNIT),
    "tangent_projection": (sphere.tangent_projection, UNIT[0], Z2),
    "parallel_transport": (sphere.parallel_transport, *UNIT, Z3),
    "frechet_mean": (lambda x, w: sphere.frechet_mean(x, weights=w), Z1, WEIGHTS),
    "frequencies": (
        lambda r, t: metrics.frequencies(r, t),
        *(CIRCLE, 2 * torch.pi / 8 * torch.arange(8)),
    ),
    "shared_views": (lambda x: tuple(shared_views(x, torch.neg, chunks=3)[:2]), Z1),
    "shared_views, ids": (lambda x, ids: tuple(shared_views(x, torch.neg, chunks=ids)), Z1, IDS),
    "augment_chunks": (lambda x: augment_chunks(x, torch.neg, chunks=3).view, Z1),
    "composition_error": (metrics.composition_error, Z1, Z2, Z3, Z4),
    "cosine_spread": (metrics.cosine_spread, Z1[:, :2], Z2[:, :2]),
    "effective_rank": (metrics.effective_rank, Z1),
    "equivariance_error": (metrics.equivariance_error, Z1, Z2),
    "invariance_error": (metrics.invariance_error, Z1, Z2),
    "mean_norm": (metrics.mean_norm, Z1),
    "relative_equivariance": (metrics.relative_equivariance, Z1, Z2),
    "rotation_share": (metrics.rotation_share, Z1, Z2),
    "transformed_retrieval": (metrics.transformed_retrieval, Z1, Z2),
    "wahba_error": (metrics.wahba_error, Z1, Z2),
}
STAY = {"ids": 2, "shared_views, ids": 1}  # arguments that may be on the CPU, by place


def results(call, tensors):
    """All tensors that a call returns, and the gradients of those that have any."""
    tensors = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]
    found = call(*tensors)
    found = [found] if isinstance(found, torch.Tensor) else list(found)
    total = sum(x.sum() for x in found if x.requires_grad)
    leaves = [x for x in tensors if x.requires_grad]
    if not isinstance(total, int):
        found += [x for x in torch.autograd.grad(total, leaves, allow_unused=True) if x is not None]
    return found


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
    pytest.importorskip("torch", minversion="2.9")
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "--device", "pretend", "-p", "no:cacheprovider"]
    command += [str(tests / "test_devices.py"), str(tests / "test_modules.py"), "-q"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
