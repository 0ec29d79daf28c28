"""The orthogonal polar factor of matrices, with derivatives of every order.

It is P Qᵀ of the singular value decomposition P S Qᵀ. Differentiating a decomposition divides by
differences of singular values; the derivative here divides by sums of them only. What counts as a
singular value of 0 is decided once, in the forward, for the factor and for its derivatives.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from care_loss._numerics import function, refuse_nested_forward_mode, use_operator


def polar(
    x: Tensor,
    *,
    special: bool = False,
    full: bool = False,
    zero: float = 0.0,
    tie: float = 0.0,
    floor: float | None = 0.0,
    rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the orthogonal polar factor of matrices `(*, N, D)` with `N <= D`.

    Without `full` it is a partial isometry: 0 where the matrix is 0. With it (`N = D`) it is
    orthogonal, the nearest to the identity where singular values are 0, and of determinant 1 where
    `special`. Which singular values s_i count as 0 or as equal, with the largest s_1:

    ========  ===================================  ==============================================
    `noise`   s_i <= noise s_1 is 0                always: what rounding makes of a 0
    `floor`   s_i <= floor is 0 (an absolute       by fits: their rows have the size 1, and what
              size; None: as `noise`)              is far smaller is rounding of the rows
    `zero`    s_i + ... + s_N <= zero s_1 is 0     by `nearest_orthogonal`: a sum that is lost in
                                                   the rounding of the objective
    `tie`     s_i - s_N <= tie s_1 is equal        by both: 8 eps of the dtype of the result
    ========  ===================================  ==============================================

    Returns:
        The factor `(*, N, D)`, the eigenvectors `(*, N, N)` of `x @ factor.mT`, and its eigenvalues
        `(*, N)`, descending: the singular values, the last with a sign where `special`. Only the
        factor has a derivative.
    """
    apply = _operator if use_operator() else function(_Polar, _ForwardPolar).apply
    return apply(x, special, full, zero, tie, floor, rows)  # type: ignore[no-any-return]


def rounding_noise(x: Tensor, size: int) -> float:
    """Return what rounding makes of a singular value of 0, relative to the largest.

    Seen with LAPACK: up to 3.4 eps for D = 2, 4.6 eps for 128 and 10.1 eps for 1024.
    """
    root: float = size**0.5  # math.sqrt would take a symbol of a tracer for a number
    return (4 + root) * torch.finfo(x.dtype).eps


