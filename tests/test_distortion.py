import copy
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cases import EVERY_LAYER, PLANNED_METHODS, error_of, every_layer, works_or_is_refused
from torch import Tensor, nn

from deeptwist import SVD, Decomposition, DeepTwist, Plan, Tucker, decompose, plan
from deeptwist.layers.geometry import weight_to_kernel

X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
EACH_METHOD = pytest.mark.parametrize("method", PLANNED_METHODS.values(), ids=PLANNED_METHODS)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def twisted(
    method: Decomposition | None = None, interval: int = 1, **options: Any
) -> tuple[nn.Sequential, DeepTwist]:
    model = network()
    options = {"ratio": 1.6, "example_input": X, "layers": EVERY_LAYER, **options}
    return model, DeepTwist(model, plan(model, method or SVD(), **options), interval)


def bits(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer, bit for bit: NaN compares as its bits."""
    state = model.state_dict().values()
    return [x.detach().clone().contiguous().flatten().view(torch.uint8) for x in state]


def same_bits(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))


# --- what a distortion writes


@EACH_METHOD
def test_a_distortion_writes_the_reconstruction_into_the_same_parameter(
    method: Decomposition,
) -> None:
    model, twist = twisted(method)
    parameters, before = dict(model.named_parameters()), copy.deepcopy(model)
    twist.step()
    for layer in twist.plan.compressed:
        old, new = before.get_submodule(layer.name).weight, model.get_submodule(layer.name).weight
        kernel = weight_to_kernel(old.detach(), layer.convolution)
        factors = layer.decomposition.decompose(kernel).to(dtype=torch.float64)
        expected = factors.reconstruct().to(old.dtype)
        assert torch.equal(new, expected.reshape(old.shape))
        assert new.requires_grad
        assert not torch.equal(new, old)
    compressed = {f"{layer.name}.weight" for layer in twist.plan.compressed}
    assert len(compressed) == 4
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        if name not in compressed:
            assert torch.equal(parameter, before.get_parameter(name))


@EACH_METHOD
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_memory_format_stays(method: Decomposition, memory_format: torch.memory_format) -> None:
    model, twist = twisted(method)
    model.to(memory_format=memory_format)
    strides = [parameter.stride() for parameter in model.parameters()]
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    twist.step()
    assert [parameter.stride() for parameter in model.parameters()] == strides
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    small = twist.finish()
    if memory_format == torch.channels_last:
        wide = [p for p in small.parameters() if p.dim() == 4 and p[0, 0].numel() > 1]
        assert all(p.is_contiguous(memory_format=memory_format) for p in wide)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@EACH_METHOD
def test_every_type_is_distorted_in_its_own(method: Decomposition, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    twist = DeepTwist(
        model, plan(model, method, ratio=1.6, example_input=X.to(dtype), layers=EVERY_LAYER), 1
    )
    record = twist.step()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert record is not None
    assert record.weight_shift > 0


@EACH_METHOD
def test_autocast_outside_changes_nothing(method: Decomposition) -> None:
    """Loops that run in one autocast region call `step` inside it."""
    model, twist = twisted(method)
    twin = copy.deepcopy(model)
    twist.step()
    with torch.autocast("cpu", torch.bfloat16):
        before = twin.eval()(X)  # autocast keeps the weights in bf16
        DeepTwist(twin, twist.plan, 1).step()
        after = twin(X)
    assert same_bits(twin, bits(model))
    assert not torch.equal(before, after)


def test_a_second_distortion_changes_nothing() -> None:
    _, twist = twisted()
    first, second = twist.distort(), twist.distort()
    assert second.weight_shift < 1e-5 * first.weight_shift


def test_the_decomposed_model_after_a_distortion_is_that_of_finish() -> None:
    model, twist = twisted()
    small = twist.finish()
    again = decompose(model, twist.plan)
    model.eval()
    assert torch.allclose(small.eval()(X), again.eval()(X), atol=1e-5)
    assert torch.allclose(small(X), model(X), atol=1e-5)


# --- when


@given(st.integers(1, 7), st.integers(0, 20))
@settings(max_examples=15)
def test_every_interval_th_step_distorts(interval: int, steps: int) -> None:
    model, twist = twisted(interval=interval, layers=every_layer(include=["8"]))
    for number in range(1, steps + 1):
        before = bits(model)
        record = twist.step()
        assert (record is not None) == (number % interval == 0)
        assert record is not None or same_bits(model, before)
    assert twist.steps == steps
    assert [record.step for record in twist.history] == [
        n for n in range(1, steps + 1) if n % interval == 0
    ]


@pytest.mark.parametrize("steps", [0, 3, 4, 5])
def test_finish_always_distorts(steps: int) -> None:
    model, twist = twisted(interval=4)
    for _ in range(steps):
        twist.step()
        with torch.no_grad():
            model[0].weight.add_(torch.randn_like(model[0].weight))
    before = len(twist.history)
    off = model[0].weight.clone()
    small = twist.finish()
    assert len(twist.history) == before + 1
    assert twist.history[-1].step == steps
    assert not torch.equal(off, model[0].weight)
    assert twist.output_difference is not None
    assert twist.output_difference < 1e-5
    assert torch.allclose(small.eval()(X), model.eval()(X), atol=1e-5)


@pytest.mark.parametrize("interval", [0, -1, 1.5, "200", None, True])
def test_an_interval_is_a_number_of_steps(interval: Any) -> None:
    assert "interval" in error_of(twisted, interval=interval)


def test_a_plan_without_compression_is_refused() -> None:
    assert "no layer" in error_of(twisted, layers=every_layer(exclude=["*"]))


# --- what it reports


def test_weight_shift_by_hand() -> None:
    """‖W − W′‖_F / N, of a layer and of all N weights together."""
    model, twist = twisted()
    before = copy.deepcopy(model)
    record = twist.distort()
    norms, sizes = {}, {}
    for name in record.layer_shifts:
        away = before.get_submodule(name).weight - model.get_submodule(name).weight
        norms[name] = math.sqrt(sum(x**2 for x in away.double().flatten().tolist()))
        sizes[name] = away.numel()
    assert list(norms) == ["0", "3", "5", "8"]
    assert record.layer_shifts == pytest.approx({n: norms[n] / sizes[n] for n in norms}, rel=1e-6)
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    assert record.weight_shift == pytest.approx(whole / sum(sizes.values()), rel=1e-6)
    assert record.loss_increase is None


def test_loss_increase_by_hand() -> None:
    model, twist = twisted()
    model.eval()
    losses: list[float] = []

    def loss() -> Tensor:
        value = model(X).square().mean().detach()
        losses.append(float(value))
        return value

    record = twist.step(loss)
    assert record is not None
    before, after = losses
    assert before != after
    assert record.loss_increase == pytest.approx((after - before) / before)


def test_the_loss_is_only_asked_for_at_a_distortion() -> None:
    _, twist = twisted(interval=3)
    asked = []
    for number in range(6):
        twist.step(lambda number=number: asked.append(number) or 1.0)  # type: ignore[func-returns-value]
    assert asked == [2, 2, 5, 5]


def test_a_loss_of_zero_is_no_accident() -> None:
    model, twist = twisted()
    record = twist.step(lambda: 0.0)
    assert twist.history == [record]
    assert json.dumps(asdict(record))
    assert model[0].weight.isfinite().all()


# --- nothing at all, where something is wrong


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0", "3", "5", "8"])
@pytest.mark.parametrize("call", [DeepTwist.step, DeepTwist.distort, DeepTwist.finish])
def test_a_weight_that_is_not_finite_changes_nothing(
    call: Callable[[DeepTwist], object], name: str, bad: float
) -> None:
    model, twist = twisted()
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[-1] = bad
    before = bits(model)
    assert f"'{name}'" in error_of(call, twist)
    assert same_bits(model, before)
    assert twist.history == []


def test_a_kept_layer_that_is_not_finite_is_named_before_anything_changes() -> None:
    model, twist = twisted(layers=every_layer(exclude=["5"]))
    with torch.no_grad():
        model[5].weight[0] = math.nan
    before = bits(model)
    assert "'5'" in error_of(twist.finish)
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@EACH_METHOD
def test_a_reconstruction_beyond_the_type_changes_all_or_nothing(
    method: Decomposition, dtype: torch.dtype
) -> None:
    """Where weights stand at the type's end, 65,504 in fp16, an approximation may lie beyond."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 16, 3, bias=False))
    model.to(dtype)
    made = plan(model, method, ratio=1.6, example_input=X.to(dtype), layers=EVERY_LAYER)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(16, 8, 3, 3).sign() * torch.finfo(dtype).max)
    before, twist = bits(model), DeepTwist(model, made, 1)
    works_or_is_refused(twist.step)
    assert same_bits(model, before) == (not twist.history)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_finish_refuses_a_model_that_computes_more_than_its_weights_say() -> None:
    model, twist = twisted()
    model[3].forward = lambda x: x  # type: ignore[method-assign]
    assert "exclude" in error_of(twist.finish)


