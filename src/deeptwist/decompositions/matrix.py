"""The base of the decompositions by truncated SVD: they differ in the matrices that they take."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from deeptwist.decompositions.base import SingleRankDecomposition, Tensors, in_full_metric
from deeptwist.decompositions.linalg import refine, squared_singular_values, truncated_svd
from deeptwist.layers.geometry import ConvGeometry, compute_dtype
from deeptwist.layers.moments import SecondMoment


@dataclass(frozen=True)
class MatrixDecomposition(SingleRankDecomposition):
    """The truncated SVD of some matrices cut from the kernel.

    The factors are left (b, m, r) and right (b, r, n) of each batch of matrices, in turn.
    """

    has_tangent_space: ClassVar[bool] = True

    def lowered_shape(self, convolution: ConvGeometry) -> tuple[int, int]:  # noqa: D102
        _, out, into, *_ = convolution.kernel_shape
        return out, into * convolution.kernel_numel

    @abstractmethod
    def partition(self, kernel: Tensor) -> list[Tensor]:
        """Return the matrices (b, m, n) of a kernel, those of one size in one batch."""

    @abstractmethod
    def assemble(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Invert `partition`, for a kernel of this shape."""

    @abstractmethod
    def moments(self, second_moment: SecondMoment, shape: Sequence[int]) -> list[Tensor]:
        """Return the moment (b, n, n) of what each batch's columns multiply; b may be 1."""

    def ranks(self, shape: Sequence[int]) -> list[int]:
        """Return the rank of each batch of `partition`, for a kernel of this shape."""
        return [self.resolved_rank]

    def full_rank(self, convolution: ConvGeometry) -> int:  # noqa: D102
        return min(self.lowered_shape(convolution))

    def factorize(  # noqa: D102
        self, kernel: Tensor, start: Tensors | None, second_moment: SecondMoment | None
    ) -> Tensors:
        ranks, batches = self.ranks(kernel.shape), self.partition(kernel)
        if start is not None:
            pairs = [refine(*batch) for batch in zip(batches, start[::2], strict=True)]
        elif second_moment is not None:
            moments = self.moments(second_moment, kernel.shape)
            pairs = [truncated_svd(*part) for part in zip(batches, ranks, moments, strict=True)]
        else:
            pairs = [truncated_svd(*part) for part in zip(batches, ranks, strict=True)]
        return tuple(tensor for pair in pairs for tensor in pair)

    def reconstruct(self, tensors: Tensors, shape: Sequence[int]) -> Tensor:  # noqa: D102
        products = [left @ right for left, right in zip(tensors[::2], tensors[1::2], strict=True)]
        return self.assemble(products, shape)

    def truncate(self, tensors: Tensors, shape: Sequence[int]) -> Tensors:  # noqa: D102
        # The strongest directions come first: a step of subspace iteration keeps their order.
        pairs = zip(tensors[::2], tensors[1::2], self.ranks(shape), strict=True)
        return tuple(x for left, right, r in pairs for x in (left[..., :r], right[..., :r, :]))

    def project_on_tangent(self, direction: Tensor, tensors: Tensors) -> Tensor:
        """Return U Uᵀ M + M V Vᵀ − U Uᵀ M V Vᵀ of every matrix M, for its factors' bases U, V.

        Vandereycken, "Low-Rank Matrix Completion by Riemannian Optimization", 2013, section 2.
        """
        projected = []
        for part, left, right in zip(
            self.partition(direction), tensors[::2], tensors[1::2], strict=True
        ):
            u, v = torch.linalg.qr(left).Q, torch.linalg.qr(right.mT).Q
            rest = part - u @ (u.mT @ part)
            projected.append(part - rest + (rest @ v) @ v.mT)
        return self.assemble(projected, direction.shape)

    def errors_at_all_ranks(
        self, kernel: Tensor, second_moment: SecondMoment | None = None
    ) -> Tensor:
        """Return the relative error at every rank, which is exact: the tails of the spectra.

        In a second moment's metric it is exact where one matrix is weighted by the whole of it,
        as for `SVD`; elsewhere it is exact at a quarter of the full rank, and in proportion at
        the others.
        """
        kernel = kernel.detach()
        batches = self.partition(kernel)
        moments: list[Tensor | None] = [None] * len(batches)
        if second_moment is not None:
            moments = [*self.moments(second_moment, kernel.shape)]
        tails = _spectral_tails(batches, moments, kernel)
        total = sum(float(tail[0]) for tail in tails)
        full = max(min(matrices.shape[-2:]) for matrices in batches)
        ranks = [replace(self, rank=r).ranks(kernel.shape) for r in range(1, full + 1)]
        by_batch = torch.tensor(ranks).T
        lost = torch.stack([tail[own] for tail, own in zip(tails, by_batch, strict=True)]).sum(0)
        errors: Tensor = (lost / (total or 1)).clamp_min(0).sqrt()
        is_whole = batches[0].shape[-1] == kernel[0, 0].numel()
        if second_moment is None or is_whole:
            return errors
        quarter = max(1, full // 4)
        method = replace(self, rank=quarter)
        factors = method.factorize(kernel.to(compute_dtype(kernel.dtype)), None, second_moment)
        approximation = method.reconstruct(factors, kernel.shape)
        return in_full_metric(errors, errors[quarter - 1], kernel, approximation, second_moment)


def _spectral_tails(
    batches: Sequence[Tensor], moments: Sequence[Tensor | None], kernel: Tensor
) -> list[Tensor]:
    """Return for each batch the energy that is lost at rank 0, 1, …: all of it, down to nothing."""
    scale = kernel.abs().max().double()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    tails = []
    for matrices, moment in zip(batches, moments, strict=True):
        values = squared_singular_values(matrices.double() / scale, moment).flatten(0, -2).sum(0)
        tails.append(torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)]))
    return tails
