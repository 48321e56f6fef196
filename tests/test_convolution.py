import json
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.cases import GEOMETRIES, build, error_of, every_layer, layers, read
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deeptwist import SpatialSVD, TiledSVD, decompose, plan
from deeptwist.layers.geometry import (
    ConvGeometry,
    compute_dtype,
    kernel_to_weight,
    pointwise,
    weight_to_kernel,
)
from deeptwist.layers.lowering import Grid, Segment, lower, segments, unlower
from deeptwist.plan.codec import decode, encode
from deeptwist.plan.planner import plan_from_model

EACH_GEOMETRY = pytest.mark.parametrize("geometry", GEOMETRIES)


@given(layers())
def test_sizes_and_macs_are_torchs(given_: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, size = given_
    convolution = ConvGeometry.from_module(layer)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = layer(torch.randn(2, convolution.in_channels, *size))
    assert y.shape[2:] == convolution.output_size(size)
    assert counter.get_total_flops() == 2 * 2 * convolution.macs(size)
    assert convolution.weight_numel == layer.get_parameter("weight").numel()


@given(layers())
def test_a_rebuilt_layer_is_the_layer(given_: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, size = given_
    convolution, kernel = read(layer)
    bias = None if layer.bias is None else layer.get_parameter("bias").detach()
    twin = convolution.make_module(kernel, bias)
    x = torch.randn(2, convolution.in_channels, *size)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    assert ConvGeometry.from_module(twin) == convolution


@given(layers())
def test_json_round_trip(given_: tuple[nn.Module, tuple[int, ...]]) -> None:
    convolution = ConvGeometry.from_module(given_[0])
    assert decode(ConvGeometry, json.loads(json.dumps(encode(convolution)))) == convolution


@EACH_GEOMETRY
def test_a_kernel_has_one_independent_part_per_group(geometry: str) -> None:
    layer, x = build(geometry)
    convolution, kernel = read(layer)
    assert kernel.shape == convolution.kernel_shape
    assert torch.equal(kernel_to_weight(kernel, convolution), layer.weight)
    if convolution.groups > 1:
        kernel = kernel.clone()
        kernel[0] = 0  # silences the first group's outputs, and no others
        layer.weight.copy_(kernel_to_weight(kernel, convolution))
        y = layer(x).unflatten(1, (convolution.groups, -1))
        spread = y[:, 0].flatten(2).std(dim=-1)
        assert not spread.any()
        assert y[:, 1].any()


def test_a_linear_layer_is_a_convolution_without_axes() -> None:
    layer = nn.Linear(6, 4)
    convolution = ConvGeometry.from_module(layer)
    assert (convolution.dims, convolution.kernel_numel, convolution.kernel_shape) == (
        0,
        1,
        (1, 4, 6),
    )
    assert convolution.macs(()) == 24
    assert convolution == pointwise(0, 6, 4)


@EACH_GEOMETRY
def test_work_split_over_the_axes_gives_the_same_size(geometry: str) -> None:
    convolution, _ = read(build(geometry)[0])
    size = (9, 8, 7)[: convolution.dims]
    expected = convolution.output_size(size)
    for axis in range(convolution.dims):
        size = convolution.restricted_to((axis,), 1, 1, 1).output_size(size)
    assert size == expected


def test_along_keeps_nothing_of_the_other_axes() -> None:
    convolution = ConvGeometry.from_module(nn.Conv2d(8, 8, (3, 5), (2, 3), (1, 2), (1, 2)))
    part = convolution.restricted_to((1,), 6, 4, 2)
    assert part == ConvGeometry.from_module(
        nn.Conv2d(6, 4, (1, 5), (1, 3), (0, 2), (1, 2), groups=2)
    )
    assert convolution.restricted_to((), 6, 4, 2) == pointwise(2, 6, 4, 2)


def test_valid_padding_is_none() -> None:
    assert ConvGeometry.from_module(
        nn.Conv2d(3, 4, 3, padding="valid")
    ) == ConvGeometry.from_module(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("module", [nn.BatchNorm2d(3), nn.Embedding(3, 4), nn.LSTM(3, 4)])
def test_other_modules_are_refused(module: nn.Module) -> None:
    assert type(module).__name__ in error_of(ConvGeometry.from_module, module)


@pytest.mark.parametrize(
    "values",
    [
        {"in_channels": 3},
        {"in_channels": 3, "out_channels": 4, "color": "red"},
        {"in_channels": 3, "out_channels": 4, "two\nlines": 1},
        [],
        "nonsense",
        None,
        {"in_channels": "3", "out_channels": 4},
        {"in_channels": 3.5, "out_channels": 4},
        {"in_channels": -3, "out_channels": 4},
        {"in_channels": 3, "out_channels": 4, "groups": 0},
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3},
        {"in_channels": 3, "out_channels": 4, "kernel_size": [3], "stride": []},
        {"in_channels": 3, "out_channels": 4, "kernel_size": [[3]]},
        {"in_channels": 3, "out_channels": 4, "padding": "some"},
        {"in_channels": math.inf, "out_channels": 4},
    ],
    ids=str,
)
def test_a_geometry_that_is_none_is_refused(values: object) -> None:
    assert error_of(decode, ConvGeometry, values)


def test_bias_and_weights_are_held_not_copied_from_torchs_generator() -> None:
    state = torch.random.get_rng_state()
    layer = ConvGeometry.from_module(nn.Conv2d(3, 4, 3, device="meta")).make_module(
        torch.ones(1, 4, 3, 3, 3), None
    )
    assert layer.bias is None
    assert (layer.weight == 1).all()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("dtype", "computing"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_narrow_types_compute_in_fp32(dtype: torch.dtype, computing: torch.dtype) -> None:
    assert compute_dtype(dtype) == computing


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Linear(3, 4), "3→4"),
        (nn.Conv2d(4, 8, (3, 1), groups=2), "4→8, 3×1, 2 groups"),
        (nn.ConvTranspose1d(4, 8, 2), "4→8, 2, transposed"),
    ],
)
def test_in_words(layer: nn.Module, text: str) -> None:
    assert str(ConvGeometry.from_module(layer)) == text


