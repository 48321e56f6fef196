"""Truncated SVD of the lowered kernel T × (S·d·d): d×d into R channels, then 1×1.

Zhang et al., "Accelerating Very Deep Convolutional Networks", 2015; DeepTwist, section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deeptwist.decompositions.matrix import MatrixDecomposition, Pair
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs, pointwise
from deeptwist.layers.lowering import lower, unlower


@dataclass(frozen=True)
class SVD(MatrixDecomposition):
    """Truncated SVD of the lowered kernel.

    Attributes:
        rank: R, per group; none to let a ratio set it.
    """

    method: ClassVar[str] = "svd"

    def full_rank(self, convolution: ConvGeometry) -> int:  # noqa: D102
        return min(self.lowered_shape(convolution))

    def lowered_shape(self, convolution: ConvGeometry) -> tuple[int, int]:  # noqa: D102
        _, out, into, *_ = convolution.kernel_shape
        return out, into * convolution.kernel_numel

    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:  # noqa: D102
        groups, hidden = convolution.groups, convolution.groups * self.resolved_rank
        every = range(convolution.dims)
        return (
            (convolution.restricted_to(every, convolution.in_channels, hidden, groups),),
            (pointwise(convolution.dims, hidden, convolution.out_channels, groups),),
        )

    def cut(self, kernel: Tensor) -> list[tuple[Tensor, int]]:  # noqa: D102
        return [(lower(kernel), self.resolved_rank)]

    def join(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:  # noqa: D102
        return unlower(matrices[0], shape)

    def kernels(self, pairs: Sequence[Pair], shape: Sequence[int]) -> list[Tensor]:  # noqa: D102
        ((left, right),) = pairs
        groups, _, *rest = shape
        ones = [1] * (len(shape) - 3)
        return [
            unlower(right, (groups, right.shape[1], *rest)),
            left.reshape(*left.shape, *ones),
        ]
