r"""The action of a group on embeddings, fitted: pose, invariants and canonical states.

If turns of the images act on their embeddings as rotations that compose, these are a representation
of the group of turns. For turns by an angle, the circle, it consists in some orthonormal basis of a
number of coordinates that do not move (frequency 0), and of planes that turn by :math:`k \theta`
(frequency k = 1, 2, ...). For rotations of space it consists of blocks of 2l + 1 coordinates that
turn as the spherical harmonics of degree l = 0, 1, ... :func:`fit_circle` and :func:`fit_so3` find
the basis and how often each frequency or degree occurs.

::

    +---------------------------------------------------------------------------+
    |  Vectors are rows:  z_turned ≈ z @ rotation(g)                            |
    |  Circle: g is an angle. A plane of frequency k has the coordinates        |
    |  (a, b) = z @ (two columns of the basis), and c = a + ib becomes          |
    |  exp(ikg) c.                                                              |
    |  Rotations of space: g is a matrix, and points are rows too: x_turned =   |
    |  x @ g. Degree 1 has the coordinates (x, y, z) and becomes (x, y, z) @ g. |
    +---------------------------------------------------------------------------+

The methods take any leading dimensions, which broadcast. They compute in float64 (float32 on
Apple's GPUs) and return results in the dtype of the embeddings, and `torch.compile` makes one graph
of each. On a GPU they read no values; only the decompositions of `SO3Action.pose` make the
host wait where degree 1 occurs. The fit reads values, and has no gradient.

References:
    Serre, Linear Representations of Finite Groups, 1977, chapters 2 and 4, for characters and for
    compact groups. Journée, Nesterov, Richtárik and Sepulchre, Generalized power method for sparse
    principal component analysis, JMLR, 2010, for the ascent of the fit. Kakarala, The bispectrum as
    a source of phase-sensitive invariants for Fourier descriptors, J. Math. Imaging Vis., 2012, for
    invariants of order 3 of the circle.
"""

from care_loss.actions._action import Pose
from care_loss.actions._circle import CircleAction, fit_circle
from care_loss.actions._so3 import SO3Action, fit_so3

__all__ = ["CircleAction", "Pose", "SO3Action", "fit_circle", "fit_so3"]
