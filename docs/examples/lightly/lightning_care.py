"""CARE with lightly and Lightning; --devices 2 trains in two processes."""

import argparse

import pytorch_lightning as pl
import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader

from care_loss import CAREloss
from care_loss.views import SharedAugmentCollate


class SimCLR(pl.LightningModule):
    """The encoder, its projection head, and its loss."""

    def __init__(self):
        super().__init__()
        self.backbone = torchvision.models.resnet18(num_classes=512)
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = CAREloss(temperature=0.5, shared_views=True, gather_distributed=True)

    def forward(self, x):
        return self.projection_head(self.backbone(x))

    def training_step(self, batch, batch_index):
        (x0, x1, chunks), _, _ = batch
        parts = self.criterion.forward_components(self(x0), self(x1), chunks=chunks)
        self.log_dict(parts._asdict(), prog_bar=True, sync_dist=True)
        return parts.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    devices = parser.parse_args().devices
    images = torchvision.datasets.FakeData(512, (3, 32, 32))  # or CIFAR10("data", download=True)
    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    dataset = LightlyDataset.from_torch_dataset(images)
    collate = SharedAugmentCollate(transform.transforms[0], chunks=8)
    loader = DataLoader(dataset, 64, shuffle=True, drop_last=True, collate_fn=collate)
    trainer = pl.Trainer(max_epochs=1, devices=devices, enable_checkpointing=False)
    trainer.fit(SimCLR(), loader)


if __name__ == "__main__":
    main()
