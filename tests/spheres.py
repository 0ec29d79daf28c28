"""Points, tangent vectors and pairs of points on the sphere."""

import math

import torch
from hypothesis import strategies as st
from strategies import seeds

from care_loss.sphere import (
    normalize,
    random_uniform,
    tangent_projection,
)

EPS = torch.finfo(torch.float64).eps
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ANGLES = [1e-4, 3e-4, 1e-3, 0.01, 0.1, 0.5, 1.0, math.pi / 2, 2.0, 2.5, 2.9, 3.0]
# Distances from 0 and from pi; at 0.19934 and 0.63246 a series takes over.
ends = st.sampled_from([0.0, 1e-12, 1e-7, 1e-4, 0.1, 0.1993, 0.1994, 0.6324, 0.6325])
angles = st.one_of(st.floats(0.1, 3.0), ends, ends.map(lambda end: math.pi - end))
dims = st.integers(2, 8)


def point(dim, seed=0, dtype=torch.float64, batch_shape=()):
    generator = torch.Generator().manual_seed(seed)
    return random_uniform(dim, batch_shape=batch_shape, generator=generator, dtype=dtype)


def tangent(x, seed=1):
    """A unit tangent vector at each point."""
    generator = torch.Generator().manual_seed(seed ^ 0x5EED)  # not the numbers of the points
    normal = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    # Twice, in case that little is left after the first time.
    return normalize(tangent_projection(x, normalize(tangent_projection(x, normal))))


@st.composite
def pairs(draw, angles=angles, dim=None):
    """Two points at a drawn angle, in float64."""
    d = draw(dims) if dim is None else dim
    x = point(d, draw(seeds))
    angle = draw(angles)
    return x, math.cos(angle) * x + math.sin(angle) * tangent(x, draw(seeds)), angle


def close(a, b, tolerance=1e-14):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
