"""Budgets of milliseconds: what the clock interpolates, and what a plan makes of it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.decompositions import FactoredLayer
from deeptwist.layers.cost import LayerCall
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.plan.budget import Budgets
from deeptwist.plan.clock import LayerClock
from deeptwist.plan.layer_filter import LayerFilter
from deeptwist.plan.planned_layer import CompressedLayer
from deeptwist.plan.planner import Planner

X = torch.randn(2, 16, 12, 12)
OVERHEAD = 7.0


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
        batch=batch,
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
    rules, clock = LayerFilter(), clock_of_macs()
    planner = Planner(network(), X, [dt.SpatialSVD()], rules)
    plan = planner.plan(Budgets(latency=factor), None, clock)
    dense = factored = 0.0
    for layer in plan.layers:
        assert layer.convolution is not None
        form = [layer.decomposition] if isinstance(layer, CompressedLayer) else []
        alone, times = clock.times(layer.convolution, layer.calls, form)
        dense, factored = dense + alone, factored + sum(times or [alone])
    assert factor <= dense / factored < 1.2 * factor


def test_layers_are_timed_in_pytorch_by_themselves() -> None:
    model, x = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1)).eval(), torch.randn(1, 96, 24, 24)
    options = {"example_input": x, "latency_batch": 1}
    (layer,) = dt.plan(model, dt.SpatialSVD(), latency=1.2, **options).layers
    assert isinstance(layer, CompressedLayer)
    with pytest.raises(dt.DeepTwistError, match="no ranks meet the budgets"):
        dt.plan(model, dt.SpatialSVD(), latency=1e6, **options)
    with pytest.raises(dt.DeepTwistError, match="latency_batch"):
        dt.plan(model, dt.SpatialSVD(), latency=2, example_input=x, latency_batch=0)


def test_an_example_without_a_batch_is_one() -> None:
    model, counts = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1)).eval(), set()

    def prepare(module: nn.Module, x: Tensor) -> Callable[[], object]:
        counts.add(len(x))
        return lambda: module(x)

    image = torch.randn(96, 24, 24)
    options = {"example_input": image, "latency_batch": 2, "prepare": prepare}
    dt.plan(model, dt.SpatialSVD(), latency=1.2, **options)
    assert counts == {2}
