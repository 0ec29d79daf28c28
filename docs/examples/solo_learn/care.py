"""CARE for solo-learn: copy this file beside main_pretrain.py, and run it in its place."""

from pathlib import Path

import torch
from care_loss import CAREloss
from care_loss.views import augment_chunks
from solo.methods import METHODS, BaseMethod, SimCLR


def turn_hue(images, *n):  # turns of the colours about the grey axis: one, or for n images each
    axis = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / 3**0.5
    turn = torch.linalg.matrix_exp(2 * torch.pi * torch.rand(*n, 1, 1) * axis).to(images)
    return (turn @ images.flatten(2)).view_as(images)


class CARE(SimCLR):  # in three forwards
    def training_step(self, batch, batch_idx):
        both = torch.cat(batch[1][:2], -1)  # training has to show all hues: one for each image
        batch[1][:2] = turn_hue(both, len(both)).chunk(2, -1)
        out, settings = BaseMethod.training_step(self, batch, batch_idx), self.cfg.method_kwargs
        t, weight = self.temperature, settings.equivariance_weight
        care = CAREloss(temperature=t, equivariance_weight=weight, gather_distributed=True)
        turned, chunks = augment_chunks(batch[1][0], turn_hue, chunks=settings.chunks)
        (z1, z2), e = out["z"], self(turned)["z"]
        parts = care.forward_components(z1, z2, z1, e, chunks=chunks)._asdict()
        self.log_dict({f"train_{k}": v for k, v in parts.items()}, prog_bar=True, sync_dist=True)
        return out["loss"] + parts["loss"]


METHODS["care"] = CARE
if __name__ == "__main__":
    exec(compile(Path("main_pretrain.py").read_text(), "main_pretrain.py", "exec"))
