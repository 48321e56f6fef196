"""Lowering: a kernel as a matrix, and back (paper, section 3.2); the matrix in tiles (section 4.1).

A kernel (g, o, i, *k) holds one convolution kernel per group; each is lowered on its own.
Nothing outside this file knows how a kernel's axes become rows and columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


def lower(
    kernel: Tensor,  # (g, o, i, *k)
    output_axes: int = 0,
) -> Tensor:  # (g, o·Πk_out, i·Πk_in)
    """Return a lowering: the first kernel axes go with the outputs, the others with the inputs.

    Without output axes it is the paper's lowering T × (S·d·d), input channels outermost; with one,
    the separable lowering (T·d_h) × (S·d_w).
    """
    groups, out, into, *size = kernel.shape
    rows, cols = math.prod(size[:output_axes]), math.prod(size[output_axes:])
    return kernel.movedim(2, 2 + output_axes).reshape(groups, out * rows, into * cols)


def unlower(
    matrix: Tensor,  # (g, o·Πk_out, i·Πk_in)
    shape: Sequence[int],
    output_axes: int = 0,
) -> Tensor:  # (g, o, i, *k)
    """Invert `lower`, for a kernel of this shape."""
    groups, out, into, *size = shape
    split = matrix.reshape(groups, out, *size[:output_axes], into, *size[output_axes:])
    return split.movedim(2 + output_axes, 2)


@dataclass(frozen=True)
class Segment:
    """A run of equally long pieces of one axis."""

    offset: int
    length: int
    count: int

    @property
    def stop(self) -> int:
        """Return the index after the run's last."""
        return self.offset + self.length * self.count


@cache  # a distortion asks for every layer's, again and again
def segments(size: int, length: int) -> tuple[Segment, ...]:
    """Cut an axis into pieces of `length`; what is left over is one shorter piece.

    Returns:
        One segment where the pieces fit evenly, else two: the full pieces, then the edge.
    """
    length = min(length, size)
    count, edge = divmod(size, length)
    full = Segment(0, length, count)
    return (full, Segment(full.stop, edge, 1)) if edge else (full,)


@dataclass(frozen=True)
class Grid:
    """A matrix of `shape` (m, n) under tiles of (rows, cols).

    Tiles of one size form a *patch*; an uneven grid has up to four: full tiles, the right
    edge, the bottom edge and the corner.
    """

    shape: tuple[int, int]
    tile: tuple[int, int]

    @property
    def rows(self) -> tuple[Segment, ...]:
        """Return the segments of the rows."""
        return segments(self.shape[0], self.tile[0])

    @property
    def cols(self) -> tuple[Segment, ...]:
        """Return the segments of the columns."""
        return segments(self.shape[1], self.tile[1])

    @property
    def patches(self) -> tuple[tuple[Segment, Segment], ...]:
        """Return the (rows, cols) segments of every patch, row by row."""
        return tuple((row, col) for row in self.rows for col in self.cols)

    @property
    def num_tiles(self) -> int:
        """Return the number of tiles, edges included."""
        return sum(row.count * col.count for row, col in self.patches)

    def split(self, matrix: Tensor) -> list[Tensor]:  # (…, m, n) → (…, tile row, tile col, h, w)
        """Cut a matrix into its patches."""
        return [
            matrix[..., row.offset : row.stop, col.offset : col.stop]
            .unflatten(-1, (col.count, col.length))
            .unflatten(-3, (row.count, row.length))
            .transpose(-3, -2)
            for row, col in self.patches
        ]

    def assemble(self, patches: list[Tensor]) -> Tensor:  # (…, m, n)
        """Invert `split`."""
        blocks = [patch.transpose(-3, -2).flatten(-2).flatten(-3, -2) for patch in patches]
        width = len(self.cols)
        lines = [blocks[i : i + width] for i in range(0, len(blocks), width)]
        if len(blocks) == 1:
            return blocks[0]  # `cat` would copy it, twice
        return torch.cat([torch.cat(line, dim=-1) for line in lines], dim=-2)
