import math
import random
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.cases import EVERY_LAYER, METHODS, at, error_of
from torch import nn

import deeptwist as dt
from deeptwist import SVD, Decomposition, Tucker
from deeptwist.decompositions import CannotDecomposeError
from deeptwist.decompositions.base import SingleRankDecomposition, largest_rank
from deeptwist.decompositions.tucker import floor_fraction
from deeptwist.errors import check_ratio
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.plan.budget import Candidate, allocate

RATIOS = st.floats(1.01, 64)
CONVOLUTIONS = st.builds(
    lambda groups, out, into, size: ConvGeometry.from_module(
        [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(size) - 1](
            groups * into, groups * out, size, groups=groups, device="meta"
        )
        if size
        else nn.Linear(into, out, device="meta")
    ),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.integers(1, 5), max_size=3).map(tuple),
)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 60), st.integers(0, 500))
def test_the_largest_rank_is_found(slope: int, start: int, maximum: int, budget: int) -> None:
    fitting = [rank for rank in range(1, maximum + 1) if slope * rank + start <= budget]
    actual = largest_rank(lambda rank: slope * rank + start, maximum, budget)
    assert actual == max(fitting, default=0)


@pytest.mark.parametrize(
    ("channels", "fraction", "rank"),
    [(100, 0.29, 29), (10, 0.7, 7), (64, 0.45, 28), (512, 0.6, 307), (3, 0.3, 0), (7, 1, 7)],
)
def test_fractions_are_the_decimals_that_were_written(
    channels: int, fraction: float, rank: int
) -> None:
    assert floor_fraction(channels, fraction) == rank


@given(st.integers(1, 4096), st.integers(1, 1000))
def test_fractions_round_down(channels: int, thousandths: int) -> None:
    exact = math.floor(Fraction(thousandths, 1000) * channels)
    assert floor_fraction(channels, thousandths / 1000) == exact


def test_a_fraction_from_numpy_is_a_fraction_too() -> None:
    numpy = pytest.importorskip("numpy")
    convolution = ConvGeometry.from_module(nn.Conv2d(8, 16, 3))
    assert Tucker(fraction=numpy.float64(0.5)).resolve(convolution, None) == Tucker(rank=(8, 4))


@pytest.mark.parametrize("ratio", [1, 0, -4, 0.5, math.inf, math.nan])
def test_a_ratio_that_compresses_nothing_is_refused(ratio: float) -> None:
    assert "above 1" in error_of(check_ratio, ratio)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@given(CONVOLUTIONS, RATIOS)
def test_a_ratio_is_a_promise(
    method: Decomposition, convolution: ConvGeometry, ratio: float
) -> None:
    try:
        resolved = method.resolve(convolution, ratio)
    except CannotDecomposeError:
        return  # which the next test judges
    assert resolved.weight_numel(convolution) * ratio <= convolution.weight_numel


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@given(CONVOLUTIONS, RATIOS)
def test_the_next_rank_would_break_the_promise(
    method: Decomposition, convolution: ConvGeometry, ratio: float
) -> None:
    try:
        resolved = method.resolve(convolution, ratio)
    except CannotDecomposeError:
        resolved = None
    if resolved is None:
        smallest = at(method, convolution, 0.0)
        assert smallest.weight_numel(convolution) * ratio > convolution.weight_numel
    elif isinstance(resolved, SingleRankDecomposition):
        assume(resolved.resolved_rank < resolved.full_rank(convolution))
        following = type(resolved)(**{**vars(resolved), "rank": resolved.resolved_rank + 1})
        assert following.weight_numel(convolution) * ratio > convolution.weight_numel


@given(CONVOLUTIONS, RATIOS)
def test_tucker_ranks_keep_the_proportion_of_the_channels(
    convolution: ConvGeometry, ratio: float
) -> None:
    assume(convolution.kernel_numel > 1)
    _, out, into, *_ = convolution.kernel_shape
    try:
        rank = Tucker().resolve(convolution, ratio).rank
    except CannotDecomposeError:
        return
    # There is one fraction of which both are the floor (or 1).
    low = max((rank[0] / out if rank[0] > 1 else 0), (rank[1] / into if rank[1] > 1 else 0))
    high = min((rank[0] + 1) / out, (rank[1] + 1) / into)
    assert low < high
    larger = [(rank[0] + 1, rank[1] + 1)]
    assert all(
        r[0] > out
        or r[1] > into
        or Tucker(rank=r).weight_numel(convolution) * ratio > convolution.weight_numel
        for r in larger
    )


@given(CONVOLUTIONS, st.floats(0.01, 1))
def test_tucker_fractions_are_the_papers(convolution: ConvGeometry, fraction: float) -> None:
    assume(convolution.kernel_numel > 1)
    _, out, into, *_ = convolution.kernel_shape
    expected = tuple(math.floor(Fraction(repr(fraction)) * side) for side in (out, into))
    if min(expected) == 0:
        assert "rank 0" in error_of(Tucker(fraction=fraction).resolve, convolution, None)
    else:
        assert Tucker(fraction=fraction).resolve(convolution, None) == Tucker(rank=expected)


def test_the_rank_of_the_formula() -> None:
    """R = ⌊T·S·d² / (ratio·(T + S·d²))⌋ for the plain SVD."""
    convolution = ConvGeometry.from_module(nn.Conv2d(64, 64, 3, device=torch.device("meta")))
    assert SVD().resolve(convolution, 2) == SVD(rank=28)
    assert SVD().resolve(convolution, 4) == SVD(rank=14)
    assert "cannot be 100× smaller" in error_of(SVD().resolve, convolution, 100)


# --- budgets shared among layers, against brute force

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
