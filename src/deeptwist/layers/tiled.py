"""How a tiled layer runs: the channels' way from tile columns over hidden channels to tile rows.

The first round, tile columns, is one d×d convolution grouped by tile column: over the columns' own
channels where tiles are aligned, over windows of the channels that they touch, the other taps zero,
where they cut through channels. The second, tile rows, is a 1×1 convolution grouped by tile row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from deeptwist.layers.geometry import ConvGeometry, ParallelConvs, pointwise
from deeptwist.layers.lowering import Grid
from deeptwist.layers.routing import PointwiseOnLastDim, SplitConcat, permutation
from deeptwist.layers.sparse_conv import ChannelWindows, window_convolution


@dataclass(frozen=True)
class TiledLayerBuilder:
    """How the channels run from tile columns to tile rows."""

    convolution: ConvGeometry
    grid: Grid
    ranks: list[int]
    aligned: bool

    @property
    def dims(self) -> int:
        """Spatial axes of the convolutions; one for a linear layer in more than one tile."""
        return self.convolution.dims or int(self.grid.num_tiles > 1)

    @property
    def convolutions(self) -> tuple[ParallelConvs, ...]:
        """The convolutions of tile columns, then those of tile rows."""
        conv, groups = self.convolution, self.convolution.groups
        width = len(self.grid.cols)
        into, out = [], []
        for c, col in enumerate(self.grid.cols):
            ranks = self.ranks[c::width]
            hidden = sum(row.count * rank for row, rank in zip(self.grid.rows, ranks, strict=True))
            blocks = groups * col.count
            if self.aligned and conv.dims:
                channels = blocks * col.length // conv.kernel_numel
                into.append(conv.restricted_to(range(conv.dims), channels, blocks * hidden, blocks))
            else:
                into.append(pointwise(self.dims, blocks * col.length, blocks * hidden, blocks))
        for r, row in enumerate(self.grid.rows):
            ranks = self.ranks[r * width : (r + 1) * width]
            hidden = sum(col.count * rank for col, rank in zip(self.grid.cols, ranks, strict=True))
            blocks = groups * row.count
            out.append(pointwise(self.dims, blocks * hidden, blocks * row.length, blocks))
        return tuple(into), tuple(out)

    def make_modules(self, kernels: Sequence[Tensor], bias: Tensor | None) -> list[nn.Module]:
        """The layer's modules, in order."""
        conv, (into, out) = self.convolution, self.convolutions
        exchange, departure = self._hidden_order(), self._output_order()
        arrival, columns = self._first_round(kernels[: len(into)])
        biases: Sequence[Tensor | None] = [None] * len(out)
        if bias is not None:
            biases = bias[departure.argsort()].split([part.out_channels for part in out])
        rows = [
            part.make_module(k, b)
            for part, k, b in zip(out, kernels[len(into) :], biases, strict=True)
        ]
        stages: list[nn.Module | None] = [
            permutation(arrival, self.dims),
            _abreast(columns, self.dims),
            permutation(exchange, self.dims),
            _abreast(rows, self.dims),
            permutation(departure, self.dims),
        ]
        present = [stage for stage in stages if stage is not None]
        return present if self.dims == conv.dims else [PointwiseOnLastDim(*present)]

    def _first_round(self, kernels: Sequence[Tensor]) -> tuple[Tensor, list[nn.Module]]:
        """The order in which channels arrive, and a layer for each column patch."""
        into, _ = self.convolutions
        if self.aligned:
            return self._input_order(), [
                part.make_module(kernel, None) for part, kernel in zip(into, kernels, strict=True)
            ]
        windows = [self._windows(column) for column in range(len(into))]
        order = [window.order(self.convolution.groups) for window in windows]
        return torch.cat(order), [
            window_convolution(convolution, window, kernel)
            for convolution, window, kernel in zip(
                self.window_convolutions, windows, kernels, strict=True
            )
        ]

    def _windows(self, column: int) -> ChannelWindows:
        taps = self.convolution.kernel_numel
        return ChannelWindows(self.grid.cols[column], taps, self.grid.shape[1] // taps)

    @property
    def window_convolutions(self) -> ParallelConvs:
        """The convolutions of tile columns over the channels that they touch."""
        conv = self.convolution
        return tuple(
            conv.restricted_to(
                range(conv.dims),
                part.groups * self._windows(column).width,
                part.out_channels,
                part.groups,
            )
            for column, part in enumerate(self.convolutions[0])
        )

    def _input_order(self) -> Tensor:
        """Column patches gather their channels from every group."""
        taps = self.convolution.kernel_numel
        width = self.grid.shape[1] // taps
        order = torch.arange(self.convolution.groups * width).unflatten(0, (-1, width))
        spans = [
            order[:, col.offset // taps : col.stop // taps].flatten() for col in self.grid.cols
        ]
        return torch.cat(spans)

    def _hidden_order(self) -> Tensor:
        """From (column patch; group, tile column, row patch, tile row, rank) to rows first."""
        groups, width = self.convolution.groups, len(self.grid.cols)
        blocks: dict[tuple[int, int], Tensor] = {}
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
                blocks[r, c] = part.unflatten(2, (row.count, -1)).transpose(1, 2).flatten(2)
        rows = range(len(self.grid.rows))
        return torch.cat(
            [torch.cat([blocks[r, c] for c in range(width)], 2).flatten() for r in rows]
        )

    def _output_order(self) -> Tensor:
        """Row patches hand their channels back to their groups."""
        groups, height = self.convolution.groups, self.grid.shape[0]
        order = torch.arange(groups * height).unflatten(0, (-1, height))
        return torch.cat(
            [order[:, row.offset : row.stop].flatten() for row in self.grid.rows]
        ).argsort()


def _abreast(layers: list[nn.Module], dims: int) -> nn.Module:
    if len(layers) == 1:
        return layers[0]
    return SplitConcat(layers, [cast(nn.Conv2d, layer).in_channels for layer in layers], dims)
