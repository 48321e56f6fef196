"""Truncated SVD of every tile of the lowered kernel (DeepTwist, section 4.1).

The layer is two rounds of convolutions. A tile's right factor maps its columns to R hidden
channels: one convolution, grouped by tile column. Its left factor maps the hidden channels of a
tile row to its outputs: a 1×1 convolution, grouped by tile row.

A tile is *aligned* when its width is a multiple of d·d: it then covers whole input channels. How
either kind runs is told in `tiled_layer`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from deeptwist.decompositions.base import SingleRankDecomposition
from deeptwist.decompositions.matrix import MatrixDecomposition, Pair
from deeptwist.errors import DeepTwistError, check_int
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs
from deeptwist.layers.lowering import lower, unlower
from deeptwist.layers.tiled import TiledLayerBuilder
from deeptwist.layers.tiling import Grid, Segment

_CHANNELS = 128  # in a tile that is chosen, at least: docs/speed.md


@dataclass(frozen=True)
class TiledSVD(MatrixDecomposition):
    """Truncated SVD of every tile of the lowered kernel.

    Edges that the tile does not fill evenly become smaller tiles, at the rank that keeps the
    ratio of the full ones.

    Attributes:
        rank: R of a full tile; none to let a ratio set it.
        tile: (rows, cols); none for an aligned one by shape: all rows, over equal parts of the
            input channels of 128 or a little more. Linear layers stay whole.
    """

    method: ClassVar[str] = "tiled_svd"
    tile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile is not None:
            if not isinstance(self.tile, tuple) or len(self.tile) != 2:
                raise DeepTwistError(f"TiledSVD tile {self.tile!r} is not a pair (rows, cols)")
            for length in self.tile:
                check_int("TiledSVD tile side", length)

    def lowered_shape(self, convolution: ConvGeometry) -> tuple[int, int]:  # noqa: D102
        _, out, into, *_ = convolution.kernel_shape
        return out, into * convolution.kernel_numel

    def grid(self, shape: tuple[int, int]) -> Grid:
        """The tiles over a lowered kernel of this shape."""
        return Grid(shape, self.tile or shape)

    def full_rank(self, convolution: ConvGeometry) -> int:  # noqa: D102
        shape = self.lowered_shape(convolution)
        tile = self.grid(shape).tile
        return min(*shape, *tile)

    def resolve(self, convolution: ConvGeometry, ratio: float | None) -> Self:  # noqa: D102
        tile = self.tile or _aligned_tile(convolution)
        return SingleRankDecomposition.resolve(replace(self, tile=tile), convolution, ratio)

    def is_aligned(self, convolution: ConvGeometry) -> bool:
        """Whether every tile covers whole input channels."""
        columns = self.grid(self.lowered_shape(convolution)).cols
        return all(column.length % convolution.kernel_numel == 0 for column in columns)

    def ranks(self, grid: Grid) -> list[int]:
        """The rank of every patch of the grid: `rank` for full tiles, the same ratio for edges."""
        full_row, full_col = grid.rows[0].length, grid.cols[0].length
        if self.resolved_rank >= min(full_row, full_col):
            return [min(row.length, col.length) for row, col in grid.patches]

        def rank(row: Segment, col: Segment) -> int:
            # r·(m+n) : m·n is to be the same in every tile, so r goes with m·n/(m+n).
            share = row.length * col.length * (full_row + full_col)
            whole = full_row * full_col * (row.length + col.length)
            return max(1, min(self.resolved_rank * share // whole, row.length, col.length))

        return [rank(row, col) for row, col in grid.patches]

    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:  # noqa: D102
        return self._plumbing(convolution).convolutions

    def workload(  # noqa: D102
        self, convolution: ConvGeometry, input_size: Sequence[int]
    ) -> list[tuple[ConvGeometry, tuple[int, ...]]]:
        if convolution.dims == 0 and self._plumbing(convolution).dims == 1:
            input_size = (math.prod(input_size),)
        if self.is_aligned(convolution):
            return super().workload(convolution, input_size)
        # Tile columns see the input as windows, of which there is one for each output position;
        # transposed, each input position is one.
        output_size = convolution.output_size(input_size)
        windows = tuple(input_size) if convolution.transposed else output_size
        into, out = self.convolutions(convolution)
        return [(part, windows) for part in into] + [(part, output_size) for part in out]

    def implementations(self, convolution: ConvGeometry) -> tuple[str, ...]:  # noqa: D102
        return self._plumbing(convolution).implementations

    def make_modules(  # noqa: D102
        self,
        convolution: ConvGeometry,
        kernels: Sequence[Tensor],
        bias: Tensor | None,
        implementation: str,
    ) -> list[nn.Module]:
        return self._plumbing(convolution).make_modules(kernels, bias, implementation)

    def _plumbing(self, convolution: ConvGeometry) -> TiledLayerBuilder:
        grid = self.grid(self.lowered_shape(convolution))
        return TiledLayerBuilder(convolution, grid, self.ranks(grid), self.is_aligned(convolution))

    def _grid_over(self, shape: Sequence[int]) -> Grid:
        return self.grid((shape[1], math.prod(shape[2:])))

    def cut(self, kernel: Tensor) -> list[tuple[Tensor, int]]:  # noqa: D102
        grid = self._grid_over(kernel.shape)
        patches = [patch.flatten(0, 2) for patch in grid.split(lower(kernel))]
        return list(zip(patches, self.ranks(grid), strict=True))

    def join(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:  # noqa: D102
        grid = self._grid_over(shape)
        return unlower(grid.assemble(_patches(grid, matrices, shape[0])), shape)

    def rows_apart(self, shape: Sequence[int]) -> int:  # noqa: D102
        height = self._grid_over(shape).rows[0].length
        return height if shape[1] % height == 0 else shape[1]

    def kernels(self, pairs: Sequence[Pair], shape: Sequence[int]) -> list[Tensor]:  # noqa: D102
        grid, size = self._grid_over(shape), shape[3:]
        taps = math.prod(size)
        aligned = all(column.length % taps == 0 for column in grid.cols)
        # A linear layer in more than one tile runs as a 1×1 convolution.
        ones = (1,) * (len(size) or int(grid.num_tiles > 1))
        width = len(grid.cols)
        lefts, rights = (_patches(grid, side, shape[0]) for side in zip(*pairs, strict=True))
        patches = list(zip(lefts, rights, strict=True))
        lines = [patches[i : i + width] for i in range(0, len(patches), width)]
        into = []
        for column in range(width):
            # (g, rows, cols, r, w) → (g, cols, rows·r, w), the patches of a column side by side
            stacked = [line[column][1].transpose(1, 2).flatten(2, 3) for line in lines]
            kernel = torch.cat(stacked, dim=2).flatten(0, 1)
            into.append(
                kernel.unflatten(2, (-1, *size))
                if aligned and size
                else kernel.reshape(*kernel.shape, *ones)
            )
        out = []
        for line in lines:
            # (g, rows, cols, h, r) → (g, rows, h, cols·r), the patches of a row side by side
            abreast = [left.permute(0, 1, 3, 2, 4).flatten(3) for left, _ in line]
            kernel = torch.cat(abreast, dim=3).flatten(0, 1)
            out.append(kernel.reshape(*kernel.shape, *ones))
        return into + out


def _aligned_tile(convolution: ConvGeometry) -> tuple[int, int]:
    """The tile that loses little and runs fast, of the shapes in ``benchmarks/tiles.py``."""
    _, out, into, *_ = convolution.kernel_shape
    parts = max(1, into // _CHANNELS) if convolution.dims else 1
    while into % parts:
        parts -= 1
    return out, into // parts * convolution.kernel_numel


def _patches(grid: Grid, batches: Sequence[Tensor], groups: int) -> list[Tensor]:
    """Every patch's tiles (b, …) as (g, tile row, tile col, …)."""
    return [
        batch.unflatten(0, (groups, row.count, col.count))
        for batch, (row, col) in zip(batches, grid.patches, strict=True)
    ]
