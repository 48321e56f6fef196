"""The training system on the embedded digits: what it counts, repeats, records and refuses."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from experiments.runs import NoiseInPlaceOfDistortion
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import deeptwist as dt
from deeptwist.app.data import ImageData, Split, load_data, normalize
from deeptwist.app.folders import read_run
from deeptwist.app.training.devices import own_device
from deeptwist.app.training.evaluation import evaluate, training_inputs
from deeptwist.app.training.recipe import Mode, Recipe, make_recipe
from deeptwist.app.training.run import TrainingRun, build_run, train
from deeptwist.compress import Values
from deeptwist.networks.build import build_model
from deeptwist.networks.weights import load_weights

SHORT = {
    "model": "tests:network",
    "interval": 4,
    "schedule": {"epochs": 2},
    "compression": {"decomposition": "svd", "ratio": 3, "linear": True, "include": ["3"]},
    "logging": {"images": 100},
}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )


def run_of(images: ImageData, model: nn.Module | None = None, **values: Any) -> TrainingRun:
    recipe = make_recipe({**SHORT, **values})
    return build_run(recipe, images, name="a run", model=model or network())


def state_of(run_folder: Path) -> dict[str, torch.Tensor]:
    return dt.load(run_folder / "model", model=network).state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


# --- evaluation


def test_evaluation_agrees_with_the_definition(digits: ImageData) -> None:
    model = network().train()
    evaluation = evaluate(model, digits.test, digits)
    with torch.no_grad():
        logits = model.eval()(normalize(digits.test.images, digits.mean, digits.std))
    labels = digits.test.labels
    assert evaluation.loss == pytest.approx(
        float(functional.cross_entropy(logits, labels)), rel=1e-5
    )
    assert evaluation.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    among_five = logits.topk(5).indices == labels[:, None]
    assert evaluation.top5 == pytest.approx(float(among_five.any(1).float().mean()))


def test_evaluation_leaves_the_training_flags_alone(digits: ImageData) -> None:
    model = network().train()
    model[1].eval()
    evaluate(model, digits.test.subsample(8), digits)
    assert [module.training for module in model] == [True, False, True, True, True, True, True]  # type: ignore[attr-defined]


def test_evaluation_refuses_a_network_for_other_images_or_classes(
    digits: ImageData, error_of: Callable[..., str]
) -> None:
    test = digits.test, digits
    assert "10 classes" in error_of(evaluate, nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), *test)
    assert "cannot run on images of digits" in error_of(evaluate, nn.Conv2d(3, 10, 3), *test)
    assert "a dict where a tensor of logits belongs" in error_of(evaluate, InDict(), *test)
    message = error_of(evaluate, Picky(), *test)
    assert "Picky cannot run on images of digits, (1, 8, 8): takes 224 pixels, not 8" in message
    message = error_of(run_of, digits, model=Picky())
    assert "takes 224 pixels, not 8" in message


class Picky(nn.Sequential):
    """Checks its input as timm's networks do."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == 224, f"takes 224 pixels, not {x.shape[-1]}"
        output: torch.Tensor = super().forward(x)
        return output


class InDict(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"logits": super().forward(x)}


# --- the loop


def test_training_learns_and_repeats_itself_bit_for_bit(digits: ImageData, tmp_path: Path) -> None:
    for name in "ab":
        summary = train(run_of(digits, schedule={"epochs": 5}), tmp_path / name)
    assert summary["accuracy"] > 0.8
    assert same(state_of(tmp_path / "a"), state_of(tmp_path / "b"))


def test_another_seed_is_another_order_of_images(digits: ImageData, tmp_path: Path) -> None:
    for seed in (0, 1):
        train(run_of(digits, seed=seed), tmp_path / str(seed))
    assert not same(state_of(tmp_path / "0"), state_of(tmp_path / "1"))


