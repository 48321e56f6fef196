"""Distortions found from those before them, against exact ones."""

import copy

import pytest
import torch
from cases import METHODS, difference, error_of, read
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deeptwist.twist.tracking
from deeptwist import CP, SVD, Decomposition, DeepTwist, TiledSVD, Tucker, plan
from deeptwist.benchmark.memory import peak_memory
from deeptwist.decompositions.linalg import truncated_svd
from deeptwist.decompositions.subspace import (
    by_cholesky,
    by_householder,
    excess,
    follow,
    power_step,
    start_of,
)
from deeptwist.twist.tracking import Tracked, track

TOLERANCE = 1e-3
X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


def lost(matrices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """‖W − W′‖² / ‖W‖² of each matrix, at any scale."""
    scale = matrices.abs().amax((1, 2), keepdim=True).double()
    scale = torch.where(scale > 0, scale, 1)
    exact = matrices.double() / scale
    away = exact - (left.double() / scale.sqrt()) @ (right.double() / scale.sqrt())
    return away.square().sum((1, 2)) / exact.square().sum((1, 2)).clamp_min(1e-30)


def least(matrices: Tensor, rank: int) -> Tensor:
    """The same of the best approximation, by an SVD in fp64."""
    scale = matrices.abs().amax((1, 2), keepdim=True).double()
    values = torch.linalg.svdvals(matrices.double() / torch.where(scale > 0, scale, 1))
    squares = values.square()
    return squares[:, rank:].sum(1) / squares.sum(1).clamp_min(1e-30)


def start(matrices: Tensor, rank: int) -> Tensor:
    return start_of(*truncated_svd(matrices, rank))


def moved(matrices: Tensor, share: float) -> Tensor:
    """The matrices after a step of `share` of their norm."""
    noise = torch.randn_like(matrices)
    norms = [torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in (matrices, noise)]
    return matrices + share * norms[0] / norms[1] * noise


def low_rank(matrices: Tensor, rank: int) -> Tensor:
    left, right = truncated_svd(matrices, rank)
    return left @ right


# --- matrices


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 20))


@given(SHAPES, st.integers(1, 20), st.floats(0, 0.2), st.integers(0, 2**16))
def test_following_is_near_the_optimum(
    shape: tuple[int, int, int], rank: int, share: float, seed: int
) -> None:
    """Of a low-rank matrix that has moved, which is what training hands a distortion."""
    torch.manual_seed(seed)
    rank = min(rank, *shape[1:])
    matrices = low_rank(torch.randn(shape), rank)
    after = moved(matrices, share)
    found = follow(after, start(matrices, rank), TOLERANCE)
    error, best = lost(after, *found.factors), least(after, rank)
    assert found.factors[0].shape == (*shape[:2], rank)
    assert found.factors[1].shape == (shape[0], rank, shape[2])
    assert float((error - best).mean()) <= 4 * TOLERANCE * float(best.mean()) + 1e-6
    (basis,) = found.start
    assert torch.allclose(basis @ basis.mT, torch.eye(rank).expand(len(basis), -1, -1), atol=1e-4)


