"""CARE with lightly in three forwards: the hue turns the embedding, and the rest is ignored."""

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader

from care_loss import CAREloss
from care_loss.views import augment_chunks

images = torchvision.datasets.FakeData(512, (3, 32, 32))  # or CIFAR10("data", download=True)
# The hue must stay out of the ordinary views: no jitter of the hue, no grey, no normalisation.
transform = SimCLRTransform(
    input_size=32, gaussian_blur=0.0, cj_hue=0.0, random_gray_scale=0.0, normalize=None
)
dataset = LightlyDataset.from_torch_dataset(images, transform=transform)
collate = MultiViewCollate()
loader = DataLoader(dataset, 128, shuffle=True, drop_last=True, collate_fn=collate)

backbone = torchvision.models.resnet18(num_classes=512)
model = torch.nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))
criterion = CAREloss(temperature=0.5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)


def turn_hue(images):  # one turn about the grey axis for all images of a chunk
    thirds = 2 * torch.pi / 3 * torch.arange(3)
    turn = (1 + 2 * torch.cos(2 * torch.pi * torch.rand(()) + thirds - thirds[:, None])) / 3
    return (turn.to(images) @ images.flatten(2)).view_as(images)


for (x0, x1), _, _ in loader:
    turned, chunks = augment_chunks(x0, turn_hue, chunks=8)
    z0, z1, e = model(x0), model(x1), model(turned)
    loss, base, equivariance = criterion.forward_components(z0, z1, z0, e, chunks=chunks)
    print(f"loss {loss:.4f}, InfoNCE {base:.4f}, equivariance {equivariance:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
