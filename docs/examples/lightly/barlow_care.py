"""Barlow Twins with lightly: each of the two views has a transform of its own."""

import torch
import torchvision
from care_loss import CAREloss
from care_loss.views import SharedAugmentCollate
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
dataset = torchvision.datasets.FakeData(128, (3, 32, 32))
dataloader = torch.utils.data.DataLoader(
    dataset,
    batch_size=64,
    shuffle=True,
    drop_last=True,
    collate_fn=SharedAugmentCollate(transform.transforms, chunks=8),
)

criterion = CAREloss(base_loss=BarlowTwinsLoss(), equivariance_weight=100, shared_views=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

for batch in dataloader:
    x0, x1, chunks = batch[0]
    z0, z1 = model(x0), model(x1)
    loss, base, equivariance = criterion.forward_components(z0, z1, chunks=chunks)
    print(f"loss {loss:.4f}, base {base:.4f}, equivariance {equivariance:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
