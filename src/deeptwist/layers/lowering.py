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


def lower(kernel: Tensor) -> Tensor:  # (g, o, i, *k) → (g, o, i·Πk)
    """Return the paper's lowering T × (S·d·d), input channels outermost."""
    return kernel.flatten(2)


def unlower(matrix: Tensor, shape: Sequence[int]) -> Tensor:  # (g, o, i·Πk) → (g, o, i, *k)
    """Invert `lower`, for a kernel of this shape."""
    return matrix.reshape(tuple(shape))


def lower_spatial(kernel: Tensor) -> Tensor:  # (g, o, i, kh, *kw) → (g, o·kh, i·Πkw)
    """Return the separable lowering (T·d_h) × (S·d_w).

    With fewer than two spatial axes it is `lower`; with three, the first goes with the outputs
    and the other two with the inputs.
    """
    if kernel.dim() < 5:
        return lower(kernel)
    groups, out, into, first, *rest = kernel.shape
    return kernel.transpose(2, 3).reshape(groups, out * first, into * math.prod(rest))


def unlower_spatial(matrix: Tensor, shape: Sequence[int]) -> Tensor:  # (g, o, i, kh, *kw)
    """Invert `lower_spatial`, for a kernel of this shape."""
    if len(shape) < 5:
        return unlower(matrix, shape)
    groups, out, into, first, *rest = shape
    return matrix.reshape(groups, out, first, into, *rest).transpose(2, 3)


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