@given(st.sampled_from([1e-30, 1e-18, 1e-9, 1.0, 1e9, 1e18, 1e30]), st.integers(0, 2**16))
def test_scale_is_no_matter_not_even_among_neighbours(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    matrices = low_rank(torch.randn(4, 12, 16), 4)
    after = moved(matrices, 0.05)
    sizes = torch.tensor([scale, 1.0, 0.0, 1 / scale]).reshape(4, 1, 1)
    found = follow(after * sizes, start(matrices * sizes, 4), TOLERANCE)
    plain = follow(after, start(matrices, 4), TOLERANCE)
    errors = lost(after * sizes, *found.factors)
    assert all(factor.isfinite().all() for factor in found.factors)
    assert not (found.factors[0][2] @ found.factors[1][2]).any()
    expected = lost(after, *plain.factors)
    for number in (0, 1, 3):
        assert errors[number] == pytest.approx(float(expected[number]), rel=1e-3)


@given(st.integers(0, 5), st.integers(1, 8), st.integers(0, 2**16))
def test_what_lacks_rank_is_met_and_rank_is_found_again(true: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    true = min(true, rank)
    matrices = torch.randn(3, 10, true) @ torch.randn(3, true, 14)
    found = follow(matrices, start(torch.randn(3, 10, 14), rank), TOLERANCE)
    again = follow(matrices, found.start[0], TOLERANCE)
    for some in (found, again):
        assert float(lost(matrices, *some.factors).max()) <= float(
            1.01 * least(matrices, rank).max() + 1e-5
        )
    richer = low_rank(torch.randn(3, 10, 14), rank)  # the next training steps fill it up
    after = follow(richer, again.start[0], TOLERANCE)
    assert float(lost(richer, *after.factors).max()) < 1e-4


def test_equal_singular_values_are_no_obstacle() -> None:
    matrices = torch.linalg.qr(torch.randn(4, 12, 12)).Q
    found = follow(matrices, start(torch.randn(4, 12, 12), 5), TOLERANCE)
    assert torch.allclose(lost(matrices, *found.factors), torch.tensor(7 / 12).double(), atol=1e-5)


def test_doubles_stay_doubles() -> None:
    matrices = low_rank(torch.randn(2, 9, 7).double(), 3)
    found = follow(matrices, start(matrices, 3), TOLERANCE)
    assert found.factors[0].dtype == torch.float64
    assert float(lost(matrices, *found.factors).max()) < 1e-24


def test_matrices_that_jump_are_factored_exactly_after_all() -> None:
    """A flat spectrum and a start that has nothing to do with it: no iteration settles."""
    matrices = torch.randn(6, 48, 48)
    found = follow(matrices, start(torch.randn(6, 48, 48), 6), 1e-6)
    assert found.exact == tuple(range(6))
    left, right = truncated_svd(matrices, 6)
    assert torch.equal(found.factors[0] @ found.factors[1], left @ right)
    assert difference(found.start[0], start_of(left, right)) == 0


def test_one_that_jumps_leaves_the_others_alone() -> None:
    before = low_rank(torch.randn(3, 48, 48), 6)
    after = moved(before, 0.02)
    after[1] = torch.randn(48, 48)
    found = follow(after, start(before, 6), 1e-6)
    assert 1 in found.exact
    errors, best = lost(after, *found.factors), least(after, 6)
    assert torch.allclose(errors, best, rtol=1e-4)


def test_a_basis_that_says_nothing_is_taken_by_householder() -> None:
    """Rows that repeat: Cholesky cannot make their image orthonormal."""
    matrices = low_rank(torch.randn(2, 12, 16), 4)
    same = torch.ones(2, 4, 12)
    assert not by_cholesky(same @ matrices)[2].any()
    rows, _, sound = by_householder(same @ matrices)
    assert sound.all()
    assert torch.allclose(rows @ rows.mT, torch.eye(4).expand(2, 4, 4), atol=1e-5)
    assert float(lost(matrices, *follow(matrices, same, TOLERANCE).factors).max()) < 1e-5


def test_large_batches_are_taken_piece_by_piece() -> None:
    before = low_rank(torch.randn(300, 48, 64), 4)
    after = moved(before, 0.05)
    after[290] = torch.randn(48, 64)
    basis = start(before, 4)
    whole, last = follow(after, basis, 1e-6), follow(after[280:], basis[280:], 1e-6)
    assert 290 in whole.exact
    assert torch.allclose(lost(after, *whole.factors), least(after, 4), rtol=1e-3)
    assert {n - 280 for n in whole.exact if n >= 280} >= set(last.exact) & {10}


@given(st.floats(0.01, 0.3), st.integers(0, 2**16))
@settings(max_examples=25)
def test_the_estimate_is_of_the_size_of_the_error(share: float, seed: int) -> None:
    torch.manual_seed(seed)
    before = low_rank(torch.randn(32, 24, 24).double(), 4)
    after = moved(before, share)
    image = start(before, 4) @ after
    basis, (first, second), _ = power_step(after, image, by_cholesky)
    held = (basis @ after).square().sum((1, 2))
    residual = after.square().sum((1, 2)) - held
    weakest = (basis @ after).square().sum(2).amin(1)
    estimate = excess(first, second, held, (residual / weakest).clamp_max(1)).sum()
    true = torch.linalg.svdvals(after)[:, :4].square().sum() - held.sum()
    slack = 1e-12 * float(after.square().sum())
    assert float(true) <= 3 * float(estimate) + slack
    assert float(estimate) <= 30 * float(true) + slack


# --- whole networks


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=2),
        nn.Conv2d(24, 24, 3, padding=1, groups=2),
        nn.ConvTranspose2d(24, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 20),
    )


def nudge(model: nn.Module, share: float) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape).to(weight)
            weight.add_(share * weight.float().norm() / noise.float().norm() * noise)


def approximations(tracked: Tracked) -> dict[str, Tensor]:
    """The kernel that each layer's factors stand for."""
    found: dict[str, list[Tensor]] = {}
    for block, factors in tracked.factors:
        kernels = factors.reconstruct().chunk(len(block.names))
        for name, kernel in zip(block.names, kernels, strict=True):
            found.setdefault(name, []).append(kernel)
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}


