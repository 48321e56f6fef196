"""How a tiled layer runs: the channels' way from tile columns over hidden channels to tile rows.

The second round, tile rows, is always a 1×1 convolution grouped by tile row. The first has several
exact forms, the implementations:

- ``grouped``: tiles of whole channels are one d×d convolution, grouped by tile column.
- ``windows``: tiles that cut through channels, as one d×d convolution over the channels that they
  touch, the other taps zero.
- ``im2col``: the paper's way, for reference: the input's windows as channels (S·d·d of them), then
  products of matrices, which a 1×1 convolution grouped by tile column is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from deeptwist.layers.geometry import ConvGeometry, ParallelConvs, pointwise
from deeptwist.layers.lowering import Grid
from deeptwist.layers.routing import PointwiseOnLastDim, SplitConcat, Unfold, permutation
from deeptwist.layers.sparse_conv import ChannelWindows, window_convolution

GROUPED, WINDOWS, IM2COL = "grouped", "windows", "im2col"

# MACs in the time that it takes to write one number to memory and read it again, on processors.
_MACS_PER_NUMBER = 40


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

    @property
    def implementations(self) -> tuple[str, ...]:
        """Every form that is exact for this layer, the one that should be fastest first.

        The rule, per output position: the first round costs its MACs, zero taps included, and
        `_MACS_PER_NUMBER` for every number that it gathers. What does more MACs than the dense
        layer comes last.
        """
        conv = self.convolution
        if conv.kernel_numel == 1:
            return (GROUPED,)
        if conv.transposed:
            return (GROUPED,) if self.aligned else (WINDOWS,)
        if self.aligned:
            return GROUPED, IM2COL
        into, out = self.convolutions
        padded = self.window_convolutions
        macs = {
            WINDOWS: sum(part.weight_numel for part in padded),
            IM2COL: sum(part.weight_numel for part in into),
        }
        gathered = {
            WINDOWS: sum(part.in_channels for part in padded) * math.prod(conv.stride),
            IM2COL: conv.in_channels * conv.kernel_numel,
        }
        second_round = sum(part.weight_numel for part in out)

        def cost(name: str) -> tuple[bool, int]:
            is_slower = macs[name] + second_round >= conv.weight_numel
            return is_slower, macs[name] + _MACS_PER_NUMBER * gathered[name]

        return tuple(sorted(macs, key=cost))

    def make_modules(
        self, kernels: Sequence[Tensor], bias: Tensor | None, implementation: str
    ) -> list[nn.Module]:
        """The layer's modules, in order."""
        conv, (into, out) = self.convolution, self.convolutions
        exchange, departure = self._hidden_order(), self._output_order()
        arrival, columns = self._first_round(kernels[: len(into)], implementation)
        biases: Sequence[Tensor | None] = [None] * len(out)
        if bias is not None:
            biases = bias[departure.argsort()].split([part.out_channels for part in out])
        rows = [
            part.make_module(k, b)
            for part, k, b in zip(out, kernels[len(into) :], biases, strict=True)
        ]
        stages: list[nn.Module | None] = [
            Unfold(conv) if implementation == IM2COL else None,
            permutation(arrival, self.dims),
            _abreast(columns, self.dims),
            permutation(exchange, self.dims),
            _abreast(rows, self.dims),
            permutation(departure, self.dims),
        ]
        present = [stage for stage in stages if stage is not None]
        return present if self.dims == conv.dims else [PointwiseOnLastDim(*present)]

    def _first_round(
        self, kernels: Sequence[Tensor], implementation: str
    ) -> tuple[Tensor, list[nn.Module]]:
        """The order in which channels arrive, and a layer for each column patch."""
        into, _ = self.convolutions
        if implementation == WINDOWS:
            windows = [self._windows(column) for column in range(len(into))]
            order = [window.order(self.convolution.groups) for window in windows]
            return torch.cat(order), [
                window_convolution(convolution, window, kernel)
                for convolution, window, kernel in zip(
                    self.window_convolutions, windows, kernels, strict=True
                )
            ]
        if implementation == IM2COL:
            into = tuple(self._over_columns(part) for part in into)
            kernels = [
                kernel.reshape(part.kernel_shape)
                for part, kernel in zip(into, kernels, strict=True)
            ]
        layers = [
            part.make_module(kernel, None) for part, kernel in zip(into, kernels, strict=True)
        ]
        return self._input_order(
            1 if implementation == IM2COL else self.convolution.kernel_numel
        ), layers

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

    def _over_columns(self, part: ConvGeometry) -> ConvGeometry:
        columns = part.in_channels * part.kernel_numel
        return pointwise(self.dims, columns, part.out_channels, part.groups)

    def _input_order(self, taps: int) -> Tensor:
        """Column patches gather their channels, of `taps` columns each, from every group."""
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
