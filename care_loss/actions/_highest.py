r"""The rotation of space at which a function of low degree is highest.

For the pose between rows y and w the function is :math:`h(g) = \sum_l \langle D^l(g), M^l
\rangle` with :math:`M^l = \sum_i y_{li}^\top w_{li}`. Along any axis, it is a trigonometric
polynomial of the angle of degree L, the highest that occurs. With the range 2r of h, M. Riesz'
lemma gives :math:`h(g^* \exp x) \ge h(g^*) - r (1 - \cos L |x|)` for :math:`|x| \le \pi / L`: near
its maximum h is not narrower than a wave of degree L. So h is first computed on :math:`64 L^3`
rotations that cover the group evenly, the nearest of which is at most :math:`1.1 / L` away. The
highest peaks among these are climbed by Newton's method. After two steps, the height that it
promises hardly errs, and a few are climbed to the end.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from care_loss._numerics import exact
from care_loss._polar import polar
from care_loss.actions._spherical import couplings, generators, wigner

STARTS = 64  # for degree 1; the volume of what one has to cover falls as the cube of the degree
NEIGHBOURS = 6  # that a peak among the starts exceeds
PEAKS = (16, 6)  # that are climbed: all, and those that promise most after the first steps
STEPS = (2, 2, 5)  # for these, and for the best two
PLASTIC = 1.533751168755204  # the root of x^4 = x + 4


@lru_cache
def starts(degree: int) -> tuple[Tensor, Tensor]:
    """Return rotations that cover the group evenly, `(64 L^3, 3, 3)`, and their nearest ones.

    References:
        Alexa, Super-Fibonacci spirals: fast, low-discrepancy sampling of SO(3), CVPR, 2022.
    """
    n = STARTS * degree**3
    i = torch.arange(n, dtype=torch.float64, device="cpu") + 0.5
    a, b = 2 * math.pi * i / math.sqrt(2), 2 * math.pi * i / PLASTIC
    r, s = (i / n).sqrt(), (1 - i / n).sqrt()
    q = torch.stack((r * a.sin(), r * a.cos(), s * b.sin(), s * b.cos()), -1)
    # The distance of rotations falls with |q · p|.
    near = [(rows @ q.T).abs().topk(NEIGHBOURS + 1).indices[:, 1:] for rows in q.split(1024)]
    return matrix_of(q).float(), torch.cat(near)


def table(rotations: Tensor, degrees: Sequence[int]) -> Tensor:
    """Return the entries of D^l of all degrees for rotations, `(n, Σ (2l + 1)²)`."""
    return _entries(rotations.double(), couplings(max(degrees)), degrees).float()


def matrix_of(q: Tensor) -> Tensor:
    """Return the rotations `(*, 3, 3)` of unit quaternions `(*, 4)`, real part first."""
    w, x, y, z = q.unbind(-1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)]
    rows += [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)]
    rows += [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)]
    return _matrices(rows)


def quaternion_of(g: Tensor) -> Tensor:
    """Return unit quaternions `(*, 4)` of rotations, with a real part >= 0; see `matrix_of`.

    All entries of 4 q qᵀ are sums of entries of g. The column of the largest diagonal entry, which
    is 1 at least, has all digits.
    """
    (a, b, c), (d, e, f), (h, i, j) = (row.unbind(-1) for row in g.unbind(-2))
    rows = [1 + a + e + j, f - i, h - c, b - d]
    rows += [f - i, 1 + a - e - j, b + d, c + h]
    rows += [h - c, b + d, 1 - a + e - j, f + i]
    rows += [b - d, c + h, f + i, 1 - a - e + j]
    square = _matrices(rows)
    largest = square.detach().diagonal(dim1=-2, dim2=-1).argmax(-1)
    q = square.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4)).squeeze(-2)
    q = q / q.square().sum(-1, keepdim=True).sqrt()
    return torch.where(q[..., :1] < 0, -q, q)


def near_rotation(g: Tensor) -> Tensor:
    """Return the rotations nearest to matrices that are nearly rotations.

    Each step of Newton and Schulz squares the error, from 0.05 to less than rounding in four.
    """
    for _ in range(4):
        g = 1.5 * g - 0.5 * g @ g.mT @ g
    return g


def highest(
    products: dict[int, Tensor],
    squares: Sequence[Tensor],
    grid: tuple[Tensor, Tensor, Tensor],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return where h is highest, `(*, 3, 3)`, and the gap, `(*)`.

    The matrices M^l are given by degree; the grid is rotations, their neighbours and their table.
    Only the result has a gradient. `eps` is the rounding error of the matrices.
    """
    degrees = list(products)
    known = {k: m.detach() for k, m in products.items()}
    jets = _jets(known, squares)
    top, gap = degrees[-1], None
    if top > 1:
        g, jet, lowest = _peaks(jets, grid)
    if 1 in known:
        fit = polar(known[1], special=True, full=True)[0].unsqueeze(-3)
        start = _entries(fit, squares, degrees) @ jets
        g, jet = (
            (fit, start) if top == 1 else (torch.cat((fit, g), -3), torch.cat((start, jet), -2))
        )
    if top > 1:
        g, jet = _climbed(g, jet, jets, squares, degrees, STEPS[0])
        place = _promised(jet, 1 / top).topk(PEAKS[1], -1).indices
        g, jet = _climbed(_taken(g, place), _rows(jet, place), jets, squares, degrees, STEPS[1])
        # Of optima that are equal but for rounding, the one nearest to the identity is taken.
        trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
        place = (jet[..., 0] + 8 * eps * trace).argmax(-1, keepdim=True)
        other = jet[..., 0].masked_fill(_same(g, _taken(g, place), top), -torch.inf)
        place = torch.cat((place, other.argmax(-1, keepdim=True)), -1)
        alone = (other == -torch.inf).all(-1)
        g, jet = near_rotation(_taken(g, place)), _rows(jet, place)
    best, jet = _climbed(g, jet, jets, squares, degrees, STEPS[2])
    if top > 1:
        heights = jet[..., 0]
        gap = (heights[..., 0] - heights[..., 1]) / (heights[..., 0] - lowest)
        alone = alone | _same(best, best[..., :1, :, :], top)[..., 1]
        gap = gap.clamp(0, 1).masked_fill(alone, 1)
    best, jet = near_rotation(best[..., 0, :, :]), jet[..., 0, :]
    # A step of Newton's method from the optimum has the derivative of the implicit function
    # theorem, that of the slope divided by the curvature. Its value, rounding that a flat optimum
    # magnifies, is removed.
    slope = _slope(products, best, squares)
    curvature, size = -jet[..., 4:], jet[..., 4:].abs().amax(-1, keepdim=True)
    # What is added only matters where the optimum is flat, and the slope 0 in that direction.
    unit = torch.where(size > 0, 1e-11 * size, 1)
    step = _solved(_plus(curvature, unit), slope - slope.detach())
    flat = _least(curvature) <= 64 * eps * size
    if gap is None:
        gap = torch.ones_like(size.squeeze(-1))
    return best @ _turn(step), gap.masked_fill(flat.squeeze(-1), 0)


