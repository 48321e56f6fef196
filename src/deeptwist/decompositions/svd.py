"""Truncated SVD of the lowered kernel T × (S·d·d): d×d into R channels, then 1×1.

Zhang et al., "Accelerating Very Deep Convolutional Networks", 2015; DeepTwist, section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deeptwist.decompositions.base import Tensors
from deeptwist.decompositions.matrix import MatrixDecomposition
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs, pointwise
from deeptwist.layers.lowering import lower, unlower
from deeptwist.layers.moments import SecondMoment


@dataclass(frozen=True)
class SVD(MatrixDecomposition):
    """Truncated SVD of the lowered kernel.

    Attributes:
        rank: R, per group; `None` to let a ratio set it.
    """

    method: ClassVar[str] = "svd"

    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:  # noqa: D102
        groups, hidden = convolution.groups, convolution.groups * self.resolved_rank
        axes = range(convolution.dims)
        return (
            (convolution.restricted_to(axes, convolution.in_channels, hidden, groups),),
            (pointwise(convolution.dims, hidden, convolution.out_channels, groups),),
        )

    def partition(self, kernel: Tensor) -> list[Tensor]:  # noqa: D102
        return [lower(kernel)]

    def assemble(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:  # noqa: D102
        return unlower(matrices[0], shape)

    def moments(self, second_moment: SecondMoment, shape: Sequence[int]) -> list[Tensor]:  # noqa: D102
        return [second_moment.full]

    def kernels(self, tensors: Tensors, shape: Sequence[int]) -> list[Tensor]:  # noqa: D102
        left, right = tensors
        groups, _, *rest = shape
        ones = [1] * (len(shape) - 3)
        return [
            unlower(right, (groups, right.shape[1], *rest)),
            left.reshape(*left.shape, *ones),
        ]
