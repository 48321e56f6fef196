"""Second moments gathered by hooks, against the layers' own outputs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.cases import EVERY_LAYER, GEOMETRIES, difference, error_of, every_layer
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.layers.geometry import weight_to_kernel
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
