"""The published settings, as keyword arguments of `CAREloss`.

They are those of the paper (Gupta et al., ICLR 2024, appendix), on the scale of the authors' code,
which grows with the chunk size. For each recipe, a comment gives the weight on the scale `"mean"`
for the batch size of the paper, :math:`2(n-1)` times as much, and the differences of the authors'
scripts. To change a recipe, write `RECIPES["cifar10"] | {"temperature": 0.2}`; with other chunks or
another batch size, the same weight has another effect. With a `base_loss`, remove the temperature
and give it to the base loss.
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    # 16 chunks of 16: 0.30 on the scale "mean". Script: weight 0.03, 0.90 on the scale "mean".
    "cifar10": {"temperature": 0.5, "equivariance_weight": 0.01, "chunks": 16, "scale": "authors"},
    # 4 chunks of 64: 0.126.
    "cifar100": {"temperature": 0.5, "equivariance_weight": 0.001, "chunks": 4, "scale": "authors"},
    # 8 chunks of 32: 0.62.
    "stl10": {"temperature": 0.5, "equivariance_weight": 0.01, "chunks": 8, "scale": "authors"},
    # 4 chunks of 8, the 32 images of each of several GPUs: 0.07.
    "imagenet100-simclr": {
        "temperature": 0.2,
        "equivariance_weight": 0.005,
        "chunks": 4,
        "scale": "authors",
    },
    # 8 chunks of 4: 0.06. Script: weight 0.005 and 4 chunks of 8, 0.07.
    "imagenet100-moco": {
        "temperature": 0.2,
        "equivariance_weight": 0.01,
        "chunks": 8,
        "scale": "authors",
    },
}