def errors(before: nn.Module, after: nn.Module, names: list[str]) -> dict[str, float]:
    return {
        name: difference(before.get_submodule(name).weight, after.get_submodule(name).weight) ** 2
        for name in names
    }


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_distortion_after_the_first_is_as_good_and_writes_in_place(
    method: Decomposition, memory_format: torch.memory_format
) -> None:
    model = network().to(memory_format=memory_format)
    twist = DeepTwist(model, plan(model, method, ratio=1.6, example_input=X), 1)
    assert twist.step().iterations == 0
    names = [layer.name for layer in twist.plan.compressed]
    for _ in range(1 if method.method == "cp" else 3):  # an exact CP takes seconds
        nudge(model, 0.03)
        before, twin = copy.deepcopy(model), copy.deepcopy(model)
        parameters = dict(model.named_parameters())
        places = [(p.data_ptr(), p.stride()) for p in model.parameters()]
        record = twist.step()
        assert record.iterations > 0
        exact = DeepTwist(twin, twist.plan, 1, tolerance=0)
        assert exact.step().iterations == 0
        found, best = errors(before, model, names), errors(before, twin, names)
        slack = 1.25 if method.method == "cp" else 1.02  # small layers, one by one
        for name in names:
            assert found[name] <= slack * best[name] + 1e-6, name
        assert dict(model.named_parameters()) == parameters
        assert [(p.data_ptr(), p.stride()) for p in model.parameters()] == places


def test_tucker_of_more_directions_than_its_core_can_use() -> None:
    model = nn.Sequential(nn.Conv2d(16, 64, 3))
    made = plan(model, Tucker(rank=(32, 2)), example_input=X)
    twist = DeepTwist(model, made, 1, tolerance=1e-5)
    twist.step()
    nn.init.normal_(model[0].weight)  # a jump: some has to be factored exactly after all
    twist.step()
    nudge(model, 0.03)
    state = twist.state_dict()
    twin = copy.deepcopy(model)
    twist.step()
    resumed = DeepTwist(twin, made, 1, tolerance=1e-5)
    resumed.load_state_dict(state)
    resumed.step()
    assert torch.equal(model[0].weight, twin[0].weight)


@pytest.mark.parametrize("groups", [1, 2])
def test_cp_of_what_was_zero_before(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=groups))
    twist = DeepTwist(model, plan(model, CP(rank=4), example_input=X), 1)
    with torch.no_grad():
        model[0].weight[: 16 // groups].zero_()
    twist.step()
    nn.init.normal_(model[0].weight)
    before, twin = copy.deepcopy(model), copy.deepcopy(model)
    twist.step()
    DeepTwist(twin, twist.plan, 1, tolerance=0).step()
    kernels = [net[0].weight.unflatten(0, (groups, -1)) for net in (before, model, twin)]
    for old, followed, exact in zip(*kernels, strict=True):
        error = difference(old, followed)
        assert error <= 1.1 * difference(old, exact)
        assert error < 0.99


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["svd", "tiled-ragged", "tucker"])
def test_every_type_is_followed(name: str, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    made = plan(model, METHODS[name], ratio=1.6, example_input=X.to(dtype))
    twist = DeepTwist(model, made, 1)
    twist.step()
    nudge(model, 0.1)
    before, twin = copy.deepcopy(model), copy.deepcopy(model)
    assert twist.step().iterations > 0
    DeepTwist(twin, made, 1, tolerance=0).step()
    names = [layer.name for layer in made.compressed]
    found, best = errors(before, model, names), errors(before, twin, names)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(found[n] <= 1.3 * best[n] + 1e-4 for n in names)


def test_exact_throughout_by_a_tolerance_of_zero() -> None:
    model = network()
    twist = DeepTwist(model, plan(model, SVD(), ratio=1.6, example_input=X), 1, tolerance=0)
    for _ in range(3):
        nudge(model, 0.05)
        expected = approximations(track(model, twist.plan, {}, 0))["0"]
        assert twist.step().iterations == 0
        assert torch.equal(read(model[0])[1], expected)
    assert twist.state_dict()["starts"] == {}


@pytest.mark.parametrize("tolerance", [-1, 1.5, float("nan")])
def test_a_tolerance_is_a_share(tolerance: float) -> None:
    model = network()
    made = plan(model, SVD(), ratio=1.6, example_input=X)
    assert "tolerance" in error_of(DeepTwist, model, made, 1, tolerance=tolerance)


def test_the_last_distortion_is_exact() -> None:
    model = network()
    twist = DeepTwist(model, plan(model, TiledSVD(), ratio=1.6, example_input=X), 1)
    for _ in range(2):
        nudge(model, 0.05)
        twist.step()
    nudge(model, 0.05)
    expected = approximations(track(model, twist.plan, {}, 0))["2"]
    twist.finish()
    assert twist.records[-1].iterations == 0
    assert torch.equal(read(model[2])[1], expected)


@pytest.mark.parametrize("method", [TiledSVD(), Tucker()], ids=str)
def test_a_fallback_is_in_the_record(method: Decomposition) -> None:
    """A layer drawn anew between two distortions, at a tolerance that no iteration meets."""
    model = network()
    twist = DeepTwist(model, plan(model, method, ratio=4, example_input=X), 1, tolerance=1e-7)
    twist.step()
    assert twist.records[-1].fallbacks == {}
    nudge(model, 1e-4)
    nn.init.normal_(model[0].weight)
    expected = approximations(track(model, twist.plan, {}, 0))["0"]
    record = twist.step()
    assert record.fallbacks["0"] > 0
    assert difference(expected, read(model[0])[1]) < 1e-3


def test_nothing_is_written_where_a_later_layer_is_not_finite() -> None:
    model = network()
    twist = DeepTwist(model, plan(model, SVD(), ratio=1.6, example_input=X), 1)
    twist.step()
    nudge(model, 0.05)
    with torch.no_grad():
        model[7].weight[3, 3] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    assert "'7'" in error_of(twist.step)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(model.parameters(), before, strict=True)
    )
    assert len(twist.records) == 1


