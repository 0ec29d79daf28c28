"""CARE as a loss of pytorch-metric-learning, for its wrappers, which refuse other modules."""

import torch
from care_loss import CAREloss
from pytorch_metric_learning.losses import BaseMetricLossFunction, MultipleLosses, TripletMarginLoss


class CARE(BaseMetricLossFunction):
    """Call `CAREloss` on embeddings `(2N, D)`: those of one view, then those of the other."""

    def __init__(self, criterion, **kwargs):
        super().__init__(**kwargs)
        self.criterion = criterion

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        if indices_tuple is not None or ref_emb is not embeddings:
            raise ValueError("CARE takes neither a miner nor reference embeddings.")
        if labels is None or not torch.equal(*labels.chunk(2)):
            raise ValueError("CARE needs labels of which the second half repeats the first.")
        loss = self.criterion(*embeddings.chunk(2))
        return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}


if __name__ == "__main__":
    care = CARE(CAREloss(temperature=0.5, chunks=8, shared_views=True))
    loss_func = MultipleLosses([care, TripletMarginLoss()], weights=[1, 0.5])
    z1, z2 = torch.randn(2, 64, 128)  # embeddings of two views, made by shared_views
    labels = torch.arange(64).repeat(2)
    print(f"loss {loss_func(torch.cat([z1, z2]), labels):.4f}")
