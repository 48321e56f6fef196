"""The laws of `deeptwist.decompositions.base`, each one test that every method joins."""

import copy
from dataclasses import FrozenInstanceError
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cases import (
    EXACT,
    GEOMETRIES,
    METHODS,
    TOLERANCE,
    at,
    build,
    decompose,
    difference,
    factored,
    layers,
    pairs,
    read,
    with_kernel,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deeptwist import Decomposition, TiledSVD
from deeptwist.decompositions import METHODS as REGISTERED
from deeptwist.layers.geometry import compute_dtype, kernel_to_weight
from deeptwist.plan.codec import decode, encode

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
EACH_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SHARES = (0.0, 0.3, 0.6, 1.0)  # of the full rank


def error(kernel: Tensor, decomposition: Decomposition) -> float:
    return difference(kernel, decompose(decomposition, kernel).reconstruct())


def test_every_registered_method_is_in_the_table() -> None:
    assert {method.method for method in METHODS.values()} == set(REGISTERED)


@EACH_METHOD
def test_a_decomposition_is_a_frozen_value(method: Decomposition) -> None:
    twin = copy.deepcopy(method)
    assert twin == method
    assert hash(twin) == hash(method)
    with pytest.raises(FrozenInstanceError):
        method.rank = 1  # type: ignore[attr-defined]


@EACH_METHOD
def test_a_resolved_decomposition_resolves_to_itself_and_survives_json(
    method: Decomposition,
) -> None:
    assert decode(Decomposition, encode(method)) == method
    for geometry in GEOMETRIES:
        convolution, _ = read(build(geometry)[0])
        resolved = at(method, convolution, 0.5)
        assert resolved.resolve(convolution, None) == resolved, geometry
        assert not resolved.needs_ratio
        assert decode(Decomposition, encode(resolved)) == resolved, geometry


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("method", "geometry"), pairs(geometries=["3x3", "groups", "linear", "1-D", "transposed 3-D"])
)
def test_reconstruction_has_the_kernels_shape_and_device(
    method: Decomposition, geometry: str, device: str
) -> None:
    for dtype in TOLERANCE:
        layer, _ = build(geometry, dtype)
        convolution, kernel = read(layer.to(device))
        rebuilt = decompose(at(method, convolution, 0.5), kernel).reconstruct()
        assert rebuilt.shape == kernel.shape
        assert rebuilt.device == kernel.device
        assert rebuilt.dtype == compute_dtype(dtype)
        assert rebuilt.isfinite().all()


@pytest.mark.parametrize(("method", "geometry"), pairs())
def test_decomposing_leaves_the_kernel_alone_and_is_repeatable(
    method: Decomposition, geometry: str
) -> None:
    convolution, kernel = read(build(geometry)[0])
    before, resolved = kernel.clone(), at(method, convolution, 0.5)
    first = decompose(resolved, kernel).reconstruct()
    torch.manual_seed(1)  # nothing may depend on the global generator
    state = torch.random.get_rng_state()
    assert torch.equal(first, resolved.decompose(kernel).reconstruct())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(kernel, before)


