"""The paper's experiments: as configured, as run and kept, and one that is run to the end."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from experiments.paper import fig2, fig5, fig7, table1, table2
from experiments.paper.__main__ import EXPERIMENTS, main
from experiments.paper.presets import Network, Profile, preset_of
from experiments.paper.results import Results
from experiments.paper.runner import Options, Runner
from experiments.paper.runs import outcome_of, read_runs, run_name
from safetensors.torch import save_file
from tests.test_cli import refused, run
from torch import nn

from deeptwist import Plan
from deeptwist.app.models import build_model
from deeptwist.app.training.metrics import read_run
from deeptwist.app.training.recipe import Recipe, read_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


# --- what is configured, against the paper's text


@pytest.mark.parametrize(
    ("network", "expected"),
    [  # Sections 3 and 4: epochs, milestones, factor, learning rate, S_D, batch
        ("resnet32", (200, (100, 150), 0.1, 0.1, 200, 128)),
        ("vgg19", (300, (50, 100, 150, 200, 250), 0.5, 0.01, 300, 128)),
        ("resnet34", (80, (20, 50), 0.1, 0.01, 1000, 256)),
    ],
)
def test_the_paper_s_schedules(network: Network, expected: tuple[object, ...]) -> None:
    recipe = preset_of("paper", network).recipe
    schedule, optimizer = recipe.schedule, recipe.optimizer
    falls = schedule.epochs, schedule.milestones, schedule.factor
    assert (*falls, optimizer.lr, recipe.interval, recipe.batch_size) == expected
    assert (optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == (0.9, False, 1e-4)
    assert recipe.compression.skip_first_conv == (network == "resnet32")
    assert recipe.compression.min_in_channels == (1 if network == "resnet32" else 128)


@pytest.mark.parametrize("profile", ["paper", "long", "ten", "short", "smoke"])
def test_every_training_has_a_folder_of_its_own(profile: Profile) -> None:
    outcomes: dict[str, Recipe] = {}
    only = {"long": "resnet32", "ten": "vgg19"}.get(profile)
    for experiment in EXPERIMENTS.values():
        if only in (None, experiment.NETWORK):
            named = experiment.recipes(preset_of(profile, experiment.NETWORK))
            assert len(set(map(outcome_of, named.values()))) == len(named)
            for recipe in map(outcome_of, named.values()):
                assert outcomes.setdefault(run_name(recipe), recipe) == recipe


@pytest.mark.parametrize("name", ["fig6", "table2", "tail", "long"])
def test_the_smallest_networks_can_be_planned(name: str) -> None:
    """Layers that are named are there, and every rank compresses something."""
    *_, last = EXPERIMENTS[name].recipes(preset_of("short", EXPERIMENTS[name].NETWORK)).values()
    for compression in (last.compression, last.fixed):
        if compression is not None:
            assert planned(replace(last, compression=compression), {}).compressed


def planned(recipe: Recipe, models: dict[str, nn.Module]) -> Plan:
    with torch.device("meta"):
        if recipe.model not in models:
            models[recipe.model] = build_model(recipe.model)
        image = torch.empty(2, 3, *[recipe.data.image_size or 32] * 2)
    return recipe.compression.make_plan(models[recipe.model], image)


def ratio_of(plan: Plan) -> float:
    dense = sum(layer.weight_numel for layer in plan.compressed)
    return dense / sum(layer.compressed_numel for layer in plan.compressed)


def test_figure_2_s_fractions_give_the_paper_s_ratios() -> None:
    preset, models = preset_of("paper", "resnet32"), dict[str, nn.Module]()
    trainings = fig2.recipes(preset)
    assert sorted(level.ratio for level in preset.levels) == list(fig2.PAPER)
    for level in preset.levels:
        ours, other = trainings[fig2.deeptwist(level)], trainings[fig2.conventional(level)]
        assert (ours.mode, other.mode) == ("deeptwist", "finetune")
        assert replace(ours, mode="finetune") == other  # the same steps, from the same weights
        assert ratio_of(planned(ours, models)) == pytest.approx(level.ratio, rel=0.02)


def test_table_1_compresses_nine_layers_2_and_4_times() -> None:
    models: dict[str, nn.Module] = {}
    for name, recipe in table1.recipes(preset_of("paper", "resnet32")).items():
        plan = planned(recipe, models)
        assert len(plan.compressed) == 9
        assert ratio_of(plan) == int(name[-2])


def test_table_2_sizes_beside_the_paper_s() -> None:
    preset = preset_of("paper", "vgg19")
    rows = {row[0]: row[1:] for row in table2.report(Results({}), preset).tables[0].rows}
    assert rows["before compression"][:4] == ["18.98", "18.98", "647.87", "647.87"]
    assert rows["Tucker R_c = 0.45"][2:4] == ["196.62", "191.77"]  # a misprint
    assert rows["tiled SVD R = 9"][:2] == ["5.34", "5.55"]  # another
    for row in rows.values():
        weights, printed_weights, flops, printed_flops = map(float, row[:4])
        assert weights == pytest.approx(printed_weights, rel=0.06)
        assert flops == pytest.approx(printed_flops, rel=0.06)
        assert row[4] == "not run"


def test_figure_7_leaves_1_4_percent_dense() -> None:
    """Section 4.3. Tucker has as many weights."""
    trainings, models = fig7.recipes(preset_of("paper", "resnet34")), dict[str, nn.Module]()
    tiled, tucker = (planned(recipe, models) for recipe in trainings.values())
    kept = sum(layer.weight_numel for layer in tiled.kept if layer.kind == "Conv2d")
    assert (kept, tiled.dense_parameters) == (312_512, 21_797_672)
    assert tucker.parameters == pytest.approx(tiled.parameters, rel=0.02)


@pytest.mark.parametrize("tile", [8, 16, 128])
def test_figure_5_takes_the_svd_of_every_tile(tile: int) -> None:
    matrix = fig5.gaussian(3, size=128)
    expected = np.empty((128, 128))
    for top in range(0, 128, tile):
        for left in range(0, 128, tile):
            place = np.s_[top : top + tile, left : left + tile]
            u, s, vt = np.linalg.svd(matrix.numpy()[place])
            s[tile // 8 :] = 0
            expected[place] = u * s @ vt
    assert np.abs(fig5.approximate(matrix, tile).numpy() - expected).max() < 1e-10


def test_figure_5_counts_weights() -> None:
    weights = [0.05, -0.05, 1.0, -3.0]
    shares, points = fig5.distribution(torch.tensor(weights, dtype=torch.float64))
    assert shares == pytest.approx((0.5, 0.25, np.var(weights, ddof=1)))
    # Each bin is a tenth wide and holds a quarter of the weights: 2.5.
    assert [x for x, y in points if y > 0] == pytest.approx([-2.95, -0.05, 0.05, 1.05])
    assert [y for _, y in points if y > 0] == pytest.approx([2.5] * 4)


# --- what was run and kept


@pytest.mark.parametrize(
    ("name", "profile", "seeds"),
    [
        ("fig2", "short", (0, 1, 2)),
        *((name, "short", (0,)) for name in ("table1", "fig6", "interval", "noise", "tail")),
        *((name, "long", (0,)) for name in ("fig3", "fig4")),
        ("table2", "ten", (0,)),
    ],
)
def test_what_was_run_is_drawn_again(
    name: str, profile: str, seeds: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / profile).symlink_to(RESULTS / profile)
    run(name, "--show", "--profile", profile, "--out", tmp_path, "--seeds", *seeds, main=main)
    page = tmp_path / name / f"{profile}.md"
    assert page.read_text("utf-8") == (RESULTS / name / page.name).read_text("utf-8")
    figures = re.findall(r"\]\((.*\.svg)\)", page.read_text("utf-8"))
    assert sorted(path.name for path in page.parent.glob("*.svg")) == sorted(figures)
    for figure in figures:
        drawn, kept = (ElementTree.parse(at / figure) for at in (page.parent, RESULTS / name))
        assert drawn.find(".//{*}style") is not None
        assert len(list(drawn.iter())) == len(list(kept.iter()))


def test_curves_that_were_not_kept_are_said_so(tmp_path: Path) -> None:
    (tmp_path / "short").symlink_to(RESULTS / "short")
    assert "were not kept" in refused("fig7", "--show", "--out", tmp_path, main=main)


def test_long_runs_are_gathered_over_seeds(tmp_path: Path) -> None:
    for name in ("deeptwist-tucker-4x", "finetune-tucker-4x"):
        shutil.copytree(RESULTS / "long" / name, tmp_path / "long" / name)
    source = RESULTS / "long" / "deeptwist-tucker-4x"
    for seed, mode, points in [(0, "deeptwist", 0), (1, "deeptwist", 1), (0, "dense", 5)]:
        folder = shutil.copytree(source, tmp_path / "long-32" / f"{mode}-{seed}")
        recipe = replace(read_recipe(source / "recipe.yaml"), mode=mode, seed=seed)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
        summary = json.loads((source / "run.json").read_text(encoding="utf-8"))
        summary["accuracy"] += points / 100
        (folder / "run.json").write_text(json.dumps(summary), encoding="utf-8")
    run("long", "--show", "--out", tmp_path, main=main)
    page = (tmp_path / "long" / "long.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert {row[0].strip("| "): row[1:6] for row in rows[2:]} == {
        "dense": ["85.67", "", "", "", "0"],
        # The mean of 80.67 and 81.67; the differences are those of seed 0, which all have.
        "Tucker 4×, DeepTwist": ["81.17 ± 0.71", "+1.56", "100 of 100", "−5.00", "0 1"],
        "Tucker 4×, conventional fine-tuning": ["79.11", "", "", "−6.56", "0"],
    }


# --- running


def test_an_experiment_is_run_resumed_and_read(tmp_path: Path) -> None:
    options = Options(profile="smoke", out=tmp_path / "results", runs=tmp_path / "runs")
    page = tmp_path / "results" / "fig3" / "smoke.md"
    opened: list[str] = []

    @contextmanager
    def interrupted(label: str, total: int) -> Iterator[Callable[[], None]]:
        """Stop after the first step of the second training, the first after the start's."""
        opened.append(label)

        def step() -> None:
            if len(opened) == 2:
                raise KeyboardInterrupt

        yield step

    with pytest.raises(KeyboardInterrupt):
        Runner("fig3", EXPERIMENTS["fig3"], options).run(interrupted)
    assert "0 of 2 runs are finished" in page.read_text("utf-8")
    words = "--profile", "smoke", "--out", options.out, "--runs", options.runs
    assert run("fig3", *words, main=main).stdout.split() == [str(page)]
    for name in ("fig3", "fig4"):  # what is finished is read, by others too
        Runner(name, EXPERIMENTS[name], options).run(interrupted)
    assert len(opened) == 2

    text = page.read_text("utf-8")
    assert "not run" not in text.lower()
    start = read_run(options.runs / "smoke" / "resnet20-dense-1epochs-seed0").summary
    kept = {each.mode: run.summary for each, run in read_runs(options.out / "smoke").items()}
    learnt, tuned = kept["deeptwist"], kept["finetune"]
    assert learnt.accuracy_before == tuned.accuracy_before == start.accuracy
    shown = f"{100 * learnt.accuracy:.2f} | {100 * tuned.accuracy:.2f} |"
    assert f"| test accuracy at the end, % | {shown}" in text


