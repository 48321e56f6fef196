"""Budgets shared among layers, against brute force."""

import random
from itertools import product

import pytest
import torch
from tests.cases import EVERY_LAYER, error_of
from torch import nn

import deeptwist as dt
from deeptwist.plan.budget import Candidate, allocate

X = torch.randn(2, 8, 12, 12)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 48, 3)
    )


def squared_error(plan: dt.Plan) -> float:
    return sum((layer.relative_error or 0) ** 2 for layer in plan.compressed)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2])
def test_an_allocation_is_within_a_hundredth_of_the_best(seed: int, count: int) -> None:
    draw = random.Random(seed)
    layers = []
    for _ in range(4):
        sizes = [draw.uniform(1, 20) for _ in range(count)]
        decay = draw.uniform(0.5, 3)
        shares = [1, *sorted((draw.random() for _ in range(7)), reverse=True)]
        layers.append(
            [Candidate(tuple(s * share for s in sizes), (1 - share) ** decay) for share in shares]
        )
    budgets = [sum(layer[0].costs[b] for layer in layers) / 2 for b in range(count)]

    def total(choice: tuple[int, ...]) -> float:
        return sum(layer[i].error for layer, i in zip(layers, choice, strict=True))

    def fits(choice: tuple[int, ...]) -> bool:
        return all(
            sum(layer[i].costs[b] for layer, i in zip(layers, choice, strict=True))
            <= budgets[b] * (1 + 1e-9)
            for b in range(count)
        )

    best = min(total(c) for c in product(range(8), repeat=4) if fits(c))
    choice = tuple(allocate(layers, budgets))
    assert fits(choice)
    assert total(choice) <= 1.01 * best


@pytest.mark.parametrize("budget", [{"weights": 3}, {"macs": 3}, {"weights": 4, "macs": 2}])
def test_all_budgets_are_met_by_the_layers_together(budget: dict[str, float]) -> None:
    made = dt.plan(network(), dt.SpatialSVD(), example_input=X, layers=EVERY_LAYER, **budget)
    dense = sum(layer.weight_numel for layer in made.layers)
    assert made.compressed
    assert dense / sum(layer.compressed_numel for layer in made.layers) >= budget.get("weights", 1)
    assert made.dense_macs / made.macs >= budget.get("macs", 1)
    assert dt.Plan.from_json(made.to_json()) == made


def test_of_several_decompositions_the_allocation_loses_no_more_than_of_one() -> None:
    methods = [dt.SVD(), dt.SpatialSVD(), dt.Tucker()]

    def lost(decomposition: object) -> float:
        made = dt.plan(network(), decomposition, weights=3, example_input=X, layers=EVERY_LAYER)
        return squared_error(made)

    assert lost(methods) <= 1.01 * min(map(lost, methods))


def test_of_several_decompositions_a_layer_takes_the_best_at_a_ratio() -> None:
    methods = [dt.SVD(), dt.SpatialSVD(), dt.Tucker()]
    options = {"ratio": 3, "example_input": X, "layers": EVERY_LAYER}
    best = dt.plan(network(), methods, **options)
    alone = [dt.plan(network(), method, **options) for method in methods]
    for layer, *others in zip(best.layers, *(made.layers for made in alone), strict=True):
        assert layer == min(others, key=lambda other: other.relative_error)
    with torch.device("meta"):
        dense, x = network(), torch.empty_like(X)
    assert "seen from weights" in error_of(dt.plan, dense, methods, ratio=3, example_input=x)


def test_a_budget_loses_no_more_than_one_ratio_for_all() -> None:
    budget, uniform = (
        dt.plan(network(), "spatial_svd", example_input=X, layers=EVERY_LAYER, **size)
        for size in ({"weights": 3}, {"ratio": 3})
    )
    errors = [
        sum((x.relative_error or 0) ** 2 for x in made.compressed) for made in (budget, uniform)
    ]
    assert errors[0] <= errors[1]


def test_budgets_that_mean_nothing() -> None:
    model = network()
    missing = error_of(dt.plan, model, dt.SVD(), example_input=X)
    assert "give ratio, weights, macs or latency" in missing
    both = {"ratio": 2, "macs": 2}
    assert "a ratio is every layer's" in error_of(dt.plan, model, dt.SVD(), example_input=X, **both)
    assert "has a rank" in error_of(dt.plan, model, dt.SVD(rank=2), example_input=X, macs=2)
    assert "no ranks meet" in error_of(dt.plan, model, dt.SVD(), example_input=X, macs=1e6)
