"""Write random images, to try the configurations without data."""

from pathlib import Path

import numpy as np
from PIL import Image

generator = np.random.default_rng(0)
for number in range(256):
    path = Path("images", "train", f"class{number % 2}", f"{number}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
