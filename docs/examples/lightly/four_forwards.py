"""CARE with lightly in four forwards, as published: ordinary views, and shared ones."""

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader

from care_loss import CAREloss
from care_loss.views import SharedAugmentCollate

images = torchvision.datasets.FakeData(512, (3, 32, 32))  # or CIFAR10("data", download=True)
transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
dataset = LightlyDataset.from_torch_dataset(images)
view = transform.transforms[0]
collate = SharedAugmentCollate(view, chunks=8, ordinary=view)
loader = DataLoader(dataset, 128, shuffle=True, drop_last=True, collate_fn=collate)

backbone = torchvision.models.resnet18(num_classes=512)
model = torch.nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))
criterion = CAREloss(temperature=0.5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

for (x0, x1, a0, a1, chunks), _, _ in loader:
    z = [model(x) for x in (x0, x1, a0, a1)]
    loss, base, equivariance = criterion.forward_components(*z, chunks=chunks)
    print(f"loss {loss:.4f}, InfoNCE {base:.4f}, equivariance {equivariance:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
