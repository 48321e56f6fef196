import json
import math

import pytest
import torch
from hypothesis import given
from tests.cases import GEOMETRIES, build, error_of, layers, read
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deeptwist.layers.geometry import (
    ConvGeometry,
    compute_dtype,
    kernel_to_weight,
    pointwise,
    weight_to_kernel,
)
from deeptwist.plan.codec import decode, encode

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