@pytest.mark.parametrize("order", [1, -1])
def test_one_output_of_several_that_is_not_a_number_is_noticed(order: int) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.layer(x)
            return (y, y * self.scale)[::order]

    model, x = Two(), torch.randn(2, 8)
    twist = DeepTwist(model, plan(model, SVD(), ratio=1.5, example_input=x, layers=EVERY_LAYER), 1)
    model.scale.fill_(math.nan)
    error_of(twist.finish)


@dataclass
class Answer:
    logits: Tensor


@pytest.mark.parametrize(
    "pack",
    [
        lambda y: (y, [y]),
        lambda y: {"logits": y, "rest": {"more": (y,)}},
        lambda y: Answer(y),
    ],
    ids=["tuple", "dict", "dataclass"],
)
def test_outputs_are_compared_whatever_holds_them(pack: Callable[[Tensor], object]) -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> object:
            return pack(self.layer(x))

    model = Packing()
    twist = DeepTwist(
        model, plan(model, SVD(), ratio=1.5, example_input=torch.randn(2, 8), layers=EVERY_LAYER), 1
    )
    twist.finish()
    assert twist.output_difference is not None
    assert 0 < twist.output_difference < 1e-5  # 0 would be luck, or nothing compared


class Vanishing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1e-44  # what is left is a few bits


