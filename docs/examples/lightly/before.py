"""SimCLR with lightly, in a plain training loop."""

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader

images = torchvision.datasets.FakeData(512, (3, 32, 32))  # or CIFAR10("data", download=True)
transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
dataset = LightlyDataset.from_torch_dataset(images, transform=transform)
collate = MultiViewCollate()
loader = DataLoader(dataset, 128, shuffle=True, drop_last=True, collate_fn=collate)

backbone = torchvision.models.resnet18(num_classes=512)
model = torch.nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))
criterion = NTXentLoss(temperature=0.5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

for (x0, x1), _, _ in loader:
    z0, z1 = model(x0), model(x1)
    loss = criterion(z0, z1)
    print(f"loss {loss:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