def test_a_transposed_weight_stores_inputs_first() -> None:
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
    convolution, kernel = read(layer)
    assert kernel.shape == (2, 2, 3, 3, 3)
    assert torch.equal(kernel[1, 0, 2], layer.weight[5, 0])
    assert torch.equal(weight_to_kernel(layer.weight, convolution), kernel)


# --- lowered kernels and their tiles, and the layers that raw tiles become

SHAPES = st.integers(0, 3).flatmap(lambda dims: st.tuples(*[st.integers(1, 5)] * (3 + dims)))


def counting(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@given(SHAPES)
def test_lowering_and_back(shape: tuple[int, ...]) -> None:
    kernel = counting(*shape)
    for axes in range(len(shape) - 2):
        assert torch.equal(unlower(lower(kernel, axes), shape, axes), kernel)


@given(SHAPES)
def test_the_papers_lowering_has_input_channels_outermost(shape: tuple[int, ...]) -> None:
    kernel = counting(*shape)
    groups, out, *rest = shape
    assert torch.equal(lower(kernel), kernel.reshape(groups, out, torch.Size(rest).numel()))


def test_lowered_columns_are_those_of_unfold() -> None:
    kernel, x = torch.randn(1, 5, 3, 2, 4).double(), torch.randn(2, 3, 6, 7).double()
    by_matrix = lower(kernel)[0] @ F.unfold(x, (2, 4))
    assert torch.allclose(by_matrix, F.conv2d(x, kernel[0]).flatten(2))


def test_the_separable_lowering_element_by_element() -> None:
    kernel = counting(2, 3, 4, 5, 6)
    matrix = lower(kernel, SpatialSVD().output_axes(kernel.dim() - 3))
    assert matrix.shape == (2, 3 * 5, 4 * 6)
    for g, o, i, h, w in product(*map(range, kernel.shape)):
        assert matrix[g, o * 5 + h, i * 6 + w] == kernel[g, o, i, h, w]


def test_in_three_axes_the_first_goes_with_the_outputs() -> None:
    kernel = counting(1, 2, 3, 2, 3, 2)
    matrix = lower(kernel, SpatialSVD().output_axes(kernel.dim() - 3))
    assert matrix.shape == (1, 2 * 2, 3 * 3 * 2)
    for o, i, d, h, w in product(*map(range, kernel.shape[1:])):
        assert matrix[0, o * 2 + d, (i * 3 + h) * 2 + w] == kernel[0, o, i, d, h, w]


def test_below_two_axes_there_is_but_one_lowering() -> None:
    assert [SpatialSVD().output_axes(dims) for dims in range(4)] == [0, 0, 1, 1]


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


def test_windows_hold_the_channels_that_their_tile_touches() -> None:
    """The zero-padded weight, against the tile's columns laid out by hand."""
    layer = nn.Conv2d(5, 4, 3, bias=False)
    decomposition = TiledSVD(tile=(4, 12), rank=4)  # full rank
    geometry = ConvGeometry.from_module(layer)
    kernels = decomposition.decompose(layer.weight.detach()[None]).kernels()
    built = decomposition.make_layer(geometry, kernels, None)
    full = next(part for part in built.modules() if isinstance(part, nn.Conv2d))
    # Columns 0-11, 12-23, 24-35 of 45 touch channels 0-1, 1-2, 2-3; 36-44 are channel 4.
    branch = next(part for part in built.modules() if type(part).__name__ == "SplitConcat")
    convolutions = list(branch.layers)
    assert [part.weight.shape[1] for part in convolutions] == [2, 1]
    weight = convolutions[0].weight.detach().reshape(3, 4, 18)
    for tile, before in enumerate((0, 3, 6)):  # taps of the window before the tile
        assert torch.equal(weight[tile, :, before : before + 12], kernels[0][tile, :, :, 0, 0])
        assert weight[tile].count_nonzero() == kernels[0][tile].count_nonzero()
    assert full is convolutions[0]


def test_the_plan_of_a_decomposed_model_is_the_plan_that_made_it() -> None:
    network = nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 24, 3),
        nn.Conv2d(24, 16, 1),
    ).eval()
    x = torch.randn(2, 16, 9, 9)
    before = plan(
        network,
        TiledSVD(tile=(8, 20)),
        ratio=1.5,
        example_input=x,
        layers=every_layer(exclude=["3"]),
    )
    read_back = plan_from_model(decompose(network, before), network, x)
    assert [(x.name, x.decomposition) for x in read_back.compressed] == [
        (x.name, x.decomposition) for x in before.compressed
    ]
    assert [x.name for x in read_back.layers] == [x.name for x in before.layers]
    assert read_back.macs == before.macs
