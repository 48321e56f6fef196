"""Truncated SVD: of the matrices that a kernel is lowered to, by one of two lowerings.

`SVD` lowers to T × (S·d·d): d×d into R channels, then 1×1 (Zhang et al., "Accelerating Very Deep
Convolutional Networks", 2015; DeepTwist, section 3.2). `SpatialSVD` lowers to (T·d_h) × (S·d_w):
1×d into R channels, then d×1 (Jaderberg et al., "Speeding up Convolutional Neural Networks with
Low Rank Expansions", 2014); with three spatial axes it is the (2+1)-D factorisation.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from deeptwist.decompositions.base import SingleRankDecomposition, Tensors, rescale_to_moment
from deeptwist.decompositions.linalg import (
    refine,
    solve_gram,
    squared_singular_values,
    to_unit_scale,
    truncated_svd,
)
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs, compute_dtype
from deeptwist.layers.lowering import lower, unlower
from deeptwist.layers.moments import SecondMoment


@dataclass(frozen=True)
class MatrixDecomposition(SingleRankDecomposition):
    """The truncated SVD of some matrices cut from the kernel.

    The factors are left (b, m, r) and right (b, r, n) of each batch of matrices, in turn.
    """

    @abstractmethod
    def partition(self, kernel: Tensor) -> list[Tensor]:  # (g, o, i, *k) → (b, m, n) each
        """Return the matrices of a kernel, those of one size in one batch."""

    @abstractmethod
    def assemble(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Invert `partition`: (b, m, n) each → the kernel of this shape (g, o, i, *k)."""

    @abstractmethod
    def column_moments(self, second_moment: SecondMoment, shape: Sequence[int]) -> list[Tensor]:
        """Return the moment (b, n, n) of what each batch's columns multiply; b may be 1."""

    def ranks(self, shape: Sequence[int]) -> list[int]:
        """Return the rank of each batch of `partition`, for a kernel of this shape."""
        return [self.resolved_rank]

    def output_axes(self, dims: int) -> int:
        """Return how many kernel axes the lowering puts beside the outputs; others are inputs'."""
        return 0

    def lowered_shape(self, convolution: ConvGeometry) -> tuple[int, int]:
        _, out, into, *size = convolution.kernel_shape
        split = self.output_axes(len(size))
        return out * math.prod(size[:split]), into * math.prod(size[split:])

    def full_rank(self, convolution: ConvGeometry) -> int:
        return min(self.lowered_shape(convolution))

    def factorize(
        self,
        kernel: Tensor,  # (g, o, i, *k)
        start: Tensors | None,
        second_moment: SecondMoment | None,
    ) -> Tensors:  # (b, m, r), (b, r, n) of each batch
        ranks, batches = self.ranks(kernel.shape), self.partition(kernel)
        if start is not None:
            pairs = [refine(*batch) for batch in zip(batches, start[::2], strict=True)]
        elif second_moment is not None:
            moments = self.column_moments(second_moment, kernel.shape)
            pairs = [truncated_svd(*part) for part in zip(batches, ranks, moments, strict=True)]
        else:
            pairs = [truncated_svd(*part) for part in zip(batches, ranks, strict=True)]
        return tuple(tensor for pair in pairs for tensor in pair)

    def reconstruct(self, tensors: Tensors, shape: Sequence[int]) -> Tensor:  # (g, o, i, *k)
        products = [left @ right for left, right in zip(tensors[::2], tensors[1::2], strict=True)]
        return self.assemble(products, shape)

    def tangent(self, tensors: Tensors, gradients: Tensors, damping: float) -> Tensors:
        """See `Decomposition.tangent`; a share that either factor could move is halved.

        The gradients times the other factor's inverse Gram matrix (Tong et al., "Accelerating
        Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent", 2021) would move
        what both can reach twice as far as the rest.
        """
        steps: list[Tensor] = []
        pairs = (side[place::2] for side in (tensors, gradients) for place in (0, 1))
        for left, right, of_left, of_right in zip(*pairs, strict=True):
            by_left, by_right = left.mT @ left, right @ right.mT
            step_left = solve_gram(by_right, of_left.mT, damping).mT
            step_right = solve_gram(by_left, of_right, damping)
            # Within the columns of left and the rows of right both do the same to the product.
            shared = solve_gram(by_left, left.mT @ step_left, damping) / 2
            steps += [step_left - left @ shared, step_right - shared @ right]
        return tuple(steps)

    def errors_at_all_ranks(
        self,
        kernel: Tensor,  # (g, o, i, *k)
        second_moment: SecondMoment | None = None,
    ) -> Tensor:  # (full rank,)
        """Return the relative error at every rank, which is exact: the tails of the spectra.

        In a second moment's metric it is exact where one matrix is weighted by the whole of it,
        as for `SVD`; elsewhere it is exact at a quarter of the full rank, and in proportion at
        the others.
        """
        kernel = kernel.detach()
        batches = self.partition(to_unit_scale(kernel.double(), kernel.dim())[0])
        moments: list[Tensor | None] = [None] * len(batches)
        if second_moment is not None:
            moments = [*self.column_moments(second_moment, kernel.shape)]
        tails = []  # the energy of each batch that is lost at rank 0, 1, …
        for matrices, moment in zip(batches, moments, strict=True):
            values = squared_singular_values(matrices, moment).flatten(0, -2).sum(0)
            tails.append(torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)]))
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
        return rescale_to_moment(errors, errors[quarter - 1], kernel, approximation, second_moment)