@pytest.mark.parametrize("method", [SVD(), TiledSVD(tile=(5, 30)), Tucker()], ids=str)
def test_stacks_of_any_size_come_to_the_same(
    method: Decomposition, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    made = plan(model, method, ratio=1.6, example_input=X)
    starts = track(model, made, {}, TOLERANCE).starts
    nudge(model, 0.02)
    together = approximations(track(model, made, starts, TOLERANCE))
    monkeypatch.setattr(deeptwist.twist.tracking, "_AT_ONCE", {"cpu": 1})
    apart = approximations(track(model, made, starts, TOLERANCE))
    assert list(apart) == list(together)
    for name, kernel in together.items():
        assert difference(kernel, apart[name]) < 0.02


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "method", [SVD(), TiledSVD(tile=(6, 30)), TiledSVD(tile=(4, 18)), Tucker()], ids=str
)
def test_alike_layers_side_by_side_and_large_ones_in_parts_are_the_same_distortion(
    method: Decomposition, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a tolerance of 1 each takes one step, whatever it shares a stack with."""
    model = network().to(memory_format=memory_format)
    twist = DeepTwist(model, plan(model, method, ratio=1.6, example_input=X), 1, tolerance=1)
    twist.step()
    nudge(model, 0.02)
    found = []
    for limit in (1, 2000, 2**20):
        monkeypatch.setattr(deeptwist.twist.tracking, "_AT_ONCE", {"cpu": limit})
        twin = copy.deepcopy(model)
        again = DeepTwist(twin, twist.plan, 1, tolerance=1)
        again.load_state_dict(twist.state_dict())
        blocks = track(twin, twist.plan, again._starts, 1).factors
        record = again.step()
        found.append((len(blocks), twin, record, again.state_dict()["starts"]))
    counts, models, records, starts = zip(*found, strict=True)
    assert counts[0] >= counts[1] >= counts[2]
    assert counts[2] == 4  # the two grouped convolutions are one block
    assert counts[0] >= 5 + 3 * (isinstance(method, TiledSVD))
    for other, record, start in zip(models[1:], records[1:], starts[1:], strict=True):
        for a, b in zip(models[0].parameters(), other.parameters(), strict=True):
            assert difference(a, b) < 1e-5
        assert record.layer_shifts == pytest.approx(records[0].layer_shifts, rel=1e-4)
        for name, parts in start.items():
            for (first, *_), (second, *_) in zip(starts[0][name], parts, strict=True):
                assert torch.allclose(first, second, atol=1e-4)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the factors: a stack of bounded size, a few times over, however deep it is."""
    monkeypatch.setattr(deeptwist.twist.tracking, "_AT_ONCE", {"cpu": 2**15})

    def needed(depth: int) -> tuple[int, int]:
        model = nn.Sequential(*[nn.Conv2d(32, 32, 3, padding=1) for _ in range(depth)])
        made = plan(model, SVD(rank=2), example_input=torch.zeros(1, 32, 4, 4))
        starts = track(model, made, {}, TOLERANCE).starts
        nudge(model, 0.02)
        track(model, made, starts, TOLERANCE)
        held = 4 * sum(layer.compressed_numel for layer in made.compressed)
        return peak_memory(lambda: track(model, made, starts, TOLERANCE)), held

    (few, few_held), (many, many_held) = needed(6), needed(24)
    assert many - few < 2 * (many_held - few_held)
    assert few < 6 * 4 * 2**15
