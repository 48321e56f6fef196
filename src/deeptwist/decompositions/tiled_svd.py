"""Truncated SVD of every tile of the lowered kernel (DeepTwist, section 4.1).

The layer is two rounds of convolutions. A tile's right factor maps its columns to R hidden
channels: one convolution, grouped by tile column. Its left factor maps the hidden channels of a
tile row to its outputs: a 1×1 convolution, grouped by tile row.

A tile is *aligned* when its width is a multiple of d·d: it then covers whole input channels. How
either kind runs is told in `deeptwist.layers.tiled`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from deeptwist.decompositions.base import Decomposition, Tensors
from deeptwist.decompositions.svd import MatrixDecomposition
from deeptwist.errors import DeepTwistError, check_int
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs
from deeptwist.layers.lowering import Grid, Segment, lower, unlower
from deeptwist.layers.moments import SecondMoment
from deeptwist.layers.tiled import TiledLayerBuilder, is_aligned

_CHANNELS = 128  # in a tile that is chosen, at least: docs/speed.md


@dataclass(frozen=True)
class TiledSVD(MatrixDecomposition):
    """Truncated SVD of every tile of the lowered kernel.

    Edges that the tile does not fill evenly become smaller tiles, at the rank that keeps the
    ratio of the full ones.

    Attributes:
        rank: R of a full tile; `None` to let a ratio set it.
        tile: (rows, cols); `None` for an aligned one by shape: all rows, over equal parts of the
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

    def grid(self, shape: Sequence[int]) -> Grid:
        """Return the tiles over the lowered kernel of a kernel of this shape (g, o, i, *k)."""
        lowered = shape[1], math.prod(shape[2:])
        return Grid(lowered, self.tile or lowered)

    def full_rank(self, convolution: ConvGeometry) -> int:
        return min(*self.lowered_shape(convolution), *self.grid(convolution.kernel_shape).tile)

    def resolve(self, convolution: ConvGeometry, ratio: float | None) -> Decomposition:
        tile = self.tile or _aligned_tile(convolution)
        return super(TiledSVD, replace(self, tile=tile)).resolve(convolution, ratio)

    def ranks(self, shape: Sequence[int]) -> list[int]:
        """Return every patch's rank: `rank` for full tiles, what keeps their ratio for edges."""
        grid = self.grid(shape)
        full_row, full_col = grid.rows[0].length, grid.cols[0].length
        if self.resolved_rank >= min(full_row, full_col):
            return [min(row.length, col.length) for row, col in grid.patches]

        def rank(row: Segment, col: Segment) -> int:
            # r·(m+n) : m·n is to be the same in every tile, so r goes with m·n/(m+n).
            share = row.length * col.length * (full_row + full_col)
            whole = full_row * full_col * (row.length + col.length)
            return max(1, min(self.resolved_rank * share // whole, row.length, col.length))

        return [rank(row, col) for row, col in grid.patches]

    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:
        return self._builder(convolution).convolutions

    def built_convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:
        return self._builder(convolution).built_convolutions

    def make_modules(
        self,
        convolution: ConvGeometry,
        kernels: Sequence[Tensor],  # (g, o, i, *k) each
        bias: Tensor | None,  # (out_channels,)
    ) -> list[nn.Module]:
        return self._builder(convolution).make_modules(kernels, bias)

    def _builder(self, convolution: ConvGeometry) -> TiledLayerBuilder:
        shape = convolution.kernel_shape
        return TiledLayerBuilder(convolution, self.grid(shape), self.ranks(shape))

    def partition(self, kernel: Tensor) -> list[Tensor]:  # (g, o, i, *k) → (b, h, w) each
        return [patch.flatten(0, 2) for patch in self.grid(kernel.shape).split(lower(kernel))]

    def assemble(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:  # (g, o, i, *k)
        grid = self.grid(shape)
        return unlower(grid.assemble(_patches(grid, matrices, shape[0])), shape)

    def column_moments(self, second_moment: SecondMoment, shape: Sequence[int]) -> list[Tensor]:
        """Return every tile's own block (b, w, w); what tiles of one row share is left out."""
        moment, moments = second_moment.full, []
        for row, col in self.grid(shape).patches:
            blocks = moment[:, col.offset : col.stop, col.offset : col.stop]
            blocks = blocks.reshape(-1, col.count, col.length, col.count, col.length)
            blocks = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # (g, tile col, w, w)
            wide = blocks.unsqueeze(1).expand(-1, row.count, -1, -1, -1)
            moments.append(wide.flatten(0, 2))
        return moments

    def kernels(self, tensors: Tensors, shape: Sequence[int]) -> list[Tensor]:  # (g, o, i, *k)
        grid, size = self.grid(shape), tuple(shape[3:])
        # A linear layer in more than one tile runs as a 1×1 convolution.
        ones = (1,) * (len(size) or int(grid.num_tiles > 1))
        taps = size if size and is_aligned(grid, math.prod(size)) else ones
        width = len(grid.cols)
        lefts, rights = (_patches(grid, side, shape[0]) for side in (tensors[::2], tensors[1::2]))
        into, out = [], []
        for column in range(width):
            # (g, rows, cols, r, w) → (g, cols, rows·r, w), the patches of a column side by side
            stacked = [right.transpose(1, 2).flatten(2, 3) for right in rights[column::width]]
            kernel = torch.cat(stacked, dim=2).flatten(0, 1)
            into.append(kernel.reshape(*kernel.shape[:2], -1, *taps))
        for row in range(0, len(lefts), width):
            # (g, rows, cols, h, r) → (g, rows, h, cols·r), the patches of a row side by side
            joined = [left.permute(0, 1, 3, 2, 4).flatten(3) for left in lefts[row : row + width]]
            kernel = torch.cat(joined, dim=3).flatten(0, 1)
            out.append(kernel.reshape(*kernel.shape, *ones))
        return into + out

    def tensors(self, kernels: Sequence[Tensor], shape: Sequence[int]) -> Tensors:
        grid, groups, ranks = self.grid(shape), shape[0], self.ranks(shape)
        width = len(grid.cols)
        lefts: list[Tensor] = []
        for row, kernel in enumerate(kernels[width:]):
            # (g·rows, h, Σ cols·r) → (g, rows, h, cols, r) of every patch
            of_row = zip(grid.cols, ranks[row * width : (row + 1) * width], strict=True)
            sizes = [col.count * rank for col, rank in of_row]
            parts = kernel.flatten(2).unflatten(0, (groups, -1)).split(sizes, dim=3)
            joined = [
                p.unflatten(3, (col.count, -1)) for p, col in zip(parts, grid.cols, strict=True)
            ]
            lefts += [part.permute(0, 1, 3, 2, 4).flatten(0, 2) for part in joined]
        rights: list[Tensor] = [lefts[0]] * len(lefts)
        for column, kernel in enumerate(kernels[:width]):
            # (g·cols, Σ rows·r, w) → (g, cols, rows, r, w) of every patch
            of_column = zip(grid.rows, ranks[column::width], strict=True)
            sizes = [row.count * rank for row, rank in of_column]
            parts = kernel.flatten(2).unflatten(0, (groups, -1)).split(sizes, dim=2)
            stacked = [
                p.unflatten(2, (row.count, -1)) for p, row in zip(parts, grid.rows, strict=True)
            ]
            rights[column::width] = [part.transpose(1, 2).flatten(0, 2) for part in stacked]
        return tuple(tensor for pair in zip(lefts, rights, strict=True) for tensor in pair)


def _aligned_tile(convolution: ConvGeometry) -> tuple[int, int]:
    """Return the tile that loses little and runs fast, of the shapes in ``benchmarks/tiles.py``."""
    _, out, into, *_ = convolution.kernel_shape
    parts = max(1, into // _CHANNELS) if convolution.dims else 1
    while into % parts:
        parts -= 1
    return out, into // parts * convolution.kernel_numel


def _patches(grid: Grid, batches: Sequence[Tensor], groups: int) -> list[Tensor]:
    """Return every patch's tiles (b, …), in one batch, as (g, tile row, tile col, …)."""
    return [
        batch.unflatten(0, (groups, row.count, col.count))
        for batch, (row, col) in zip(batches, grid.patches, strict=True)
    ]
