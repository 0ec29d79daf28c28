"""CARE with lightly in two forwards: the views of each chunk share an augmentation."""

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
collate = SharedAugmentCollate(transform.transforms[0], chunks=8)
loader = DataLoader(dataset, 128, shuffle=True, drop_last=True, collate_fn=collate)

backbone = torchvision.models.resnet18(num_classes=512)
model = torch.nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))
criterion = CAREloss(temperature=0.5, shared_views=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

for (x0, x1, chunks), _, _ in loader:
    z0, z1 = model(x0), model(x1)
    loss, base, equivariance = criterion.forward_components(z0, z1, chunks=chunks)
    print(f"loss {loss:.4f}, InfoNCE {base:.4f}, equivariance {equivariance:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