def test_distortions_come_at_every_interval_and_are_recorded(
    digits: ImageData, tmp_path: Path
) -> None:
    records: list[Values] = []
    ticks: list[int] = []
    run = run_of(digits)
    train(run, tmp_path, on_record=records.append, on_step=lambda: ticks.append(1))
    distortions = [record for record in records if record["event"] == "distortion"]
    epochs = [record for record in records if record["event"] == "epoch"]
    assert len(ticks) == run.steps == 22
    assert [record["step"] for record in distortions] == [4, 8, 12, 16, 20, 22]
    assert [(record["epoch"], record["step"]) for record in epochs] == [(1, 11), (2, 22)]
    assert epochs[-1]["lr"] == pytest.approx(0)
    for record in distortions:
        before, after = (evaluation["loss"] for evaluation in record["train"])
        increase = (after - before) / before
        assert record["loss_increase"] == pytest.approx(increase, abs=1e-6)
        assert 0 < record["seconds"] < 5
        assert len(record["test"]) == 2
    # The network that follows the last distortion is the one that is deployed.
    final = dt.load(tmp_path / "model", model=network)
    fixed = digits.test.subsample(100)
    evaluation = evaluate(final, fixed, digits)
    assert evaluation.loss == pytest.approx(distortions[-1]["test"][1]["loss"], rel=1e-4)


def test_records_can_be_left_out(digits: ImageData, tmp_path: Path) -> None:
    train(run_of(digits, logging={"images": 0}), tmp_path / "without")
    train(run_of(digits), tmp_path / "with")
    assert same(state_of(tmp_path / "without"), state_of(tmp_path / "with"))
    for line in read_run(tmp_path / "without").distortions:
        assert line["train"] == line["test"] == []
        assert line["loss_increase"] is None


def test_metrics_hold_what_the_report_needs_and_tensorboard_is_written(
    digits: ImageData, tmp_path: Path
) -> None:
    train(run_of(digits), tmp_path)
    run_read = read_run(tmp_path)
    (first, *_), (epoch, *_) = run_read.distortions, run_read.epochs
    assert first["step"] == 4
    assert first["lr"] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 4 / 22)))
    assert epoch["images_per_second"] == pytest.approx(11 * 128 / epoch["seconds"])
    assert first["weight_shift"] > 0
    assert [*(tmp_path / "tensorboard").glob("events*")]


def test_processes_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpus, expected in ((True, "cuda:3"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda answer=has_gpus: answer)
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert own_device() == torch.device(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", ["dense", "deeptwist", "finetune"])
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_cuda_graphs_train_as_separate_launches_do(
    digits: ImageData, tmp_path: Path, mode: Mode, backend: str | None
) -> None:
    settings: list[dict[str, Any]] = [{}, {"cuda_graphs": True, "compile": backend}]
    summaries = [
        train(run_of(digits, mode=mode, **values), tmp_path / str(len(values)))
        for values in settings
    ]
    assert summaries[0]["loss"] == pytest.approx(summaries[1]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"kind": "step", "epochs": 3, "milestones": [1, 2], "factor": 0.1}, [0.005, 0.0005, 5e-4]),
        ({"epochs": 3}, [0.0375, 0.0125, 0]),
    ],
)
def test_schedules(
    schedule: dict[str, Any], expected: list[float], digits: ImageData, tmp_path: Path
) -> None:
    train(run_of(digits, mode="dense", schedule=schedule), tmp_path)
    assert [epoch["lr"] for epoch in read_run(tmp_path).epochs] == pytest.approx(expected)


def test_a_distortion_without_effect_changes_no_training(digits: ImageData, tmp_path: Path) -> None:
    """At full rank DeepTwist is dense training, up to rounding."""
    plain, twisted = network(), network()
    train(run_of(digits, mode="dense", model=plain), tmp_path / "dense")
    run = run_of(digits, model=twisted)
    full = tuple(
        replace(layer, decomposition=dt.SVD(rank=24)) if layer in run.plan.compressed else layer
        for layer in run.plan.layers
    )
    train(replace(run, plan=replace(run.plan, layers=full)), tmp_path / "twisted")
    for parameter, other in zip(plain.parameters(), twisted.parameters(), strict=True):
        assert torch.allclose(parameter, other, atol=1e-4)


