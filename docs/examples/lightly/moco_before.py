"""Momentum contrast with lightly: a momentum encoder, and a memory bank of negatives."""

import copy

import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform

backbone = torchvision.models.resnet18(num_classes=512)
query_encoder = torch.nn.Sequential(backbone, MoCoProjectionHead(512, 512, 128))
key_encoder = copy.deepcopy(query_encoder)
deactivate_requires_grad(key_encoder)

transform = MoCoV2Transform(input_size=32)
# Random images, to try the loop: in their place, use torchvision.datasets.CIFAR10, for example.
dataset = torchvision.datasets.FakeData(128, (3, 32, 32), transform=transform)
dataloader = torch.utils.data.DataLoader(
    dataset,
    batch_size=64,
    shuffle=True,
    drop_last=True,
)

criterion = NTXentLoss(temperature=0.2, memory_bank_size=(1024, 128))
optimizer = torch.optim.SGD(query_encoder.parameters(), lr=0.06)

for batch in dataloader:
    x_query, x_key = batch[0]
    update_momentum(query_encoder, key_encoder, m=0.99)
    query = query_encoder(x_query)
    key = key_encoder(x_key).detach()
    loss = criterion(query, key)
    print(f"loss {loss:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
