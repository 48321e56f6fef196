"""Budgets of milliseconds: what the clock interpolates, and what a plan makes of it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cases import EVERY_LAYER
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.decompositions import FactoredLayer
from deeptwist.layers.geometry import ConvGeometry, LayerCall
from deeptwist.measure.latency import Latency, LatencyCache, LatencySetting, NetworkTimes
from deeptwist.measure.layer_clock import LayerClock
from deeptwist.measure.runtimes import Runtime
from deeptwist.plan.budget import Budgets
from deeptwist.plan.network_clock import search_latency
from deeptwist.plan.planned_layer import CompressedLayer
from deeptwist.plan.planner import Planner

X = torch.randn(2, 16, 12, 12)
OVERHEAD = 7.0


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def by_macs(module: nn.Module, x: Tensor) -> Callable[[], float]:
    """A runtime whose time is the MACs, and a constant for every call."""
    size = tuple(x.shape[2:])
    if isinstance(module, FactoredLayer):
        macs = module.decomposition.macs(module.convolution, size)
    else:
        macs = ConvGeometry.from_module(module).macs(size)
    return lambda: macs / 1e3 + OVERHEAD


def clock_of_macs(examples: int = 2, batch: int = 2) -> LayerClock:
    return LayerClock(
        X,
        examples=examples,
        setting=LatencySetting(batch),
        prepare=by_macs,
        measure=lambda runs: [[run()] for run in runs],  # type: ignore[list-item]
    )


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))).eval()


def test_ranks_between_those_timed_lie_on_the_line() -> None:
    convolution = ConvGeometry.from_module(network()[0])
    calls = (LayerCall(2, (12, 12)),)
    forms = [dt.SpatialSVD(rank=rank) for rank in range(1, 17)]
    forms += [dt.SVD(rank=rank) for rank in range(1, 10)]
    dense, times = clock_of_macs().times(convolution, calls, forms)
    macs = [form.macs(convolution, (12, 12)) for form in forms]
    assert dense == convolution.macs((12, 12)) / 1e3 + OVERHEAD
    np.testing.assert_allclose(times, np.array(macs) / 1e3 + OVERHEAD)


def test_every_call_counts() -> None:
    convolution = ConvGeometry.from_module(network()[0])
    calls = (LayerCall(2, (12, 12)), LayerCall(2, (6, 6)))
    forms = [dt.SVD(rank=2), dt.SVD(rank=5)]
    dense, times = clock_of_macs().times(convolution, calls, forms)
    alone = [clock_of_macs().times(convolution, (call,), forms) for call in calls]
    assert dense == sum(each for each, _ in alone)
    assert times == [sum(each) for each in zip(*(each for _, each in alone), strict=True)]


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_a_budget_of_milliseconds_is_met_and_used(factor: float) -> None:
    clock = clock_of_macs()
    planner = Planner(network(), X, [dt.SpatialSVD()], EVERY_LAYER)
    plan = planner.plan(None, Budgets(milliseconds=factor), clock)
    dense = factored = 0.0
    for layer in plan.layers:
        assert layer.convolution is not None
        form = [layer.decomposition] if isinstance(layer, CompressedLayer) else []
        alone, times = clock.times(layer.convolution, layer.calls, form)
        dense, factored = dense + alone, factored + sum(times or [alone])
    assert factor <= dense / factored < 1.2 * factor


def test_layers_are_timed_in_pytorch_by_themselves() -> None:
    model, x = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1)).eval(), torch.randn(1, 96, 24, 24)
    options = {"example_input": x, "layers": EVERY_LAYER}
    (layer,) = dt.plan(model, "spatial_svd", latency=Latency(1.2, batch=1), **options).layers
    assert isinstance(layer, CompressedLayer)
    with pytest.raises(dt.DeepTwistError, match="no plan"):
        dt.plan(model, dt.SpatialSVD(), latency=1e6, **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "speedup and ms"),
        ({"speedup": 2, "ms": 2}, "speedup and ms are one budget"),
        ({"speedup": 1}, "speedup of 1"),
        ({"ms": 0}, "0 ms"),
        ({"ms": 12, "batch": 0}, "batch 0"),
        ({"ms": 12, "threads": 0}, "threads 0"),
        ({"ms": 12, "runtime": "onxruntime"}, "did you mean 'onnxruntime'?"),
    ],
)
def test_latencies_that_mean_nothing(
    values: dict[str, object], message: str, error_of: Callable[..., str]
) -> None:
    assert message in error_of(Latency, **values)


def test_an_example_without_a_batch_is_one(error_of: Callable[..., str]) -> None:
    model, image = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1)).eval(), torch.randn(96, 24, 24)
    options = {"example_input": image, "layers": EVERY_LAYER}
    assert dt.plan(model, dt.SpatialSVD(), ratio=2, **options).examples == 1
    # A batch of such images is none that the network takes.
    assert "with a batch in front" in error_of(dt.plan, model, dt.SVD(), latency=2, **options)


def test_what_was_timed_is_kept_in_a_file_that_names_the_machine() -> None:
    x, setting = torch.randn(1, 96, 24, 24), LatencySetting(1)
    model = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1)).eval()
    convolution, forms = ConvGeometry.from_module(model[0]), [dt.SVD(rank=8), dt.SVD(rank=32)]
    planner = Planner(model, x, [dt.SVD()], EVERY_LAYER)
    times = planner.clock(setting).times(convolution, (LayerCall(1, (24, 24)),), forms)
    path = LatencyCache("eager").path
    kept = json.loads(path.read_text())
    assert str(torch.__version__) in kept["machine"]
    assert "eager" in kept["machine"]
    assert [times[0], *times[1]] in kept["times"].values()
    assert planner.clock(setting).times(convolution, (LayerCall(1, (24, 24)),), forms) == times
    path.write_text("[]")
    assert LatencyCache("eager").read() == {}


@pytest.mark.parametrize("width", [1, 8, 16])
def test_ranks_are_multiples_of_what_vectors_hold(width: int) -> None:
    def stairs(module: nn.Module, x: Tensor) -> Callable[[], float]:
        decomposition = getattr(module, "decomposition", dt.SVD(rank=100))
        return lambda: 10.0 + -(-decomposition.rank // width) * width

    clock = LayerClock(
        X,
        examples=1,
        setting=LatencySetting(1),
        prepare=stairs,
        measure=lambda runs: [[run()] for run in runs],  # type: ignore[list-item]
    )
    convolution = ConvGeometry.from_module(nn.Conv2d(64, 64, 3, padding=1))
    assert clock.rank_multiple(convolution, LayerCall(1, (8, 8)), dt.SVD()) == width
    narrow = ConvGeometry.from_module(nn.Conv2d(40, 40, 3, padding=1))
    assert clock.rank_multiple(narrow, LayerCall(1, (8, 8)), dt.SVD()) == 1


@pytest.mark.parametrize("limit", [7.0, 6.0, 4.8])
def test_the_whole_network_takes_no_longer_than_asked(limit: float) -> None:
    def attempt(factor: float) -> dt.Plan:  # layers of 8 ms save seven tenths of it in the network
        return dt.Plan(
            (), other_parameters=1, latency=NetworkTimes(10.0, 10 - 0.7 * 8 * (1 - 1 / factor), "")
        )

    for latency in (Latency(ms=limit), Latency(speedup=10 / limit)):
        plan = search_latency(latency, attempt)
        assert plan.latency is not None
        assert 0.95 * limit <= plan.latency.planned <= limit
        assert dt.Plan.from_json(plan.to_json()) == plan
        assert str(plan.latency) in str(plan)


def test_milliseconds_that_cannot_be_met_are_refused(error_of: Callable[..., str]) -> None:
    def attempt(factor: float) -> dt.Plan:
        return dt.Plan(compressed=(), latency=NetworkTimes(10.0, 10 - 4 * (1 - 1 / factor), ""))

    assert "10.00 ms as it is" in error_of(search_latency, Latency(ms=11), attempt)
    assert "the fastest tried takes 6.13" in error_of(search_latency, Latency(ms=5), attempt)


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_a_plan_promises_milliseconds_of_the_network(runtime: Runtime) -> None:
    model = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU()).eval()
    x = torch.randn(2, 96, 24, 24)
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    latency = Latency(speedup=1.3, batch=4, threads=1, runtime=runtime)
    plan = dt.plan(model, "spatial_svd", latency=latency, example_input=x, layers=EVERY_LAYER)
    assert plan.latency is not None
    assert 0 < plan.latency.planned <= plan.latency.dense / 1.3
    assert f"{runtime}, batch 4, " in plan.latency.where
