"""Factors refined from a start, against exact ones."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cases import EVERY_LAYER, METHODS, at, build, difference, error_of, peak_memory, read
from torch import Tensor, nn

from deeptwist import CP, SVD, Decomposition, DeepTwist, TiledSVD, Tucker, plan
from deeptwist.decompositions.linalg import power_step, refine, truncated_svd

X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
SEED = st.integers(0, 2**16)


def moved(tensor: Tensor, share: float) -> Tensor:
    """The tensor after a step of `share` of its norm."""
    noise = torch.randn_like(tensor)
    return tensor + share * tensor.norm() / noise.norm() * noise


def lost(matrices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """‖W − W′‖² / ‖W‖² of each matrix, at any scale."""
    scale = matrices.abs().amax((1, 2), keepdim=True).double()
    scale = torch.where(scale > 0, scale, 1)
    exact = matrices.double() / scale
    away = exact - left.double() @ (right.double() / scale)
    return away.square().sum((1, 2)) / exact.square().sum((1, 2)).clamp_min(1e-30)


def least(matrices: Tensor, rank: int) -> Tensor:
    """The same of the best approximation, by an SVD in fp64."""
    squares = torch.linalg.svdvals(matrices.double()).square()
    return squares[:, rank:].sum(1) / squares.sum(1).clamp_min(1e-30)


def low_rank(matrices: Tensor, rank: int) -> Tensor:
    left, right = truncated_svd(matrices, rank)
    return left @ right


# --- matrices

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 20))


@given(SHAPES, st.integers(1, 20), st.floats(0, 0.1), SEED)
def test_refining_is_near_the_optimum(
    shape: tuple[int, int, int], rank: int, share: float, seed: int
) -> None:
    """Of a low-rank matrix that has moved, which is what training hands a distortion."""
    torch.manual_seed(seed)
    rank = min(rank, *shape[1:])
    matrices = low_rank(torch.randn(shape), rank)
    after = torch.stack([moved(matrix, share) for matrix in matrices])
    left, right = refine(after, truncated_svd(matrices, rank)[0])
    assert left.shape == (*shape[:2], rank)
    assert right.shape == (shape[0], rank, shape[2])
    excess = float((lost(after, left, right) - least(after, rank)).mean())
    assert excess <= 1e-3 * float(least(after, rank).mean()) + 1e-6
    assert torch.allclose(left.mT @ left, torch.eye(rank).expand(len(left), -1, -1), atol=1e-4)


@given(st.sampled_from([1e-30, 1e-18, 1e-9, 1.0, 1e9, 1e18, 1e30]), SEED)
def test_scale_is_no_matter_not_even_among_neighbours(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    matrices = low_rank(torch.randn(4, 12, 16), 4)
    after = moved(matrices, 0.05)
    sizes = torch.tensor([scale, 1.0, 0.0, 1 / scale]).reshape(4, 1, 1)
    left, right = refine(after * sizes, truncated_svd(matrices * sizes, 4)[0])
    assert left.isfinite().all()
    assert right.isfinite().all()
    assert not (left[2] @ right[2]).any()
    errors = lost(after * sizes, left, right)
    expected = lost(after, *refine(after, truncated_svd(matrices, 4)[0]))
    for number in (0, 1, 3):
        assert errors[number] == pytest.approx(float(expected[number]), rel=1e-3)


@given(st.integers(0, 5), st.integers(1, 8), SEED)
def test_what_lacks_rank_is_met_and_rank_is_found_again(true: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    true = min(true, rank)
    matrices = torch.randn(3, 10, true) @ torch.randn(3, true, 14)
    once = refine(matrices, truncated_svd(torch.randn(3, 10, 14), rank)[0])
    twice = refine(matrices, once[0])
    for pair in (once, twice):
        assert float(lost(matrices, *pair).max()) < 1e-5
    richer = low_rank(torch.randn(3, 10, 14), rank)  # the next training steps fill it up
    assert float(lost(richer, *refine(richer, twice[0])).max()) < 1e-4


def test_equal_singular_values_are_no_obstacle() -> None:
    matrices = torch.linalg.qr(torch.randn(4, 12, 12)).Q
    pair = refine(matrices, truncated_svd(torch.randn(4, 12, 12), 5)[0])
    assert torch.allclose(lost(matrices, *pair), torch.tensor(7 / 12).double(), atol=1e-5)


def test_columns_that_repeat_are_filled_up_with_others() -> None:
    matrices = low_rank(torch.randn(2, 12, 16), 4)
    basis = power_step(matrices, torch.ones(2, 12, 4))
    assert torch.allclose(basis.mT @ basis, torch.eye(4).expand(2, 4, 4), atol=1e-5)


# --- every method


def test_a_start_of_other_ranks_is_refused() -> None:
    kernel = torch.randn(1, 6, 5, 3, 3)
    start = SVD(rank=3).decompose(kernel)
    assert "cannot start from factors of SVD(rank=3)" in error_of(
        SVD(rank=2).decompose, kernel, start
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D", "transposed 3-D"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_start_changes_the_error_by_little(
    method: Decomposition, geometry: str, dtype: torch.dtype
) -> None:
    convolution, kernel = read(build(geometry, dtype)[0])
    resolved = at(method, convolution, 0.5)
    exact = resolved.decompose(kernel)
    after = moved(exact.reconstruct(), 0.03)
    warm, cold = resolved.decompose(after, exact), resolved.decompose(after)
    assert [x.shape for x in warm.tensors] == [x.shape for x in cold.tensors]
    assert {x.dtype for x in warm.tensors} == {dtype}
    squares = [difference(after, factors.reconstruct()) ** 2 for factors in (warm, cold)]
    slack = 1.25 if method.method == "cp" else 1.02  # small layers, one by one
    assert squares[0] <= slack * squares[1] + 1e-10


@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_kernels_refined_together_are_those_refined_apart(
    method: Decomposition, geometry: str
) -> None:
    convolution, kernel = read(build(geometry)[0])
    resolved = at(method, convolution, 0.5)
    starts = [resolved.decompose(kernel), resolved.decompose(1e3 * torch.randn_like(kernel))]
    after = [moved(start.reconstruct(), 0.03) for start in starts]
    together = resolved.refine_together(after, starts)
    for moved_kernel, start, factors in zip(after, starts, together, strict=True):
        apart = resolved.decompose(moved_kernel, start)
        assert factors.shape == apart.shape
        assert difference(apart.reconstruct(), factors.reconstruct()) < 1e-6


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_unmoved_kernel_keeps_its_factors(method: Decomposition) -> None:
    convolution, kernel = read(build("3x3")[0])
    resolved = at(method, convolution, 0.5)
    exact = resolved.decompose(kernel)
    again = resolved.decompose(exact.reconstruct(), exact)
    assert difference(exact.reconstruct(), again.reconstruct()) < 1e-6


def test_tucker_of_more_directions_than_its_core_can_use() -> None:
    method, kernel = Tucker(rank=(32, 2)), torch.randn(1, 64, 16, 3, 3)
    exact = method.decompose(kernel)
    after = moved(kernel, 0.03)
    warm, cold = method.decompose(after, exact), method.decompose(after)
    errors = [difference(after, factors.reconstruct()) for factors in (warm, cold)]
    assert errors[0] <= 1.02 * errors[1]
    assert warm.tensors[0].shape == (1, 64, 32)


@pytest.mark.parametrize("groups", [1, 2])
def test_cp_of_what_was_zero_before(groups: int) -> None:
    """Components that are zero would stay so: they begin anew, and are soon what they should be."""
    method, kernel = CP(rank=4), torch.randn(groups, 16 // groups, 16 // groups, 3, 3)
    was = kernel.clone()
    was[0] = 0
    factors = method.decompose(was)
    for _ in range(4):
        factors = method.decompose(kernel, factors)
    warm, cold = factors.reconstruct(), method.decompose(kernel).reconstruct()
    for old, refined, exact in zip(kernel, warm, cold, strict=True):
        assert difference(old, refined) <= 1.1 * difference(old, exact)
        assert difference(old, refined) < 0.99


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
    twist = DeepTwist(model, plan(model, method, ratio=1.6, example_input=X, layers=EVERY_LAYER), 1)
    twist.step()
    names = [layer.name for layer in twist.plan.compressed]
    for _ in range(1 if method.method == "cp" else 3):  # an exact CP takes seconds
        nudge(model, 0.03)
        before, twin = copy.deepcopy(model), copy.deepcopy(model)
        parameters = dict(model.named_parameters())
        places = [(p.data_ptr(), p.stride()) for p in model.parameters()]
        twist.step()
        DeepTwist(twin, twist.plan, 1).step()
        warm, best = errors(before, model, names), errors(before, twin, names)
        slack = 1.25 if method.method == "cp" else 1.02  # small layers, one by one
        for name in names:
            assert warm[name] <= slack * best[name] + 1e-6, name
        assert dict(model.named_parameters()) == parameters
        assert [(p.data_ptr(), p.stride()) for p in model.parameters()] == places


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["svd", "tiled-ragged", "tucker"])
def test_every_type_is_followed(name: str, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    made = plan(model, METHODS[name], ratio=1.6, example_input=X.to(dtype), layers=EVERY_LAYER)
    twist = DeepTwist(model, made, 1)
    twist.step()
    nudge(model, 0.1)
    before, twin = copy.deepcopy(model), copy.deepcopy(model)
    twist.step()
    DeepTwist(twin, made, 1).step()
    names = [layer.name for layer in made.compressed]
    warm, best = errors(before, model, names), errors(before, twin, names)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(warm[n] <= 1.3 * best[n] + 1e-4 for n in names)


def test_the_last_distortion_is_exact() -> None:
    model = network()
    twist = DeepTwist(
        model, plan(model, TiledSVD(), ratio=1.6, example_input=X, layers=EVERY_LAYER), 1
    )
    for _ in range(2):
        nudge(model, 0.05)
        twist.step()
    nudge(model, 0.05)
    twin = copy.deepcopy(model)
    twist.finish()
    DeepTwist(twin, twist.plan, 1).step()  # the first one is exact too
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_nothing_is_written_where_a_later_layer_is_not_finite() -> None:
    model = network()
    twist = DeepTwist(model, plan(model, SVD(), ratio=1.6, example_input=X, layers=EVERY_LAYER), 1)
    twist.step()
    nudge(model, 0.05)
    with torch.no_grad():
        model[7].weight[0, 0] = float("nan")
    before = copy.deepcopy(model)
    assert "'7'" in error_of(twist.step)
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())
    assert len(twist.history) == 1


def test_a_distortion_holds_little_more_than_the_weights_and_the_factors() -> None:
    model = nn.Sequential(*[nn.Conv2d(128, 128, 3, padding=1) for _ in range(6)])
    x = torch.zeros(1, 128, 4, 4)
    made = plan(model, TiledSVD(tile=(64, 64)), ratio=4, example_input=x, layers=EVERY_LAYER)
    twist = DeepTwist(model, made, 1)
    twist.step()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert peak_memory(twist.step) < 3 * weights
