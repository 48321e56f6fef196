"""Executors: the exact forms of a layer, the rule that orders them, and the clock that may."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.cases import difference, error_of
from torch import nn

from deeptwist import SVD, DeepTwist, Plan, TiledSVD, decompose, load, plan, save
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.layers.tiled import GROUPED, IM2COL, WINDOWS
from deeptwist.plan.autotune import time_implementations, tune_implementations
from deeptwist.plan.planner import plan_from_model

X = torch.randn(2, 16, 9, 9)
RAW, ALIGNED = TiledSVD(tile=(8, 20)), TiledSVD(tile=(8, 36))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 24, 3),
        nn.Conv2d(24, 16, 1),
    ).eval()


def made(decomposition: TiledSVD) -> Plan:
    return plan(network(), decomposition, ratio=1.5, example_input=X)


def implementations(model: nn.Module) -> list[str]:
    return [part.implementation for part in model.modules() if hasattr(part, "implementation")]


def test_which_forms_there_are() -> None:
    raw, aligned = made(RAW), made(ALIGNED)
    assert set(raw.compressed[0].implementations) == {WINDOWS, IM2COL}
    assert raw.compressed[1].implementations == (WINDOWS,)  # transposed: no windows to take
    assert raw.compressed[2].implementations == (GROUPED,)  # one tap: every tile is whole channels
    assert aligned.compressed[0].implementations == (GROUPED, IM2COL)


def test_a_named_executor_is_taken_where_there_is_one() -> None:
    model, raw = network(), made(RAW)
    reference = decompose(model, raw, implementation=IM2COL)
    assert implementations(reference) == [IM2COL, WINDOWS, GROUPED]
    assert difference(decompose(model, raw)(X), reference(X)) < 1e-5


def test_an_unknown_executor_is_refused() -> None:
    assert "did you mean 'im2col'" in error_of(
        decompose, network(), made(RAW), implementation="imcol"
    )
    assert "choose from windows" in error_of(
        replace, made(RAW).compressed[1], implementation=IM2COL
    )


def test_a_plan_keeps_its_executors() -> None:
    chosen = made(RAW)
    layers = (replace(chosen.compressed[0], implementation=IM2COL), *chosen.compressed[1:])
    chosen = chosen.with_layers(layers)
    assert Plan.from_json(chosen.to_json()) == chosen
    assert implementations(decompose(network(), chosen))[0] == IM2COL
    assert implementations(DeepTwist(network(), chosen, 1).finish())[0] == IM2COL
    text = chosen.to_json().replace('"im2col"', '"sideways"')
    assert "sideways" in error_of(Plan.from_json, text)


@pytest.mark.parametrize("implementation", [WINDOWS, IM2COL])
def test_an_artefact_keeps_its_executors(tmp_path: Path, implementation: str) -> None:
    small = decompose(network(), made(RAW), implementation=implementation)
    loaded = load(save(small, tmp_path), network)
    assert implementations(loaded) == implementations(small)
    assert torch.equal(loaded(X), small(X))
    assert plan_from_model(loaded, network(), X).compressed[0].implementation == implementation


def test_the_plan_of_a_decomposed_model_is_the_plan_that_made_it() -> None:
    before = plan(network(), RAW, ratio=1.5, example_input=X, exclude=["3"])
    read_back = plan_from_model(decompose(network(), before), network(), X)
    assert [(x.name, x.decomposition) for x in read_back.compressed] == [
        (x.name, x.decomposition) for x in before.compressed
    ]
    assert read_back.order == before.order
    assert read_back.macs == before.macs


def test_tuning_takes_the_fastest_form_and_changes_nothing_else() -> None:
    before = made(TiledSVD(tile=(24, 3)))
    after = tune_implementations(network(), before)
    assert after.compressed[0].implementation in before.compressed[0].implementations
    assert [replace(layer, implementation=None) for layer in after.compressed] == list(
        before.compressed
    )
    small = decompose(network(), before, tune=True)
    assert difference(decompose(network(), before)(X), small(X)) < 1e-5


def test_windows_hold_the_channels_that_their_tile_touches() -> None:
    """The zero-padded weight, against the tile's columns laid out by hand."""
    layer = nn.Conv2d(5, 4, 3, bias=False)
    decomposition = TiledSVD(tile=(4, 12), rank=4)  # full rank
    geometry = ConvGeometry.from_module(layer)
    kernels = decomposition.decompose(layer.weight.detach()[None]).kernels()
    built = decomposition.make_layer(geometry, kernels, None, WINDOWS)
    full = next(part for part in built.modules() if isinstance(part, nn.Conv2d))
    # Columns 0-11, 12-23, 24-35 of 45 touch channels 0-1, 1-2, 2-3; 36-44 are channel 4.
    branch = next(part for part in built.modules() if type(part).__name__ == "SplitConcat")
    convolutions = list(branch.layers)
    assert [part.weight.shape[1] for part in convolutions] == [2, 1]
    weight = convolutions[0].weight.detach().reshape(3, 4, 18)
    for tile, before in enumerate((0, 3, 6)):  # taps of the window before the tile
        assert torch.equal(weight[tile, :, before : before + 12], kernels[0][tile, :, :, 0, 0])
        assert weight[tile].count_nonzero() == kernels[0][tile].count_nonzero()
    assert full is convolutions[0]


SHAPES = [
    pytest.param(64, 32, 4, (64, 64), id="64→64, 32×32, tile 64×64"),
    pytest.param(128, 28, 1, (64, 64), id="128→128, 28×28, tile 64×64"),
    pytest.param(256, 14, 1, (64, 64), id="256→256, 14×14, tile 64×64"),
    pytest.param(64, 16, 4, (64, 3), id="64→64, 16×16, tile 64×3"),
    pytest.param(64, 16, 4, (16, 20), id="64→64, 16×16, tile 16×20"),
]


@pytest.mark.parametrize(("channels", "size", "batch", "tile"), SHAPES)
def test_the_rule_is_not_far_from_the_clock(
    channels: int, size: int, batch: int, tile: tuple[int, int]
) -> None:
    model = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)).eval()
    x = torch.randn(batch, channels, size, size)
    layer = plan(model, TiledSVD(tile=tile, rank=2), example_input=x).compressed[0]
    times = time_implementations(layer, x)
    assert times[layer.implementations[0]] < 1.5 * min(times.values()), times


def test_other_decompositions_have_one_form() -> None:
    layer = plan(network(), SVD(rank=2), example_input=X).compressed[0]
    assert layer.implementations == ("convolutions",)


@pytest.mark.parametrize(("layer", "size"), [(nn.Conv1d, [9]), (nn.Conv3d, [5, 5, 5])])
def test_any_number_of_axes_is_tuned(layer: type[nn.Module], size: list[int]) -> None:
    model, x = nn.Sequential(layer(16, 24, 3)), torch.randn(2, 16, *size)
    raw = plan(model, RAW, ratio=1.5, example_input=x)
    assert difference(decompose(model, raw, tune=True)(x), decompose(model, raw)(x)) < 1e-5
