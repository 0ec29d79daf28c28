"""CARE: contrastive learning in which augmentations rotate the embeddings."""

from care_loss import actions, distributed, functional, metrics, rotation, sphere, views
from care_loss.modules import CAREloss, EquivarianceLoss, InfoNCELoss, RotationContrastLoss
from care_loss.recipes import RECIPES

__version__ = "0.1.0"

__all__ = ["RECIPES", "CAREloss", "EquivarianceLoss", "InfoNCELoss", "RotationContrastLoss"]
__all__ += ["actions", "distributed", "functional", "metrics", "rotation", "sphere", "views"]
