"""Contrastive learning with the Trainer of transformers; the samples are dictionaries."""

import torch
import torchvision
from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss
from torchvision.transforms import ToTensor, v2

from transformers import Trainer, TrainingArguments


class Encoder(torch.nn.Module):
    """Embed two views."""

    def __init__(self):
        super().__init__()
        self.backbone = torchvision.models.resnet18(num_classes=128)

    def forward(self, view1, view2):
        return {"z1": self.backbone(view1), "z2": self.backbone(view2)}


transform = v2.Compose([v2.RandomResizedCrop(32), v2.ColorJitter(0.4, 0.4), ToTensor()])
# Random images, to try the loop: a datasets.Dataset with these columns works as well.
images = torchvision.datasets.FakeData(128, (3, 32, 32))
dataset = [{"image": image, "label": label} for image, label in images]
criterion = SelfSupervisedLoss(NTXentLoss(temperature=0.5))


def collate(samples):
    view1 = torch.stack([transform(sample["image"]) for sample in samples])
    view2 = torch.stack([transform(sample["image"]) for sample in samples])
    labels = torch.tensor([sample["label"] for sample in samples])
    return {"view1": view1, "view2": view2, "labels": labels}


def compute_loss(outputs, labels, num_items_in_batch=None):
    return criterion(outputs["z1"], outputs["z2"])


arguments = TrainingArguments(
    output_dir="build/trainer",
    per_device_train_batch_size=64,
    num_train_epochs=1,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    remove_unused_columns=False,
    dataloader_drop_last=True,
)
trainer = Trainer(
    Encoder(), arguments, collate, train_dataset=dataset, compute_loss_func=compute_loss
)
trainer.train()