def test_a_run_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    path = tmp_path / "vgg.safetensors"
    save_file(build_model("vgg19_bn", in_channels=1).state_dict(), path)
    words = ["fig3", "--profile", "smoke", "--weights", path]
    words += ["--out", tmp_path, "--runs", tmp_path / "runs"]
    assert "2 of 2 runs of fig3 failed, 'Tucker 4×, DeepTwist' first" in refused(*words, main=main)
    text = (tmp_path / "fig3" / "smoke.md").read_text("utf-8")
    assert "0 of 2 runs are finished" in text
    assert "Not run: Tucker 4×, DeepTwist (" in text


def test_the_list_names_all_twelve() -> None:
    lines = run("--list", main=main).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["fig22"], "unknown experiment 'fig22': did you mean 'fig2'?"),
        ([], "name an experiment"),
        (["fig2"], "resnet32 in profile short needs --weights"),
        (["fig7"], "torchvision/resnet34 in profile short needs --data"),
        (["fig2", "--profile", "smok"], "smok"),
        (["table2", "--profile", "long"], "profile long trains resnet32 alone, not vgg19"),
        (["fig2", "--profile", "smoke", "--only", "Tucker 4x, DeepTwist"], "'Tucker 4×, DeepTwist"),
        (["fig2", "--profile", "smoke", "--seeds", "-1"], "seed -1 is not a whole number"),
        (["fig2", "--profile", "smoke", "--data", "digit"], "did you mean 'digits'?"),
    ],
)
def test_mistakes_get_one_line(words: list[str], answer: str, tmp_path: Path) -> None:
    assert answer in refused(*words, "--out", tmp_path, "--runs", tmp_path / "runs", main=main)