class Outputs(NamedTuple):
    logits: torch.Tensor
    auxiliary: torch.Tensor


class WithAuxiliaryHead(nn.Module):
    """Returns two tensors while it trains, as torchvision's GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.head = nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor | Outputs:
        logits: torch.Tensor = self.body(x)
        return Outputs(logits, self.head(logits)) if self.training else logits


def test_of_several_outputs_the_first_is_trained(digits: ImageData, tmp_path: Path) -> None:
    plain, other = network(), WithAuxiliaryHead()
    for name, model in (("plain", plain), ("other", other)):
        distillation = {"weight": 0.5, "temperature": 4}
        run = run_of(digits, mode="dense", distillation=distillation, model=model)
        train(run, tmp_path / name)
    assert same(plain.state_dict(), other.body.state_dict())


def test_double_precision_is_that_of_every_copy(digits: ImageData, tmp_path: Path) -> None:
    """The example, the teacher, the average, the tail; distorted, decomposed or neither."""
    beside: dict[str, Any] = {"ema": 0.5, "distillation": {"weight": 0.5, "temperature": 4}}
    summary = train(
        run_of(
            digits,
            precision="64-true",
            finetune_after={"epochs": 1},
            batch_norm_batches=2,
            **beside,
        ),
        tmp_path / "deeptwist",
    )
    assert summary["output_difference"] is not None
    assert summary["output_difference"] < 1e-12
    for mode in ("dense", "finetune"):
        train(run_of(digits, precision="64-true", mode=mode, **beside), tmp_path / mode)
    files = [*tmp_path.rglob("*.safetensors")]
    assert len(files) == 4 + 2 + 2
    for path in files:
        assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {
            torch.float64
        }


# --- the modes


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in read_run(folder).distortions]


def test_modes_see_the_same_images_and_distort_when_they_say(
    digits: ImageData, tmp_path: Path
) -> None:
    first_losses = {}
    for name, values in {
        "dense": {"mode": "dense"},
        "deeptwist": {},
        "finetune": {"mode": "finetune"},
        "projected": {"interval": 1},
        "noise": {},
        "at the end": {"interval": 1000},
    }.items():
        run, records = run_of(digits, **values), list[Values]()
        if name == "noise":
            run = replace(run, perturb=NoiseInPlaceOfDistortion(seed=0))
        train(run, tmp_path / name, on_record=records.append)
        first_losses[name] = next(r["train_loss"] for r in records if r["event"] == "epoch")
    assert steps_of(tmp_path / "dense") == steps_of(tmp_path / "finetune") == []
    for name in ("deeptwist", "noise"):
        assert steps_of(tmp_path / name) == [4, 8, 12, 16, 20, 22]
    assert steps_of(tmp_path / "projected") == [*range(1, 23), 22]
    assert steps_of(tmp_path / "at the end") == [22]
    # Without distortions on the way, it trains as 'dense' does; noise is not a distortion.
    assert first_losses["at the end"] == first_losses["dense"]
    different = ("dense", "deeptwist", "noise", "projected")
    assert len({first_losses[name] for name in different}) == 4


def test_a_start_of_its_own_is_trained_in_place_of_decomposing_anew(
    digits: ImageData, tmp_path: Path
) -> None:
    run = run_of(digits, mode="finetune")
    dense, start = copy.deepcopy(run.model), dt.decompose(run.model, run.plan)
    anew = replace(run, model=dense)
    given = [train(r, tmp_path / n) for n, r in (("a", anew), ("b", replace(run, start=start)))]
    assert same(state_of(tmp_path / "a"), state_of(tmp_path / "b"))
    assert given[0]["accuracy_untrained"] == given[1]["accuracy_untrained"]
    other = copy.deepcopy(start)
    for parameter in other.parameters():
        parameter.data.zero_()
    summary = train(replace(run, start=other, model=dense), tmp_path / "c")
    assert summary["accuracy_untrained"] < given[0]["accuracy_untrained"] + 1e-9
    assert not same(state_of(tmp_path / "b"), state_of(tmp_path / "c"))


def test_noise_has_the_size_of_the_distortion_that_it_stands_in_for(digits: ImageData) -> None:
    model = network()
    made = run_of(digits, model=model).plan
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    noise = dt.DeepTwist(model, made, 1, perturb=NoiseInPlaceOfDistortion(seed=3))
    record = noise.step(lambda: 1.0)
    exact = dt.DeepTwist(network(), made, 1).step()
    assert record is not None
    assert exact is not None
    assert record.layer_shifts == pytest.approx(exact.layer_shifts, rel=1e-4)
    planned = {layer.name: layer for layer in made.compressed}
    for name, parameter in model.named_parameters():
        layer = planned.get(name.removesuffix(".weight"))
        moved = (parameter.detach() - before[name]).norm()
        size = 0 if layer is None else record.layer_shifts[layer.name] * layer.weight_numel
        assert float(moved) == pytest.approx(size, rel=1e-4)
        if layer is not None:  # not towards low rank
            matrix = parameter.detach().flatten(1)
            assert torch.linalg.matrix_rank(matrix) == min(matrix.shape)
    assert torch.linalg.matrix_rank(noise.finish()[3][0].weight.flatten(1)) < 24


@pytest.mark.parametrize("mode", ["dense", "deeptwist", "finetune"])
def test_a_run_leaves_a_model_that_gives_the_accuracy_it_claims(
    mode: Mode, digits: ImageData, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    run = run_of(digits, mode=mode)
    summary = train(run, tmp_path)
    run_read = read_run(tmp_path)
    assert run_read.summary == summary
    assert len(run_read.epochs) == 2
    assert summary["steps"] == 22
    assert make_recipe(summary["recipe"]) == run.recipe
    if mode == "dense":
        assert run_read.plan is None
        assert summary["parameters"] == summary["parameters_before"] == run.plan.dense_parameters
        final = network()
        final.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    else:
        assert run_read.plan == run.plan
        assert summary["parameters"] == run.plan.parameters < run.plan.dense_parameters
        assert summary["macs"] == run.plan.macs
        final = dt.load(tmp_path / "model", model=network)
    assert evaluate(final, digits.test, digits).accuracy == summary["accuracy"]
    assert not [*tmp_path.glob("checkpoint*")]
    assert "holds a run" in error_of(train, run_of(digits, mode=mode), tmp_path)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.again = self.body[6]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.body(x)
        return output


def test_a_dense_run_leaves_weights_that_load(digits: ImageData, tmp_path: Path) -> None:
    """Those of a shared module under each of its names, those of fixed layers as they were."""
    fixed = {"decomposition": "svd", "rank": 4, "linear": True, "include": ["6"]}
    for name, model, values in (
        ("shared", Twice, {}),
        ("frozen", network, {"frozen_compression": fixed}),
    ):
        trained = model()
        train(run_of(digits, mode="dense", model=trained, **values), tmp_path / name)
        path = tmp_path / name / "weights.safetensors"
        assert load_file(path).keys() == trained.state_dict().keys()
        loaded = model()
        load_weights(loaded, path)
        assert same(loaded.state_dict(), trained.state_dict())
        assert not same(loaded.state_dict(), model().state_dict())


# --- what the paper does not do


def test_refinements_have_rows_and_weights_of_their_own(digits: ImageData, tmp_path: Path) -> None:
    plain = train(run_of(digits), tmp_path / "plain")
    summary = train(
        run_of(digits, ema=0.5, batch_norm_batches=5, finetune_after={"epochs": 2, "lr": 0.02}),
        tmp_path / "more",
    )
    before, *others = summary["variants"]
    assert (before["accuracy"], before["loss"]) == (plain["accuracy"], plain["loss"])
    assert before["name"] == "not recalibrated"
    assert [variant["name"] for variant in others] == ["moving average", "tail"]
    assert len({variant["loss"] for variant in summary["variants"]} | {summary["loss"]}) == 4
    for variant in summary["variants"]:
        loaded = dt.load(tmp_path / "more" / variant["path"], model=network)
        evaluation = evaluate(loaded, digits.test, digits)
        assert evaluation.loss == pytest.approx(variant["loss"], rel=1e-6)
        assert sum(p.numel() for p in loaded.parameters()) == summary["parameters"]


def test_a_moving_average_is_projected_before_it_is_used(digits: ImageData, tmp_path: Path) -> None:
    """With a decay near zero it is the last network, whose decomposition is the run's own."""
    summary = train(run_of(digits, ema=1e-9), tmp_path)
    (average,) = summary["variants"]
    assert average["loss"] == pytest.approx(summary["loss"], rel=1e-3)