def _error_of_solver(x: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> Tensor | float:
    """Return the error `(*, 1)` of singular values `(*, N)` of `x` beyond `rounding_noise`.

    That of LAPACK is known. Solvers of other devices iterate until they decide to stop: the lengths
    of x v_i - s_i u_i say how far the values are from what `x` makes of their vectors. The longest
    counts for all values, so that those taken for 0, or for equal, are always the last ones.
    """
    if _by_lapack(x):
        return 0.0
    rest = torch.linalg.vector_norm(x @ vh.mT - u * s.unsqueeze(-2), dim=-2)
    error: Tensor = rest.amax(-1, keepdim=True)
    return error


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin decomposition u, s, vh of matrices `(*, N, D)`."""
    if _by_lapack(x):
        u, s, vh = _svd_by_lapack(x.cpu())
        return u.to(x.device), s.to(x.device), vh.to(x.device)
    # CUDA's default misses singular values of 512 x 512 by 1000 eps, and gesvd by 50. ROCm, which
    # calls itself cuda too, has no choice of drivers.
    is_large = x.is_cuda and min(x.shape[-2:]) > 256
    driver = "gesvd" if is_large and torch.version.cuda else None
    return torch.linalg.svd(x, full_matrices=False, driver=driver)  # type: ignore[no-any-return]


def _svd_by_lapack(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose matrices on a CPU, also where LAPACK's gesdd gives up.

    It does so for some matrices with many equal singular values. The transpose, and a reflection,
    have the same values, and take other steps to them.
    """
    if torch.compiler.is_compiling():
        return torch.linalg.svd(x, full_matrices=False)  # type: ignore[no-any-return]
    try:
        return torch.linalg.svd(x, full_matrices=False)  # type: ignore[no-any-return]
    except LinAlgError:
        pass
    try:
        v, s, uh = torch.linalg.svd(x.mT, full_matrices=False)
        return uh.mT, s, v.mT
    except LinAlgError:
        normal = torch.arange(1, x.shape[-2] + 1, dtype=x.dtype).sqrt()
        normal = (normal / torch.linalg.vector_norm(normal)).unsqueeze(-1)
        u, s, vh = torch.linalg.svd(x - 2 * normal @ (normal.mT @ x), full_matrices=False)
        return u - 2 * normal @ (normal.mT @ u), s, vh


def _by_lapack(x: Tensor) -> bool:
    """Whether LAPACK decomposes these matrices: on a CPU, and those of middle size of a GPU.

    CUDA takes those of up to 32 x 32 as one batch, and larger ones one by one, which is slower than
    LAPACK up to 128 x 128, as slow at 256 x 256, and less exact (docs/speed.md).
    """
    middle = max(x.shape[-2:]) > 32 and min(x.shape[-2:]) <= 256
    return x.device.type == "cpu" or (x.is_cuda and middle)


def polished(factor: Tensor) -> Tensor:
    """Take one step of Newton and Schulz, which removes most of the rounding errors."""
    return 1.5 * factor - 0.5 * (factor @ factor.mT) @ factor


def polar_by_products(x: Tensor, steps: int) -> tuple[Tensor, bool]:
    """Return the polar factors of matrices `(*, D, D)`, and whether the steps were enough.

    The iteration of Newton and Schulz brings singular values in (0, 1] to 1, each by a factor of up
    to 1.5 in a step. It does not mind equal ones, for which LAPACK's svd has failed, and two
    products of a batch take less time than its decompositions.
    """
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    noise = 4 * len(identity) ** 0.5 * torch.finfo(x.dtype).eps
    # A norm of the Gram matrix, for orthogonal columns the largest singular value squared.
    scale = torch.linalg.matrix_norm(x.mT @ x, math.inf, keepdim=True).sqrt()
    x = x / scale
    for _ in range(steps):
        error = x.mT @ x - identity
        x = x - 0.5 * x @ error
        if error.abs().max() <= noise:
            return x, True
    return x, False


def _toward_identity(p: Tensor, q: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the singular vectors of the value 0 that bring `p @ q.mT` nearest to the identity."""
    block = null.unsqueeze(-1) & null.unsqueeze(-2)
    identity = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    # Null directions come last, and so do the singular values of their block: none exceeds 1.
    a, _, bh = svd(torch.where(block, p.mT @ q, 2 * identity))
    return p @ torch.where(block, a, identity), q @ torch.where(block, bh.mT, identity)


def _best_to_flip_last(p: Tensor, q: Tensor, tied: Tensor) -> tuple[Tensor, Tensor]:
    """Turn tied singular vectors so that flipping the last costs `p @ q.mT` the least trace."""
    block = tied.unsqueeze(-1) & tied.unsqueeze(-2)
    identity = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    # The symmetric part has eigenvalues in [-1, 1], which + 2 makes singular values: they descend,
    # and the tied directions come last, as the others have 4. CUDA's eigh fails for large batches.
    trace = q.mT @ p
    e, _, _ = svd(torch.where(block, (trace + trace.mT) / 2, 2 * identity) + 2 * identity)
    e = torch.where(block, e, identity)
    return p @ e, q @ e


def sign_of_reflections(q: Tensor) -> Tensor:
    """Return 1 or -1 for an even or odd number of reflections in a QR decomposition."""
    reflectors, scales = torch.geqrf(q)
    negative = reflectors.diagonal(dim1=-2, dim2=-1) < 0
    odd = (negative.sum(-1) + (scales != 0).sum(-1)) % 2
    return 1 - 2 * odd.to(q.dtype)


@torch.library.custom_op("care_loss::determinant", mutates_args=())
def determinant(q: Tensor) -> Tensor:
    """Return the determinant of orthogonal matrices `(*, D, D)`, 1 or -1.

    It counts the reflections of a QR decomposition. In float32 `det` underflows (to 0 from D = 384
    on), and `slogdet` shares its LU decompositions, which can be wrong for batches: with torch
    2.13, MKL and two threads they are, from D = 256 on. On CUDA `geqrf` takes matrices one by one,
    and `slogdet` is right (docs/speed.md). An operator, as torch.compile does not know the shapes
    of `geqrf`.
    """
    if q.is_cuda:
        sign: Tensor = torch.linalg.slogdet(q).sign
        return sign
    return sign_of_reflections(q)


@determinant.register_fake
def _(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:-2])


@determinant.register_vmap
def _(info: Any, in_dims: Any, q: Tensor) -> Any:
    return determinant(q.movedim(in_dims[0], 0)), 0


def with_last_times(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the last entries of `x` along dim -1 by a factor."""
    return torch.cat((x[..., :-1], x[..., -1:] * factor), -1)


def any_true(mask: Tensor) -> bool:
    """Tell whether anything is true; where values cannot be read, something may be."""
    if torch.compiler.is_compiling() or mask.is_meta:
        return True
    try:
        return bool(mask.any())
    except RuntimeError:  # under vmap there is no single value
        return True


class _Polar(Function):
    """The polar factor, with a derivative that is its own transpose.

    With h = x factorᵀ and the solution w of h w + w h = dx factorᵀ - factor dxᵀ it is w factor, and
    for what leaves the row space of a partial isometry, h⁺ dx (1 - factorᵀ factor).
    """

    @staticmethod
    def forward(
        x: Tensor,
        special: bool,
        full: bool,
        zero: float,
        tie: float,
        floor: float | None,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        noise = rounding_noise(x, max(rows, *x.shape[-2:]))
        tie = torch.sym_max(tie, noise)
        broken = ~x.sum((-2, -1), keepdim=True).isfinite()
        # The transpose lies in memory as LAPACK wants it.
        transposed = x.masked_fill(broken, 0).mT
        q, s, ph = svd(transposed)
        p, top = ph.mT, s[..., :1]
        unknown = _error_of_solver(transposed, q, s, ph)
        tail = s.flip(-1).cumsum(-1).flip(-1)
        floor = noise if floor is None else floor
        null = (tail <= zero * top) | (s <= (noise * top).clamp_min(floor) + unknown)
        s = s.masked_fill(null, 0)
        if not full:
            q = q.masked_fill(null.unsqueeze(-2), 0)
        elif any_true(null):
            p, q = _toward_identity(p, q, null)
        if special:
            sign = determinant(p @ q.mT).unsqueeze(-1)
            tied = (s - s[..., -1:] <= tie * top + 2 * unknown) & ~null[..., -1:] & (sign < 0)
            if any_true(tied[..., :-1]):
                p, q = _best_to_flip_last(p, q, tied)
            s = torch.where(tied, s[..., -1:], s)
            p = with_last_times(p, sign.unsqueeze(-1))
            s = with_last_times(s, sign)
        factor = polished(p @ q.mT).masked_fill(broken, torch.nan)
        return factor, p, s.masked_fill(broken[..., 0], torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, ctx.full, *_ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, *output)
        ctx.save_for_forward(x, *output)

    @staticmethod
    def backward(ctx: Any, step: Tensor, *_: Any) -> Any:
        x, factor, basis, values = ctx.saved_tensors
        h, k = x @ factor.mT, step @ factor.mT
        sums = values.unsqueeze(-1) + values.unsqueeze(-2)
        # Only sums of singular values are divided by, so equal ones do no harm. Where a sum is 0
        # the factor may turn freely, and has no derivative. The forward has made those sums exactly
        # 0 that are 0 but for rounding.
        inverse = torch.where(sums > 0, 1 / sums, 0)
        result = _solve(h, k - k.mT, basis, inverse) @ factor
        if not ctx.full:
            kept = basis * (values > 0).to(basis.dtype).unsqueeze(-2)
            pseudoinverse = _solve(h, 2 * kept @ basis.mT, basis, inverse)
            result = result + pseudoinverse @ (step - k @ factor)
        return result, *6 * [None]

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *settings: Any) -> Any:
        x = x.movedim(in_dims[0], 0)
        return function(_Polar, _ForwardPolar).apply(x, *settings), (0, 0, 0)


class _ForwardPolar(_Polar):
    @staticmethod
    def jvp(ctx: Any, step: Tensor, *_: Any) -> Any:
        refuse_nested_forward_mode()
        return _Polar.backward(ctx, step)[0], None, None


@torch.library.custom_op("care_loss::polar", mutates_args=())
def _operator(
    x: Tensor, special: bool, full: bool, zero: float, tie: float, floor: float | None, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for compilers, which take long to compile it, and cannot read values."""
    factor, basis, values = _Polar.forward(x, special, full, zero, tie, floor, rows)
    return factor.contiguous(), basis.contiguous(), values.contiguous()


@_operator.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], x.shape[-2]), x.new_empty(x.shape[:-1])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.full = inputs[2]
    ctx.save_for_backward(inputs[0], *output)


_operator.register_autograd(_Polar.backward, setup_context=_save)


def _solve(h: Tensor, k: Tensor, basis: Tensor, inverse: Tensor) -> Tensor:
    return function(_Solve, _ForwardSolve).apply(h, k, basis, inverse)  # type: ignore[no-any-return]


class _Solve(Function):
    """The solution x of h x + x h = k, for symmetric h.

    The columns of `basis` are the eigenvectors of h, and `inverse` has the reciprocals of the sums
    of its eigenvalues. The derivatives solve the same equation: they are finite to every order,
    where those of eigenvectors are not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, k: Tensor, basis: Tensor, inverse: Tensor) -> Tensor:
        return basis @ (inverse * (basis.mT @ k @ basis)) @ basis.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        h, _, *factors = inputs
        ctx.save_for_backward(h, output, *factors)
        ctx.save_for_forward(h, output, *factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, x, *factors = ctx.saved_tensors
        grad = _solve(h, grad, *factors)
        return -grad @ x.mT - x.mT @ grad, grad, None, None


class _ForwardSolve(_Solve):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, dh: Tensor, dk: Tensor, *_: Any) -> Any:
        h, x, *factors = ctx.saved_tensors
        return _solve(h, dk - dh @ x - x @ dh, *factors)
