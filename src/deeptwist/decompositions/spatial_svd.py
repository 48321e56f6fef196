"""Truncated SVD of the separable lowering (T·d_h) × (S·d_w): 1×d into R channels, then d×1.

Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", 2014.
With three spatial axes it is the (2+1)-D factorisation; with one or none, `SVD`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deeptwist.decompositions.base import Tensors
from deeptwist.decompositions.matrix import MatrixDecomposition
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs
from deeptwist.layers.lowering import lower_spatial, unlower_spatial
from deeptwist.layers.moments import SecondMoment


@dataclass(frozen=True)
class SpatialSVD(MatrixDecomposition):
    """Truncated SVD of the separable lowering.

    Attributes:
        rank: R, per group; `None` to let a ratio set it.
    """

    method: ClassVar[str] = "spatial_svd"

    def lowered_shape(self, convolution: ConvGeometry) -> tuple[int, int]:  # noqa: D102
        _, out, into, *size = convolution.kernel_shape
        first = size[0] if len(size) > 1 else 1
        return out * first, into * convolution.kernel_numel // first

    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:  # noqa: D102
        groups, hidden = convolution.groups, convolution.groups * self.resolved_rank
        output_axes = range(1 if convolution.dims > 1 else 0)
        input_axes = range(len(output_axes), convolution.dims)
        return (
            (convolution.restricted_to(input_axes, convolution.in_channels, hidden, groups),),
            (convolution.restricted_to(output_axes, hidden, convolution.out_channels, groups),),
        )

    def partition(self, kernel: Tensor) -> list[Tensor]:  # noqa: D102
        return [lower_spatial(kernel)]

    def assemble(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:  # noqa: D102
        return unlower_spatial(matrices[0], shape)

    def moments(self, second_moment: SecondMoment, shape: Sequence[int]) -> list[Tensor]:  # noqa: D102
        return [second_moment.spatial]

    def kernels(self, tensors: Tensors, shape: Sequence[int]) -> list[Tensor]:  # noqa: D102
        left, right = tensors  # (g, o·kh, r) and (g, r, i·Πkw)
        groups, out, into, *size = shape
        rank, first = left.shape[-1], left.shape[1] // out
        if len(size) > 1:
            size[0] = 1
        column = left.reshape(groups, out, first, rank).transpose(2, 3)
        ones = [first, *[1] * (len(size) - 1)] if size else []
        return [
            right.reshape(groups, rank, into, *size),
            column.reshape(groups, out, rank, *ones),
        ]
