"""Steps against torch's own: optimizers, schedules, clipping, fp16, compiled, frozen."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deeptwist.app.data import ImageData, Split, load_data
from deeptwist.app.training.devices import Fabric, MixedPrecision
from deeptwist.app.training.loop import Trainer
from deeptwist.app.training.optimizers import lr_factor, make_optimizer
from deeptwist.app.training.recipe import OptimizerRecipe, ScheduleRecipe, make_recipe
from deeptwist.app.training.run import build_run, train
from deeptwist.errors import DeepTwistError
from deeptwist.twist import DeepTwist


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


@pytest.fixture(scope="module")
def one_batch() -> ImageData:
    """A set of one batch, whose augmentation does nothing."""
    data = load_data("digits")
    images = Split(data.train.images[:128], data.train.labels[:128])
    return ImageData("few", images, data.test, data.classes, data.mean, data.std, 0, False)


def trained(
    data: ImageData, folder: Path, model: nn.Module | None = None, **values: Any
) -> nn.Module:
    model = network() if model is None else model
    recipe = make_recipe({"model": "own", "mode": "dense", "schedule": {"epochs": 1}, **values})
    train(build_run(recipe, data, name="run", model=model), folder)
    return model


def difference(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((first - second).detach().abs().max()) for first, second in pairs)


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
    moved = math.hypot(*(float((first - second).detach().norm()) for first, second in pairs))
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


# --- fp16


def in_fp16(data: ImageData, scale: float) -> tuple[Trainer, DeepTwist, list[float]]:
    """A training of two epochs whose loss is scaled by so much at first; its rates by step."""
    torch.manual_seed(0)
    recipe = make_recipe(
        {
            "model": "own",
            "interval": 3,
            "precision": "16-mixed",
            "batch_size": 32,
            "schedule": {"epochs": 2},
            "compression": {
                "decomposition": "svd",
                "ratio": 2,
                "skip_first_conv": False,
                "linear": True,
            },
            "logging": {"images": 0},
        }
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
    model = network()
    made = recipe.compression.make_plan(model, torch.zeros(2, 1, 8, 8))
    trainer = Trainer(fabric, model, data, recipe, plan=made)
    assert trainer.twist is not None
    return trainer, trainer.twist, [trainer.learning_rate for _ in trainer.fit()]


def test_steps_that_fp16_skips_are_not_counted(one_batch: ImageData) -> None:
    """From a scale that overflows, training is that from the scale at which nothing does."""
    trainer, twist, rates = in_fp16(one_batch, 2.0**60)
    settled = trainer.state_dict()["scaler"]["scale"]
    assert 1 < settled < 2.0**40
    sound, other, expected = in_fp16(one_batch, settled)
    assert sound.state_dict()["scaler"]["scale"] == settled
    assert trainer.step == sound.step == 8
    assert [record.step for record in twist.history] == [3, 6]
    assert [record.step for record in other.history] == [3, 6]
    assert rates == expected
    assert difference(twist.model, other.model) == 0


def test_gradients_that_no_scale_helps_end_the_run(one_batch: ImageData, tmp_path: Path) -> None:
    with pytest.raises(DeepTwistError, match="at step 1, its gradients are not finite in fp16"):
        trained(one_batch, tmp_path, precision="16-mixed", label_smoothing=0.1, model=Overflowing())


class Overflowing(nn.Module):
    """Has gradients beyond fp16's range whatever its loss is scaled by."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(x)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * float("inf"))
        return logits


# --- compiled, in less memory, in part


def test_a_compiled_step_is_the_same(one_batch: ImageData, tmp_path: Path) -> None:
    plain = trained(one_batch, tmp_path / "plain")
    compiled = trained(one_batch, tmp_path / "compiled", compile="aot_eager")
    assert difference(plain, compiled) < 1e-6
    with pytest.raises(DeepTwistError, match="did you mean 'inductor'"):
        trained(one_batch, tmp_path / "unknown", compile="inducter")


def test_only_inductor_compiles_to_cuda_graphs() -> None:
    make_recipe({"model": "resnet20", "cuda_graphs": True, "compile": "inductor"})
    with pytest.raises(DeepTwistError, match="inductor or none, not aot_eager"):
        make_recipe({"model": "resnet20", "cuda_graphs": True, "compile": "aot_eager"})


def test_checkpointed_gradients_are_the_same(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    digits = load_data("digits")
    few = Split(digits.train.images[:16], digits.train.labels[:16])
    data = replace(digits, train=few, test=few)
    models = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(
            "test_convnext", num_classes=10, in_chans=1, patch_size=1, drop_path_rate=0.1
        )
        options = {"checkpoint_gradients": checkpoint, "batch_size": 16}
        models.append(trained(data, tmp_path / str(checkpoint), model=model, **options))
    assert difference(*models) == 0
    with pytest.raises(DeepTwistError, match="Sequential offers no gradient checkpointing"):
        trained(data, tmp_path / "none", checkpoint_gradients=True, batch_size=16)


def test_frozen_layers_stay_as_they_are(one_batch: ImageData, tmp_path: Path) -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), network())

    before, after = normed(), normed()
    after.load_state_dict(before.state_dict())
    trained(one_batch, tmp_path / "run", model=after, optimizer={"freeze": ["0", "re:1", "2.0"]})
    state = before.state_dict()
    same = {name for name, tensor in after.state_dict().items() if torch.equal(tensor, state[name])}
    assert same == {name for name in state if name.split(".")[0] in "01" or "2.0" in name}
    for freeze, answer in ((["2.o"], "unknown module '2.o'"), (["*"], "nothing to train")):
        with pytest.raises(DeepTwistError, match=answer):
            trained(one_batch, tmp_path / answer, model=normed(), optimizer={"freeze": freeze})