@pytest.mark.parametrize("between", [nn.Identity, Vanishing])
def test_outputs_that_are_zero_prove_nothing_and_layers_are_compared(
    between: Callable[[], nn.Module],
) -> None:
    """As a vision transformer's, whose head is zero until it is trained."""
    layers = nn.Linear(8, 8), between(), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
    model = nn.Sequential(*layers)
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    made = plan(
        model, SVD(), ratio=1.2, example_input=torch.randn(2, 8), layers=every_layer(exclude="3")
    )
    twist = DeepTwist(model, made, 1)
    twist.finish()
    assert twist.output_difference is not None
    assert 0 < twist.output_difference < 1e-5


def test_integer_inputs_are_compared_too() -> None:
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16))
    tokens = torch.randint(20, (2, 5))
    twist = DeepTwist(
        model, plan(model, SVD(), ratio=1.5, example_input=tokens, layers=EVERY_LAYER), 1
    )
    small = twist.finish()
    assert torch.allclose(small(tokens), model(tokens), atol=1e-5)


def test_the_example_input_may_be_given() -> None:
    model = network()
    made = plan(model, SVD(), ratio=2, example_input=X, layers=EVERY_LAYER)
    for given_ in (X[:1], (X[:1],)):
        twist = DeepTwist(model, made, 1, example_input=given_)
        twist.finish()
        assert twist.output_difference is not None
        assert twist.output_difference < 1e-5


class Noisy(nn.Module):
    """Draws random numbers in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + torch.randn_like(y)


def test_a_model_that_draws_random_numbers_is_compared_on_the_same_ones() -> None:
    model = Noisy()
    twist = DeepTwist(model, plan(model, SVD(), ratio=2, example_input=X, layers=EVERY_LAYER), 1)
    twist.finish()
    assert twist.output_difference is not None
    assert twist.output_difference < 1e-5


def test_outputs_are_compared_as_finely_as_they_are_computed() -> None:
    model, twist = twisted()
    with torch.autocast("cpu", torch.bfloat16):
        twist.finish()
    assert twist.output_difference is not None
    assert twist.output_difference > torch.finfo(torch.float32).eps ** 0.5
    model = nn.Sequential(nn.BatchNorm2d(8), Narrow(), nn.Conv2d(8, 16, 3).bfloat16())
    twist = DeepTwist(model, plan(model, SVD(), ratio=2, example_input=X, layers=EVERY_LAYER), 1)
    twist.finish()


class Narrow(nn.Module):
    """To bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


def test_finish_leaves_the_mode_and_the_global_generator_alone() -> None:
    model, twist = twisted()
    model.train()
    model[1].eval()
    state = torch.random.get_rng_state()
    small = twist.finish()
    assert [m.training for m in model] == [m.training for m in small]  # type: ignore[attr-defined]
    assert model.training
    assert not model[1].training
    assert torch.equal(torch.random.get_rng_state(), state)