def _entries(g: Tensor, squares: Sequence[Tensor], degrees: Sequence[int]) -> Tensor:
    """Return the entries of D^l of all degrees, `(*, Σ (2l + 1)²)`."""
    matrices = wigner(g, squares[: max(degrees) - 1])
    return torch.cat([matrices[k - 1].flatten(-2) for k in degrees], -1)


def _jets(products: dict[int, Tensor], squares: Sequence[Tensor]) -> Tensor:
    """Return what makes h and its derivatives of entries of D(g), `(*, Σ (2l + 1)², 10)`.

    With the generators X_a, h(g exp x) is ⟨D (1 + Σ x_a X_a + ½ Σ x_a x_b X_a X_b + ...), M⟩, and
    ⟨D X, M⟩ = ⟨D, M Xᵀ⟩. The derivatives are ordered as 1, 2, 3, 11, 22, 33, 12, 13, 23.
    """
    found = []
    all_generators = generators(squares, next(iter(products.values())))
    for degree, m in products.items():
        x = all_generators[degree - 1]
        second = torch.einsum("aij,bjk->abik", x, x)
        second = (second + second.transpose(0, 1)) / 2
        rows, columns = (0, 1, 2, 0, 0, 1), (0, 1, 2, 1, 2, 2)
        chosen = [second[i, j] for i, j in zip(rows, columns, strict=True)]
        one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        both = torch.cat((one.unsqueeze(0), x, torch.stack(chosen)))
        found.append(torch.einsum("...ij,tkj->...ikt", m, both).flatten(-3, -2))
    return torch.cat(found, -2)


