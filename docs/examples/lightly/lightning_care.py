"""Contrastive learning with lightly and Lightning; --devices 2 trains in two processes."""

import argparse

import pytorch_lightning as pl
import torch
import torchvision
from care_loss import CAREloss
from care_loss.views import SharedAugmentCollate
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform


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
        x0, x1, chunks = batch[0]
        parts = self.criterion.forward_components(self(x0), self(x1), chunks=chunks)
        self.log_dict(parts._asdict(), prog_bar=True, sync_dist=True)
        return parts.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    # Random images, to try the loop: in their place, use torchvision.datasets.CIFAR10, for example.
    dataset = torchvision.datasets.FakeData(128, (3, 32, 32))
    dataloader = torch.utils.data.DataLoader(
        dataset,
        batch_size=32,
        shuffle=True,
        drop_last=True,
        collate_fn=SharedAugmentCollate(transform.transforms, chunks=8),
    )
    devices = parser.parse_args().devices
    trainer = pl.Trainer(max_epochs=1, devices=devices, enable_checkpointing=False)
    trainer.fit(SimCLR(), dataloader)


if __name__ == "__main__":
    main()
