"""Train on patches of photographs in several processes, with DistributedDataParallel.

    torchrun --nproc-per-node 2 docs/examples/photos_ddp.py

This is the arm "CARE, three forwards" of photos.py. The batch of 256 patches and its 8 chunks are
divided among the processes. InfoNCE contrasts with the patches of all of them, and the equivariance
loss needs only those of one, because a chunk lies on one process.

With --same-views, all processes draw the views of the whole batch from one seed and take their own
part, and the network has no batch norm, whose statistics would depend on the part. The losses are
then those of one process (--nproc-per-node 1), up to rounding.
"""

import argparse
import csv
from pathlib import Path

import torch
import torch.distributed as dist
from care_loss import CAREloss
from care_loss.distributed import assert_seeds_differ
from care_loss.views import augment_chunks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import photos


def without_batch_norm(network: nn.Module) -> nn.Module:
    """Normalise each image by itself."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return network


def make_views(images: Tensor, chunks: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return two ordinary views, the first with its hues turned, and the number of chunks."""
    ordinary = photos.crop_and_flip()
    x1, x2 = ordinary(images), ordinary(images)
    return x1, x2, *augment_chunks(x1, photos.one_turn, chunks=chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--same-views", action="store_true", help="of one seed on all processes")
    parser.add_argument("--output", type=Path, default=Path("build/photos_ddp"))
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if photos.CHUNKS % world:
        parser.error(f"the number of processes must divide {photos.CHUNKS} chunks, got {world}")
    training, _ = photos.load_patches()
    torch.manual_seed(args.seed)
    network = photos.network()
    order = [torch.randperm(len(training))[: photos.BATCH] for _ in range(args.steps)]
    if args.same_views:
        network = without_batch_norm(network)
    else:
        # Otherwise all processes would draw the same augmentations.
        torch.manual_seed(args.seed + rank)
        assert_seeds_differ()
    model = DistributedDataParallel(network)
    criterion = CAREloss(equivariance_weight=10.0, gather_distributed=True)
    optimizer = torch.optim.AdamW(model.parameters())

    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / f"{world}-processes-rank{rank}.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", "loss", "InfoNCE", "equivariance"])
        for step, rows in enumerate(order):
            if args.same_views:
                *views, _ = make_views(training[rows], photos.CHUNKS)
                views = [view.chunk(world)[rank] for view in views]
                chunks = photos.CHUNKS // world
            else:
                *views, chunks = make_views(
                    training[rows.chunk(world)[rank]], photos.CHUNKS // world
                )
            # One forward: DDP may overwrite the buffers of batch norm before each.
            z1, z2, e = model(torch.cat(views)).chunk(3)
            loss, base, equivariance = criterion.forward_components(z1, z2, z1, e, chunks=chunks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = torch.stack((loss, equivariance)).detach()
            dist.all_reduce(mean)  # of the processes, each of which has chunks of its own
            loss, equivariance = (mean / world).tolist()
            table.writerow([step, f"{loss:.6f}", f"{base.item():.6f}", f"{equivariance:.6f}"])
            if rank == 0:
                print(f"step {step}: loss {loss:.4f}, InfoNCE {base.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
