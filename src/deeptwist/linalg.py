"""Truncated factorisations, exact and safe at any scale."""

import torch
from torch import Tensor

from deeptwist.convolution import computing_dtype


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of this rank (Eckart–Young), its scale split evenly.

    Args:
        matrix: (..., m, n), any floating type; computed in fp32, or fp64 where it is fp64.
        rank: from 1 to min(m, n).

    Returns:
        left (..., m, rank) and right (..., rank, n), whose product is the approximation.
    """
    matrix = matrix.to(computing_dtype(matrix.dtype))
    # Singular values overflow when squared from 1e19 on: factor at unit scale.
    scale = matrix.abs().amax(dim=(-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    u, s, vh = _svd(matrix / scale)
    root = (s[..., :rank].unsqueeze(-2) * scale).sqrt()
    return u[..., :rank] * root, root.mT * vh[..., :rank, :]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Divide and conquer gives up on a few fp32 matrices that it solves in fp64.
        u, s, vh = (x.to(matrix.dtype) for x in torch.linalg.svd(matrix.double(), False))
    return u, s, vh


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
    """‖W − W′‖_F / ‖W‖_F; 0 where W is zero and met exactly."""
    exact = exact.to(torch.float64)
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    difference = torch.linalg.vector_norm((exact - approximation.to(torch.float64)) / scale)
    norm = torch.linalg.vector_norm(exact / scale)
    return float(difference / norm) if norm > 0 else float(difference)
