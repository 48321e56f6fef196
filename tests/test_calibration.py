"""Second moments gathered by hooks, against the layers' own outputs."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.cases import (
    EVERY_LAYER,
    GEOMETRIES,
    METHODS,
    at,
    build,
    difference,
    error_of,
    every_layer,
    pairs,
    read,
)
from torch import Tensor, nn

import deeptwist as dt
from deeptwist import CP, SVD, Decomposition, SpatialSVD, TiledSVD, Tucker
from deeptwist.decompositions.linalg import truncated_svd
from deeptwist.layers.geometry import ConvGeometry, weight_to_kernel
from deeptwist.layers.moments import SecondMoment


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_moment_s_norm_of_a_kernel_is_that_of_the_outputs(geometry: str) -> None:
    make, shape = GEOMETRIES[geometry]
    layer, x = make().double(), torch.randn(shape).double()
    model = nn.Sequential(layer)
    if not (layers := dt.plan(model, dt.SVD(rank=1), example_input=x, layers=EVERY_LAYER).layers):
        return
    (planned,) = layers
    if planned.convolution is None or getattr(layer, "weight", None) is None:
        return
    moments = dt.calibrate(model, [x]).moments
    if not moments:
        return
    moment = moments["0"]
    with torch.no_grad():
        y = layer(x)
        if layer.bias is not None:
            bias = (
                layer.bias
                if not planned.convolution.dims
                else layer.bias[(slice(None), *[None] * planned.convolution.dims)]
            )
            y = y - bias
    kernel = weight_to_kernel(layer.weight.detach(), planned.convolution)
    positions = y.numel() // planned.convolution.out_channels
    expected = float(y.square().sum()) / positions
    assert float(moment.squared_norm(kernel)) == pytest.approx(expected)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3)
    ).eval()


def batches() -> list[Tensor]:
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 8, 6, 10, 10, generator=torch.Generator().manual_seed(2))
    return list(torch.einsum("oi,bnihw->bnohw", mix, x))


@pytest.mark.parametrize("method", [dt.SVD(), dt.SpatialSVD(), dt.TiledSVD(), dt.Tucker()], ids=str)
def test_a_calibrated_layer_loses_less_of_its_outputs(method: dt.Decomposition) -> None:
    model, data = network(), batches()
    calibration = dt.calibrate(model, data)
    made = dt.plan(model, method, ratio=3, example_input=data[0], layers=every_layer(include="0"))
    plain, calibrated = (dt.decompose(model, made, calibration=c)[0] for c in (None, calibration))
    x = torch.cat(data)
    with torch.no_grad():
        lost = [float((layer(x) - model[0](x)).square().sum()) for layer in (plain, calibrated)]
    assert lost[1] <= lost[0] * (1 + 1e-5)
    planned = dt.plan(
        model,
        method,
        ratio=3,
        example_input=data[0],
        calibration=calibration,
        layers=every_layer(include="0"),
    ).compressed[0]
    with torch.no_grad():
        y = model[0](x) - model[0].bias[:, None, None]
    slack = 0.15 if method.method == "tucker" else 1e-5  # a bound
    lost_share = (lost[1] / float(y.square().sum())) ** 0.5
    assert planned.relative_error == pytest.approx(lost_share, rel=slack)


def test_pairs_of_a_loader_and_layers_that_are_called_twice() -> None:
    layer = nn.Linear(4, 4)
    model, x = nn.Sequential(layer, nn.ReLU(), layer), torch.randn(50, 4)
    values = dt.calibrate(model, [(x, "labels")]).moments["0"].values[0]
    both = torch.cat([x, layer(x).relu()]).detach()
    assert torch.allclose(values, both.mT @ both / len(both), atol=1e-5)
    assert "inputs=" in error_of(dt.calibrate, model, [("labels", x)])
    again = dt.calibrate(model, [{"x": x}], inputs=lambda batch: (batch["x"],)).moments["0"]
    assert torch.allclose(again.values[0], values)
    assert "no batch" in error_of(dt.calibrate, model, [])


def test_a_large_moment_is_held_with_fewer_axes() -> None:
    model, data = network(), batches()
    full = dt.calibrate(model, data).moments["3"]
    for side, axes in ((24 * 3, 1), (24, 0), (1, 0)):
        bounded = dt.calibrate(model, data, max_side=side).moments["3"]
        assert bounded.axes == axes
        assert torch.allclose(bounded.values, full.over(axes), rtol=1e-3, atol=1e-4)


def test_a_calibration_survives_the_disk(tmp_path: Path) -> None:
    calibration = dt.calibrate(network().half().float(), batches())
    calibration.save(tmp_path / "moments.safetensors")
    loaded = dt.Calibration.load(tmp_path / "moments.safetensors")
    assert loaded.moments.keys() == calibration.moments.keys()
    for name, moment in calibration.moments.items():
        again: SecondMoment = loaded.moments[name]
        assert torch.equal(again.values, moment.values)
        assert replace(again, values=moment.values) == moment
    assert "cannot read calibration" in error_of(dt.Calibration.load, tmp_path / "none")


@pytest.mark.parametrize("values", [torch.zeros(1, 5), torch.zeros(3), torch.zeros(1, 2, 2)])
def test_a_file_whose_moments_are_laid_out_in_another_way_is_refused(
    tmp_path: Path, values: torch.Tensor
) -> None:
    path = tmp_path / "moments.safetensors"
    save_file({"0": values}, path, metadata={"deeptwist_calibration": json.dumps({"0": [[], 0]})})
    error = error_of(dt.Calibration.load, path)
    assert error.startswith(f"cannot read calibration {path}: ")


@pytest.mark.parametrize("side", [8, 300])
def test_fewer_inputs_than_directions_are_enough(side: int) -> None:
    """What rounding leaves of the missing ones is below zero as often as above."""
    model, x = nn.Sequential(nn.Linear(side, side + 8)), torch.randn(3, side)
    calibration = dt.calibrate(model, [x])
    made = dt.plan(
        model, dt.SVD(), ratio=1.5, example_input=x, calibration=calibration, layers=EVERY_LAYER
    )
    small = dt.decompose(model, made, calibration=calibration)
    assert difference(model(x), small(x)) < 1e-2  # their own span is within the rank


def test_a_layer_that_is_read_is_left_out() -> None:
    """Its weight alone is used, as Swin's, so that no call shows its inputs."""
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)
    calibration = dt.calibrate(model, [x])
    assert calibration.moments.keys() == {"linear1", "linear2"}
    made = dt.plan(
        model, dt.SVD(), ratio=2, example_input=x, calibration=calibration, layers=EVERY_LAYER
    )
    assert len(made.compressed) == 4
    dt.decompose(model, made, calibration=calibration)


