"""How a tiled layer runs: the channels' way from tile columns over hidden channels to tile rows.

The first round, tile columns, is one d×d convolution grouped by tile column. Where tiles are
aligned it runs over the columns' own channels. A tile that cuts through channels runs over its
*window*, all the channels that it touches, and the taps that lie outside are zero. Only the tile's
own numbers are stored and trained: the zeros come in by a parametrization, which
`torch.nn.utils.parametrize.remove_parametrizations` makes permanent. The second round, tile rows,
is a 1×1 convolution grouped by tile row.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deeptwist.layers.geometry import ConvGeometry, ParallelConvs, kernel_to_weight, pointwise
from deeptwist.layers.lowering import Grid, Segment
from deeptwist.layers.routing import PointwiseOnLastDim, SplitConcat, permutation


def is_aligned(grid: Grid, taps: int) -> bool:
    """Return whether every tile covers whole input channels, of so many columns each."""
    return all(column.length % taps == 0 for column in grid.cols)


@dataclass(frozen=True)
class TiledLayerBuilder:
    """The channels' way from tile columns to tile rows.

    Attributes:
        convolution: the layer's geometry.
        grid: the tiles over one group's lowered kernel.
        ranks: of every patch of the grid.
    """

    convolution: ConvGeometry
    grid: Grid
    ranks: list[int]

    @property
    def convolutions(self) -> tuple[ParallelConvs, ...]:
        """Return the convolutions of tile columns, then of tile rows: of the stored numbers.

        A tile that cuts through channels sees every one of its columns as a channel.
        """
        into, out = self.built_convolutions
        if self._aligned:
            return into, out
        columns = zip(into, self.grid.cols, strict=True)
        return tuple(
            pointwise(self._dims, part.groups * col.length, part.out_channels, part.groups)
            for part, col in columns
        ), out

    @property
    def built_convolutions(self) -> tuple[ParallelConvs, ...]:
        """Return `convolutions` as they run: tile columns over all the channels that they touch."""
        conv, groups, width = self.convolution, self.convolution.groups, len(self.grid.cols)
        into, out = [], []
        for c, (col, windows) in enumerate(zip(self.grid.cols, self._windows, strict=True)):
            ranks = zip(self.grid.rows, self.ranks[c::width], strict=True)
            blocks = groups * col.count
            hidden = blocks * sum(row.count * rank for row, rank in ranks)
            sizes = blocks * windows.width, hidden, blocks
            axes = range(conv.dims)
            into.append(conv.restricted_to(axes, *sizes) if axes else pointwise(self._dims, *sizes))
        for r, row in enumerate(self.grid.rows):
            ranks = zip(self.grid.cols, self.ranks[r * width : (r + 1) * width], strict=True)
            blocks = groups * row.count
            hidden = blocks * sum(col.count * rank for col, rank in ranks)
            out.append(pointwise(self._dims, hidden, blocks * row.length, blocks))
        return tuple(into), tuple(out)

    def make_modules(
        self,
        kernels: Sequence[Tensor],  # (g, o, i, *k), one for each of `convolutions`
        bias: Tensor | None,  # (out_channels,)
    ) -> list[nn.Module]:
        """Return the layer's modules, in order."""
        into, out = self.built_convolutions
        kernels_into, kernels_out = kernels[: len(into)], kernels[len(into) :]
        columns = [
            part.make_module(kernel, None)
            if self._aligned
            else window_convolution(part, windows, kernel)
            for part, windows, kernel in zip(into, self._windows, kernels_into, strict=True)
        ]
        order = self._output_order()
        biases: Iterable[Tensor | None] = [None] * len(out)
        if bias is not None:
            biases = bias[order].split([part.out_channels for part in out])
        rows = [
            part.make_module(kernel, own)
            for part, kernel, own in zip(out, kernels_out, biases, strict=True)
        ]
        stages = [
            permutation(self._input_order(), self._dims),
            _parallel(columns, self._dims),
            permutation(self._hidden_order(), self._dims),
            _parallel(rows, self._dims),
            permutation(order.argsort(), self._dims),
        ]
        present = [stage for stage in stages if stage is not None]
        return present if self.convolution.dims == self._dims else [PointwiseOnLastDim(*present)]

    @property
    def _dims(self) -> int:
        """Return the convolutions' spatial axes; 1 for a linear layer in more than one tile."""
        return self.convolution.dims or int(self.grid.num_tiles > 1)

    @property
    def _aligned(self) -> bool:
        return is_aligned(self.grid, self.convolution.kernel_numel)

    @property
    def _windows(self) -> list["ChannelWindows"]:
        taps = self.convolution.kernel_numel
        channels = self.grid.shape[1] // taps
        return [ChannelWindows(columns, taps, channels) for columns in self.grid.cols]

    def _input_order(self) -> Tensor:  # (channels of all windows,)
        """Return the input channels that the patches' columns gather from every group."""
        return torch.cat([windows.order(self.convolution.groups) for windows in self._windows])

    def _hidden_order(self) -> Tensor:  # (hidden channels,)
        """From (column patch; group, tile column, row patch, tile row, rank) to rows first."""
        groups, width, offset = self.convolution.groups, len(self.grid.cols), 0
        lines: list[list[Tensor]] = [[] for _ in self.grid.rows]
        for c, col in enumerate(self.grid.cols):
            ranks = zip(self.grid.rows, self.ranks[c::width], strict=True)
            sizes = [row.count * rank for row, rank in ranks]
            places = torch.arange(groups * col.count * sum(sizes)) + offset
            offset += len(places)
            parts = places.reshape(groups, col.count, -1).split(sizes, dim=2)
            for line, part, row in zip(lines, parts, self.grid.rows, strict=True):
                line.append(part.unflatten(2, (row.count, -1)).transpose(1, 2).flatten(2))
        return torch.cat([torch.cat(line, dim=2).flatten() for line in lines])

    def _output_order(self) -> Tensor:  # (out_channels,)
        """Return the output channels in the order in which the patches' rows give them."""
        groups, height = self.convolution.groups, self.grid.shape[0]
        order = torch.arange(groups * height).unflatten(0, (-1, height))
        return torch.cat([order[:, row.offset : row.stop].flatten() for row in self.grid.rows])


