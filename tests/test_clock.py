"""Budgets of milliseconds: what the clock interpolates, and what a plan makes of it."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cases import EVERY_LAYER
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deeptwist as dt
from deeptwist.inspection.run import Inputs
from deeptwist.layers.geometry import ConvGeometry, LayerCall
from deeptwist.measure.layer_clock import LayerClock
from deeptwist.measure.machine import LatencyCache
from deeptwist.measure.runtimes import Runtime, Setting
from deeptwist.measure.timing import Comparison, time_models
from deeptwist.plan.budget import Budgets
from deeptwist.plan.latency import Latency, search_latency
from deeptwist.plan.plan import CompressedLayer
from deeptwist.plan.planner import Planner

X = torch.randn(2, 16, 12, 12)
OVERHEAD = 7.0


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this file's tests alone: what one of them timed, the others need not."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def by_macs(
    modules: Sequence[nn.Module],
    inputs: Inputs,
    setting: Setting,
    overhead: float = OVERHEAD,
) -> list[list[float]]:
    """A clock that counts: the MACs of one example, and a constant for everything else."""
    times = []
    for module in modules:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            inputs.run(module)
        macs = counter.get_total_flops() / 2 / len(inputs.tensors[0])
        times.append([macs / 1e3 + overhead] * 2)
    return times


def clock_of_macs(examples: int = 2, batch: int = 2) -> LayerClock:
    return LayerClock(X, examples=examples, setting=Setting(batch, 1), clock=by_macs)


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


def counted(*networks: nn.Module, overhead: float = OVERHEAD) -> list[float]:
    return [times[0] for times in by_macs(networks, Inputs.of(X), Setting(2, 1), overhead)]


@pytest.mark.parametrize("factor", [1.5, 3.0])
@pytest.mark.parametrize("overhead", [7.0, 100.0])
def test_a_budget_of_time_is_the_network_s(factor: float, overhead: float) -> None:
    """What layers save is not what the network saves: what else it does takes its time too."""
    model, clock = network(), partial(by_macs, overhead=overhead)
    planner = Planner(model, X, [dt.SpatialSVD()], EVERY_LAYER, clock=clock)
    plan = planner.plan_within(Budgets(), Latency(speedup=factor, batch=2))
    dense, factored = counted(model, dt.decompose(model, plan), overhead=overhead)
    assert factor <= dense / factored < 1.2 * factor
    assert plan.latency is not None
    assert plan.latency.speedup == pytest.approx(dense / factored)
    in_ms = planner.plan_within(Budgets(), Latency(ms=dense / factor, batch=2))
    (small,) = counted(dt.decompose(model, in_ms), overhead=overhead)
    assert dense / factor / 1.2 < small <= dense / factor


def test_of_time_that_cannot_be_had_the_best_is_told(error_of: Callable[..., str]) -> None:
    model = network()
    planner = Planner(model, X, [dt.SpatialSVD()], EVERY_LAYER, clock=by_macs)
    told = error_of(planner.plan_within, Budgets(), Latency(speedup=500, batch=2))
    dense = counted(model)[0]
    fastest = 3 * dt.SpatialSVD(rank=1).macs(ConvGeometry.from_module(model[0]), (12, 12)) / 1e3
    assert f"the fastest takes {dense:.2f} → {fastest + OVERHEAD:.2f} ms" in told
    assert f"{dense / (fastest + OVERHEAD):.2f}× as fast" in told
    assert "500×" in told


def test_other_budgets_are_kept_beside_time(error_of: Callable[..., str]) -> None:
    planner = Planner(network(), X, [dt.SpatialSVD()], EVERY_LAYER, clock=by_macs)
    plan = planner.plan_within(Budgets(weights=4), Latency(speedup=1.5, batch=2))
    weights = sum(layer.weight_numel for layer in plan.layers)
    assert weights / sum(layer.compressed_numel for layer in plan.layers) >= 4
    assert plan.latency is not None
    assert plan.latency.speedup >= 1.5
    impossible = Budgets(weights=1e6), Latency(speedup=1.5, batch=2)
    assert "no ranks meet the budgets" in error_of(planner.plan_within, *impossible)


def test_layers_are_timed_in_pytorch_by_themselves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "deeptwist.clock")
    model, x = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1)).eval(), torch.randn(1, 96, 24, 24)
    options = {"example_input": x, "layers": EVERY_LAYER}
    (layer,) = dt.plan(model, "spatial_svd", latency=Latency(1.2, batch=1), **options).layers
    assert isinstance(layer, CompressedLayer)
    assert caplog.messages[0] == "timing layer 1 of 1, 0"
    assert caplog.messages[1] == "timing the network as planned beside the dense one"
    assert caplog.messages[2].startswith("timed the network: ")
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


@pytest.mark.parametrize("channels", [1, 96])
def test_an_example_without_a_batch_is_one(channels: int) -> None:
    image = torch.randn(channels, 24, 24)
    model = nn.Sequential(
        nn.Conv2d(channels, 96, 3, padding=1), nn.Conv2d(96, 96, 3, padding=1)
    ).eval()
    options = {"example_input": image, "layers": EVERY_LAYER}
    plan = dt.plan(model, dt.SpatialSVD(), latency=Latency(1.2, batch=2), **options)
    assert plan.examples == 1
    assert plan.latency is not None
    assert "batch 1," in plan.latency.setting  # of such images the network takes no other


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(96, 96, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) + y


def test_a_network_of_several_inputs_is_timed_too() -> None:
    inputs = torch.randn(1, 96, 24, 24), torch.randn(1, 96, 1, 1)
    latency = Latency(1.2, batch=1, threads=1)
    plan = dt.plan(
        TwoInputs(), "spatial_svd", latency=latency, example_input=inputs, layers=EVERY_LAYER
    )
    assert plan.latency is not None
    assert plan.latency.speedup >= 1.2


def test_what_was_timed_is_kept_in_a_file_that_names_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x, setting = torch.randn(1, 96, 24, 24), Setting(1, torch.get_num_threads())
    layer = nn.Conv2d(96, 96, 3, padding=1)
    convolution, forms = ConvGeometry.from_module(layer), [dt.SVD(rank=8), dt.SVD(rank=32)]
    cache = LatencyCache("eager")
    clock = LayerClock(x, examples=1, setting=setting, cache=cache)
    times = clock.times(convolution, (LayerCall(1, (24, 24)),), forms)
    path = cache.path
    kept = json.loads(path.read_text())
    assert str(torch.__version__) in kept["machine"]
    assert "eager" in kept["machine"]
    assert [times[0], *times[1]] in kept["times"].values()
    again = LayerClock(x, examples=1, setting=setting, cache=LatencyCache("eager"))
    assert again.times(convolution, (LayerCall(1, (24, 24)),), forms) == times
    path.write_text("[]")
    assert LatencyCache("eager").read() == {}


@pytest.mark.parametrize("width", [1, 8, 16])
def test_ranks_are_multiples_of_what_vectors_hold(width: int) -> None:
    def stairs(modules: Sequence[nn.Module], inputs: Inputs, setting: Setting) -> list[list[float]]:
        ranks = [getattr(module, "decomposition", dt.SVD(rank=100)).rank for module in modules]
        return [[10.0 + -(-rank // width) * width] for rank in ranks]

    clock = LayerClock(X, examples=1, setting=Setting(1, 1), clock=stairs)
    convolution = ConvGeometry.from_module(nn.Conv2d(64, 64, 3, padding=1))
    assert clock.rank_multiple(convolution, LayerCall(1, (8, 8)), dt.SVD()) == width
    narrow = ConvGeometry.from_module(nn.Conv2d(40, 40, 3, padding=1))
    assert clock.rank_multiple(narrow, LayerCall(1, (8, 8)), dt.SVD()) == 1


def taking(dense: float, planned: float) -> dt.Plan:
    return dt.Plan((), other_parameters=1, latency=Comparison.of([dense] * 2, [planned] * 2))


@pytest.mark.parametrize("limit", [7.0, 6.0, 4.8])
def test_the_whole_network_takes_no_longer_than_asked(limit: float) -> None:
    def attempt(factor: float | None) -> dt.Plan:  # layers of 8 ms save seven tenths of it there
        return taking(10.0, 10 - 0.7 * 8 * (1 - 1 / (factor or 1e9)))

    for latency in (Latency(ms=limit), Latency(speedup=10 / limit)):
        plan = search_latency(latency, attempt)
        assert plan.latency is not None
        assert 0.95 * limit <= plan.latency.decomposed.median <= limit
        assert dt.Plan.from_json(plan.to_json()) == plan
        assert str(plan.latency) in str(plan)


def test_milliseconds_that_cannot_be_met_are_refused(error_of: Callable[..., str]) -> None:
    def attempt(factor: float | None) -> dt.Plan:
        if factor is not None and factor > 5:
            raise dt.DeepTwistError("no ranks meet the budgets")
        return taking(10.0, 10 - 4 * (1 - 1 / (factor or 5)))

    assert "10.00 ms as it is" in error_of(search_latency, Latency(ms=11), attempt)
    assert "the fastest takes 10.00 → 6.80 ms" in error_of(search_latency, Latency(ms=5), attempt)
    plan = search_latency(Latency(ms=6.9), attempt)
    assert plan.latency is not None
    assert 0.95 * 6.9 <= plan.latency.decomposed.median <= 6.9


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_a_plan_promises_milliseconds_of_the_network(runtime: Runtime) -> None:
    model = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU()).eval()
    x = torch.randn(1, 96, 24, 24)
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    latency = Latency(speedup=1.3, batch=1, threads=1, runtime=runtime)
    plan = dt.plan(model, "spatial_svd", latency=latency, example_input=x, layers=EVERY_LAYER)
    assert plan.latency is not None
    assert plan.latency.speedup >= 1.3
    assert f"{runtime}, batch 1, " in plan.latency.setting


@pytest.mark.slow
def test_a_real_network_keeps_what_was_promised() -> None:
    """Norms and activations, which no plan makes faster, take a part of its time."""
    blocks = [
        nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU())
        for _ in range(6)
    ]
    model, x = nn.Sequential(*blocks).eval(), torch.randn(4, 128, 28, 28)
    latency = Latency(speedup=2, batch=4, threads=1)
    plan = dt.plan(model, "spatial_svd", latency=latency, example_input=x, layers=EVERY_LAYER)
    assert plan.latency is not None
    assert plan.latency.speedup >= 2
    anew = time_models(model, dt.decompose(model, plan), x, latency.setting(x.dtype))
    assert anew.speedup > 1.8
    layers = plan.dense_macs / plan.macs
    assert layers > 2  # the layers save more than the network does
