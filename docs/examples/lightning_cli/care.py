"""Train with the loss and the views of a configuration file of LightningCLI."""

from collections.abc import Callable

import pytorch_lightning as pl
import torch
import torchvision
from pytorch_lightning.cli import LightningCLI


class Model(pl.LightningModule):
    """An encoder and its loss."""

    def __init__(self, criterion: torch.nn.Module):
        super().__init__()
        self.encoder = torchvision.models.resnet18(num_classes=128)
        self.criterion = criterion

    def training_step(self, batch, batch_index):
        x0, x1, chunks = batch[0]
        z = self.encoder(x0), self.encoder(x1)
        parts = self.criterion.forward_components(*z, chunks=chunks)
        self.log_dict(parts._asdict(), prog_bar=True)
        return parts.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


class Data(pl.LightningDataModule):
    """Random images, with a transform of single images, or a function that collates batches."""

    def __init__(self, transform: Callable | None = None, collate_fn: Callable | None = None):
        super().__init__()
        self.dataset = torchvision.datasets.FakeData(128, (3, 32, 32), transform=transform)
        self.collate_fn = collate_fn

    def train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.dataset, 64, shuffle=True, drop_last=True, collate_fn=self.collate_fn
        )


if __name__ == "__main__":
    LightningCLI(Model, Data, save_config_callback=None)
