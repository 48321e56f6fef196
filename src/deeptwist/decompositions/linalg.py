"""Low-rank approximations of matrices, exact or from a start, safe at any scale."""

import torch
from torch import Tensor

from deeptwist.layers.geometry import compute_dtype
from deeptwist.layers.moments import SecondMoment

_RIDGE = 1e-8  # of a second moment's mean eigenvalue, added to all: no direction counts for nothing
_MIN_RIDGE = 1e-30  # the same for an input that is zero altogether


def truncated_svd(
    matrix: Tensor,  # (…, m, n)
    rank: int,
    second_moment: Tensor | None = None,  # (…, n, n)
) -> tuple[Tensor, Tensor]:  # (…, m, rank), (…, rank, n)
    """Return the best approximation of this rank (Eckart–Young), its scale split evenly.

    A matrix in fp32 or narrower goes through the eigenvectors of its Gram matrix in fp64: to
    square the condition costs half the digits, and fp64 has twice those of fp32, so the result is
    as exact as an SVD in fp32 and several times cheaper.

    Args:
        matrix: of any floating type; computed in fp32, or fp64 where it is fp64.
        rank: from 1 to min(m, n).
        second_moment: of what the columns multiply; with it, ‖(W − W′) M^½‖ is least.

    Returns:
        The left and the right factor, whose product is the approximation.
    """
    dtype = compute_dtype(matrix.dtype)
    unit, scale = to_unit_scale(matrix.double(), 2)
    if second_moment is not None:
        left, right = _weighted_svd(unit, rank, second_moment)
    elif matrix.shape[-2] > matrix.shape[-1]:
        right, left = (side.mT for side in _plain_svd(unit.mT, rank, dtype))
    else:
        left, right = _plain_svd(unit, rank, dtype)
    # Half of the scale each, so that neither factor over- or underflows.
    norms = [torch.linalg.vector_norm(x, dim=d, keepdim=True) for x, d in ((left, -2), (right, -1))]
    root = (norms[0].mT * norms[1] * scale).sqrt()  # (…, rank, 1)
    tiny = torch.finfo(unit.dtype).tiny
    left, right = (x / norm.clamp_min(tiny) for x, norm in zip((left, right), norms, strict=True))
    return (left * root.mT).to(dtype), (right * root).to(dtype)


