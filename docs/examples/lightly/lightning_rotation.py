"""Contrastive learning with lightly and Lightning; --devices 2 trains in two processes."""

import argparse

import pytorch_lightning as pl
import torch
import torchvision
from care_loss import RotationContrastLoss
from care_loss.views import augment_chunks
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform


class SimCLR(pl.LightningModule):
    """The encoder, its projection head, and its loss."""

    def __init__(self):
        super().__init__()
        self.backbone = torchvision.models.resnet18(num_classes=512)
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = RotationContrastLoss(temperature=0.5, gather_distributed=True)

    def forward(self, x):
        return self.projection_head(self.backbone(x))

    def training_step(self, batch, batch_index):
        x0, x1 = batch[0]
        turned, chunks = augment_chunks(x1, torchvision.transforms.ColorJitter(hue=0.5), chunks=1)
        loss, share = self.criterion.forward_components(self(x0), self(turned), chunks=chunks)
        self.log("share", share, prog_bar=True, sync_dist=True)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    options = {"gaussian_blur": 0.0, "cj_hue": 0.0, "random_gray_scale": 0.0, "normalize": None}
    any_hue = torchvision.transforms.ColorJitter(hue=0.5)  # training has to show all hues
    transform = torchvision.transforms.Compose([any_hue, SimCLRTransform(32, **options)])
    # Random images, to try the loop: in their place, use torchvision.datasets.CIFAR10, for example.
    dataset = torchvision.datasets.FakeData(128, (3, 32, 32), transform=transform)
    dataloader = torch.utils.data.DataLoader(
        dataset,
        batch_size=64,
        shuffle=True,
        drop_last=True,
    )
    devices = parser.parse_args().devices
    trainer = pl.Trainer(max_epochs=1, devices=devices, enable_checkpointing=False)
    trainer.fit(SimCLR(), dataloader)


if __name__ == "__main__":
    main()