def _peaks(jets: Tensor, grid: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest peaks of the grid, their derivatives, and the lowest value."""
    rotations, near, entries = grid
    values = jets[..., 0].to(entries) @ entries.mT
    around = values[..., near[:, 0]]
    for neighbour in near.unbind(-1)[1:]:
        around = torch.maximum(around, values[..., neighbour])
    index = values.masked_fill(values < around, -torch.inf).topk(PEAKS[0], -1).indices
    return exact(rotations)[index], entries[index].to(jets) @ jets, values.amin(-1).to(jets)


def _climbed(
    g: Tensor,
    jet: Tensor,
    jets: Tensor,
    squares: Sequence[Tensor],
    degrees: Sequence[int],
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Climb from rotations `(*, K, 3, 3)` by Newton's method, in steps that do not lead down.

    The values of the grid are in float32: at first they may be too high by its rounding error.
    """
    radius = torch.full_like(jet[..., :1], 1 / degrees[-1])
    for _ in range(steps):
        trial = g @ _turn(_newton(jet, radius))
        following = _entries(trial, squares, degrees) @ jets
        better = following[..., :1] >= jet[..., :1] - 1e-6
        radius = torch.where(better, 2 * radius, radius / 4)
        g = torch.where(better.unsqueeze(-1), trial, g)
        jet = torch.where(better, following, jet)
    return g, jet


def _promised(jet: Tensor, radius: float) -> Tensor:
    """Return the heights that one step of Newton's method promises."""
    step = _newton(jet, torch.full_like(jet[..., :1], radius))
    return jet[..., 0] + (jet[..., 1:4] * step).sum(-1) / 2


def _newton(jet: Tensor, radius: Tensor) -> Tensor:
    """Return steps uphill of at most the radius, those of Newton's method near a maximum.

    Where a curvature is negative, as much is added to all as makes its sign positive.
    """
    curvature = -jet[..., 4:]
    size = curvature.abs().amax(-1, keepdim=True)
    shift = (-2 * _least(curvature)).clamp_min(0) + 1e-9 * size
    step = _solved(_plus(curvature, torch.where(size > 0, shift, 1)), jet[..., 1:4])
    length = step.square().sum(-1, keepdim=True).sqrt()
    return step * (radius / torch.maximum(length, radius))


def _slope(products: dict[int, Tensor], g: Tensor, squares: Sequence[Tensor]) -> Tensor:
    """Return the first derivatives of h at rotations `(*, 3, 3)`, with a gradient, `(*, 3)`."""
    matrices, found = wigner(g, squares), g.new_zeros(3)
    for degree, x in enumerate(generators(squares, g), 1):
        if degree in products:
            moved = matrices[degree - 1].mT @ products[degree]
            found = found + torch.einsum("aij,...ij->...a", x, moved)
    return found


def _turn(v: Tensor) -> Tensor:
    """Return rotations near exp v, equal to second order: those of the quaternions (1, v / 2)."""
    x, y, z = v.unbind(-1)
    o = torch.zeros_like(x)
    skew = _matrices([o, z, -y, -z, o, x, y, -x, o])
    scale = 1 + v.square().sum(-1)[..., None, None] / 4
    identity = torch.eye(3, dtype=v.dtype, device=v.device)
    return identity + (skew + skew @ skew / 2) / scale


def _same(g: Tensor, best: Tensor, top: int) -> Tensor:
    """Tell which rotations `(*, K, 3, 3)` are at the peak of the best, `(*, 1, 3, 3)`."""
    return (best.mT @ g).diagonal(dim1=-2, dim2=-1).sum(-1) > 1 + 2 * math.cos(0.5 / top)


def _rows(jet: Tensor, place: Tensor) -> Tensor:
    return jet.gather(-2, place.unsqueeze(-1).expand(*place.shape, jet.shape[-1]))


def _taken(g: Tensor, place: Tensor) -> Tensor:
    return g.gather(-3, place[..., None, None].expand(*place.shape, 3, 3))


def _plus(a: Tensor, shift: Tensor) -> Tensor:
    """Add to the diagonal of symmetric matrices, given as 11, 22, 33, 12, 13, 23."""
    return torch.cat((a[..., :3] + shift, a[..., 3:]), -1)


def _least(a: Tensor) -> Tensor:
    """Return the least eigenvalue of symmetric matrices, `(*, 1)`, by the cosines of a third."""
    (p, q, r), (s, t, u) = a[..., :3].unbind(-1), a[..., 3:].unbind(-1)
    mean = (p + q + r) / 3
    p, q, r = p - mean, q - mean, r - mean
    size = ((p * p + q * q + r * r + 2 * (s * s + t * t + u * u)) / 6).sqrt()
    unit = torch.where(size > 0, size, 1)
    p, q, r, s, t, u = (x / unit for x in (p, q, r, s, t, u))
    determinant = p * (q * r - u * u) - s * (s * r - u * t) + t * (s * u - q * t)
    third = (determinant / 2).clamp(-1, 1).acos() / 3
    return (mean + 2 * size * torch.cos(third + 2 * math.pi / 3)).unsqueeze(-1)


def _solved(a: Tensor, b: Tensor) -> Tensor:
    """Solve positive definite systems of three equations, by the factors L, D and Lᵀ.

    As with those of Cholesky, errors are those of a matrix that differs by rounding: where one
    direction is flat, the others keep their digits.
    """
    (p, q, r), (s, t, u), (x, y, z) = a[..., :3].unbind(-1), a[..., 3:].unbind(-1), b.unbind(-1)
    left, lower = s / p, t / p
    second = q - left * s
    last = (u - left * t) / second
    y = y - left * x
    z = (z - lower * x - last * y) / (r - lower * t - last * last * second)
    y = y / second - last * z
    return torch.stack((x / p - left * y - lower * z, y, z), -1)


def _matrices(entries: Sequence[Tensor]) -> Tensor:
    """Return square matrices of all their entries, row by row."""
    size = math.isqrt(len(entries))
    matrices: Tensor = torch.stack(list(entries), -1).unflatten(-1, (size, size))
    return matrices
