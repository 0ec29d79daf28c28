r"""Geometry of the unit sphere, along the last dimension.

Points are unit vectors `(*, D)`: normalise embeddings with :func:`normalize` first. Tangent vectors
at a point are orthogonal to it. Leading dimensions broadcast. All tensors of one call have the same
dtype, and results have it too; half types are computed in float32.

On a CPU the lengths of the points are read: a length that differs from 1 by more than 0.01 is an
error, except for zero vectors, which :func:`normalize` returns for zero vectors
(:func:`frechet_mean` normalises instead). On other devices,
under `torch.compile` and under `vmap` nothing is read. Whether a vector is tangent is never
checked; :func:`tangent_projection` makes it so.

Many shortest paths join a point and its antipode. The functions choose the path that leaves `x`
towards the coordinate axis on which the entry of `x` is nearest to 0. They do so for points that
are antipodal to within :math:`8 \varepsilon`, and all first derivatives are finite there. For
`D = 1` no path exists, and for zero vectors none is defined: results are finite, without meaning.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from care_loss import _checks
from care_loss._autograd.unit_rows import largest_entries
from care_loss._checks import (
    as_broadcast,
    check_floating,
    check_on_device,
    check_row_weights,
    check_same_dtype_and_device,
    is_real,
    read_on_cpu,
    show,
)
from care_loss._numerics import (
    computed_in,
    exact,
    function,
    normal,
    refuse_nested_forward_mode,
    savable,
)


def normalize(x: Tensor) -> Tensor:
    r"""Scale every vector to unit length.

    .. math:: x \mapsto x / \lVert x \rVert

    A zero vector stays zero and gets a gradient of exactly 0. Lengths may be anything the dtype can
    hold: no value overflows or underflows on the way (`F.normalize` turns float16 rows of length
    256 and more into zeros). A vector that contains NaN or an infinity becomes NaN.

    Args:
        x: Vectors of any floating point dtype, `(*, D)`.

    Returns:
        Unit vectors in the dtype of `x`, computed in float32 at least, `(*, D)`.

    Raises:
        TypeError, ValueError: if the argument is not as described.

    Example:
        >>> normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e30, 4e30]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000],
                [0.6000, 0.8000]])
    """
    _check_vectors(x=x)
    y = x.to(computed_in(x))
    y = y / largest_entries(y)
    # Only zero rows are below 1, so the clamp changes nothing else. A sum of squares has second
    # derivatives at 0, and a norm has not.
    length = y.square().sum(-1, keepdim=True).clamp_min(1).sqrt()
    return (y / length).to(x.dtype)


def geodesic_distance(x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
    r"""Return the angle between points, the length of the shortest path on the sphere.

    .. math:: 2 \operatorname{atan2}(\lVert x - y \rVert, \lVert x + y \rVert)

    The angle is exactly 0 for equal points, and in float32 accurate to a relative error of 1e-6
    down to angles of 1e-4 (`acos` of the inner product returns 0, NaN, or another wrong value
    there). Differences in length that are due to rounding are corrected for.

    The gradient is a unit tangent vector, and 0 where the points are equal or antipodal (or 0). The
    square of the distance has derivatives of every order where points are equal as well: to use
    them, compute it as ``logmap(x, y).square().sum(-1)``.

    Args:
        x: Points, `(*, D)`.
        y: Points, `(*, D)`.
        keepdim: Keep the last dimension, with size 1.

    Returns:
        Angles in radians, in [0, pi], `(*)`, or with `keepdim` `(*, 1)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> geodesic_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor(1.5708)

    References:
        Kahan, How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?, 2006,
        section 12.
    """
    _check_vectors(x=x, y=y)
    _check_unit(x=x, y=y)
    x, y = savable(x, y)
    dtype = computed_in(x)
    angle_of = function(_Angle, _ForwardAngle)
    start, end = x.to(dtype), y.to(dtype)
    if start.shape != end.shape:
        start, end = torch.broadcast_tensors(start, end)
    angle: Tensor = angle_of.apply(start, end)
    return (angle.unsqueeze(-1) if keepdim else angle).to(x.dtype)


def slerp(x: Tensor, y: Tensor, t: float | Tensor) -> Tensor:
    r"""Interpolate along the shortest path from `x` to `y` with constant speed.

    Args:
        x: Points where `t` is 0, `(*, D)`.
        y: Points where `t` is 1, `(*, D)`.
        t: The position on the path: a number or a floating point tensor `(*)` that broadcasts with
            the leading dimensions. Outside [0, 1] the path goes on along the great circle.

    Returns:
        Points, `(*, D)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> slerp(x, y, 0.5)
        tensor([0.7071, 0.7071])
        >>> slerp(x, y, torch.tensor([1 / 3, 2.0])).round(decimals=4)
        tensor([[ 0.8660,  0.5000],
                [-1.0000,  0.0000]])

    References:
        Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985.
    """
    _check_vectors(x=x, y=y)
    _check_unit(x=x, y=y)
    t = _as_position("t", t, x, y)
    x, y = savable(x, y)
    dtype = computed_in(x)
    middle, across, squared_half = _arc(x.to(dtype), y.to(dtype))
    # A single number stays as it is: that of a CPU joins the points on any device.
    s = t.to(dtype).unsqueeze(-1) if isinstance(t, Tensor) and t.ndim else t
    # Along the circle through both points, measured from the middle of the path.
    from_middle = 1 - 2 * s
    cos, sinc = _cos_and_sinc(squared_half * from_middle**2)
    length = from_middle / 2 * sinc / _cos_and_sinc(squared_half)[1]
    return (cos * middle + length * across).to(x.dtype)


def expmap(x: Tensor, v: Tensor) -> Tensor:
    r"""Follow the great circle that leaves `x` in the direction of `v` for the length of `v`.

    .. math:: \cos \lVert v \rVert \, x + \frac{\sin \lVert v \rVert}{\lVert v \rVert} \, v

    Args:
        x: Points, `(*, D)`.
        v: Tangent vectors at `x`, `(*, D)`, of any length in radians. The result is a unit vector
            only where `v` is tangent: project gradients with :func:`tangent_projection`.

    Returns:
        Points, `(*, D)`; `x` itself where `v` is 0, with the identity as derivative in `v`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> expmap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, torch.pi / 2])).round(decimals=6)
        tensor([-0.,  1.])
    """
    _check_vectors(x=x, v=v)
    _check_unit(x=x)
    x, v = savable(x, v)
    dtype = computed_in(x)
    step = v.to(dtype)
    cos, sinc = _cos_and_sinc(step.square().sum(-1, keepdim=True))
    return (cos * x.to(dtype) + sinc * step).to(x.dtype)


def logmap(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the tangent vector at `x` that leads to `y`, the inverse of :func:`expmap`.

    Args:
        x: Points, `(*, D)`.
        y: Points, `(*, D)`.

    Returns:
        Tangent vectors at `x` whose lengths are the geodesic distances, in [0, pi], `(*, D)`;
        exactly 0 where the points are equal, with finite derivatives of every order.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> logmap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).round(decimals=4)
        tensor([0.0000, 1.5708])
    """
    _check_vectors(x=x, y=y)
    _check_unit(x=x, y=y)
    x, y = savable(x, y)
    dtype = computed_in(x)
    middle, across, squared_half = _arc(x.to(dtype), y.to(dtype))
    cos, sinc = _cos_and_sinc(squared_half)
    return (2 * squared_half * sinc * middle - cos / sinc * across).to(x.dtype)