# --- training


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(count):
        yield torch.randn(6, 8, 6, 6), torch.randint(10, (6,))


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.05, 0.9), torch.optim.AdamW], ids=["sgd", "adamw"]
)
def test_training_goes_on_after_a_distortion(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model, twist = twisted(interval=2)
    optimizer = make(model.parameters())
    for number, (x, y) in enumerate(batches(6), start=1):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = copy.deepcopy(optimizer.state_dict())
        before = model[0].weight.clone()
        twist.step()
        assert torch.equal(before, model[0].weight) == (number % 2 == 1)
        assert states_equal(state, optimizer.state_dict())
    assert all(p.isfinite().all() for p in model.parameters())
    assert len(twist.history) == 3


def states_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return bool(a == b)


def test_a_distortion_between_forward_and_backward_is_noticed_by_autograd() -> None:
    model, twist = twisted()
    loss = model(X).sum()
    twist.step()
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


# --- checkpoints


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_dict_round_trip() -> None:
    model, twist = twisted(interval=2)
    for _ in range(5):
        twist.step(lambda: model[0].weight.detach().square().sum())
    saved = through_a_file(twist.state_dict())
    other = DeepTwist(model, twist.plan, 2)
    other.load_state_dict(saved)
    assert (other.steps, other.history) == (twist.steps, twist.history)
    assert other.step() is not None  # the sixth


def test_a_saved_state_does_not_change_afterwards() -> None:
    _, twist = twisted()
    twist.step()
    saved = twist.state_dict()
    frozen = copy.deepcopy(saved)
    twist.step()
    twist.history[0].layer_shifts["0"] = -1.0
    assert states_equal(saved, frozen)


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        [],
        {"steps": "many", "history": []},
        {"steps": math.inf, "history": []},
        {"steps": 1},
        {"steps": 1, "history": 3},
        {"steps": 1, "history": [None]},
        {"steps": 1, "history": [{"step": 1}]},
        {"steps": 1, "history": [{"two\nlines": 1}]},
        {"steps": 1, "history": [], "factors": 3},
        {"steps": 1, "history": [], "factors": {"0": []}},
        {"steps": 1, "history": [], "factors": {n: [torch.ones(1, 2, 3)] for n in "0358"}},
    ],
    ids=str,
)
def test_a_state_that_is_none_changes_nothing(state: Any) -> None:
    _, twist = twisted()
    twist.step()
    records = list(twist.history)
    assert "state" in error_of(twist.load_state_dict, state)
    assert (twist.steps, twist.history) == (1, records)


@pytest.mark.parametrize("decomposition", [SVD(rank=2), Tucker(rank=(2, 2))], ids=repr)
def test_the_factors_of_another_plan_are_refused(decomposition: Decomposition) -> None:
    model, twist = twisted()
    twist.step()
    other = DeepTwist(model, plan(model, decomposition, example_input=X, layers=EVERY_LAYER), 1)
    assert "another plan" in error_of(other.load_state_dict, twist.state_dict())


def test_what_is_written_may_be_changed_but_for_the_last() -> None:
    def add_one(name: str, step: int, weight: Tensor, approximation: Tensor) -> Tensor:
        calls.append((name, step))
        return approximation + 1

    calls: list[tuple[str, int]] = []
    model, plain = twisted()
    twin = copy.deepcopy(model)
    twist = DeepTwist(twin, plain.plan, 1, perturb=add_one)
    plain.step()
    record = twist.step()
    assert calls == [(name, 1) for name in ("0", "3", "5", "8")]
    assert torch.allclose(twin[0].weight, model[0].weight + 1)
    assert record is not None
    assert record.weight_shift > plain.history[0].weight_shift
    twist.finish()
    assert len(calls) == 4


@EACH_METHOD
def test_resuming_is_as_if_nothing_had_happened(method: Decomposition) -> None:
    torch.manual_seed(1)
    model, twist = twisted(method, interval=3)
    data = list(batches(10))

    def train(model: nn.Module, twist: DeepTwist, data: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in data:
            loss = nn.functional.cross_entropy(model(x), y)
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.05 * parameter.grad)
            twist.step()

    train(model, twist, data[:4])
    resumed = copy.deepcopy(model)
    again = DeepTwist(resumed, Plan.from_json(twist.plan.to_json()), 3)
    again.load_state_dict(through_a_file(twist.state_dict()))
    train(model, twist, data[4:])
    train(resumed, again, data[4:])
    assert same_bits(resumed, bits(model))
    assert again.history == twist.history


def test_what_does_not_train_is_kept_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    made = plan(model, SVD(), ratio=2, example_input=torch.randn(2, 3, 8, 8), layers=EVERY_LAYER)
    twist = DeepTwist(model, made, interval=1)
    assert ["'0'" in record.message for record in caplog.records] == [True]
    twist.step()
    assert torch.equal(model[0].weight, before)
    assert isinstance(twist.finish()[0], nn.Conv2d)


def test_a_weight_that_no_optimizer_moves_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    made = plan(model, SVD(), ratio=2, example_input=torch.randn(2, 3, 8, 8), layers=EVERY_LAYER)
    twist = DeepTwist(model, made, interval=1)
    twist.step()
    with torch.no_grad():
        model[2].weight.add_(0.1)
    twist.step()
    twist.step()
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith("not trained since the first distortion: '0':")