def _plain_svd(
    unit: Tensor,  # (…, m, n)
    rank: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (…, m, rank), (…, rank, n)
    if dtype == torch.float64:
        basis = torch.linalg.svd(unit, full_matrices=False).U[..., :rank]
    else:
        basis = leading_subspace(unit, rank)
    return basis, basis.mT @ unit


def _weighted_svd(
    unit: Tensor,  # (…, m, n)
    rank: int,
    second_moment: Tensor,  # (…, n, n)
) -> tuple[Tensor, Tensor]:  # (…, m, rank), (…, rank, n)
    if unit.shape[-2] <= unit.shape[-1]:
        # The best W′ is U Uᵀ W, with the leading eigenvectors U of W M Wᵀ.
        basis = leading_eigenvectors(unit @ regularized(second_moment) @ unit.mT, rank)
        return basis, basis.mT @ unit
    root = cholesky(second_moment)
    whitened = unit @ root
    basis = leading_eigenvectors(whitened.mT @ whitened, rank)
    return whitened @ basis, torch.linalg.solve_triangular(root, basis.mT, upper=False, left=False)


def squared_singular_values(
    matrix: Tensor,  # (…, m, n)
    second_moment: Tensor | None = None,  # (…, n, n)
) -> Tensor:  # (…, min(m, n))
    """Return the squared singular values of W M^½, the largest first.

    Args:
        matrix: W, of unit scale, in fp64.
        second_moment: M, whose scale is taken out; the identity where it is `None`.
    """
    if second_moment is not None:
        if matrix.shape[-2] <= matrix.shape[-1]:
            return _descending(matrix @ regularized(second_moment) @ matrix.mT)
        matrix = matrix @ cholesky(second_moment)
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = matrix.mT
    return _descending(matrix @ matrix.mT)


def _descending(gram: Tensor) -> Tensor:  # (…, n, n) → (…, n)
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(-1).clamp_min(0)


def refine(
    matrix: Tensor,  # (…, m, n)
    left: Tensor,  # (…, m, rank)
) -> tuple[Tensor, Tensor]:  # (…, m, rank), orthonormal, and (…, rank, n)
    """Return a low-rank approximation from the left factor of one that was good a moment ago.

    One step of subspace iteration: it is within 0.1 % of the least squared error where the matrix
    moved by 5 % (``docs/decompositions.md``), and its error is a projection's wherever it moved.

    Args:
        matrix: finite.
        left: the columns that it begins with, of any norm.
    """
    left = power_step(matrix, left)
    return left, left.mT @ matrix


def power_step(
    matrix: Tensor,  # (…, m, n)
    basis: Tensor,  # (…, m, r)
) -> Tensor:  # (…, m, r)
    """Return orthonormal columns that span (W Wᵀ) basis of a matrix W, at any scale.

    Where that lacks rank, other directions fill it up.
    """
    # As rows: processors multiply them by contiguous matrices several times faster.
    image = to_unit_scale(to_unit_scale(basis, 2)[0].mT @ matrix, 2)[0]
    rows = to_unit_scale(image @ matrix.mT, 2)[0]
    orthonormal: Tensor = torch.linalg.qr(rows.mT).Q
    return orthonormal


def leading_subspace(matrix: Tensor, rank: int) -> Tensor:  # (…, m, n) → (…, m, rank)
    """Return an orthonormal basis of the leading left singular subspace, by the Gram matrix.

    The strongest direction comes first. The matrix is of unit scale, the rank at most m.
    """
    return leading_eigenvectors(matrix @ matrix.mT, rank)


def leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:  # (…, n, n) → (…, n, rank)
    """Return the eigenvectors of the largest eigenvalues, the largest first."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[..., -rank:].flip(-1)


def regularized(second_moment: Tensor) -> Tensor:  # (b, n, n) → (b, n, n)
    """Return second moments, the largest at unit scale, in fp64, positive definite.

    Directions that no input had, as of dead channels or of fewer inputs than directions, then count
    for little, but not for nothing: as much as what rounding may have left of them below zero.
    """
    floor = max(_RIDGE, second_moment.shape[-1] * torch.finfo(second_moment.dtype).eps)
    moment = to_unit_scale(second_moment.double(), second_moment.dim())[0]
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return moment + (mean * floor).clamp_min(_MIN_RIDGE) * identity


def solve_gram(
    gram: Tensor,  # (…, r, r), symmetric, not negative
    target: Tensor,  # (…, r, n)
    damping: float,
) -> Tensor:  # (…, r, n)
    """Return (gram + damping · its mean eigenvalue)⁻¹ target, without waiting for an accelerator.

    A Gram matrix of zeros gives zero for a target of zeros.
    """
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = (damping * mean).clamp_min(torch.finfo(gram.dtype).tiny)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(gram + ridge * identity)
    solution: Tensor = torch.cholesky_solve(target, factor)
    return solution


def cholesky(second_moment: Tensor) -> Tensor:  # (b, n, n) → (b, n, n)
    """Return the triangular L of a regularized M = L Lᵀ, damped as far as it takes to have one.

    Of inputs that all but vanish, what rounding leaves need not be positive definite.
    """
    moment = regularized(second_moment)
    more = moment.diagonal(dim1=-2, dim2=-1).abs().amax(-1).clamp_min(_MIN_RIDGE) * _RIDGE  # (b,)
    while True:
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(moment)
        if not failed.any():
            return root
        moment = moment + torch.diag_embed((more * (failed > 0))[:, None].expand(moment.shape[:-1]))
        more = more * 10


def to_unit_scale(
    tensor: Tensor,  # (…, *sides), of so many dims
    dims: int,
) -> tuple[Tensor, Tensor]:  # as the tensor, and (…, *ones)
    """Return a tensor divided by the largest number in its last `dims` axes, and that number.

    Squares of its numbers then neither over- nor underflow; zeros stay, at scale 1.
    """
    scale = tensor.abs().amax(dim=tuple(range(-dims, 0)), keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return tensor / scale, scale


def relative_error(
    exact: Tensor,  # (…,)
    approximation: Tensor,  # (…,)
    second_moment: SecondMoment | None = None,
) -> float:
    """Return ‖y − y′‖ / ‖y‖ of two tensors of one shape; ‖y′‖ where y is zero.

    Computed in fp64 at unit scale, so that no square of fp32 numbers under- or overflows. NaN
    where a number is not finite. Of kernels whose inputs' second moment is given, it is that of the
    outputs, see `SecondMoment.relative_error`.
    """
    if second_moment is not None:
        return second_moment.relative_error(exact, approximation)
    if exact.numel() == 0:
        return 0.0
    exact, approximation = (_to_fp64(x) for x in (exact, approximation))
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    difference = torch.linalg.vector_norm((exact - approximation) / scale)
    norm = torch.linalg.vector_norm(exact / scale)
    return float(difference / norm) if norm > 0 else float(difference)


def _to_fp64(x: Tensor) -> Tensor:  # (…,), of complex numbers (…, 2)
    return torch.view_as_real(x.resolve_conj()).double() if x.is_complex() else x.double()
