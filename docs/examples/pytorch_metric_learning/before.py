"""Self-supervised learning with pytorch-metric-learning."""

import torch
import torchvision
from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss
from torchvision.transforms import v2

model = torchvision.models.resnet18(num_classes=128)
augment = v2.Compose([v2.RandomResizedCrop(32), v2.ColorJitter(0.4, 0.4)])
images = torch.rand(128, 3, 32, 32)  # random images, to try the loop
loss_func = SelfSupervisedLoss(NTXentLoss(temperature=0.5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

for data in images.split(64):
    view1 = torch.stack([augment(image) for image in data])
    view2 = torch.stack([augment(image) for image in data])
    z1, z2 = model(view1), model(view2)
    loss = loss_func(z1, z2)
    print(f"loss {loss:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