@pytest.mark.parametrize(("method", "geometry"), pairs())
def test_decomposing_a_reconstruction_changes_nothing(method: Decomposition, geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    resolved = at(method, convolution, 0.5)
    once = decompose(resolved, kernel).reconstruct()
    twice = resolved.decompose(once).reconstruct()
    if method.method != "cp":
        assert difference(once, twice) < 1e-7
    else:  # ALS does not find the factors of a product again, but something near
        assert difference(once, twice) <= difference(kernel, once)


@pytest.mark.parametrize(("method", "geometry"), pairs())
def test_the_error_never_rises_with_the_rank(method: Decomposition, geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    errors = [error(kernel, at(method, convolution, share / 6)) for share in range(7)]
    slack = 0.03 if method.method == "cp" else 1e-7  # ALS finds the nearest optimum, not the best
    assert all(more <= less + slack for less, more in pairwise(errors)), errors
    assert errors[0] <= 1 + 1e-12


@pytest.mark.parametrize(("method", "geometry"), pairs(methods=EXACT))
def test_full_rank_is_the_identity(method: Decomposition, geometry: str) -> None:
    layer, x = build(geometry)
    convolution, kernel = read(layer)
    factors, small = factored(layer, at(method, convolution, 1.0))
    assert difference(kernel, factors.reconstruct()) < 1e-12
    assert difference(layer(x), small(x)) < 1e-12


@pytest.mark.parametrize(("method", "geometry"), pairs())
def test_counted_weights_are_the_stored_numbers(method: Decomposition, geometry: str) -> None:
    layer, _ = build(geometry)
    convolution, _ = read(layer)
    biases = 0 if layer.bias is None else layer.bias.numel()
    for share in SHARES:
        resolved = at(method, convolution, share)
        _, small = factored(layer, resolved)
        stored = sum(parameter.numel() for parameter in small.parameters())
        assert stored == resolved.weight_numel(convolution) + biases


@pytest.mark.parametrize(("method", "geometry"), pairs())
def test_counted_macs_are_the_layers(method: Decomposition, geometry: str) -> None:
    layer, x = build(geometry, torch.float32)
    convolution, _ = read(layer)
    resolved = at(method, convolution, 0.5)
    size = tuple(x.shape[-convolution.dims :]) if convolution.dims else ()
    examples = x.shape[0] if convolution.dims else x.shape[:-1].numel()
    _, small = factored(layer, resolved)
    with FlopCounterMode(display=False) as counter:
        small(x)
    macs = sum(part.macs(part_size) for part, part_size in resolved.workload(convolution, size))
    assert counter.get_total_flops() == 2 * examples * macs
    assert macs == resolved.macs(convolution, size)


@pytest.mark.parametrize(("method", "geometry"), pairs())
def test_the_layer_is_the_convolution_with_the_reconstructed_kernel(
    method: Decomposition, geometry: str
) -> None:
    layer, x = build(geometry)
    convolution, _ = read(layer)
    for share in SHARES:
        resolved = at(method, convolution, share)
        factors, small = factored(layer, resolved)
        assert difference(with_kernel(layer, factors.reconstruct())(x), small(x)) < 1e-11


TILES = st.builds(TiledSVD, tile=st.tuples(st.integers(1, 9), st.integers(1, 40)))


@given(layers(), st.sampled_from([*METHODS.values()]) | TILES, st.floats(0, 1))
@settings(max_examples=150)
def test_any_layer_by_any_method_at_any_rank(
    drawn: tuple[nn.Module, tuple[int, ...]], method: Decomposition, share: float
) -> None:
    layer, size = drawn[0].double().requires_grad_(False), drawn[1]
    convolution, kernel = read(layer)
    resolved = at(method, convolution, share)
    x = torch.randn(2, convolution.in_channels, *size, dtype=torch.float64)
    factors, small = factored(layer, resolved)
    assert difference(with_kernel(layer, factors.reconstruct())(x), small(x)) < 1e-10
    assert difference(kernel, factors.reconstruct()) < 1 + 1e-9
    stored = sum(p.numel() for n, p in small.named_parameters() if not n.endswith("bias"))
    assert stored == resolved.weight_numel(convolution)


@pytest.mark.parametrize(("method", "geometry"), pairs())
def test_the_layer_in_every_type(method: Decomposition, geometry: str) -> None:
    # CP's components may cancel, by which a narrow type loses more than in one product.
    slack = 10 if method.method == "cp" else 1
    for dtype, tolerance in TOLERANCE.items():
        layer, x = build(geometry, dtype)
        factors, small = factored(layer, at(method, read(layer)[0], 0.5))
        assert {parameter.dtype for parameter in small.parameters()} == {dtype}
        expected = with_kernel(layer.double(), factors.reconstruct().double())(x.double())
        assert difference(expected, small(x).double()) < slack * tolerance


@pytest.mark.parametrize(
    ("method", "geometry"), pairs(geometries=["3x3", "groups", "stride", "reflect"])
)
def test_the_layer_takes_any_memory_format(method: Decomposition, geometry: str) -> None:
    layer, x = build(geometry)
    _, small = factored(layer, at(method, read(layer)[0], 0.5))
    expected = small(x)
    small = small.to(memory_format=torch.channels_last)
    assert difference(expected, small(x.to(memory_format=torch.channels_last))) < 1e-12


@pytest.mark.parametrize(
    ("method", "geometry"),
    pairs(geometries=["3x3", "groups", "1x1", "reflect", "linear", "1-D", "transposed 2-D"]),
)
def test_the_layer_takes_whatever_leads(method: Decomposition, geometry: str) -> None:
    """One example without its batch axis, and an empty batch, as torch's own layers do."""
    layer, x = build(geometry)
    factors, small = factored(layer, at(method, read(layer)[0], 0.5))
    twin = with_kernel(layer, factors.reconstruct())
    assert difference(twin(x[0]), small(x[0])) < 1e-11
    assert small(x[:0]).shape == twin(x[:0]).shape


@EACH_METHOD
def test_the_layer_keeps_its_geometry_and_its_bias_readable(method: Decomposition) -> None:
    for geometry in GEOMETRIES:
        layer, _ = build(geometry)
        _, small = factored(layer, at(method, read(layer)[0], 0.5))
        names = ["in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"]
        if isinstance(layer, nn.Linear):
            names = ["in_features", "out_features"]
        for name in names:
            assert getattr(small, name) == getattr(layer, name), geometry
        biases = [value for name, value in small.named_parameters() if name.endswith("bias")]
        if layer.bias is None:
            assert not biases, geometry
        else:
            assert torch.equal(torch.cat(biases).sort().values, layer.bias.sort().values), geometry


@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D"])
@EACH_METHOD
def test_gradients_reach_every_factor(method: Decomposition, geometry: str) -> None:
    layer, x = build(geometry)
    _, small = factored(layer, at(method, read(layer)[0], 0.5))
    small(x).square().sum().backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize(("method", "geometry"), pairs(geometries=["3x3", "groups", "linear"]))
def test_scale_changes_nothing_but_the_scale(
    method: Decomposition, geometry: str, scale: float
) -> None:
    convolution, kernel = read(build(geometry, torch.float32)[0])
    resolved = at(method, convolution, 0.5)
    plain, scaled = error(kernel, resolved), error(kernel * scale, resolved)
    assert scaled == pytest.approx(plain, rel=0.02 if method.method == "cp" else 1e-3)
    for part in resolved.decompose(kernel * scale).kernels():
        assert part.isfinite().all()
        assert part.any()


@pytest.mark.parametrize("scale", [2.0**127, 2.0**-120])
@pytest.mark.parametrize(
    ("method", "geometry"), pairs(methods=EXACT, geometries=["3x3", "groups", "linear"])
)
def test_the_ends_of_fp32_are_within_reach(
    method: Decomposition, geometry: str, scale: float
) -> None:
    convolution, kernel = read(build(geometry, torch.float32)[0])
    kernel = kernel / kernel.abs().max() * scale
    rebuilt = at(method, convolution, 1.0).decompose(kernel).reconstruct()
    assert rebuilt.isfinite().all()
    assert difference(kernel, rebuilt) < 1e-3


@pytest.mark.parametrize(("method", "geometry"), pairs())
def test_a_zero_kernel_stays_zero(method: Decomposition, geometry: str) -> None:
    layer, x = build(geometry, torch.float32)
    layer.weight.zero_()
    factors, small = factored(layer, at(method, read(layer)[0], 0.5))
    assert not factors.reconstruct().any()
    assert torch.allclose(small(x), layer(x))


@pytest.mark.parametrize(("method", "geometry"), pairs(geometries=["3x3", "groups", "3-D"]))
def test_one_zero_group_among_others_harms_none(method: Decomposition, geometry: str) -> None:
    convolution, kernel = read(build(geometry, torch.float32)[0])
    kernel = kernel.clone()
    kernel[-1] = 0
    rebuilt = at(method, convolution, 0.5).decompose(kernel).reconstruct()
    assert rebuilt.isfinite().all()
    assert rebuilt[-1].abs().max() < 1e-6


@pytest.mark.parametrize(("method", "geometry"), pairs(methods=EXACT))
def test_equal_singular_values_are_no_obstacle(method: Decomposition, geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    u, _, vh = torch.linalg.svd(kernel.flatten(2), full_matrices=False)
    kernel = (u @ vh).reshape(kernel.shape)  # every singular value is 1
    assert error(kernel, at(method, convolution, 1.0)) < 1e-12
    assert error(kernel, at(method, convolution, 0.5)) <= 1


COMBINATIONS = [
    combination
    for combination in product(
        (1, 2, 4),  # groups
        (1, (2, 1)),  # stride
        (1, (2, 1)),  # dilation
        (0, 1, (2, 1), "same"),  # padding
        ("zeros", "reflect", "replicate", "circular"),
    )
    if not (combination[3] == "same" and combination[1] != 1)  # torch has none
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", [METHODS[name] for name in EXACT], ids=EXACT)
def test_full_rank_is_the_identity_for_every_combination(
    method: Decomposition, dtype: torch.dtype
) -> None:
    x = torch.randn(1, 4, 6, 7, dtype=dtype)
    for number, (groups, stride, dilation, padding, mode) in enumerate(COMBINATIONS):
        bias = number % 3 == 0  # with every value of the others
        layer = nn.Conv2d(
            4, 8, (3, 2), stride, padding, dilation, groups, bias, mode, dtype=dtype
        ).requires_grad_(False)
        _, small = factored(layer, at(method, read(layer)[0], 1.0))
        assert difference(layer(x), small(x)) < TOLERANCE[dtype], layer


@EACH_METHOD
def test_a_weight_goes_to_a_kernel_and_back(method: Decomposition) -> None:
    """What a distortion writes has the weight's own layout, transposed or not."""
    for geometry in GEOMETRIES:
        layer, _ = build(geometry)
        convolution, kernel = read(layer)
        assert kernel.shape == convolution.kernel_shape
        assert torch.equal(kernel_to_weight(kernel, convolution), layer.weight)
