"""What people bring: any call, any batch, networks that are compiled or wrapped, state anywhere."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.cases import error_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import deeptwist as dt
from deeptwist.export import export_onnx, export_program, export_state_dict, quantize_onnx
from deeptwist.inspection.run import Inputs, preserving_state, read_batches
from deeptwist.measure.runtimes import Setting, make_runner

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ALL = dt.Layers(skip_first_conv=False)


class Conditioned(nn.Module):
    """Takes a number, and an option by keyword; calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, t: int, scale: float | None = None) -> Tensor:
        y: Tensor = self.norm(self.layer(input=x * t))
        return (y * (scale or 1)).mean((2, 3))


CALLS = [(X, 3), (X, 3, None), {"x": X, "t": 3}, {"x": X, "t": 3, "scale": 2.0}]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Conditioned().eval()


@pytest.mark.parametrize("call", CALLS, ids=["args", "none", "kwargs", "option"])
def test_a_call_holds_what_the_forward_takes(model: nn.Module, call: object) -> None:
    plan = dt.plan(model, dt.SVD(), ratio=2, example_input=call, layers=ALL)
    assert [layer.name for layer in plan.compressed] == ["layer"]
    assert plan.examples == 4
    assert dt.Plan.from_json(plan.to_json()) == plan
    twist = dt.DeepTwist(model, plan, 1)  # by the plan alone: numbers of its shapes, and the rest
    twist.finish()
    assert twist.output_difference is not None
    assert twist.output_difference < 1e-5
    small = dt.decompose(model, plan)
    inputs = Inputs.of(call)
    with torch.no_grad():
        expected = inputs.run(small)
        assert torch.allclose(make_runner(small, call, Setting(4, 1))(), expected, atol=1e-5)


def test_a_dict_is_called_by_keyword_wherever_batches_go(model: nn.Module) -> None:
    batches = [{"x": X + i, "t": 3, "labels": X} for i in range(4)]
    moments = dt.calibrate(model, batches).moments
    plain = dt.calibrate(model, batches, inputs=lambda batch: (batch["x"], batch["t"])).moments
    patches = nn.functional.unfold(3 * torch.cat([b["x"] for b in batches]), 3)
    values = patches.transpose(1, 2).flatten(0, 1)
    assert torch.allclose(moments["layer"].values[0], values.mT @ values / len(values), rtol=1e-4)
    assert torch.equal(moments["layer"].values, plain["layer"].values)
    anew = dt.recalibrate_batch_norm(model, list(batches)).norm.running_mean
    seen = torch.stack([model.layer(3 * b["x"]).mean((0, 2, 3)) for b in batches]).mean(0)
    assert torch.allclose(anew, seen, atol=1e-5)
    done = dt.compress(model, batches, lambda _: 1.0, ratio=2, layers=ALL, distill_steps=2)
    assert done.plan.keywords == ("x", "t")


def test_a_call_is_exported_with_numbers_fixed(model: nn.Module, tmp_path: Path) -> None:
    call = {"x": X, "t": 3}
    assert export_program(model, tmp_path / "a.pt2", call).worst_difference < 1e-5
    assert export_onnx(model, tmp_path / "a.onnx", call).worst_difference < 1e-5
    quantize_onnx(tmp_path / "a.onnx", tmp_path / "q.onnx", [(call, "label")])
    assert make_runner(model, call, Setting(4, 1, runtime="onnxruntime"))()[0].shape == (4, 8)
    with pytest.raises(dt.DeepTwistError, match="no batch"):
        quantize_onnx(tmp_path / "a.onnx", tmp_path / "r.onnx", [])


def test_a_detector_s_list_of_images_is_one_example() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)

        def forward(self, images: list[Tensor]) -> list[SimpleNamespace]:
            return [SimpleNamespace(boxes=self.layer(image)) for image in images]

    plan = dt.plan(Detector(), dt.SVD(), ratio=2, example_input=([*X],), layers=ALL)
    assert plan.examples == 1
    assert plan.inputs == plan.keywords == ()  # which JSON cannot tell: nothing is drawn
    assert dt.decompose(Detector(), plan)([*X])[0].boxes.shape == (8, 6, 6)


def test_what_is_no_input_is_refused(model: nn.Module) -> None:
    for wrong in ([X], 3, (), {}, {"t": 3}):
        assert "tensor" in error_of(
            dt.plan, model, dt.SVD(), ratio=2, example_input=wrong, layers=ALL
        )
    text = dt.plan(model, dt.SVD(), ratio=2, example_input=(X, 3), layers=ALL).to_json()
    values = {**json.loads(text), "keywords": ["a", "b", "c"]}
    assert "keywords" in error_of(dt.Plan.from_json, json.dumps(values))


def test_a_used_up_generator_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    batches = (X for _ in range(2))
    dt.calibrate(model, batches)
    for call in (dt.calibrate, dt.recalibrate_batch_norm):
        assert "used up" in error_of(call, model, batches)
    assert "used up" in error_of(dt.compress, model, batches, lambda _: 1.0, ratio=2)