def tangent_projection(x: Tensor, v: Tensor) -> Tensor:
    r"""Project vectors onto the tangent spaces at points.

    .. math:: v - (x^\top v) \, x

    Args:
        x: Points, `(*, D)`.
        v: Any vectors, `(*, D)`.

    Returns:
        Tangent vectors at `x`, `(*, D)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> tangent_projection(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0]))
        tensor([0., 3.])
    """
    _check_vectors(x=x, v=v)
    _check_unit(x=x)
    x, v = savable(x, v)
    return _without(x.to(computed_in(x)), v.to(computed_in(x))).to(x.dtype)


def parallel_transport(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    r"""Carry tangent vectors at `x` along the shortest path to `y`.

    With the middle :math:`m` of the path it is :math:`v - 2 (m^\top v) \, m`, a reflection, which
    keeps lengths and angles.

    Args:
        x: Points where the paths begin, `(*, D)`.
        y: Points where the paths end, `(*, D)`.
        v: Tangent vectors at `x`, `(*, D)`.

    Returns:
        Tangent vectors at `y`, `(*, D)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> parallel_transport(x, y, torch.tensor([0.0, 2.0])).round(decimals=6)
        tensor([-2., 0.])
    """
    _check_vectors(x=x, y=y, v=v)
    _check_unit(x=x, y=y)
    x, y, v = savable(x, y, v)
    dtype = computed_in(x)
    middle, _, _ = _axes(x.to(dtype), y.to(dtype))
    return _without(middle, v.to(dtype), times=2).to(x.dtype)


def frechet_mean(x: Tensor, *, weights: Tensor | None = None) -> Tensor:
    r"""Return the point with the smallest mean squared geodesic distance to given points.

    .. math:: \min_\mu \sum_i w_i \, d(\mu, x_i)^2

    Computed in float64 by 32 steps of gradient descent with a fixed step size, and without
    gradient. Points of any length are normalised first, and zero vectors are ignored.

    For points within the angle `r < pi / 2` of the mean, each step multiplies the error by at most
    :math:`\max(0.364, 1 - 1.364 \, r \cot r)`: 0.364 up to `r = 1.2`, where the result is exact to
    rounding; 0.67 for `r = 1.4`. Farther out, the result may be inexact.

    Where the points have no unique mean (antipodes, or points that are spread evenly over the
    sphere), the result is some finite point. For two antipodes it lies on the path that the other
    functions choose.

    Args:
        x: Points, `(*, N, D)` with `N >= 1`.
        weights: A weight >= 0 for each point, `(*, N)`; only their ratios matter. A point of weight
            0 is ignored: it may contain anything, NaN included. Negative and infinite weights are
            an error on a CPU; elsewhere they give NaN, as do weights that are all 0.

    Returns:
        The mean, without gradient, `(*, D)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> frechet_mean(torch.eye(3))
        tensor([0.5774, 0.5774, 0.5774])

    References:
        Buss and Fillmore, Spherical averages and applications to spherical splines and
        interpolation, ACM Transactions on Graphics, 2001.
    """
    _check_points_to_average(x, weights)
    points = exact(x.detach())
    if weights is None:
        w = points.new_ones(points.shape[-2])
    else:
        w = exact(weights.detach())
        points = points.masked_fill((w == 0).unsqueeze(-1), 0)
        w = torch.where(w < 0, torch.nan, w)
    w = (w / w.amax(-1, keepdim=True)).unsqueeze(-2)  # so that their sum does not overflow
    points, w = normalize(points), w / w.sum(-1, keepdim=True)
    heaviest = torch.arange(w.shape[-1], device=x.device) == w.argmax(-1, keepdim=True)
    mean = _direction(w @ points, heaviest.to(points.dtype) @ points).squeeze(-2)
    # A point opposite to the mean pulls in no direction. Starting beside it lets one win.
    opposite = (points @ mean.unsqueeze(-1)).amin(-2) <= -1 + 8 * torch.finfo(points.dtype).eps
    beside = normalize(mean + _direction(torch.zeros_like(mean), mean))
    mean = torch.where(opposite, beside, mean)
    for _ in range(_STEPS):
        cos = (points @ mean.unsqueeze(-1)).mT.clamp(-1, 1)
        # The ratio of an angle to its sine, which are both accurate for this cosine.
        sin = ((1 - cos) * (1 + cos)).sqrt()
        pull = w * torch.where(sin == 0, 1, cos.acos() / sin)
        gradient = (pull @ points).squeeze(-2) - (pull * cos).sum(-1) * mean
        mean = normalize(expmap(mean, _STEP_SIZE * gradient))
    return mean.to(x.dtype)


def random_uniform(
    dim: int,
    *,
    batch_shape: Sequence[int] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw points from the uniform distribution on the sphere.

    Args:
        dim: The dimension `D >= 1` of the space around the sphere.
        batch_shape: The leading dimensions of the result.
        generator: The generator that all randomness comes from; by default torch's global one.
        dtype: The dtype of the result; by default torch's default dtype.
        device: The device of the result; by default torch's default device.

    Returns:
        Points, `(*batch_shape, D)`.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> x = random_uniform(3, batch_shape=(2,), dtype=torch.float64)
        >>> torch.linalg.vector_norm(x, dim=-1).round(decimals=6)
        tensor([1., 1.], dtype=torch.float64)

    References:
        Muller, A note on a method for generating points uniformly on n-dimensional spheres, 1959.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    _checks.check_sample(dim, batch_shape, generator, dtype)
    return normalize(normal((*batch_shape, dim), generator, device)).to(dtype)


_STEPS = 32
# The Hessian of the objective has eigenvalues in [r cot r, 1]; this is best for r = 1.2.
_STEP_SIZE = 1.364


def _axes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the middle of the path between points, and `x - y` and `x + y`, made orthogonal."""
    across, along = x - y, x + y
    # The two are orthogonal but for rounding, which makes one point longer than the other. It
    # matters to the shorter of the two; subtracting it from the longer changes nothing.
    squares = (z.square().sum(-1, keepdim=True) for z in (across, along))
    largest = torch.maximum(*squares)
    tilt = (across * along).sum(-1, keepdim=True) / largest.masked_fill(largest == 0, 1)
    across, along = across - tilt * along, along - tilt * across
    return _direction(along, x), across, along


def _arc(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the middle of the path, `x - y` across it, and the square of half its angle.

    The square is a smooth function of the points where they are equal, which the angle is not.
    """
    middle, across, along = _axes(x, y)
    short, long = (z.square().sum(-1, keepdim=True) for z in (across, along))
    near = short <= 0.01 * long
    # Each branch computes with harmless numbers where the other is chosen: a derivative that is
    # not finite would be multiplied by 0, and become NaN.
    at_antipodes = long == 0
    squared_tan = short.masked_fill(~near, 0) / long.masked_fill(~near | at_antipodes, 1)
    series = torch.zeros_like(squared_tan)
    for n in range(17, 0, -2):  # of atan(z)/z, in powers of z²
        series = 1 / n - squared_tan * series
    length = long.masked_fill(at_antipodes, 1).sqrt().masked_fill(at_antipodes, 0)
    half = torch.atan2(short.masked_fill(near, 1).sqrt(), length)
    squared_half = torch.where(near, squared_tan * series.square(), half.square())
    return middle, across, squared_half


def _direction(v: Tensor, x: Tensor) -> Tensor:
    """Return `v` with unit length, or where it is rounding noise, a point orthogonal to `x`."""
    point = x.detach()
    index = point.abs().argmin(-1, keepdim=True)
    axis = (torch.arange(x.shape[-1], device=x.device) == index).to(x.dtype)
    noise = (
        torch.linalg.vector_norm(v.detach(), dim=-1, keepdim=True) <= 8 * torch.finfo(x.dtype).eps
    )
    return normalize(torch.where(noise, _without(point, axis), v))


def _without(x: Tensor, v: Tensor, times: int = 1) -> Tensor:
    """Subtract from `v` its component along the unit vector `x`, or a multiple of it."""
    return v - times * (x * v).sum(-1, keepdim=True) * x


def _cos_and_sinc(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine of an angle, and its sine over the angle, as functions of its square.

    Near 0 both are polynomials, so derivatives of every order are right there.
    """
    near = square < 0.1
    q = square.masked_fill(~near, 0)
    cos_series = sinc_series = torch.ones_like(q)
    for n in (12, 10, 8, 6, 4, 2):
        cos_series = 1 - q / (n * (n - 1)) * cos_series
        sinc_series = 1 - q / (n * (n + 1)) * sinc_series
    angle = square.masked_fill(near, 1).sqrt()
    cos = torch.where(near, cos_series, angle.cos())
    return cos, torch.where(near, sinc_series, angle.sin() / angle)


class _Angle(Function):
    """The angle between rows of one shape, with the rows alone kept for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        difference, total = x - y, x + y
        short, long = (torch.linalg.vector_norm(z, dim=-1) for z in (difference, total))
        # By rounding alone, one point may be longer than the other by as much as a small angle.
        # Then the difference and the sum are not orthogonal, and their area counts, not the
        # product of their lengths: this makes the angle that of the vectors as they are.
        along = (difference * total).sum(-1)
        along = along.masked_fill(short.square() + long.square() < 3, 0)  # a zero vector
        area = _area(torch.minimum(short, long), torch.maximum(short, long), along)
        return torch.atan2(2 * area, (long - short) * (long + short))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, angle = ctx.saved_tensors
        # The gradients lie along the shorter of x - y and x + y, in which no digits cancel, made
        # orthogonal to x and to y.
        sign = torch.where(angle < math.pi / 2, -1.0, 1.0).to(x.dtype)
        shorter = torch.addcmul(x, sign.unsqueeze(-1), y)
        short, long_x, long_y = (torch.linalg.vector_norm(z, dim=-1) for z in (shorter, x, y))
        along_x = (shorter * x).sum(-1)
        along_y = sign * (short.square() - along_x)
        area = _area(short, long_x, along_x)
        factor = grad / area.masked_fill(area == 0, torch.inf)
        tilt_x = factor * along_x / long_x.masked_fill(long_x == 0, 1).square()
        tilt_y = factor * along_y / long_y.masked_fill(long_y == 0, 1).square()
        first = shorter * factor.unsqueeze(-1)
        at_x, at_y = x * tilt_x.unsqueeze(-1), y * tilt_y.unsqueeze(-1)
        # In place, where nothing else needs the result: to allocate costs more than to compute.
        return at_x.sub_(first).mul_(sign.unsqueeze(-1)), at_y.sub_(first)


class _ForwardAngle(_Angle):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dy: Tensor) -> Any:
        refuse_nested_forward_mode()
        at_x, at_y = _Angle.backward(ctx, torch.ones_like(dx[..., 0]))
        return (at_x * dx + at_y * dy).sum(-1)


def _area(short: Tensor, long: Tensor, along: Tensor) -> Tensor:
    """Return the area that two vectors span, from their lengths and their inner product."""
    along = along / long.masked_fill(long == 0, 1)
    return long * ((short - along) * (short + along)).clamp_min(0).sqrt()


def _check_points_to_average(x: Any, weights: Any) -> None:
    """Require points `(*, N, D)`, and a weight `(*, N)` for each or None."""
    check_floating("x", x)
    if x.ndim < 2 or x.shape[-2] < 1 or x.shape[-1] < 1:
        raise ValueError(
            f"`x` must have shape (*, N, D) with N >= 1 and D >= 1, got {tuple(x.shape)}: pass "
            "one point per row."
        )
    check_row_weights(weights, "x", x, "x", x.shape[:-2])


def _check_vectors(**tensors: Any) -> None:
    """Require vectors `(*, D)` of one D, one dtype and one device, with shapes that broadcast."""
    for name, x in tensors.items():
        check_floating(name, x)
        if not x.ndim or x.shape[-1] < 1:
            raise ValueError(
                f"`{name}` must have shape (*, D) with D >= 1, got {tuple(x.shape)}: the last "
                "dimension holds the entries of a vector."
            )
    (name, first), *others = tensors.items()
    names, leading = name, first.shape[:-1]
    for other_name, other in others:
        if first.shape[-1] != other.shape[-1]:
            raise ValueError(
                f"`{name}` and `{other_name}` must have the same D in their shapes (*, D), got "
                f"{tuple(first.shape)} and {tuple(other.shape)}: pass vectors of the same space."
            )
        check_same_dtype_and_device(name, first, other_name, other)
        if other.shape[:-1] != leading:
            leading = as_broadcast(names, leading, other_name, other.shape[:-1])
        names += f"` and `{other_name}"


def _check_unit(**tensors: Tensor) -> None:
    """Require unit vectors, or zero vectors, where their lengths can be read."""
    for name, x in tensors.items():
        length = read_on_cpu(x, _length_farthest_from_1)
        if length is not None and abs(length - 1) > 0.01:
            raise ValueError(
                f"`{name}` must contain unit vectors along the last dimension, got one of length "
                f"{length:.3g}: pass care_loss.sphere.normalize({name})."
            )


def _as_position(name: str, value: Any, x: Tensor, y: Tensor) -> float | Tensor:
    """Require a finite number or a tensor that broadcasts with `x` and `y`, and return it."""
    if isinstance(value, Tensor):
        check_floating(name, value)
        if value.ndim or value.device.type != "cpu":  # a single number may stay there
            check_on_device(name, value, x.device, "the points")
        leading = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        as_broadcast("x` and `y", leading, name, value.shape)
        return value
    if not is_real(value) or not abs(value) < math.inf:
        raise TypeError(
            f"`{name}` must be a finite number or a torch.Tensor of a floating point dtype, got "
            f"{show(value)}: convert it with torch.as_tensor() or float()."
        )
    return value if type(value) is float else float(value)


def _length_farthest_from_1(x: Tensor) -> float:
    """Return the length that differs most from 1 among vectors that are finite and not 0."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1)
    least, most = map(float, length.aminmax())
    if not 0 < least <= most < math.inf:
        length = length.masked_fill(~((length > 0) & (length < math.inf)), 1)
        least, most = map(float, length.aminmax())
    return least if 1 - least > most - 1 else most
