"""Truncated SVD of the separable lowering (T·d_h) × (S·d_w): 1×d into R channels, then d×1.

Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", 2014.
With three spatial axes it is the (2+1)-D factorisation; with one or none, `SVD`.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deeptwist.convolution import Convolution
from deeptwist.decompositions.base import Factors, Level, OneRank
from deeptwist.linalg import product, truncated_svd
from deeptwist.lowering import lower_spatial, unlower_spatial


@dataclass(frozen=True)
class SpatialSVD(OneRank):
    """Truncated SVD of the separable lowering.

    Attributes:
        rank: R, per group; none to let a ratio set it.
    """

    method: ClassVar[str] = "spatial_svd"

    def full_rank(self, convolution: Convolution) -> int:  # noqa: D102
        return min(self.lowered_shape(convolution))

    def lowered_shape(self, convolution: Convolution) -> tuple[int, int]:  # noqa: D102
        _, out, into, *size = convolution.kernel_shape
        first = size[0] if len(size) > 1 else 1
        return out * first, into * convolution.taps // first

    def levels(self, convolution: Convolution) -> tuple[Level, ...]:  # noqa: D102
        groups, hidden = convolution.groups, convolution.groups * self.known_rank
        output_axes = range(1 if convolution.dims > 1 else 0)
        input_axes = range(len(output_axes), convolution.dims)
        return (
            (convolution.along(input_axes, convolution.in_channels, hidden, groups),),
            (convolution.along(output_axes, hidden, convolution.out_channels, groups),),
        )

    def decompose(self, kernel: Tensor) -> "SpatialSVDFactors":  # noqa: D102
        left, right = truncated_svd(lower_spatial(kernel), self.known_rank)
        return SpatialSVDFactors(left, right, tuple(kernel.shape))


@dataclass(frozen=True)
class SpatialSVDFactors(Factors):
    """left (g, o·kh, r) and right (g, r, i·Πkw), for a kernel of `shape` (g, o, i, kh, *kw)."""

    left: Tensor
    right: Tensor
    shape: tuple[int, ...]

    def reconstruct(self) -> Tensor:  # noqa: D102
        return unlower_spatial(product(self.left, self.right), self.shape)

    def kernels(self) -> list[Tensor]:  # noqa: D102
        groups, out, into, *size = self.shape
        rank = self.left.shape[-1]
        if len(size) < 2:
            ones = [1] * len(size)
            return [
                self.right.reshape(groups, rank, into, *size),
                self.left.reshape(groups, out, rank, *ones),
            ]
        first, *rest = size
        row = self.right.reshape(groups, rank, into, 1, *rest)
        column = self.left.reshape(groups, out, first, rank).transpose(2, 3)
        return [row, column.reshape(groups, out, rank, first, *[1] * len(rest))]
