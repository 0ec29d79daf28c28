"""Self-supervised learning with pytorch-metric-learning."""

import torch
import torchvision
from care_loss import CAREloss
from care_loss.views import shared_views
from torchvision.transforms import v2

model = torchvision.models.resnet18(num_classes=128)
augment = v2.Compose([v2.RandomResizedCrop(32), v2.ColorJitter(0.4, 0.4)])
images = torch.rand(128, 3, 32, 32)  # random images, to try the loop
loss_func = CAREloss(temperature=0.5, shared_views=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

for data in images.split(64):
    view1, view2, chunks = shared_views(data, augment, chunks=8)
    z1, z2 = model(view1), model(view2)
    loss, base, equivariance = loss_func.forward_components(z1, z2, chunks=chunks)
    print(f"loss {loss:.4f}, InfoNCE {base:.4f}, equivariance {equivariance:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
