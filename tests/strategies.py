"""What Hypothesis draws: shapes, seeds and spectra, so that failures shrink to readable ones."""

import torch
from hypothesis import strategies as st

seeds = st.integers(0, 2**31 - 1)
SPECTRA = {
    "flat": lambda k: torch.ones(k, dtype=torch.float64),
    "decaying": lambda k: 0.5 ** torch.arange(k, dtype=torch.float64),
    "rank one": lambda k: torch.eye(k, dtype=torch.float64)[0],
    "tiny": lambda k: 1e-8 + torch.eye(k, dtype=torch.float64)[0],
}


def orthogonal(dim, seed, *, reflect=False):
    """An orthogonal matrix of determinant 1, or -1 for a reflection."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    if (torch.linalg.det(q) < 0) != reflect:
        q[:, 0] *= -1
    return q


@st.composite
def embeddings(draw, *, count=1, min_n=2, max_n=24, min_d=2, max_d=12):
    """`count` float64 matrices of one shape (N, D) with singular values of a drawn spectrum."""
    n = draw(st.integers(min_n, max_n))
    d = draw(st.integers(min_d, max_d))
    spectrum = SPECTRA[draw(st.sampled_from(sorted(SPECTRA)))](min(n, d))
    generator = torch.Generator().manual_seed(draw(seeds))
    matrices = []
    for _ in range(count):
        z = torch.randn(n, d, dtype=torch.float64, generator=generator)
        u, _, vh = torch.linalg.svd(z, full_matrices=False)
        matrices.append((u * spectrum) @ vh)
    return matrices[0] if count == 1 else tuple(matrices)
