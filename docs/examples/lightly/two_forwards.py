"""Contrastive learning with lightly, in a plain training loop."""

import torch
import torchvision
from care_loss import CAREloss
from care_loss.views import SharedAugmentCollate
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform

backbone = torchvision.models.resnet18(num_classes=512)
model = torch.nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))

transform = SimCLRTransform(
    input_size=32,
    gaussian_blur=0.0,
)
# Random images, to try the loop: in their place, use torchvision.datasets.CIFAR10, for example.
dataset = torchvision.datasets.FakeData(128, (3, 32, 32))
dataloader = torch.utils.data.DataLoader(
    dataset,
    batch_size=64,
    shuffle=True,
    drop_last=True,
    collate_fn=SharedAugmentCollate(transform.transforms, chunks=8),
)

criterion = CAREloss(temperature=0.5, shared_views=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

for batch in dataloader:
    x0, x1, chunks = batch[0]
    z0, z1 = model(x0), model(x1)
    loss, base, equivariance = criterion.forward_components(z0, z1, chunks=chunks)
    print(f"loss {loss:.4f}, InfoNCE {base:.4f}, equivariance {equivariance:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
