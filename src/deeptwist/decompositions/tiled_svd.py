"""Truncated SVD of every tile of the lowered kernel (DeepTwist, section 4.1).

The layer is two rounds of convolutions. A tile's right factor maps its columns to R hidden
channels: one convolution, grouped by tile column. Its left factor maps the hidden channels of a
tile row to its outputs: a 1×1 convolution, grouped by tile row.

A tile is *aligned* when its width is a multiple of d·d: it then covers whole input channels and
the first round is a d×d convolution. Any other tile cuts through input channels, and the first
round is a 1×1 convolution on the input's windows (im2col, as in the paper).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from deeptwist.convolution import Convolution, pointwise
from deeptwist.decompositions.base import FactoredLayer, Factors, Level, OneRank, Unfit
from deeptwist.decompositions.routing import Branches, Im2col, OverFeatures, permutation
from deeptwist.errors import DeepTwistError, check_whole
from deeptwist.linalg import product, truncated_svd
from deeptwist.lowering import lower, unlower
from deeptwist.tiling import Grid, Span

_ROWS = 64  # of the tile chosen where none is given: the paper's


@dataclass(frozen=True)
class TiledSVD(OneRank):
    """Truncated SVD of every tile of the lowered kernel.

    Edges that the tile does not fill evenly become smaller tiles, at the rank that keeps the
    ratio of the full ones.

    Attributes:
        rank: R of a full tile; none to let a ratio set it.
        tile: (rows, cols); none for an aligned tile of 64 rows over all inputs.
    """

    method: ClassVar[str] = "tiled_svd"
    tile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile is not None:
            if not isinstance(self.tile, tuple) or len(self.tile) != 2:
                raise DeepTwistError(f"TiledSVD tile {self.tile!r} is not a pair (rows, cols)")
            for length in self.tile:
                check_whole("TiledSVD tile side", length)

    def lowered_shape(self, convolution: Convolution) -> tuple[int, int]:  # noqa: D102
        _, out, into, *_ = convolution.kernel_shape
        return out, into * convolution.taps

    def grid(self, shape: tuple[int, int]) -> Grid:
        """The tiles over a lowered kernel of this shape."""
        return Grid(shape, self.tile or (_ROWS, shape[1]))

    def full_rank(self, convolution: Convolution) -> int:  # noqa: D102
        shape = self.lowered_shape(convolution)
        tile = self.grid(shape).tile
        return min(*shape, *tile)

    def resolve(self, convolution: Convolution, ratio: float | None) -> Self:  # noqa: D102
        tile = self.grid(self.lowered_shape(convolution)).tile
        resolved = OneRank.resolve(replace(self, tile=tile), convolution, ratio)
        if convolution.transposed and not resolved.is_aligned(convolution):
            raise Unfit(
                f"cannot hold a tile {tile} that cuts through input channels in transposed form: "
                f"give a width that is a multiple of {convolution.taps}"
            )
        return resolved

    def is_aligned(self, convolution: Convolution) -> bool:
        """Whether every tile covers whole input channels."""
        columns = self.grid(self.lowered_shape(convolution)).cols
        return all(column.length % convolution.taps == 0 for column in columns)

    def ranks(self, grid: Grid) -> list[int]:
        """The rank of every patch of the grid: `rank` for full tiles, the same ratio for edges."""
        full_row, full_col = grid.rows[0].length, grid.cols[0].length
        if self.known_rank >= min(full_row, full_col):
            return [min(row.length, col.length) for row, col in grid.patches]

        def rank(row: Span, col: Span) -> int:
            # r·(m+n) : m·n is to be the same in every tile, so r goes with m·n/(m+n).
            share = row.length * col.length * (full_row + full_col)
            whole = full_row * full_col * (row.length + col.length)
            return max(1, min(self.known_rank * share // whole, row.length, col.length))

        return [rank(row, col) for row, col in grid.patches]

    def levels(self, convolution: Convolution) -> tuple[Level, ...]:  # noqa: D102
        return self._plumbing(convolution).levels

    def work(  # noqa: D102
        self, convolution: Convolution, input_size: Sequence[int]
    ) -> list[tuple[Convolution, tuple[int, ...]]]:
        if not self.is_aligned(convolution):
            input_size = convolution.output_size(input_size)  # the windows are taken first
        if convolution.dims == 0 and self._plumbing(convolution).dims == 1:
            input_size = (math.prod(input_size),)
        return super().work(convolution, input_size)

    def layer(  # noqa: D102
        self, convolution: Convolution, kernels: Sequence[Tensor], bias: Tensor | None
    ) -> FactoredLayer:
        return FactoredLayer(self._plumbing(convolution).stages(kernels, bias), convolution, self)

    def _plumbing(self, convolution: Convolution) -> "_Plumbing":
        grid = self.grid(self.lowered_shape(convolution))
        return _Plumbing(convolution, grid, self.ranks(grid), self.is_aligned(convolution))

    def decompose(self, kernel: Tensor) -> "TiledSVDFactors":  # noqa: D102
        matrix = lower(kernel)
        grid = self.grid((matrix.shape[1], matrix.shape[2]))
        patches = zip(grid.split(matrix), self.ranks(grid), strict=True)
        pairs = [truncated_svd(patch, rank) for patch, rank in patches]
        return TiledSVDFactors(tuple(pairs), grid, tuple(kernel.shape))


@dataclass(frozen=True)
class TiledSVDFactors(Factors):
    """For every patch of the grid: left (g, rows, cols, h, r) and right (g, rows, cols, r, w)."""

    pairs: tuple[tuple[Tensor, Tensor], ...]
    grid: Grid
    shape: tuple[int, ...]

    def reconstruct(self) -> Tensor:  # noqa: D102
        return unlower(
            self.grid.assemble([product(left, right) for left, right in self.pairs]), self.shape
        )

    def kernels(self) -> list[Tensor]:  # noqa: D102
        size = self.shape[3:]
        taps = int(torch.Size(size).numel())
        aligned = all(column.length % taps == 0 for column in self.grid.cols)
        # A linear layer in more than one tile runs as a 1×1 convolution.
        ones = (1,) * (len(size) or int(self.grid.num_tiles > 1))
        width = len(self.grid.cols)
        lines = [self.pairs[i : i + width] for i in range(0, len(self.pairs), width)]
        into = []
        for column in range(width):
            # (g, rows, cols, r, w) → (g, cols, rows·r, w), the patches of a column side by side
            rights = [line[column][1].transpose(1, 2).flatten(2, 3) for line in lines]
            kernel = torch.cat(rights, dim=2).flatten(0, 1)
            into.append(
                kernel.unflatten(2, (-1, *size))
                if aligned and size
                else kernel.reshape(*kernel.shape, *ones)
            )
        out = []
        for line in lines:
            # (g, rows, cols, h, r) → (g, rows, h, cols·r), the patches of a row side by side
            lefts = [left.permute(0, 1, 3, 2, 4).flatten(3) for left, _ in line]
            kernel = torch.cat(lefts, dim=3).flatten(0, 1)
            out.append(kernel.reshape(*kernel.shape, *ones))
        return into + out


@dataclass(frozen=True)
class _Plumbing:
    """How the channels run from tile columns to tile rows."""

    convolution: Convolution
    grid: Grid
    ranks: list[int]
    aligned: bool

    @property
    def dims(self) -> int:
        """Spatial axes of the convolutions; one for a linear layer in more than one tile."""
        return self.convolution.dims or int(self.grid.num_tiles > 1)

    @property
    def levels(self) -> tuple[Level, ...]:
        conv, groups = self.convolution, self.convolution.groups
        width = len(self.grid.cols)
        into, out = [], []
        for c, col in enumerate(self.grid.cols):
            ranks = self.ranks[c::width]
            hidden = sum(row.count * rank for row, rank in zip(self.grid.rows, ranks, strict=True))
            blocks = groups * col.count
            if self.aligned and conv.dims:
                channels = blocks * col.length // conv.taps
                into.append(conv.along(range(conv.dims), channels, blocks * hidden, blocks))
            else:
                into.append(pointwise(self.dims, blocks * col.length, blocks * hidden, blocks))
        for r, row in enumerate(self.grid.rows):
            ranks = self.ranks[r * width : (r + 1) * width]
            hidden = sum(col.count * rank for col, rank in zip(self.grid.cols, ranks, strict=True))
            blocks = groups * row.count
            out.append(pointwise(self.dims, blocks * hidden, blocks * row.length, blocks))
        return tuple(into), tuple(out)

    def stages(self, kernels: Sequence[Tensor], bias: Tensor | None) -> list[nn.Module]:
        """The layer's modules, in order."""
        conv, (into, out) = self.convolution, self.levels
        arrival, exchange, departure = (
            self._input_order(),
            self._hidden_order(),
            self._output_order(),
        )
        columns = [part.build(k, None) for part, k in zip(into, kernels[: len(into)], strict=True)]
        biases: Sequence[Tensor | None] = [None] * len(out)
        if bias is not None:
            biases = bias[departure.argsort()].split([part.out_channels for part in out])
        rows = [
            part.build(k, b) for part, k, b in zip(out, kernels[len(into) :], biases, strict=True)
        ]
        stages: list[nn.Module | None] = [
            None if self.aligned else Im2col(conv),
            permutation(arrival),
            _abreast(columns, into),
            permutation(exchange),
            _abreast(rows, out),
            permutation(departure),
        ]
        present = [stage for stage in stages if stage is not None]
        return present if self.dims == conv.dims else [OverFeatures(*present)]

    def _input_order(self) -> Tensor:
        """Column patches gather their channels (windows, where not aligned) from every group."""
        taps = self.convolution.taps if self.aligned else 1
        width = self.grid.shape[1] // taps
        order = torch.arange(self.convolution.groups * width).unflatten(0, (-1, width))
        spans = [
            order[:, col.offset // taps : col.stop // taps].flatten() for col in self.grid.cols
        ]
        return torch.cat(spans)

    def _hidden_order(self) -> Tensor:
        """From (column patch; group, tile column, row patch, tile row, rank) to rows first."""
        groups, width = self.convolution.groups, len(self.grid.cols)
        found: dict[tuple[int, int], Tensor] = {}
        offset = 0
        for c, col in enumerate(self.grid.cols):
            sizes = [
                row.count * rank
                for row, rank in zip(self.grid.rows, self.ranks[c::width], strict=True)
            ]
            block = (
                torch.arange(groups * col.count * sum(sizes)).reshape(groups, col.count, -1)
                + offset
            )
            offset += block.numel()
            for r, (part, row) in enumerate(
                zip(block.split(sizes, dim=2), self.grid.rows, strict=True)
            ):
                found[r, c] = part.unflatten(2, (row.count, -1)).transpose(1, 2).flatten(2)
        rows = range(len(self.grid.rows))
        return torch.cat(
            [torch.cat([found[r, c] for c in range(width)], 2).flatten() for r in rows]
        )

    def _output_order(self) -> Tensor:
        """Row patches hand their channels back to their groups."""
        groups, height = self.convolution.groups, self.grid.shape[0]
        order = torch.arange(groups * height).unflatten(0, (-1, height))
        return torch.cat(
            [order[:, row.offset : row.stop].flatten() for row in self.grid.rows]
        ).argsort()


def _abreast(layers: list[nn.Module], parts: Level) -> nn.Module:
    if len(layers) == 1:
        return layers[0]
    return Branches(layers, [part.in_channels for part in parts])
