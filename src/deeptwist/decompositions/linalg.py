"""Truncated factorisations, exact and safe at any scale."""

import torch
from torch import Tensor

from deeptwist.layers.geometry import compute_dtype


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of this rank (Eckart–Young), its scale split evenly.

    A matrix in fp32 or narrower goes through the eigenvectors of its Gram matrix in fp64: to
    square the condition costs half the digits, and fp64 has twice those of fp32, so the result is
    as exact as an SVD in fp32 and several times cheaper.

    Args:
        matrix: (..., m, n), any floating type; computed in fp32, or fp64 where it is fp64.
        rank: from 1 to min(m, n).

    Returns:
        left (..., m, rank) and right (..., rank, n), whose product is the approximation.
    """
    dtype = compute_dtype(matrix.dtype)
    if matrix.shape[-2] > matrix.shape[-1]:
        right, left = truncated_svd(matrix.mT, rank)
        return left.mT, right.mT
    # Singular values overflow when squared from 1e19 on: factor at unit scale.
    scale = matrix.abs().amax(dim=(-2, -1), keepdim=True).double()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    unit = matrix.double() / scale
    if dtype == torch.float64:
        basis = torch.linalg.svd(unit, full_matrices=False).U[..., :rank]
    else:
        basis = leading_subspace(unit, rank)
    image = basis.mT @ unit  # (..., rank, n): singular values times right singular vectors
    values = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
    root = (values * scale).sqrt()
    right = torch.where(values > 0, image / values, torch.zeros_like(image)) * root
    return (basis * root.mT).to(dtype), right.to(dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two factors, summed in fp64 and rounded once.

    What a sum in fp32 loses would stand between the distorted network and the decomposed one.

    Args:
        left: (..., m, r).
        right: (..., r, n).
    """
    return (left.double() @ right.double()).to(left.dtype)


def leading_subspace(matrix: Tensor, rank: int) -> Tensor:
    """An orthonormal basis of the leading left singular subspace, from the Gram matrix.

    Args:
        matrix: (..., m, n), of unit scale.
        rank: from 1 to m.

    Returns:
        (..., m, rank), the strongest direction first.
    """
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors
    return vectors[..., -rank:].flip(-1)


def relative_error(exact: Tensor, approximation: Tensor) -> float:
    """Return ‖y − y′‖ / ‖y‖ of two tensors of one shape; ‖y′‖ where y is zero.

    Computed in fp64 at unit scale, so that no square of fp32 numbers under- or overflows. NaN
    where a number is not finite.
    """
    if exact.numel() == 0:
        return 0.0
    exact, approximation = (_to_fp64(x) for x in (exact, approximation))
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    difference = torch.linalg.vector_norm((exact - approximation) / scale)
    norm = torch.linalg.vector_norm(exact / scale)
    return float(difference / norm) if norm > 0 else float(difference)


def _to_fp64(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()).double() if x.is_complex() else x.double()