def test_the_best_is_chosen_on_images_held_out_and_on_distorted_weights(
    digits: ImageData, tmp_path: Path
) -> None:
    run = run_of(digits, data={"validation": 200}, schedule={"epochs": 4}, optimizer={"lr": 0.3})
    assert run.data.validation is not None
    held_out = {image.numpy().tobytes() for image in run.data.validation.images}
    assert len(run.data.validation.labels) == 200
    assert len(run.data.train.labels) == len(digits.train.labels) - 200
    assert sum(i.numpy().tobytes() in held_out for i in run.data.train.images) < 5  # twins aside
    summary = train(run, tmp_path)
    (best,) = summary["variants"]
    assert best["name"] == "best on validation"
    loaded = dt.load(tmp_path / best["path"], model=network)
    validation = run.data.validation, digits
    final = dt.load(tmp_path / "model", model=network)
    assert evaluate(loaded, *validation).accuracy >= evaluate(final, *validation).accuracy


def test_more_held_out_than_there_are(digits: ImageData, error_of: Callable[..., str]) -> None:
    assert "leaves nothing" in error_of(run_of, digits, data={"validation": 5000})


def test_recalibration_is_the_statistics_of_the_images(digits: ImageData) -> None:
    model = network()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
    recalibrated = dt.recalibrate_batch_norm(model, training_inputs(digits, model, 128, 64))
    order = torch.randperm(len(digits.train.labels), generator=torch.Generator().manual_seed(0))
    x = normalize(digits.train.images[order[:128]], digits.mean, digits.std)
    hidden = model[0](x).detach()
    assert torch.allclose(recalibrated[1].running_mean, hidden.mean((0, 2, 3)), atol=1e-5)
    assert not recalibrated[1].training
    assert recalibrated[1].momentum == model[1].momentum
    assert torch.equal(model[1].running_mean, torch.zeros(16))  # the source is left alone


