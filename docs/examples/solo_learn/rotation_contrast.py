"""Rotation contrast for solo-learn: copy this file beside main_pretrain.py, and run it instead."""

from pathlib import Path

import torch
from care_loss import RotationContrastLoss
from care_loss.views import augment_chunks
from solo.methods import METHODS, BaseMethod, SimCLR


def turn_hue(images, *n):  # turns of the colours about the grey axis: one, or for n images each
    axis = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / 3**0.5
    turn = torch.linalg.matrix_exp(2 * torch.pi * torch.rand(*n, 1, 1) * axis).to(images)
    return (turn @ images.flatten(2)).view_as(images)


class RotationContrast(SimCLR):  # in two forwards
    def training_step(self, batch, batch_idx):
        both = torch.cat(batch[1][:2], -1)  # training has to show all hues: one for each image
        batch[1][:2] = turn_hue(both, len(both)).chunk(2, -1)
        chunks = self.cfg.method_kwargs.chunks
        batch[1][1], _ = augment_chunks(batch[1][1], turn_hue, chunks=chunks)
        out = BaseMethod.training_step(self, batch, batch_idx)
        contrast = RotationContrastLoss(temperature=self.temperature, gather_distributed=True)
        parts = contrast.forward_components(*out["z"], chunks=chunks)._asdict()
        self.log_dict({f"train_{k}": v for k, v in parts.items()}, prog_bar=True, sync_dist=True)
        return out["loss"] + parts["loss"]


METHODS["care"] = RotationContrast
if __name__ == "__main__":
    exec(compile(Path("main_pretrain.py").read_text(), "main_pretrain.py", "exec"))
