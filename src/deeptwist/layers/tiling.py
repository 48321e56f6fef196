"""Tiling: a matrix cut into rectangles (paper, section 4.1), ragged edges included."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of equally long pieces of one axis."""

    offset: int
    length: int
    count: int

    @property
    def stop(self) -> int:
        """Where the run ends."""
        return self.offset + self.length * self.count


@cache  # a distortion asks for every layer's, again and again
def cut(size: int, length: int) -> tuple[Segment, ...]:
    """Cuts an axis into pieces of `length`; what is left over is one shorter piece.

    Returns:
        One span where the pieces fit evenly, else two: the full pieces, then the edge.
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
        """How the rows are cut."""
        return cut(self.shape[0], self.tile[0])

    @property
    def cols(self) -> tuple[Segment, ...]:
        """How the columns are cut."""
        return cut(self.shape[1], self.tile[1])

    @property
    def patches(self) -> tuple[tuple[Segment, Segment], ...]:
        """The (rows, cols) spans of every patch, row by row."""
        return tuple((row, col) for row in self.rows for col in self.cols)

    @property
    def num_tiles(self) -> int:
        """The number of tiles, edges included."""
        return sum(row.count * col.count for row, col in self.patches)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Cuts a matrix (..., m, n) into its patches, each (..., tile row, tile col, h, w)."""
        return [
            matrix[..., row.offset : row.stop, col.offset : col.stop]
            .unflatten(-1, (col.count, col.length))
            .unflatten(-3, (row.count, row.length))
            .transpose(-3, -2)
            for row, col in self.patches
        ]

    def assemble(self, patches: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        blocks = [patch.transpose(-3, -2).flatten(-2).flatten(-3, -2) for patch in patches]
        width = len(self.cols)
        lines = [blocks[i : i + width] for i in range(0, len(blocks), width)]
        if len(blocks) == 1:
            return blocks[0]  # `cat` would copy it, twice
        return torch.cat([torch.cat(line, dim=-1) for line in lines], dim=-2)
