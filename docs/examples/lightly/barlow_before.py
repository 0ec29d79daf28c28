"""Barlow Twins with lightly: each of the two views has a transform of its own."""

import torch
import torchvision
from lightly.loss import BarlowTwinsLoss
from lightly.models.modules import BarlowTwinsProjectionHead
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform

backbone = torchvision.models.resnet18(num_classes=512)
model = torch.nn.Sequential(backbone, BarlowTwinsProjectionHead(512, 512, 512))

transform = BYOLTransform(
    view_1_transform=BYOLView1Transform(input_size=32, gaussian_blur=0.0),
    view_2_transform=BYOLView2Transform(input_size=32, gaussian_blur=0.0),
)
# Random images, to try the loop: in their place, use torchvision.datasets.CIFAR10, for example.
dataset = torchvision.datasets.FakeData(128, (3, 32, 32), transform=transform)
dataloader = torch.utils.data.DataLoader(
    dataset,
    batch_size=64,
    shuffle=True,
    drop_last=True,
)

criterion = BarlowTwinsLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

for batch in dataloader:
    x0, x1 = batch[0]
    z0, z1 = model(x0), model(x1)
    loss = criterion(z0, z1)
    print(f"loss {loss:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
