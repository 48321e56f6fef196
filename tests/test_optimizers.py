"""Optimizers, their parameter groups, schedules, clipping and accumulation, against torch's own."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deeptwist.data import ImageData, Split, load_digits
from deeptwist.errors import DeepTwistError
from deeptwist.training.optimizers import lr_factor, make_optimizer
from deeptwist.training.recipe import OptimizerRecipe, ScheduleRecipe, make_recipe
from deeptwist.training.run import build_run, train


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


@pytest.fixture(scope="module")
def one_batch() -> ImageData:
    """A set of one batch, whose augmentation does nothing."""
    data = load_digits()
    images = Split(data.train.images[:128], data.train.labels[:128])
    return ImageData("few", images, data.test, data.classes, data.mean, data.std, 0, False)


def trained(data: ImageData, folder: Path, **values: Any) -> nn.Module:
    model = network()
    recipe = make_recipe({"model": "own", "mode": "dense", "schedule": {"epochs": 1}, **values})
    train(build_run(recipe, data, name="run", model=model), folder)
    return model


def difference(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((one - two).detach().abs().max()) for one, two in pairs)


def test_a_step_in_parts_is_the_step_in_one(one_batch: ImageData, tmp_path: Path) -> None:
    whole = trained(one_batch, tmp_path / "whole")
    parts = trained(one_batch, tmp_path / "parts", optimizer={"accumulate": 4})
    assert difference(whole, parts) < 1e-6
    assert difference(whole, network()) > 1e-3
    with pytest.raises(DeepTwistError, match="cannot be shared by 1 processes in 3 parts"):
        trained(one_batch, tmp_path / "odd", optimizer={"accumulate": 3})


def test_clipping_bounds_the_step(one_batch: ImageData, tmp_path: Path) -> None:
    options = {"lr": 1.0, "momentum": 0, "nesterov": False, "weight_decay": 0}
    model = trained(one_batch, tmp_path, optimizer={**options, "clip_norm": 0.01})
    pairs = zip(model.parameters(), network().parameters(), strict=True)
    moved = math.hypot(*(float((one - two).detach().norm()) for one, two in pairs))
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("rmsprop", torch.optim.RMSprop)]
)
def test_torch_optimizers_step_as_torch_s(name: str, kind: Any) -> None:
    model, twin = network(), network()
    optimizer = make_optimizer(model, OptimizerRecipe(name=name, lr=0.01, momentum=0))
    reference = kind(twin.parameters(), lr=0.01, weight_decay=5e-4)
    for net, steps in ((model, optimizer), (twin, reference)):
        net(torch.ones(2, 1, 8, 8)).square().sum().backward()
        steps.step()
    assert difference(model, twin) == 0


def test_norms_and_biases_may_be_spared_the_decay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = make_optimizer(model, OptimizerRecipe(decay_all=False, weight_decay=0.1))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {n: decays[id(p)] for n, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_timm_s_optimizers_train(one_batch: ImageData, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    options = {"name": "timm/lamb", "lr": 0.01, "betas": [0.9, 0.98]}
    model = trained(one_batch, tmp_path, optimizer=options)
    assert difference(model, network()) > 1e-4


def test_the_warm_up_rises_and_the_rest_falls_to_zero() -> None:
    cosine = ScheduleRecipe(epochs=4, warmup_epochs=1)
    rates = [lr_factor(cosine, step, 40, 10) for step in range(41)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1
    assert rates[25] == pytest.approx(0.5)
    assert rates[40] == pytest.approx(0)
    poly = ScheduleRecipe(epochs=4, kind="polynomial", power=2)
    assert [lr_factor(poly, step, 40, 10) for step in (0, 20, 40)] == [1, 0.25, 0]
    step = ScheduleRecipe(epochs=4, kind="step", milestones=(2,), warmup_epochs=0.5)
    assert [lr_factor(step, n, 40, 10) for n in (4, 5, 19, 20)] == pytest.approx([5 / 6, 1, 1, 0.1])