@dataclass(frozen=True)
class SVD(MatrixDecomposition):
    """Truncated SVD of the lowered kernel.

    Attributes:
        rank: R, per group; `None` to let a ratio set it.
    """

    method: ClassVar[str] = "svd"

    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:
        groups, hidden = convolution.groups, convolution.groups * self.resolved_rank
        split = self.output_axes(convolution.dims)
        input_axes, output_axes = range(split, convolution.dims), range(split)
        return (
            (convolution.restricted_to(input_axes, convolution.in_channels, hidden, groups),),
            (convolution.restricted_to(output_axes, hidden, convolution.out_channels, groups),),
        )

    def partition(self, kernel: Tensor) -> list[Tensor]:  # (g, o, i, *k) → (g, m, n)
        return [lower(kernel, self.output_axes(kernel.dim() - 3))]

    def assemble(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:  # (g, o, i, *k)
        return unlower(matrices[0], shape, self.output_axes(len(shape) - 3))

    def column_moments(self, second_moment: SecondMoment, shape: Sequence[int]) -> list[Tensor]:
        dims = len(shape) - 3  # (g, n, n)
        return [second_moment.over(dims - self.output_axes(dims))]

    def kernels(self, tensors: Tensors, shape: Sequence[int]) -> list[Tensor]:  # (g, o, i, *k)
        left, right = tensors  # (g, o·Πk_out, r) and (g, r, i·Πk_in)
        groups, out, into, *size = shape
        rank, split = left.shape[-1], self.output_axes(len(size))
        columns = left.reshape(groups, out, -1, rank).transpose(2, 3)
        return [
            right.reshape(groups, rank, into, *[1] * split, *size[split:]),
            columns.reshape(groups, out, rank, *size[:split], *[1] * (len(size) - split)),
        ]

    def tensors(self, kernels: Sequence[Tensor], shape: Sequence[int]) -> Tensors:
        right, left = kernels
        return left.movedim(2, -1).flatten(1, -2), right.flatten(2)


@dataclass(frozen=True)
class SpatialSVD(SVD):
    """Truncated SVD of the separable lowering, with the first of two or three axes at the outputs.

    With fewer spatial axes it is `SVD`.

    Attributes:
        rank: R, per group; `None` to let a ratio set it.
    """

    method: ClassVar[str] = "spatial_svd"

    def output_axes(self, dims: int) -> int:
        return int(dims > 1)
