"""Recipes: what is written is what is run, and what cannot be is named."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from deeptwist import SVD, Layers, TiledSVD, Tucker, plan
from deeptwist.app.training.loop import steps_per_epoch
from deeptwist.app.training.recipe import (
    CompressionRecipe,
    Mode,
    OptimizerRecipe,
    Recipe,
    ScheduleRecipe,
    make_recipe,
    read_recipe,
)
from deeptwist.networks.build import build_model

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 6


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_plans_its_network(path: Path) -> None:
    recipe = read_recipe(path)
    # A budget is shared by errors, for which there must be weights.
    device = "meta" if recipe.compression.macs is None else "cpu"
    with torch.device(device):
        model = build_model(recipe.model)
    size = 224 if "imagenet" in path.stem else 32
    made = recipe.compression.make_plan(model, torch.zeros(2, 3, size, size, device=device))
    assert made.compressed
    assert make_recipe(recipe.to_dict()) == recipe


def test_the_paper_s_schedules() -> None:
    """Section 4: what the paper states of each set-up."""
    resnet, vgg, imagenet = (
        read_recipe(RECIPES[0].with_name(name))
        for name in (
            "resnet32-cifar10-paper.yaml",
            "vgg19-cifar10-paper.yaml",
            "resnet34-imagenet-paper.yaml",
        )
    )
    assert resnet.optimizer == OptimizerRecipe(
        lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=False
    )
    assert resnet.schedule == ScheduleRecipe(
        epochs=200, kind="step", milestones=(100, 150), factor=0.1
    )
    assert (resnet.batch_size, resnet.interval) == (128, 200)
    assert vgg.schedule == ScheduleRecipe(
        epochs=300, kind="step", milestones=(50, 100, 150, 200, 250), factor=0.5
    )
    assert (vgg.optimizer.lr, vgg.interval, vgg.compression.min_in_channels) == (0.01, 300, 128)
    assert vgg.frozen_compression is not None
    assert imagenet.schedule == ScheduleRecipe(
        epochs=80, kind="step", milestones=(20, 50), factor=0.1
    )
    assert imagenet.compression.methods == (TiledSVD(tile=(64, 64), rank=10),)
    assert (imagenet.optimizer.lr, imagenet.compression.min_in_channels) == (0.01, 128)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ("intervall: 3", "Did you mean --interval?"),
        ("schedule: {epoch: 3}", "Did you mean --schedule.epochs?"),
        ("finetune_after: {epoch: 3}", "Did you mean --finetune-after.epochs?"),
        ("distillation: {weigth: 0.3}", "Did you mean --distillation.weight?"),
        ("interval: 0", '"0" for [interval] provided by r.yaml. Must be >= 1'),
        ("interval: 2.5", "[interval]: '2.5' is not a whole number"),
        (
            "seed: 18446744073709551616",
            '"18446744073709551616" for [seed] provided by r.yaml. Must be <',
        ),
        ("optimizer: {lr: fast}", "[optimizer][lr] from r.yaml: unable to convert"),
        ("optimizer: {lr: .nan}", '"nan" for [optimizer][lr]'),
        ("optimizer: 1", "[optimizer]: unknown optimizer '1'"),
        (
            "mode: deeptwits",
            'for [mode] from r.yaml. Choose from: "dense", "deeptwist", "finetune"',
        ),
        ("schedule: {milestones: [3]}", "a cosine has no milestones: write schedule.kind: step"),
        (
            "compression: {tile: 64}",
            '"64" for [compression][tile] provided by r.yaml. Write rows and columns',
        ),
        ("compression: {tile: [64, 64, 64]}", '"(64, 64, 64)" for [compression][tile]'),
        (
            "compression: {tile: [0, 64]}",
            '"(0, 64)" for [compression][tile] provided by r.yaml. Must be >= 1',
        ),
        ("compression: {rank: 0}", '"0" for [compression][rank] provided by r.yaml. Must be >= 1'),
        (
            "compression: {rank: [8, 8, 8]}",
            "[compression][rank] provided by r.yaml. Write one rank, or two",
        ),
        ("compression: {ratoi: 3}", "Did you mean --compression.ratio?"),
        ("compression: {plan: a.json, ratio: 3}", "leave out ratio"),
        ("optimizer: {name: adamww}", "unknown optimizer 'adamww': did you mean 'adamw'?"),
        ("optimizer: {name: timm/lam}", "did you mean 'timm/lamb'?"),
        ("schedule: {epochs: 2, warmup_epochs: 2}", "a warm-up of 2 epochs leaves none"),
        ("optimiser: {lr: 1}", "Did you mean --optimizer.lr?"),
    ],
)
def test_what_a_recipe_cannot_hold_is_named(
    change: str, answer: str, error_of: Callable[..., str]
) -> None:
    assert answer in error_of(
        make_recipe, {"model": "resnet20", **yaml.safe_load(change)}, "r.yaml"
    )


def test_a_mode_knows_when_it_distorts() -> None:
    recipes = [Recipe(model="resnet20", mode=mode) for mode in get_args(Mode)]
    assert [r.mode for r in recipes if r.compresses] == ["deeptwist", "finetune"]
    assert [r.mode for r in recipes if r.distorts] == ["deeptwist"]


def test_a_tail_needs_distortions(error_of: Callable[..., str]) -> None:
    for mode in ("dense", "finetune"):
        message = error_of(make_recipe, {"model": "resnet20", "mode": mode, "finetune_after": {}})
        assert message == f"finetune_after follows distortions, mode {mode} has none"


def test_a_file_that_is_no_recipe(tmp_path: Path, error_of: Callable[..., str]) -> None:
    assert "--model requires an argument" in error_of(make_recipe, {})
    path = tmp_path / "recipe.yaml"
    for text, answer in (
        ("- 3", "holds a list"),
        ("a: [", "not valid YAML"),
        ("\0", "not valid YAML"),
    ):
        path.write_text(text)
        assert answer in error_of(read_recipe, path)
    path.write_bytes(b"\xff\xfe\xff")
    assert "cannot read recipe" in error_of(read_recipe, path)
    assert "cannot read recipe" in error_of(read_recipe, tmp_path / "nowhere.yaml")


def test_a_recipe_survives_yaml(tmp_path: Path) -> None:
    recipe = make_recipe(
        {
            "model": "resnet20",
            "finetune_after": {"epochs": 2},
            "compression": {"rank": [3, 4], "plan": None},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert read_recipe(path) == recipe


def test_a_compression_is_the_plan_that_it_says(tmp_path: Path) -> None:
    model, x = build_model("resnet20"), torch.zeros(2, 3, 32, 32)
    compression = CompressionRecipe(decomposition=("tucker",), fraction=0.5, exclude=("layer3*",))
    made = plan(
        model,
        Tucker(fraction=0.5),
        example_input=x,
        layers=Layers(exclude=["layer3*"]),
    )
    assert compression.make_plan(model, x) == made
    path = tmp_path / "plan.json"
    path.write_text(plan(model, SVD(rank=2), example_input=x).to_json())
    from_file = CompressionRecipe(plan=str(path)).make_plan(model, x)
    overridden = CompressionRecipe(
        decomposition=("svd",), ratio=2, overrides=("conv1=keep", "layer1*=4", "linear=svd:rank=3")
    ).make_plan(model, x)
    overrides = {"conv1": None, "layer1*": 4.0, "linear": SVD(rank=3)}
    assert overridden == plan(
        model, SVD(), ratio=2, example_input=x, layers=Layers(overrides=overrides)
    )
    assert {layer.decomposition for layer in from_file.compressed} == {SVD(rank=2)}


def test_a_default_recipe_fits_the_digits() -> None:
    from deeptwist.app.data import load_data

    assert steps_per_epoch(load_data("digits"), Recipe(model="resnet20").batch_size) == 11
