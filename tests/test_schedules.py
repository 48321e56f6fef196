"""How distortions change on the way: interval, ranks, and the optimizer's momentum."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cases import METHODS, at, build, difference, error_of, read
from torch import Tensor, nn

from deeptwist import CP, SVD, Decomposition, DeepTwist, SpatialSVD, TiledSVD, Tucker, plan
from deeptwist.decompositions import Factors
from deeptwist.layers.geometry import kernel_to_weight, weight_to_kernel
from deeptwist.plan.plan import Plan
from deeptwist.twist.config import TwistConfig
from deeptwist.twist.rank_choice import choose_ranks_anew
from deeptwist.twist.schedules import between, check_interval, follow_learning_rate, is_due

X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
TANGENT = {name: method for name, method in METHODS.items() if method.has_tangent_space}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **options})


def planned(model: nn.Module, method: Decomposition, ratio: float = 1.6) -> Plan:
    return plan(model, method, ratio=ratio, example_input=X)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), torch.arange(len(X))).backward()
    optimizer.step()


def ranks(twist: DeepTwist) -> dict[str, Any]:
    """The ranks of the last distortion's factors."""
    return {name: factors.decomposition.rank for name, factors in twist._factors.items()}


# --- interval


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, unique_by=lambda x: x[0])
)
def test_the_last_interval_that_has_begun_counts(pairs: list[tuple[int, int]]) -> None:
    schedule = check_interval(sorted(pairs))
    for step in range(1, 80):
        begun = [pair for pair in schedule if pair[0] < step]
        expected = bool(begun) and (step - begun[-1][0]) % begun[-1][1] == 0
        assert is_due(schedule, step) == expected


def test_a_schedule_of_intervals_distorts_when_it_says() -> None:
    model = network()
    twist = DeepTwist(model, planned(model, SVD()), [(0, 3), (7, 5)])
    steps = [step for step in range(1, 20) if twist.step() is not None]
    assert steps == [3, 6, 12, 17]


@pytest.mark.parametrize("interval", [(), [(0, 0)], [(5, 1), (5, 2)], [(0, 1, 2)], [3], [(-1, 3)]])
def test_a_schedule_that_makes_no_sense_is_refused(interval: Any) -> None:
    assert "interval" in error_of(check_interval, interval)


def test_an_interval_that_follows_the_learning_rate() -> None:
    def rate(step: int) -> float:
        return 1.0 if step < 400 else 0.25

    assert follow_learning_rate(100, lambda step: 1.0, 400) == ((0, 100), (400, 401))
    assert follow_learning_rate(100, rate, 1000) == ((0, 100), (400, 400), (800, 1001))
    assert follow_learning_rate(100, rate, 1000, 0.5) == ((0, 100), (400, 200), (1000, 1001))
    cosine = follow_learning_rate(50, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / 999), 1000)
    steps = [step for step in range(1, 1001) if is_due(cosine, step)]
    gaps = [b - a for a, b in pairwise(steps)]
    assert gaps == sorted(gaps)
    assert len(steps) in (9, 10)  # the mean rate is a half: so is the number of distortions


# --- ranks


@given(st.integers(1, 50), st.integers(0, 200), st.floats(0, 2))
def test_a_ramp_goes_from_the_largest_ranks_to_the_planned(
    planned_rank: int, more: int, progress: float
) -> None:
    low, high = SVD(planned_rank), SVD(planned_rank + more)
    rank = between(high, low, progress).rank
    assert isinstance(rank, int)
    assert planned_rank <= rank <= planned_rank + more
    assert rank == planned_rank + math.floor(more * max(0.0, 1 - progress) ** 3)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_ranks_fall_over_the_ramp_and_end_at_the_planned(method: Decomposition) -> None:
    model = network()
    made = planned(model, method)
    twist = DeepTwist(model, made, 2, ramp_steps=10)
    final = {layer.name: layer.decomposition.rank for layer in made.compressed}
    before: dict[str, Any] = {}
    for _ in range(6):
        twist.step()
        twist.step()
        now = ranks(twist)
        for name in final:
            assert now[name] >= final[name]
            assert name not in before or now[name] <= before[name]
        before = now
    assert before == final


def test_a_ramp_that_is_not_over_ends_at_the_planned_ranks() -> None:
    model = network()
    made = planned(model, SVD())
    twist = DeepTwist(model, made, 2, ramp_steps=100)
    twist.step()
    twist.step()
    final = {layer.name: layer.decomposition.rank for layer in made.compressed}
    assert all(ranks(twist)[name] > rank for name, rank in final.items())
    small = twist.finish()
    assert ranks(twist) == final
    assert sum(p.numel() for p in small.parameters()) == made.parameters


