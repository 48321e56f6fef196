import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deeptwist.layers.lowering import Grid, Segment, segments

SIDE = st.integers(1, 40)
GRIDS = st.builds(Grid, st.tuples(SIDE, SIDE), st.tuples(st.integers(1, 60), st.integers(1, 60)))


@pytest.mark.parametrize(
    ("size", "length", "spans"),
    [
        (64, 64, [(0, 64, 1)]),
        (128, 64, [(0, 64, 2)]),
        (130, 64, [(0, 64, 2), (128, 2, 1)]),
        (10, 64, [(0, 10, 1)]),
        (3, 1, [(0, 1, 3)]),
    ],
)
def test_cutting(size: int, length: int, spans: list[tuple[int, int, int]]) -> None:
    assert segments(size, length) == tuple(Segment(*span) for span in spans)


@given(st.integers(1, 200), st.integers(1, 250))
def test_the_pieces_cover_the_axis_once(size: int, length: int) -> None:
    pieces = [
        range(span.offset + i * span.length, span.offset + (i + 1) * span.length)
        for span in segments(size, length)
        for i in range(span.count)
    ]
    assert [place for piece in pieces for place in piece] == list(range(size))
    assert all(len(piece) == min(size, length) for piece in pieces[:-1])


@given(GRIDS, st.integers(1, 3))
def test_splitting_and_assembling(grid: Grid, groups: int) -> None:
    matrix = torch.arange(groups * grid.shape[0] * grid.shape[1]).reshape(groups, *grid.shape)
    patches = grid.split(matrix)
    assert torch.equal(grid.assemble(patches), matrix)
    assert sum(patch[0, ..., 0, 0].numel() for patch in patches) == grid.num_tiles
    assert 1 <= len(patches) <= 4


@given(GRIDS)
def test_every_tile_is_its_rectangle(grid: Grid) -> None:
    matrix = torch.arange(grid.shape[0] * grid.shape[1]).reshape(grid.shape)
    for (row, col), patch in zip(grid.patches, grid.split(matrix), strict=True):
        assert patch.shape == (row.count, col.count, row.length, col.length)
        for r, c in [(0, 0), (row.count - 1, col.count - 1)]:
            top, left = row.offset + r * row.length, col.offset + c * col.length
            rectangle = matrix[top : top + row.length, left : left + col.length]
            assert torch.equal(patch[r, c], rectangle)
