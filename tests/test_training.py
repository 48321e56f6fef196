"""The training system on the embedded digits: what it counts, repeats, records and refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import deeptwist as dt
from deeptwist.data import Dataset, Split, load_digits, normalize
from deeptwist.distortion import DeepTwist, Distortion
from deeptwist.training.evaluation import evaluate
from deeptwist.training.job import run
from deeptwist.training.loop import Epoch, Record, fit, steps_per_epoch
from deeptwist.training.records import read_run
from deeptwist.training.settings import Mode, Settings

SHORT = Settings(epochs=2, batch_size=128, lr=0.05, interval=4)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_digits()


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


def plan_of(model: nn.Module) -> dt.Plan:
    example = torch.zeros(2, 1, 8, 8)
    return dt.plan(model, dt.SVD(), ratio=3, example_input=example, skip_first_conv=True)


def test_evaluation_agrees_with_the_definition(digits: Dataset) -> None:
    model = network().train()
    found = evaluate(model, digits.test.images, digits.test.labels, digits)
    with torch.no_grad():
        logits = model.eval()(normalize(digits.test.images, digits.mean, digits.std))
    labels = digits.test.labels
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_evaluation_leaves_the_training_flags_alone(digits: Dataset) -> None:
    model = network().train()
    model[1].eval()
    evaluate(model, digits.test.images[:8], digits.test.labels[:8], digits)
    assert [module.training for module in model] == [True, False, True, True, True, True, True]


def test_evaluation_refuses_a_network_for_other_images_or_classes(
    digits: Dataset, error_of: Callable[..., str]
) -> None:
    test = digits.test.images, digits.test.labels, digits
    assert "10 classes" in error_of(evaluate, nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), *test)
    assert "cannot run on images of digits" in error_of(evaluate, nn.Conv2d(3, 10, 3), *test)


def test_training_learns_and_repeats_itself_bit_for_bit(digits: Dataset) -> None:
    ends = []
    for _ in range(2):
        model = network()
        fit(model, digits, replace(SHORT, epochs=5))
        ends.append(model.state_dict())
    assert evaluate(model, digits.test.images, digits.test.labels, digits).accuracy > 0.8
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_another_seed_is_another_order_of_images(digits: Dataset) -> None:
    ends = []
    for seed in (0, 1):
        model = network()
        fit(model, digits, replace(SHORT, seed=seed))
        ends.append(model[0].weight.detach())
    assert not torch.equal(*ends)


def test_distortions_come_at_every_interval_and_are_recorded(digits: Dataset) -> None:
    model = network()
    twist = DeepTwist(model, plan_of(model), SHORT.interval)
    records: list[Record] = []
    ticks = []
    fit(
        model, digits, SHORT, twist=twist, on_record=records.append, on_step=lambda: ticks.append(1)
    )
    distortions = [record for record in records if isinstance(record, Distortion)]
    epochs = [record for record in records if isinstance(record, Epoch)]
    assert steps_per_epoch(digits, SHORT) == 11
    assert len(ticks) == twist.steps == 22
    assert [record.step for record in distortions] == [4, 8, 12, 16, 20]
    assert all(record.loss_increase is not None for record in distortions)
    assert [(record.epoch, record.step) for record in epochs] == [(1, 11), (2, 22)]
    assert epochs[-1].lr == pytest.approx(0)


def test_a_distortion_without_effect_changes_no_training(digits: Dataset) -> None:
    """At full rank DeepTwist is dense training, up to rounding."""
    plain, twisted = network(), network()
    fit(plain, digits, SHORT)
    plan = plan_of(twisted)
    full = tuple(
        replace(
            layer,
            decomposition=dt.SVD(rank=min(layer.decomposition.lowered_shape(layer.convolution))),
        )
        if layer.decomposition and layer.convolution
        else layer
        for layer in plan.layers
    )
    fit(twisted, digits, SHORT, twist=DeepTwist(twisted, replace(plan, layers=full), 4))
    for one, other in zip(plain.parameters(), twisted.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(
    digits: Dataset, error_of: Callable[..., str]
) -> None:
    message = error_of(fit, network(), digits, replace(SHORT, lr=1e9))
    assert "at step" in message
    assert "lower lr=" in message


def test_a_batch_larger_than_the_data_is_refused(
    digits: Dataset, error_of: Callable[..., str]
) -> None:
    few = replace(digits, train=Split(digits.train.images[:50], digits.train.labels[:50]))
    assert "batch_size 128" in error_of(fit, network(), few, SHORT)


@pytest.mark.parametrize("field", ["epochs", "batch_size", "interval", "lr"])
def test_settings_that_make_no_sense_are_refused(field: str, error_of: Callable[..., str]) -> None:
    assert field in error_of(replace, SHORT, **{field: -1})


@pytest.mark.parametrize("mode", ["dense", "deeptwist", "decomposed"])
def test_a_run_leaves_a_model_that_gives_the_accuracy_it_claims(
    mode: Mode, digits: Dataset, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    model = network()
    plan = plan_of(model)
    words = {"mode": mode, "plan": plan, "name": "a run", "model_name": "small"}
    final, summary = run(model, digits, SHORT, tmp_path, **words)
    found = read_run(tmp_path)
    assert found.summary == summary
    assert len(found.epochs) == 2
    assert summary.steps == 22
    if mode == "dense":
        assert found.plan is None
        assert summary.parameters == summary.parameters_before == plan.dense_parameters
    else:
        assert found.plan == plan
        assert summary.parameters == plan.parameters < plan.dense_parameters
        assert summary.macs == plan.macs
        final = dt.load(tmp_path / "model", model=network)
    assert (
        evaluate(final, digits.test.images, digits.test.labels, digits).accuracy == summary.accuracy
    )
    assert [line["step"] for line in found.distortions] == (
        [4, 8, 12, 16, 20, 22] if mode == "deeptwist" else []
    )
    assert "holds a finished run" in error_of(run, model, digits, SHORT, tmp_path, **words)


def test_a_damaged_run_is_refused(tmp_path: Path, error_of: Callable[..., str]) -> None:
    assert "no finished run" in error_of(read_run, tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"name": "half"}))
    assert "damaged" in error_of(read_run, tmp_path)