@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_start_of_higher_rank_changes_the_error_by_little(
    method: Decomposition, geometry: str
) -> None:
    convolution, kernel = read(build(geometry)[0])
    high, low = at(method, convolution, 0.7), at(method, convolution, 0.5)
    start = high.decompose(kernel)
    noise = torch.randn_like(kernel)
    moved = start.reconstruct() + 0.05 * kernel.norm() / noise.norm() * noise
    exact, warm = low.decompose(moved), low.decompose(moved, start)
    assert [x.shape for x in warm.tensors] == [x.shape for x in exact.tensors]
    best = difference(moved, exact.reconstruct())
    assert difference(moved, warm.reconstruct()) <= 1.05 * best + 1e-6


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_ranks_chosen_anew_go_where_they_are_needed(method: Decomposition) -> None:
    torch.manual_seed(0)
    model = network()
    made = planned(model, method)
    convolution = made.compressed[0].convolution
    kernel = weight_to_kernel(model[0].weight.detach(), convolution)
    simple = at(method, convolution, 0.0).decompose(kernel).reconstruct()
    model[0].weight.data.copy_(kernel_to_weight(simple, convolution))
    chosen = choose_ranks_anew(model, made)
    assert chosen.parameters <= made.parameters
    assert chosen.macs <= made.macs
    if made.compressed[0].decomposition != at(method, convolution, 0.0):  # there is what to give
        assert chosen.compressed[0].compressed_numel < made.compressed[0].compressed_numel
        assert sum(layer.compressed_numel for layer in chosen.compressed[1:]) > sum(
            layer.compressed_numel for layer in made.compressed[1:]
        )
    # In the errors of today's weights, which are what a new plan with the old ranks would show.
    old = plan(
        model,
        method,
        ratio=1.6,
        example_input=X,
        overrides={layer.name: layer.decomposition for layer in made.compressed},
    )
    total, before = (
        sum((layer.relative_error or 0) ** 2 for layer in p.compressed) for p in (chosen, old)
    )
    assert total <= before


def test_ranks_are_chosen_up_to_a_step_and_carried_out() -> None:
    torch.manual_seed(0)
    model = network()
    made = planned(model, SVD())
    twist = DeepTwist(model, made, 2, choose_ranks_steps=5)
    seen = []
    for _ in range(4):
        for weight in (model[0].weight, model[2].weight):
            weight.data = torch.randn_like(weight) * torch.rand(len(weight), 1, 1, 1) ** 4
        twist.step()
        twist.step()
        seen.append(twist.plan)
        assert ranks(twist) == {x.name: x.decomposition.rank for x in twist.plan.compressed}
    assert seen[0] != made
    assert seen[0] != seen[1]
    assert seen[1] == seen[2] == seen[3]
    assert seen[3].parameters <= made.parameters
    small = twist.finish()
    assert sum(p.numel() for p in small.parameters()) == seen[3].parameters


@pytest.mark.parametrize(
    ("method", "option"),
    [
        *((method, "ramp_steps") for method in METHODS.values()),
        *((METHODS[name], "choose_ranks_steps") for name in ("spatial", "tucker")),
    ],
)
def test_resuming_within_a_schedule_is_as_if_nothing_had_happened(
    method: Decomposition, option: str
) -> None:
    torch.manual_seed(1)
    model = network()
    made = planned(model, method)
    options: dict[str, Any] = {option: 12}
    if method.has_tangent_space:
        options["momentum"] = "project"
    optimizer = sgd(model)
    twist = DeepTwist(model, made, [(0, 3), (6, 2)], optimizer=optimizer, **options)
    for _ in range(7):
        train_step(model, optimizer)
        twist.step()
    resumed = copy.deepcopy(model)
    its_optimizer = sgd(resumed)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = DeepTwist(resumed, made, [(0, 3), (6, 2)], optimizer=its_optimizer, **options)
    again.load_state_dict(copy.deepcopy(twist.state_dict()))
    for _ in range(8):
        for m, o, t in ((model, optimizer, twist), (resumed, its_optimizer, again)):
            train_step(m, o)
            t.step()
    for parameter, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other)
    assert twist.history == again.history
    assert [layer.decomposition for layer in twist.plan.compressed] == [
        layer.decomposition for layer in again.plan.compressed
    ]


# --- momentum


