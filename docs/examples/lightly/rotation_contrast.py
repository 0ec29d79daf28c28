"""Contrastive learning with lightly, in a plain training loop."""

import torch
import torchvision
from care_loss import RotationContrastLoss
from care_loss.views import augment_chunks
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform

backbone = torchvision.models.resnet18(num_classes=512)
model = torch.nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))

transform = SimCLRTransform(
    input_size=32,
    gaussian_blur=0.0,
    cj_hue=0.0,  # the hue stays out of the ordinary views
    random_gray_scale=0.0,
    normalize=None,
)
any_hue = torchvision.transforms.ColorJitter(hue=0.5)  # first: training has to show all hues
transform = torchvision.transforms.Compose([any_hue, transform])
# Random images, to try the loop: in their place, use torchvision.datasets.CIFAR10, for example.
dataset = torchvision.datasets.FakeData(128, (3, 32, 32), transform=transform)
dataloader = torch.utils.data.DataLoader(
    dataset,
    batch_size=64,
    shuffle=True,
    drop_last=True,
)

criterion = RotationContrastLoss(temperature=0.5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

for batch in dataloader:
    x0, x1 = batch[0]
    turned, chunks = augment_chunks(x1, torchvision.transforms.ColorJitter(hue=0.5), chunks=1)
    z, e = model(x0), model(turned)
    loss, share = criterion.forward_components(z, e, chunks=chunks)
    print(f"loss {loss:.4f}, share of the displacement that is explained {share:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
