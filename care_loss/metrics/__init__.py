"""Numbers to report, and never to train on: how equivariant an encoder is.

Rows are embeddings, and every measure normalises them, as the losses do. Row i of `z_transformed`
is the embedding of the image of row i of `z` after a transformation; leading dimensions hold
transformations, and broadcast. Measures are computed in float64 (float32 on Apple's GPUs) and have
no gradient.

Three things make an encoder look equivariant that is not, and each has its remedy here:

* A rotation that is fitted to few rows fits them, whatever they are. Fits are **held out**: the
  rotation for the rows of even number is fitted to those of odd number, and the other way round.
  If neighbouring rows depend on each other (patches of one photograph), order them so that the two
  halves are independent.
* Every measure has a value that unrelated embeddings reach. With **shuffled=True** it returns this
  chance level: the rows of `z` are paired with others, in an order that depends on N alone.
* If each image is transformed by itself, so that no rotation is shared, a rotation can still
  explain much. :func:`equivariance_report` measures this **unshared** control, and its main figure
  is the gap ratio of the two.

A report of one encoder shows no gain: :func:`compare` measures several against a control.
"""

from care_loss.metrics._compare import Comparison, compare
from care_loss.metrics._frequencies import Frequencies, frequencies
from care_loss.metrics._measures import (
    Retrieval,
    composition_error,
    cosine_spread,
    effective_rank,
    equivariance_error,
    invariance_error,
    mean_norm,
    relative_equivariance,
    rotation_share,
    transformed_retrieval,
    wahba_error,
)
from care_loss.metrics._monitor import EquivarianceMonitor
from care_loss.metrics._report import equivariance_report
from care_loss.metrics._tables import EquivarianceReport, Estimate, ReportRow

__all__ = [
    "Comparison",
    "EquivarianceMonitor",
    "EquivarianceReport",
    "Estimate",
    "Frequencies",
    "ReportRow",
    "Retrieval",
    "compare",
    "composition_error",
    "cosine_spread",
    "effective_rank",
    "equivariance_error",
    "equivariance_report",
    "frequencies",
    "invariance_error",
    "mean_norm",
    "relative_equivariance",
    "rotation_share",
    "transformed_retrieval",
    "wahba_error",
]