def test_batch_norms_take_the_mean_over_the_batches() -> None:
    model, data = network(), batches()
    recalibrated = dt.recalibrate_batch_norm(model, data)
    with torch.no_grad():
        y = torch.cat([model[0](x) for x in data])
    assert torch.allclose(recalibrated[1].running_mean, y.mean((0, 2, 3)), atol=1e-5)
    assert torch.equal(model[1].running_mean, torch.zeros(24))
    assert recalibrated[1].momentum == model[1].momentum


@pytest.mark.parametrize("exponent", [-30, -25, 0, 25, 30])
def test_inputs_of_any_scale_are_gathered(exponent: int) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 6, 6)
    one, scaled = (dt.calibrate(model, [y]).moments["0"].values for y in (x, x * 10.0**exponent))
    assert torch.allclose(scaled.double() / 10.0 ** (2 * exponent), one.double(), rtol=1e-4)
    assert one.dtype == torch.float32


# --- approximation in the metric of the outputs, against dense least squares and the data itself

SEED = st.integers(0, 2**16)


def moment_of(convolution: ConvGeometry, positions: int = 400, live: int = 99) -> SecondMoment:
    """The moment of correlated patches, all but `live` of whose channels are dead."""
    groups, _, into, *size = convolution.kernel_shape
    width = into * convolution.kernel_numel
    mixing = torch.randn(groups, width, width, dtype=torch.float64) / width**0.5
    mixing *= torch.logspace(0, -1.5, width, dtype=torch.float64)
    patches = torch.randn(groups, positions, width, dtype=torch.float64) @ mixing
    patches.reshape(groups, positions, into, -1)[:, :, live:] = 0
    return SecondMoment(patches.mT @ patches / positions, tuple(size), len(size))


def output_error(kernel: Tensor, approximation: Tensor, moment: SecondMoment) -> float:
    """By a root of the full moment, found another way."""
    values, vectors = torch.linalg.eigh(moment.full)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    exact, away = ((x.double().flatten(2) @ root) for x in (kernel, kernel - approximation))
    return float(away.norm() / exact.norm())