def test_recalibration_sees_all_classes_where_they_lie_one_after_the_other(
    digits: ImageData,
) -> None:
    order = digits.train.labels.argsort()
    data = replace(digits, train=Split(digits.train.images[order], digits.train.labels[order]))
    few, whole = (
        dt.recalibrate_batch_norm(network(), training_inputs(data, nn.Linear(1, 1), count, 64))[1]
        for count in (128, 6400)
    )
    assert torch.allclose(few.running_mean, whole.running_mean, atol=0.01)
    assert torch.allclose(few.running_var, whole.running_var, rtol=0.1)


def test_label_smoothing_and_distillation_change_the_loss_as_defined(
    digits: ImageData, tmp_path: Path
) -> None:
    """One step of a dense run from known weights, against the closed form."""

    def first_loss(name: str, **values: Any) -> float:
        data = replace(
            digits,
            train=Split(digits.train.images[:128], digits.train.labels[:128]),
            padding=0,
            flip=False,
        )
        run = run_of(data, mode="dense", schedule={"epochs": 1}, **values)
        records: list[Values] = []
        train(run, tmp_path / name, on_record=records.append)
        return next(r["train_loss"] for r in records if r["event"] == "epoch")

    x = normalize(digits.train.images[:128], digits.mean, digits.std)
    labels = digits.train.labels[:128]
    with torch.no_grad():
        student, teacher = network().train()(x), network().eval()(x)
    plain = functional.cross_entropy(student, labels)
    assert first_loss("plain") == pytest.approx(float(plain), rel=1e-5)
    smoothed = functional.cross_entropy(student, labels, label_smoothing=0.2)
    assert first_loss("smooth", label_smoothing=0.2) == pytest.approx(float(smoothed), rel=1e-5)
    soft = functional.softmax(teacher / 4, 1)
    divergence = (soft * (soft.log() - functional.log_softmax(student / 4, 1))).sum(1).mean() * 16
    taught = 0.7 * plain + 0.3 * divergence
    measured = first_loss("taught", distillation={"weight": 0.3, "temperature": 4})
    assert measured == pytest.approx(float(taught), rel=1e-4)


