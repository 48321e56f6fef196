"""How a tiled layer runs: the channels' way from tile columns over hidden channels to tile rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deeptwist.convolution import Convolution, pointwise
from deeptwist.decompositions.base import Level
from deeptwist.decompositions.routing import Branches, Im2col, OverFeatures, permutation
from deeptwist.tiling import Grid


@dataclass(frozen=True)
class Plumbing:
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
        """The convolutions of tile columns, then those of tile rows."""
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