@given(st.tuples(*[st.integers(1, n) for n in (3, 9, 9)]), st.integers(1, 9), SEED)
def test_the_weighted_svd_is_the_best_in_its_metric(
    shape: tuple[int, int, int], rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rank = min(rank, *shape[1:])
    matrix = torch.randn(shape, dtype=torch.float64)
    mixing = torch.randn(shape[0], shape[2], shape[2] + 2, dtype=torch.float64)
    moment = mixing @ mixing.mT
    left, right = truncated_svd(matrix, rank, moment)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # M = root rootᵀ
    tail = torch.linalg.svdvals(matrix @ root)[:, rank:].square().sum()
    lost = ((matrix - left @ right) @ root).square().sum()
    assert float(lost) <= float(tail) * (1 + 1e-6) + 1e-6 * float((matrix @ root).square().sum())
    # Given right, no left does better: a dense least-squares problem.
    best = torch.linalg.lstsq((right @ root).mT, (matrix @ root).mT).solution.mT
    again = ((matrix - best @ right) @ root).square().sum()
    assert float(lost) <= float(again) + 1e-6 * float((matrix @ root).square().sum())


@pytest.mark.parametrize(("method", "geometry"), pairs())
def test_outputs_never_lose_by_it_and_the_error_is_the_moments(
    method: Decomposition, geometry: str
) -> None:
    convolution, kernel = read(build(geometry)[0])
    moment = moment_of(convolution)
    resolved = at(method, convolution, 0.4)
    plain = resolved.decompose(kernel).reconstruct()
    calibrated = resolved.decompose(kernel, second_moment=moment).reconstruct()
    errors = [output_error(kernel, x, moment) for x in (calibrated, plain)]
    assert errors[0] <= errors[1] * (1 + 1e-9)
    assert moment.relative_error(kernel, calibrated) == pytest.approx(errors[0], abs=1e-7)


@pytest.mark.parametrize("method", [SVD(rank=4), SpatialSVD(rank=8), Tucker(rank=(5, 3))], ids=str)
def test_it_is_worth_its_while(method: Decomposition) -> None:
    convolution, kernel = read(build("3x3")[0])
    moment = moment_of(convolution)
    plain, calibrated = (
        output_error(kernel, factors.reconstruct(), moment)
        for factors in (method.decompose(kernel), method.decompose(kernel, second_moment=moment))
    )
    assert calibrated < 0.95 * plain


@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D", "transposed 2-D", "3-D"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "cp"])
def test_full_rank_is_the_identity_for_dead_channels_too(name: str, geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    for positions, live in ((400, 99), (5, 2)):
        moment = moment_of(convolution, positions, live)
        full = at(METHODS[name], convolution, 1.0)
        rebuilt = full.decompose(kernel, second_moment=moment).reconstruct()
        assert rebuilt.isfinite().all()
        assert difference(kernel, rebuilt) < 1e-6


@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D", "transposed 2-D"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_outputs_error_never_rises_with_the_rank(method: Decomposition, geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    moment = moment_of(convolution)
    errors = []
    for share in range(7):
        factors = at(method, convolution, share / 6).decompose(kernel, second_moment=moment)
        errors.append(moment.relative_error(kernel, factors.reconstruct()))
    slack = 0.03 if method.method in ("cp", "tucker", "tiled_svd", "spatial_svd") else 1e-7
    assert all(more <= less + slack for less, more in pairwise(errors)), errors


@pytest.mark.parametrize("axes", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_any_structure_and_type_will_do(method: Decomposition, axes: int) -> None:
    convolution, kernel = read(build("3x3", torch.float32)[0])
    full = moment_of(convolution)
    moment = SecondMoment(full.over(axes), full.kernel_size, axes)
    resolved = at(method, convolution, 0.4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        factors = resolved.decompose(kernel.to(dtype), second_moment=moment)
        assert {x.dtype for x in factors.tensors} == {torch.float32}
        plain = resolved.decompose(kernel.to(dtype)).reconstruct()
        errors = [moment.relative_error(kernel, x) for x in (factors.reconstruct(), plain)]
        assert errors[0] <= errors[1] + 1e-3


def test_a_moment_of_zero_is_no_accident() -> None:
    _, kernel = read(nn.Conv2d(4, 6, 3))
    moment = SecondMoment(torch.zeros(1, 36, 36), (3, 3), 2)
    for method in (SVD(rank=2), Tucker(rank=(3, 2)), CP(rank=2)):
        factors = method.decompose(kernel, second_moment=moment)
        assert factors.reconstruct().isfinite().all()
        assert moment.relative_error(kernel, factors.reconstruct()) == 0


# --- errors at all ranks


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D", "more in than out"])
@pytest.mark.parametrize("name", ["svd", "spatial", "tiled-ragged", "tiled-rows"])
def test_one_spectrum_tells_the_errors_at_all_ranks(
    name: str, geometry: str, calibrated: bool
) -> None:
    convolution, kernel = read(build(geometry)[0])
    moment = moment_of(convolution) if calibrated else None
    method = METHODS[name]
    errors = method.errors_at_all_ranks(kernel, moment)
    full = at(method, convolution, 1.0)
    assert errors is not None
    assert len(errors) == full.rank
    assert float(errors[-1]) < 1e-6
    for rank in range(1, len(errors) + 1):
        resolved = at(method, convolution, rank / len(errors))
        factors = resolved.decompose(kernel)
        if moment is None:
            assert float(errors[resolved.rank - 1]) == pytest.approx(
                difference(kernel, factors.reconstruct()), abs=1e-6
            )
        elif name == "svd":
            factors = resolved.decompose(kernel, second_moment=moment)
            assert float(errors[resolved.rank - 1]) == pytest.approx(
                moment.relative_error(kernel, factors.reconstruct()), abs=1e-3
            )


@pytest.mark.parametrize("geometry", ["3x3", "groups", "1-D"])
def test_the_higher_order_spectra_bound_tucker(geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    bounds = Tucker().errors_at_all_ranks(kernel)
    assert bounds.shape == kernel.shape[1:3]
    for share in (0.3, 0.6, 1.0):
        method = at(Tucker(), convolution, share)
        error = difference(kernel, method.decompose(kernel).reconstruct())
        bound = float(bounds[method.rank[0] - 1, method.rank[1] - 1])
        assert 0.8 * bound - 1e-6 <= error <= bound + 1e-6


@pytest.mark.parametrize("geometry", ["3x3", "groups", "1-D"])
def test_a_few_sweeps_tell_what_cp_loses_about(geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    estimates = CP().errors_at_all_ranks(kernel)
    assert len(estimates) == CP().full_rank(convolution)
    assert all(more <= less for less, more in pairwise(estimates.tolist()))
    method = CP().resolve(convolution, 4)
    error = difference(kernel, method.decompose(kernel).reconstruct())
    assert error == pytest.approx(float(estimates[method.rank - 1]), rel=0.15)


@pytest.mark.parametrize("name", ["svd", "spatial", "tiled-rows", "tucker"])
def test_the_outputs_errors_at_all_ranks_are_near_what_is_lost(name: str) -> None:
    convolution, kernel = read(build("3x3")[0])
    moment = moment_of(convolution)
    for share in (0.15, 0.3, 0.6):
        method = at(METHODS[name], convolution, share)
        errors = method.without_rank().errors_at_all_ranks(kernel, moment)
        ranks = method.rank if isinstance(method.rank, tuple) else (method.rank,)
        told = float(errors[tuple(rank - 1 for rank in ranks)])
        factors = method.decompose(kernel, second_moment=moment)
        assert moment.relative_error(kernel, factors.reconstruct()) == pytest.approx(told, rel=0.25)


def test_a_kernel_of_zeros_loses_nothing() -> None:
    assert TiledSVD().errors_at_all_ranks(torch.zeros(1, 4, 4, 3, 3)).max() == 0


@given(
    st.sampled_from([*METHODS.values()]),
    st.sampled_from(["3x3", "groups", "1x1", "linear"]),
    st.integers(0, 2),
    st.integers(-45, 36),
    st.sampled_from([0.0, 1e-6, 0.3]),
    SEED,
)
def test_any_moment_is_factored(
    method: Decomposition, geometry: str, rank: int, exponent: int, noise: float, seed: int
) -> None:
    """Of any rank and scale, each group of its own; with rounding that leaves it indefinite."""
    convolution, kernel = read(build(geometry)[0])
    torch.manual_seed(seed)
    groups, _, into, *size = convolution.kernel_shape
    side = into * convolution.kernel_numel
    patches = torch.randn(groups, rank, side)
    values = patches.mT @ patches + noise * torch.randn(groups, side, side)
    values = (values + values.mT) / 2
    values.diagonal(dim1=1, dim2=2).clamp_(min=0)  # a sum of squares
    values = (
        values.clamp(-30, 30) * 10.0 ** (exponent * torch.arange(1, 0, -1 / groups))[:, None, None]
    )
    moment = SecondMoment(values, tuple(size), len(size))
    resolved = at(method, convolution, 0.4)
    approximation = resolved.decompose(kernel, second_moment=moment).reconstruct()
    assert approximation.isfinite().all()
    assert moment.relative_error(kernel, approximation) < math.inf
    errors = resolved.without_rank().errors_at_all_ranks(kernel, moment)
    assert errors is None or (errors.isfinite().all() and errors.min() >= 0)