def tangent_basis(factors: Factors) -> Tensor:
    """The kernels that the derivatives by each number of the factors span, as columns."""

    def reconstruct(*tensors: Tensor) -> Tensor:
        return Factors(factors.decomposition, factors.shape, tensors).reconstruct().flatten()

    jacobians = torch.autograd.functional.jacobian(reconstruct, factors.tensors)
    jacobian = torch.cat([j.flatten(1) for j in jacobians], dim=1)
    u, s, _ = torch.linalg.svd(jacobian, full_matrices=False)
    return u[:, s > 1e-9 * s[0]]


@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D"])
@pytest.mark.parametrize("method", TANGENT.values(), ids=TANGENT)
def test_the_projection_is_the_orthogonal_one_on_what_factors_can_reach(
    method: Decomposition, geometry: str
) -> None:
    convolution, kernel = read(build(geometry)[0])
    factors = at(method, convolution, 0.4).decompose(kernel)
    if kernel.numel() > 3000:
        pytest.skip("a Jacobian beyond memory")
    direction = torch.randn_like(kernel)
    basis = tangent_basis(factors)
    expected = (basis @ (basis.mT @ direction.flatten())).reshape(kernel.shape)
    assert difference(expected, factors.project_on_tangent(direction)) < 1e-8


@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3)])
@pytest.mark.parametrize("momentum", ["keep", "reset", "project"])
def test_momentum_of_distorted_weights_alone_is_changed(
    momentum: Any, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    model = network()
    optimizer = make(model)
    made = plan(model, TiledSVD(tile=(8, 36)), ratio=2, example_input=X, exclude="5")
    twist = DeepTwist(model, made, 2, momentum=momentum, optimizer=optimizer)
    for _ in range(2):
        train_step(model, optimizer)
    first = "momentum_buffer" if "momentum" in optimizer.defaults else "exp_avg"
    before = {p: {k: v.clone() for k, v in s.items() if isinstance(v, Tensor)}
              for p, s in optimizer.state.items()}  # fmt: skip
    twist.step()
    twist.step()
    for layer in made.compressed:
        weight = model.get_submodule(layer.name).weight
        old, new = before[weight].pop(first), optimizer.state[weight][first]
        if momentum == "keep":
            assert torch.equal(old, new)
        elif momentum == "reset":
            assert old.any()
            assert not new.any()
        else:
            kernel = weight_to_kernel(old, layer.convolution)
            expected = twist._factors[layer.name].project_on_tangent(kernel)
            assert torch.allclose(weight_to_kernel(new, layer.convolution), expected, atol=1e-6)
            assert 0.1 * old.norm() < new.norm() < old.norm()
    for parameter, state in before.items():
        assert all(torch.equal(v, optimizer.state[parameter][k]) for k, v in state.items())


def test_what_cannot_be_projected_is_refused_before_training() -> None:
    model = network()
    svd, cp = planned(model, SVD()), planned(model, CP())

    def refused(made: Plan, optimizer: torch.optim.Optimizer | None, momentum: Any) -> str:
        return error_of(DeepTwist, model, made, 2, momentum=momentum, optimizer=optimizer)

    assert "did you mean 'project'" in refused(svd, None, "projekt")
    assert "give DeepTwist optimizer=" in refused(svd, None, "reset")
    assert "no momentum to reset" in refused(svd, sgd(model, momentum=0.0), "reset")
    assert "does not hold the weight of layer '0'" in refused(svd, sgd(model[2]), "reset")
    assert "keep or reset it" in refused(cp, sgd(model), "project")
    DeepTwist(model, cp, 2, momentum="reset", optimizer=sgd(model))
    nn.utils.parametrizations.weight_norm(model[0])
    made = planned(model, SpatialSVD())
    assert "computes its weight" in refused(made, sgd(model), "project")


@pytest.mark.parametrize(
    "values", [{"ramp": 1.5}, {"choose_ranks": -0.1}, {"lr_power": -1.0}, {"momentum": "none"}]
)
def test_options_out_of_range_are_named(values: dict[str, Any]) -> None:
    (name,) = values
    assert name in error_of(TwistConfig, **values)


def test_tucker_takes_its_ramp_in_proportion() -> None:
    model = network()
    twist = DeepTwist(model, planned(model, Tucker(), 3), 1, ramp_steps=4)
    twist.step()
    assert all(isinstance(rank, tuple | int) for rank in ranks(twist).values())
    assert twist._factors["0"].decomposition != twist.plan.compressed[0].decomposition
