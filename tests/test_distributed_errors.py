"""Several processes: a mistake on one is an error on all, and none waits for one that failed."""

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import DIM, METHOD, ROWS

from care_loss import CAREloss, InfoNCELoss, RotationContrastLoss, distributed
from care_loss.distributed import all_gather

pytestmark = pytest.mark.xdist_group("processes")  # which start once


def mistakes(rank, world):
    mine = torch.randn(4, 5 + rank)
    sentence = r"rows of one shape and dtype on all processes, got 1-dimensional rows of 5 values"
    for call in (
        lambda: all_gather(mine),
        lambda: distributed.info_nce_loss(mine, mine),
        lambda: InfoNCELoss(gather_distributed=True)(mine, mine),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    other = torch.randn(4, 5).to(torch.float64 if rank else torch.float32)
    with pytest.raises(ValueError, match=r"torch.float32 on process 0 and .*torch.float64 on"):
        distributed.info_nce_loss(other, other)
    with pytest.raises(ValueError, match=r"got 2-dimensional rows of 6 .* and 1-dimensional rows"):
        all_gather(torch.zeros(4, 2, 3) if rank == 0 else torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"`x` must have shape \(N, ...\), got"):
        all_gather(torch.tensor(1.0))
    torch.testing.assert_close(all_gather(torch.ones(1)), torch.ones(world))  # nothing is stuck


def test_a_mistake_on_one_process_is_an_error_on_all(two):
    two.run(mistakes)


def only_on(place, rank, wrong, right):
    return wrong if rank == place else right


def refusals(rank, world):
    """What one process refuses must be an error on all, which names it and says the fault."""
    eight, last = torch.randn(4, 8, 6), world - 1
    narrow = eight[:2, :, :4]  # of as many dimensions as half of the rows
    care = CAREloss(gather_distributed=True, chunks=2)
    rotations = RotationContrastLoss(gather_distributed=True)
    two_views = CAREloss(gather_distributed=True, shared_views=True)

    def one(wrong, right):
        return only_on(last, rank, wrong, right)

    ids = torch.arange(8)
    calls = {
        "one row": (lambda: care(*one(eight[:, :1], eight)), "with N >= 2"),
        "no rows": (lambda: care(*one(eight[:, :0], eight)), "got (0, 6)"),
        "no rows, InfoNCE": (
            lambda: InfoNCELoss(gather_distributed=True)(*one(eight[:2, :0], eight[:2])),
            "got (0, 6)",
        ),
        "other lengths": (
            lambda: distributed.info_nce_loss(eight[0], one(eight[1, :5], eight[1])),
            "must have the same shape",
        ),
        "other lengths of the shared views": (
            lambda: care(eight[0], eight[1], eight[2], one(eight[3, :5], eight[3])),
            "`equivariant1` and `equivariant2` must have the same shape",
        ),
        "ids without a pair": (
            lambda: two_views(eight[0], eight[1], chunks=one(ids, ids // 2)),
            "`chunks`",
        ),
        "few rows to fit": (
            lambda: rotations(*narrow, chunks=one(3, 1)),
            "`chunks` must form chunks of at least four rows, got one of 2 among 8 rows",
        ),
        "other lengths to fit": (
            lambda: rotations(narrow[0], one(narrow[1, :5], narrow[1]), chunks=1),
            "`z` and `z_turned` must have the same shape",
        ),
        "no chunks": (lambda: two_views(eight[0], eight[1], chunks=one(None, 2)), "`chunks`"),
        "views missing": (lambda: care(*one(eight[:2], eight)), "shared_views=True"),
        "a list": (lambda: all_gather(one([1.0], torch.ones(2))), "got list"),
        "a temperature": (
            lambda: distributed.info_nce_loss(*eight[:2], temperature=one(torch.tensor(-1.0), 0.5)),
            "`temperature` must be > 0, got -1",
        ),
        "a word": (
            lambda: distributed.info_nce_loss(*eight[:2], reduction=one("sum", "mean")),
            "`reduction` must be",
        ),
    }
    for name, (call, sentence) in calls.items():
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert str(error.value).startswith(f"on process {last}: "), name
        assert sentence in str(error.value), name
    found = distributed.info_nce_loss(*eight[:2])  # nothing is stuck
    assert found.isfinite()


def test_what_one_process_refuses_is_an_error_on_all(two):
    two.run(refusals)  # a process that waits ends in another error, after the timeout


def other_inputs(rank, world):
    z1, z2 = torch.randn(2, ROWS, DIM)
    for t in (0.5 + 0.001 * rank, torch.tensor(0.0695 - 0.001 * rank, requires_grad=True)):
        with pytest.raises(ValueError, match=r"same on all processes, got 0.*on process 0 and 0"):
            distributed.info_nce_loss(z1, z2, temperature=t)
    with pytest.raises(NotImplementedError, match=r"outside of torch\.func"):
        torch.func.grad(lambda z: distributed.info_nce_loss(z, z2))(z1)
    with pytest.raises(NotImplementedError, match=r"outside of torch\.func"):
        torch.func.grad(lambda z: all_gather(z).sum())(z1)
    pairs = torch.randn(3, 2, dtype=torch.complex64)
    gathered = all_gather(pairs.conj())
    assert torch.equal(gathered, torch.cat([pairs.conj()] * world).resolve_conj())
    negative = pairs.conj().imag  # a view whose sign is kept beside it
    assert negative.is_neg()
    assert torch.equal(all_gather(negative), torch.cat([negative] * world))
    with torch.inference_mode():
        key = z2.clone()
    z1.requires_grad_()
    loss, expected = (distributed.info_nce_loss(z1, z) for z in (key, key.clone()))
    loss, expected = (torch.autograd.grad(x, z1)[0] for x in (loss, expected))
    assert torch.equal(loss, expected)


def test_temperatures_transforms_views_and_tensors_of_inference_mode(two):
    two.run(other_inputs)


def missing(rank, rendezvous, how):
    options = {"rank": rank, "world_size": 2, "init_method": f"file://{rendezvous}"}
    dist.init_process_group("gloo", **options)
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=6))
    dist.barrier()  # the short timeout is not for the start
    z1, z2 = torch.randn(2, 4, 5)
    distributed.info_nce_loss(z1, z2, process_group=group)
    dist.barrier()
    if rank == 1:
        if how == "sleeps":
            time.sleep(16)
        return
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        distributed.info_nce_loss(z1, z2, process_group=group)
    assert time.monotonic() - begin < 15
    os._exit(0)  # leaving a group whose other process is gone, gloo may abort in its destructor


@pytest.mark.parametrize("how", ["stops", "sleeps"])
def test_a_process_that_is_missing_ends_in_an_error_within_the_timeout(how, tmp_path):
    mp.start_processes(missing, (tmp_path / "group", how), nprocs=2, start_method=METHOD)