def test_any_network_may_teach(
    digits: ImageData, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    """One of the start's own weights teaches as the start does; one of other classes is refused."""
    torch.manual_seed(3)
    teacher = build_model("resnet20", in_channels=1)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    named = {"model": "resnet20", "weights": str(tmp_path / "teacher.safetensors")}
    states = []
    for name, distillation in (("own", {}), ("named", named)):
        run = run_of(digits, mode="dense", distillation=distillation, model=copy.deepcopy(teacher))
        train(run, tmp_path / name)
        states.append(run.model.state_dict())
    assert same(*states)
    save_file(build_model("resnet20", num_classes=7, in_channels=1).state_dict(), named["weights"])
    message = error_of(run_of, digits, mode="dense", distillation=named)
    assert "linear.weight (7, 64) where the model has (10, 64)" in message
    message = error_of(make_recipe, {"model": "x", "distillation": {"model": "resnet20"}})
    assert "a teacher is a model and its weights" in message


def test_fixed_layers_are_decomposed_and_never_change(digits: ImageData, tmp_path: Path) -> None:
    fixed = {"decomposition": "svd", "rank": 4, "linear": True, "include": ["6"]}
    run = run_of(digits, frozen_compression=fixed)
    before = {n: t.clone() for n, t in run.model.state_dict().items() if n.startswith("6")}
    assert [layer.name for layer in run.plan.compressed] == ["3"]
    train(run, tmp_path)
    after = state_of(tmp_path)
    assert len(before) == 3
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# --- what is refused


def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_checkpoint(
    digits: ImageData, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    run = run_of(digits, optimizer={"lr": 1e9}, logging={"checkpoint_every": 1})
    message = error_of(train, run, tmp_path)
    assert "at step" in message
    assert "lower optimizer.lr=" in message
    step = int(message.split("at step ")[1].split(":")[0])
    kept = sorted(tmp_path.glob("checkpoint-*.pt"))
    assert [int(path.stem.split("-")[1]) for path in kept][-1] == step - 1
    state = torch.load(kept[-1], weights_only=True)
    assert state["training"]["step"] == step - 1


def test_a_batch_larger_than_the_data_is_refused(
    digits: ImageData, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    few = replace(digits, train=Split(digits.train.images[:50], digits.train.labels[:50]))
    assert "batch_size 128" in error_of(run_of, few)
    summary = train(run_of(few, schedule={"epochs": 0}), tmp_path)  # where nothing is trained
    assert (summary["steps"], summary["accuracy"]) == (0, summary["accuracy_untrained"])


def test_a_damaged_run_is_refused(tmp_path: Path, error_of: Callable[..., str]) -> None:
    assert "no finished run" in error_of(read_run, tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"name": "half"}))
    assert "damaged" in error_of(read_run, tmp_path)


def test_networks_by_name_start_from_their_seed(digits: ImageData) -> None:
    recipe = Recipe(model="resnet20", mode="dense")
    first, second, third = (
        build_run(replace(recipe, seed=seed), digits, name="x").model.state_dict()
        for seed in (0, 0, 1)
    )
    assert same(first, second)
    assert not same(first, third)
