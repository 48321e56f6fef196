"""What the decompositions by truncated SVD share: they differ in the matrices that they cut."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deeptwist.decompositions.base import Factors, SingleRankDecomposition
from deeptwist.decompositions.linalg import product, truncated_svd
from deeptwist.decompositions.subspace import Approximations, follow, start_of

Pair = tuple[Tensor, Tensor]  # left (b, m, r) and right (b, r, n)


@dataclass(frozen=True)
class MatrixDecomposition(SingleRankDecomposition):
    """The truncated SVD of some matrices cut from the kernel."""

    @abstractmethod
    def cut(self, kernel: Tensor) -> list[tuple[Tensor, int]]:
        """The matrices (b, m, n) of a kernel, those of one size together, and their rank."""

    @abstractmethod
    def join(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of `cut`, for a kernel of this shape."""

    def rows_apart(self, shape: Sequence[int]) -> int:
        """In parts of how many output channels a kernel of this shape can be cut, to no effect."""
        return shape[1]

    @abstractmethod
    def kernels(self, pairs: Sequence[Pair], shape: Sequence[int]) -> list[Tensor]:
        """The kernels in `convolutions` that the factors of the matrices are."""

    def decompose(self, kernel: Tensor) -> "MatrixFactors":  # noqa: D102
        pairs = tuple(truncated_svd(matrices, rank) for matrices, rank in self.cut(kernel))
        return MatrixFactors(self, pairs, tuple(kernel.shape))

    def follow(  # noqa: D102
        self, parts: Tensor, start: Sequence[Tensor], tolerance: float
    ) -> Approximations:
        (basis,) = start
        return follow(parts, basis, tolerance)

    def factors(  # noqa: D102
        self, parts: Sequence[Sequence[Tensor]], shape: Sequence[int]
    ) -> "MatrixFactors":
        pairs = tuple((left, right) for left, right in parts)
        return MatrixFactors(self, pairs, tuple(shape), approximate=True)


@dataclass(frozen=True)
class MatrixFactors(Factors):
    """The factors of every matrix that `decomposition` cuts from a kernel of `shape`.

    Attributes:
        decomposition: the one whose factors they are.
        pairs: for each batch of `MatrixDecomposition.cut`, left (b, m, r) and right (b, r, n).
        shape: (g, o, i, *k).
        approximate: whether they were followed, and are not worth sums in fp64.
    """

    decomposition: MatrixDecomposition
    pairs: tuple[Pair, ...]
    shape: tuple[int, ...]
    approximate: bool = False

    def reconstruct(self) -> Tensor:  # noqa: D102
        multiply = torch.matmul if self.approximate else product
        return self.decomposition.join([multiply(*pair) for pair in self.pairs], self.shape)

    def kernels(self) -> list[Tensor]:  # noqa: D102
        return self.decomposition.kernels(self.pairs, self.shape)

    def starts(self) -> list[tuple[Tensor, ...]]:  # noqa: D102
        return [(start_of(*pair),) for pair in self.pairs]
