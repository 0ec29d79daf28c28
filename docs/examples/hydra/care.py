"""Train with the data, the views and the loss of a Hydra configuration."""

import torch
import torchvision
from hydra.utils import instantiate

import hydra


@hydra.main(version_base=None, config_path=".", config_name="before")
def main(cfg):
    model = torchvision.models.resnet18(num_classes=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    criterion = instantiate(cfg.loss)
    for batch in instantiate(cfg.dataloader):
        x0, x1, chunks = batch[0]
        loss, *parts = criterion.forward_components(model(x0), model(x1), chunks=chunks)
        print(f"loss {loss:.4f}, InfoNCE {parts[0]:.4f}, equivariance {parts[1]:.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