def _parallel(layers: list[nn.Module], dims: int) -> nn.Module:
    if len(layers) == 1:
        return layers[0]
    return SplitConcat(layers, [cast(nn.Conv2d, layer).in_channels for layer in layers], dims)


@dataclass(frozen=True)
class ChannelWindows:
    """The channels that the tiles of one span of columns touch, in each group.

    Attributes:
        span: the tiles, in columns of the lowered kernel.
        taps: columns of one channel.
        channels: input channels of one group.
    """

    span: Segment
    taps: int
    channels: int

    @property
    def width(self) -> int:
        """Return the channels in a window: as many as the tile that touches most."""
        # How tiles lie in channels repeats after as many as a channel has taps.
        return max(
            (start + self.span.length - 1) // self.taps - start // self.taps + 1
            for start in self._columns()[: self.taps]
        )

    @property
    def starts(self) -> list[int]:
        """Return the first channel of every window."""
        last = self.channels - self.width
        return [min(start // self.taps, last) for start in self._columns()]

    @property
    def shifts(self) -> list[int]:
        """Return how many taps of every window lie before its tile."""
        return [
            start - first * self.taps
            for first, start in zip(self.starts, self._columns(), strict=True)
        ]

    def order(self, groups: int) -> Tensor:  # (groups · tiles · width,)
        """Return the input channels of all windows, in every group."""
        window = torch.tensor(self.starts)[:, None] + torch.arange(self.width)
        first = torch.arange(groups)[:, None, None] * self.channels
        return (first + window).flatten()

    def _columns(self) -> range:
        """Return the first column of every tile."""
        return range(self.span.offset, self.span.stop, self.span.length)


class ScatterWeight(nn.Module):
    """Parametrizes a convolution over windows: from its tiles' numbers to its weight."""

    places: Tensor

    def __init__(self, convolution: ConvGeometry, windows: ChannelWindows):
        super().__init__()
        self.convolution = convolution
        groups = convolution.groups // windows.span.count
        shifts = torch.tensor(windows.shifts).repeat(groups)  # (blocks,)
        places = shifts[:, None, None] + torch.arange(windows.span.length)
        self.register_buffer("places", places, persistent=False)  # follows from the geometry

    def forward(self, columns: Tensor) -> Tensor:  # (blocks · hidden, tile columns) → (o, i, *k)
        """Return the weight with zeros around each tile's numbers."""
        blocks, hidden, *rest = self.convolution.kernel_shape
        tiles = columns.unflatten(0, (blocks, hidden))
        padded = tiles.new_zeros(blocks, hidden, math.prod(rest))
        padded = padded.scatter(2, self.places.expand(-1, hidden, -1), tiles)
        return kernel_to_weight(padded.unflatten(2, rest), self.convolution)


def window_convolution(
    convolution: ConvGeometry,
    windows: ChannelWindows,
    kernel: Tensor,  # (blocks, hidden, tile columns, *ones)
) -> nn.Module:
    """Return the convolution over windows, of one group for every tile; without bias.

    Args:
        convolution: its geometry, of as many groups (blocks) as there are tiles in all groups.
        windows: where the tiles lie.
        kernel: the tiles' numbers.
    """
    layer = convolution.make_module(torch.empty(convolution.kernel_shape, device="meta"), None)
    layer.weight = nn.Parameter(kernel.flatten(2).flatten(0, 1).clone())
    # 'unsafe' allows the stored numbers to be fewer than the weight's.
    parametrize.register_parametrization(
        layer, "weight", ScatterWeight(convolution, windows), unsafe=True
    )
    return layer
