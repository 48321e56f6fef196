"""Truncated SVD of the lowered kernel T × (S·d·d): d×d into R channels, then 1×1.

Zhang et al., "Accelerating Very Deep Convolutional Networks", 2015; DeepTwist, section 3.2.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deeptwist.convolution import Convolution, pointwise
from deeptwist.decompositions.base import Factors, Level, OneRank
from deeptwist.linalg import product, truncated_svd
from deeptwist.lowering import lower, unlower


@dataclass(frozen=True)
class SVD(OneRank):
    """Truncated SVD of the lowered kernel.

    Attributes:
        rank: R, per group; none to let a ratio set it.
    """

    method: ClassVar[str] = "svd"

    def full_rank(self, convolution: Convolution) -> int:  # noqa: D102
        return min(self.lowered_shape(convolution))

    def lowered_shape(self, convolution: Convolution) -> tuple[int, int]:  # noqa: D102
        _, out, into, *_ = convolution.kernel_shape
        return out, into * convolution.taps

    def levels(self, convolution: Convolution) -> tuple[Level, ...]:  # noqa: D102
        groups, hidden = convolution.groups, convolution.groups * self.known_rank
        every = range(convolution.dims)
        return (
            (convolution.along(every, convolution.in_channels, hidden, groups),),
            (pointwise(convolution.dims, hidden, convolution.out_channels, groups),),
        )

    def decompose(self, kernel: Tensor) -> "SVDFactors":  # noqa: D102
        left, right = truncated_svd(lower(kernel), self.known_rank)
        return SVDFactors(left, right, tuple(kernel.shape))


@dataclass(frozen=True)
class SVDFactors(Factors):
    """left (g, o, r) and right (g, r, i·Πk), for a kernel of `shape` (g, o, i, *k)."""

    left: Tensor
    right: Tensor
    shape: tuple[int, ...]

    def reconstruct(self) -> Tensor:  # noqa: D102
        return unlower(product(self.left, self.right), self.shape)

    def kernels(self) -> list[Tensor]:  # noqa: D102
        groups, _, *rest = self.shape
        ones = [1] * (len(self.shape) - 3)
        return [
            unlower(self.right, (groups, self.right.shape[1], *rest)),
            self.left.reshape(*self.left.shape, *ones),
        ]
