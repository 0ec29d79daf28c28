"""Problems of fitting rotations, and what an answer must be."""

import math

import torch
from hypothesis import strategies as st
from strategies import orthogonal, seeds

EPS = torch.finfo(torch.float64).eps
booleans = st.booleans()
dims = st.integers(1, 8)
counts = st.integers(1, 12)
RELATIONS = ["planted", "noisy", "unrelated", "equal", "opposite", "mirrored", "invariant"]


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def spectra(draw, dim):
    """Singular values: well apart, repeated, tiny or zero."""
    values = st.sampled_from([0.0, 1e-9, 1e-3, 0.5, 1.0, 1.0, 1.5, 2.0])
    s = draw(st.lists(values, min_size=dim, max_size=dim))
    return torch.tensor(sorted(s, reverse=True), dtype=torch.float64)


@st.composite
def matrices(draw, dim=None):
    """Square matrices of drawn spectra, orientation and scale."""
    dim = draw(dims) if dim is None else dim
    seed, reflect = draw(seeds), draw(booleans)
    m = (orthogonal(dim, seed) * draw(spectra(dim))) @ orthogonal(dim, seed + 1, reflect=reflect)
    return m * draw(st.sampled_from([1.0, 1e-12, 1e12]))


@st.composite
def problems(draw, min_n=1, max_d=8, relations=RELATIONS):
    """Rows of drawn rank and what they are mapped to."""
    d = draw(st.integers(1, max_d))
    n = draw(st.integers(min_n, max(min_n, 12)))
    rank = draw(st.integers(0, min(n, d)))
    seed = draw(seeds)
    x = normal(n, rank, seed=seed) @ normal(rank, d, seed=seed + 1)
    relation = draw(st.sampled_from(relations))
    q = orthogonal(d, seed + 2, reflect=draw(booleans))
    y = {
        "planted": x @ q,
        "noisy": x @ q + 0.1 * normal(n, d, seed=seed + 3),
        "unrelated": normal(n, d, seed=seed + 3),
        "equal": x,
        "opposite": -x,
        "mirrored": torch.cat((-x[:, :1], x[:, 1:]), -1),
        "invariant": x[:1].expand(n, d),
    }[relation]
    return x, y


def objective(x, y, r, w=None):
    squared = (x @ r - y).square().sum(-1)
    return (squared if w is None else w * squared).sum(-1)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_orthogonal(r, special, tolerance=8 * EPS):
    d = r.shape[-1]
    identity = torch.eye(d, dtype=r.dtype, device=r.device)
    assert ((r.mT @ r - identity).norm(dim=(-2, -1)) <= tolerance * math.sqrt(d)).all()
    if special:
        assert (torch.linalg.det(r) > 0.5).all()


def assert_optimal(m, r, special):
    """No orthogonal matrix is nearer to m, as is seen from R'M without any decomposition of m."""
    h = r.mT @ m
    scale = m.norm()
    # Where a direction is turned into its opposite, its plane is known to eps times a condition.
    assert (h - h.mT).norm() <= (1e-10 if special else 100 * EPS) * scale
    low = torch.linalg.eigvalsh((h + h.mT) / 2)
    if special and len(low) > 1:
        assert low[0] + low[1] >= -100 * EPS * scale
    elif not special:
        assert low[0] >= -100 * EPS * scale


def slope_of_other_bases(ours, free):
    """The slope of the mean squared distance of rotations in their basis: 0 at the nearest one."""
    skew = torch.zeros_like(ours[0], requires_grad=True)
    q = torch.linalg.matrix_exp(skew - skew.mT)
    error = (q @ ours @ q.mT - free).square().sum() / len(ours)
    return torch.autograd.grad(error, skew)[0].norm()
