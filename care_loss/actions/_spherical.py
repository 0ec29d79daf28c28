r"""The irreducible representations of rotations of space, as real matrices.

Real spherical harmonics of degree l are 2l + 1 polynomials in (x, y, z), in the order and with the
signs of e3nn: y is the polar axis, harmonic m = -l, ..., l has the factor :math:`\mathrm{Im}(z +
ix)^{|m|}` for m < 0 and :math:`\mathrm{Re}(z + ix)^m` for m >= 0, and a positive factor of y and
of the radius. Those of degree 1 are x, y and z themselves. For points and harmonics as rows,

.. math:: Y^l(x g) = Y^l(x) D^l(g), \qquad D^l(g h) = D^l(g) D^l(h), \qquad D^1(g) = g.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def coupling(degree: int) -> Tensor:
    r"""Return the signed squares of the coefficients that make harmonics of those of l - 1 and 1.

    With the harmonics Y normalised so that their squares sum to 1, :math:`Y^l_m` is a positive
    multiple of :math:`\sum_{ai} C_{aim} Y^1_a Y^{l-1}_i`. The squares are multiples of 1 / (4l (2l
    - 1)): they are returned as integers in this unit, `(3, 2l - 1, 2l + 1)`, so that no conversion
    of a module changes them.

    For the complex harmonics the coefficients are those of Clebsch and Gordan for the highest
    degree, e.g. Varshalovich et al., Quantum Theory of Angular Momentum, 1988, section 8.5.
    """
    below = degree - 1
    pairs = torch.zeros(3, 2 * below + 1, 2 * degree + 1, dtype=torch.complex128, device="cpu")
    for m in range(-degree, degree + 1):
        scale = 2 * degree * (2 * degree - 1)
        for a, numerator in {
            -1: (degree - m - 1) * (degree - m),
            0: 2 * (degree - m) * (degree + m),
            1: (degree + m - 1) * (degree + m),
        }.items():
            if abs(m - a) <= below:
                pairs[a + 1, m - a + below, m + degree] = math.sqrt(numerator / scale)
    one, two, three = (_real_harmonics(k) for k in (1, below, degree))
    c = torch.einsum("xa,yb,zc,abc->xyz", one, two, three.conj(), pairs).real
    return (c.sign() * c.square() * 4 * degree * (2 * degree - 1)).round().long()


def _real_harmonics(degree: int) -> Tensor:
    """Return the rows that make real harmonics of complex ones, which have the usual phases.

    The complex harmonics are (-1)^m exp(imφ) for m > 0 and exp(imφ) for m <= 0, times a positive
    function; the real ones √2 sin |m|φ for m < 0 and √2 cos mφ for m > 0.
    """
    size = 2 * degree + 1
    real, imaginary = torch.zeros(2, size, size, dtype=torch.float64, device="cpu")
    real[degree, degree] = 1
    for m in range(1, degree + 1):
        plus, minus, sign = degree + m, degree - m, (-1) ** m
        real[plus, plus], real[plus, minus] = sign * math.sqrt(0.5), math.sqrt(0.5)
        imaginary[minus, plus], imaginary[minus, minus] = -sign * math.sqrt(0.5), math.sqrt(0.5)
    return torch.complex(real, imaginary)


def couplings(max_degree: int) -> list[Tensor]:
    """Return :func:`coupling` for all degrees from 2 on."""
    return [coupling(degree) for degree in range(2, max_degree + 1)]


def coefficients(squares: Tensor, like: Tensor) -> Tensor:
    """Return the coefficients whose squares are given by :func:`coupling`, to rounding."""
    degree = (squares.shape[-1] - 1) // 2
    size = squares.abs().to(like) / (4 * degree * (2 * degree - 1))
    return squares.sign() * size.sqrt()


def wigner(g: Tensor, squares: Sequence[Tensor]) -> list[Tensor]:
    """Return the matrices of rotations `(*, 3, 3)` of the degrees 1, 2, ..., `(*, 2l + 1, 2l + 1)`.

    Each is a product of those below, D^l = Cᵀ (D^1 ⊗ D^{l-1}) C, since the columns of C span the
    part of degree l of these products. No step amplifies rounding errors.
    """
    found = [g]
    for square in squares:
        c = coefficients(square, g)
        # One product with C ⊗ C takes less time than three with small matrices.
        twice = torch.einsum("aim,bjn->abijmn", c, c).flatten(4).flatten(0, 3)
        pairs = g[..., :, :, None, None] * found[-1][..., None, None, :, :]
        found.append((pairs.flatten(-4) @ twice).unflatten(-1, (c.shape[-1], c.shape[-1])))
    return found


def generators(squares: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Return the derivatives of :func:`wigner` by the rotation vector v, `(3, 2l + 1, 2l + 1)`.

    Rows x become x + v × x to first order in v, so the generator a of degree 1 has e_a × e_b in row
    b. A product has the sum of the derivatives of its factors.
    """
    one = like.new_zeros(3, 3, 3)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        one[i, j, k], one[i, k, j] = 1, -1
    found = [one]
    for square in squares:
        c = coefficients(square, like)
        left = torch.einsum("tab,aim,bin->tmn", one, c, c)
        right = torch.einsum("tij,aim,ajn->tmn", found[-1], c, c)
        found.append(left + right)
    return found
