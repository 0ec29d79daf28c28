"""What the actions of all groups share: their buffers, their methods, and the checks of these.

A group adds how its elements are checked, what they do to coordinates in the basis, which of them
is the best for given products of coordinates, and its powers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from care_loss._checks import (
    as_broadcast,
    check_floating,
    check_on_device,
    is_int,
    is_real,
    read_on_cpu,
    show,
)
from care_loss._numerics import computed_in, exact
from care_loss.sphere import normalize


class Pose(NamedTuple):
    """The element of a group that takes one embedding nearest to another.

    Attributes:
        element: The element: for the circle an angle in (-pi, pi], `(*)`, for rotations of space a
            matrix, `(*, 3, 3)`.
        gap: How much worse the next best local optimum is, in [0, 1], `(*)`.
    """

    element: Tensor
    gap: Tensor


class Action(nn.Module):
    """A representation of a group on embeddings, in an orthonormal basis."""

    _label: str  # what tells irreducible parts apart, for errors
    _element_ndim: int  # the dimensions of one element
    basis: Tensor
    multiplicity: Tensor
    explained: Tensor
    explained_free: Tensor

    def __init__(self, basis: Tensor, multiplicity: Tensor | Sequence[int]) -> None:
        super().__init__()
        self._counts = self._as_counts(multiplicity)
        self._check_basis(basis)
        counts = torch.tensor(self._counts, device=basis.device)
        nan = torch.tensor(torch.nan, dtype=basis.dtype, device=basis.device)
        self.register_buffer("basis", basis.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("multiplicity", counts)
        self.register_buffer("explained", nan)
        self.register_buffer("explained_free", nan.clone())
        # Shapes depend on the multiplicities, which must be known without reading a tensor.
        self._turning = [k for k, m in enumerate(self._counts) if k and m]

    def extra_repr(self) -> str:
        return f"dim={self.basis.shape[0]}, multiplicity={list(self._counts)}"

    def rotation(self, g: Tensor) -> Tensor:
        """Return the rotations by which elements of the group act.

        They are a homomorphism to rounding: the rotation of a product is that of the first element,
        times that of the second.

        Args:
            g: Elements of the group: angles in radians, `(*)`, or rotations of space,
                `(*, 3, 3)`.

        Returns:
            Rotations in the dtype of the basis, `(*, D, D)`.
        """
        g = self._as_elements("g", g).unsqueeze(-1 - self._element_ndim)
        x = exact(self.basis)
        identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
        return self._moved(identity, g).to(self.basis.dtype)

    def apply(self, z: Tensor, g: Tensor) -> Tensor:  # type: ignore[override]
        """Turn embeddings by elements: `z @ rotation(g)`, without forming the rotations.

        `nn.Module.apply`, which takes a function, has no use here: there are no submodules.

        Args:
            z: Embeddings, `(*, D)`.
            g: Elements, `(*)` or `(*, 3, 3)`; both have gradients.

        Returns:
            Embeddings in the dtype of `z`, `(*, D)`.
        """
        self._check_rows(z=z)
        g = self._as_elements("g", g)
        as_broadcast("z", z.shape[:-1], "g", g.shape[: g.ndim - self._element_ndim])
        return self._moved(exact(z), g).to(z.dtype)

    def parts(self, z: Tensor) -> dict[int, Tensor]:
        """Split embeddings by frequency or degree.

        Args:
            z: Embeddings, `(*, D)`.

        Returns:
            The coordinates in the basis: those that do not turn with the key 0, `(*, m_0)`, and for
            each frequency k that occurs the real and imaginary parts, `(*, m_k, 2)`, which
            `torch.view_as_complex` takes, or for each degree l that occurs `(*, m_l, 2l + 1)`.
        """
        self._check_rows(z=z)
        parts = self._parts(exact(z))
        return {k: part.to(z.dtype).contiguous() for k, part in parts.items()}

    def canonical(self, z: Tensor) -> Tensor:
        r"""Turn embeddings into the same state for all states of an image.

        It is the state nearest to a fixed reference, which the class describes: the pose to the
        reference is applied. This is defined for any multiplicities, since elements that
        :meth:`pose` cannot tell apart act in the same way. It is continuous except where two states
        fit the reference equally well. Where the pose is NaN, the embedding is returned as it is.

        Args:
            z: Embeddings, `(*, D)`.

        Returns:
            Embeddings in the dtype of `z`, `(*, D)`.
        """
        self._check_rows(z=z)
        x = exact(z)
        fixed = exact(self.basis)[:, self._counts[0] :] @ self._reference()
        element, _ = self._best(x, fixed.expand_as(x))
        return self._moved(x, self._or_neutral(element)).to(z.dtype)

    def interpolate(self, z1: Tensor, z2: Tensor, t: Tensor | float) -> Tensor:
        """Turn an embedding part of the way to another, along the group.

        At t = 0 it is `z1`, and at t = 1 the state of `z1` that is nearest to `z2`: the image stays
        that of `z1`. On the way it is `z1` turned by t times the angle of the pose, about its axis,
        which is the shorter way round. Where nothing turns, it is `z1`.

        Args:
            z1: Embeddings, `(*, D)`.
            z2: Embeddings in the dtype of `z1`, `(*, D)`.
            t: Any numbers, `(*)`, or a Python number.

        Returns:
            Embeddings in the dtype of `z1`, `(*, D)`.
        """
        element, gap = self._pose(z1, z2)
        if isinstance(t, Tensor):
            check_floating("t", t)
            check_on_device("t", t, self.basis.device, "the action")
            as_broadcast("t", t.shape, "z1` and `z2", gap.shape)
            t = exact(t)
        elif not is_real(t):
            raise TypeError(f"`t` must be a number or a torch.Tensor, got {show(t)}.")
        return self._moved(exact(z1), self._power(self._or_neutral(element), t)).to(z1.dtype)

    @staticmethod
    def _size(k: int) -> int:
        """Return the dimension of an irreducible part."""
        raise NotImplementedError

    @classmethod
    def _width(cls, counts: Sequence[int]) -> int:
        """Return the number of directions that multiplicities make."""
        return sum(m * cls._size(k) for k, m in enumerate(counts))

    @classmethod
    def _as_counts(cls, multiplicity: Any) -> tuple[int, ...]:
        """Require integers >= 0, not all 0, and return them as a tuple."""
        counts = multiplicity.tolist() if isinstance(multiplicity, Tensor) else multiplicity
        is_list = isinstance(counts, (list, tuple))
        if not is_list or not all(is_int(m) and m >= 0 for m in counts) or not any(counts):
            raise ValueError(
                "`multiplicity` must be integers >= 0 of shape (K + 1,), not all 0, got "
                f"{counts if is_list else show(multiplicity)}: pass how often each {cls._label} 0, "
                "1, ..., K occurs."
            )
        return tuple(int(m) for m in counts)

    def _as_elements(self, name: str, g: Any) -> Tensor:
        """Require elements of the group, and return them in float64."""
        raise NotImplementedError

    def _turned(self, y: Tensor, g: Tensor) -> Tensor:
        """Turn coordinates in the basis but those that do not turn, `(*, D' - m_0)`."""
        raise NotImplementedError

    def _optimum(self, products: dict[int, Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best element, its gap, and the size of the objective, `(*)`.

        The products of the coordinates of two rows, by frequency or degree, are sums over i of
        the outer products of their coordinates of copy i.
        """
        raise NotImplementedError

    def _reference(self) -> Tensor:
        """Return the turning coordinates of the reference of canonical states, `(D' - m_0,)`."""
        raise NotImplementedError

    def _power(self, element: Tensor, t: Tensor | float) -> Tensor:
        """Return elements to the power of t, the shorter way round."""
        raise NotImplementedError

    def _neutral(self, like: Tensor) -> Tensor:
        """Return the neutral element, in the dtype and on the device of a tensor."""
        raise NotImplementedError

    def _or_neutral(self, element: Tensor) -> Tensor:
        return torch.where(element.isnan(), self._neutral(element), element)

    def _moved(self, x: Tensor, g: Tensor) -> Tensor:
        turning = exact(self.basis)[:, self._counts[0] :]
        y = x @ turning
        # What does not turn is never projected, so it keeps its digits.
        return x + (self._turned(y, g) - y) @ turning.mT

    def _split(self, y: Tensor) -> dict[int, Tensor]:
        """Split turning coordinates into `(*, m_k, size)` for each k that occurs."""
        sizes = [self._counts[k] * self._size(k) for k in self._turning]
        blocks = y.split(sizes, -1) if sizes else ()
        return {
            k: block.unflatten(-1, (self._counts[k], self._size(k)))
            for k, block in zip(self._turning, blocks, strict=True)
        }

    def _parts(self, x: Tensor) -> dict[int, Tensor]:
        y, fixed = x @ exact(self.basis), self._counts[0]
        return {0: y[..., :fixed], **self._split(y[..., fixed:])}

    def _pose(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """Check embeddings, and return pose and gap before they are rounded."""
        self._check_rows(z1=z1, z2=z2)
        if z1.dtype != z2.dtype:
            raise ValueError(
                f"`z1` and `z2` must have the same dtype, got {z1.dtype} and {z2.dtype}: convert "
                "one of them with .to()."
            )
        as_broadcast("z1", z1.shape[:-1], "z2", z2.shape[:-1])
        return self._best(z1, z2)

    def _best(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        x, y = normalize(exact(z1)), normalize(exact(z2))
        first, second = self._parts(x), self._parts(y)
        one = (..., *[None] * self._element_ndim)
        if not self._turning:
            zero = x.new_zeros(torch.broadcast_shapes(x.shape[:-1], y.shape[:-1]))
            return zero[one] * self._neutral(x) + torch.nan, zero
        products = {k: first[k].mT @ second[k] for k in self._turning}
        eps = max(torch.finfo(dtype).eps for dtype in (self.basis.dtype, computed_in(z1)))
        element, gap, size = self._optimum(products, eps)
        still = size <= 8 * eps  # of unit rows, correlations of this size are rounding errors
        return element.masked_fill(still[one], torch.nan), gap.masked_fill(still, 0)

    def _check_rows(self, **rows: Any) -> None:
        """Require embeddings `(*, D)` on the device of the basis."""
        for name, z in rows.items():
            check_floating(name, z)
            if z.ndim < 1 or z.shape[-1] != len(self.basis):
                raise ValueError(
                    f"`{name}` must have shape (*, {len(self.basis)}), got {tuple(z.shape)}: pass "
                    "embeddings of the encoder that the action was fitted to."
                )
            check_on_device(name, z, self.basis.device, "the action")

    def _check_basis(self, basis: Any) -> None:
        """Require orthonormal columns `(D, D')`, as many as the multiplicities make."""
        check_floating("basis", basis)
        width = self._width(self._counts)
        if basis.ndim != 2 or basis.shape[1] != width or len(basis) < width:
            raise ValueError(
                f"`basis` must have shape (D, {width}) with D >= {width} for the multiplicities "
                f"{list(self._counts)}, got {tuple(basis.shape)}: pass one column per direction, "
                f"ordered by {self._label}."
            )
        identity = torch.eye(width, dtype=basis.dtype, device=basis.device)
        deviation = read_on_cpu(basis, lambda b: float((b.mT @ b - identity).abs().max()))
        if deviation is not None and not deviation <= 0.05:
            raise ValueError(
                "`basis` must have orthonormal columns, got an entry of B.mT @ B - I of "
                f"{deviation:.3g}: pass torch.linalg.qr(basis).Q."
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}multiplicity")
        if loaded is not None and tuple(loaded.tolist()) != self._counts:
            raise ValueError(
                f"`multiplicity` of the state_dict must be {list(self._counts)}, as in the module, "
                f"got {loaded.tolist()}: make the module as {type(self).__name__}(state['basis'], "
                "state['multiplicity'])."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