def test_a_batch_of_one_image_is_taken_or_refused_in_one_line() -> None:
    body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8)).eval()
    plan = dt.plan(model, dt.SVD(), ratio=2, example_input=X[:1], layers=ALL)
    small = dt.decompose(model, plan, calibration=dt.calibrate(model, [X[:1]] * 2))
    assert dt.recalibrate_batch_norm(small[:2], [X[:1]])[1].num_batches_tracked == 1
    assert "more images" in error_of(dt.recalibrate_batch_norm, small, [X[:1]])
    assert "batch" in error_of(dt.distill, small, model, [X[:1]] * 4, steps=1)


def test_a_compiled_network_is_seen_and_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    expected = dt.calibrate(model, [X]).moments["0"].values
    model.compile(backend="eager")
    model(X)
    assert torch.equal(dt.calibrate(model, [X]).moments["0"].values, expected)
    assert model._compiled_call_impl is not None


@pytest.mark.parametrize(
    ("wrap", "inside"),
    [(nn.DataParallel, "module"), (AveragedModel, "module"), (torch.compile, "_orig_mod")],
)
def test_a_wrapper_is_refused_by_every_door(wrap: object, inside: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    plan = dt.plan(model, dt.SVD(), ratio=2, example_input=X, layers=ALL)
    wrapped = wrap(model)
    for call in (
        lambda: dt.plan(wrapped, dt.SVD(), ratio=2, example_input=X),
        lambda: dt.calibrate(wrapped, [X]),
        lambda: dt.recalibrate_batch_norm(wrapped, [X]),
        lambda: dt.save(wrap(dt.decompose(model, plan)), tmp_path / "small"),
        lambda: dt.fuse(wrapped, X),
        lambda: export_onnx(wrapped, tmp_path / "a.onnx", X),
        lambda: make_runner(wrapped, X, Setting(4, 1)),
    ):
        assert f"give its .{inside}" in error_of(call)


def test_what_is_no_network_or_no_number_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    for other in (model.state_dict(), "resnet18"):
        told = error_of(lambda other=other: dt.plan(other, dt.SVD(), ratio=2, example_input=X))
        assert "is no network: give the nn.Module" in told
    told = error_of(lambda: dt.plan(model, dt.SVD(), ratio="2", example_input=X))
    assert told.startswith("ratio '2' compresses nothing: give a number")


def test_what_a_run_leaves_anywhere_is_put_back() -> None:
    class Spiking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.potential, self.spikes = nn.Conv2d(3, 8, 3), 0.0, [torch.zeros(1)]
            self.memory = {"deep": {"v": torch.zeros(8)}}

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            self.potential = self.potential * 0.5 + y
            self.spikes[0] += 1
            self.spikes.append(y)
            self.memory["deep"]["v"].add_(1)
            return y

    model = Spiking()
    zero, memory = model.spikes[0], model.memory["deep"]["v"]
    dt.calibrate(model, [X, X])
    with preserving_state(model):
        model(X)
    assert model.potential == 0.0
    assert model.spikes == [zero]
    assert zero.item() == 0
    assert model.memory["deep"]["v"] is memory
    assert not memory.any()


def test_plain_extra_state_survives_the_disk(tmp_path: Path) -> None:
    class Counter(nn.Module):
        def __init__(self, steps: object = 0) -> None:
            super().__init__()
            self.layer, self.steps = nn.Conv2d(3, 8, 3), steps

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

        def get_extra_state(self) -> object:
            return {"steps": self.steps}

        def set_extra_state(self, state: object) -> None:
            self.steps = state["steps"]

    plan = dt.plan(Counter(), dt.SVD(), ratio=2, example_input=X, layers=ALL)
    for number, steps in enumerate(([1, "two", None], torch.arange(2))):
        small = dt.decompose(Counter(steps), plan)
        if isinstance(steps, Tensor):
            assert "extra state" in error_of(dt.save, small, tmp_path / "refused")
            continue
        folder = dt.save(small, tmp_path / str(number))
        assert dt.load(folder, Counter).steps == steps


def test_a_name_of_another_format_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    small = dt.decompose(model, dt.plan(model, dt.SVD(), ratio=2, example_input=X, layers=ALL))
    for call, right in (
        (lambda: export_onnx(small, tmp_path / "a.tflite", X), "a.onnx"),
        (lambda: export_program(small, tmp_path / "a.onnx", X), "a.pt2"),
        (lambda: export_state_dict(small, tmp_path / "a.pt"), "a.safetensors"),
        (lambda: quantize_onnx(tmp_path / "a.onnx", tmp_path / "q.pt2", [X]), "q.onnx"),
        (lambda: dt.save(small, tmp_path / "small.pt"), "small"),
        (lambda: dt.calibrate(model, [X]).save(tmp_path / "m.npz"), "m.safetensors"),
    ):
        assert f"name it {tmp_path / right}" in error_of(call)
    assert dt.save(small, tmp_path / "small-1.5x").is_dir()


def test_batches_are_read_once_each() -> None:
    given = [X, (X, 1), [X, 1], {"x": X}, ({"x": X}, 1), Inputs.of(X)]
    read = [*read_batches(given)]
    assert [len(call.args) for call in read] == [1, 1, 1, 0, 0, 1]
    assert all(call.tensors[0] is X for call in read)
