"""The paper's experiments: as configured, as run and kept, and one that is run to the end."""

import csv
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from experiments import fig2, fig5, table2
from experiments.__main__ import EXPERIMENTS, Options, main, run_experiment
from experiments.page import Results
from experiments.profiles import PROFILES, Network, Profile, Run
from experiments.runs import Job, append, read_table
from experiments.studies import STUDIES
from safetensors.torch import save_file
from tests.test_cli import refused, run
from torch import nn

from deeptwist import Plan
from deeptwist.app.folders import read_run
from deeptwist.app.training.recipe import Recipe, make_recipe
from deeptwist.networks.build import build_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
SEEDS = {"fig2": (0, 1, 2)}


def profile_of(name: str, network: Network) -> Profile:
    return next(profile for profile in PROFILES[network] if profile.name == name)


def recipe_of(run: Run) -> Recipe:
    return Job(run.name, run.words).recipe


def recipes_of(name: str, profile: Profile) -> dict[str, Recipe]:
    return {label: recipe_of(run) for label, run in EXPERIMENTS[name].runs(profile).items()}


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
    recipe = recipe_of(profile_of("paper", network).run("deeptwist", "tucker", "--ratio 2"))
    schedule, optimizer = recipe.schedule, recipe.optimizer
    falls = schedule.epochs, schedule.milestones, schedule.factor
    assert (*falls, optimizer.lr, recipe.interval, recipe.batch_size) == expected
    assert (optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == (0.9, False, 1e-4)
    assert recipe.compression.skip_first_conv == (network == "resnet32")
    assert recipe.compression.min_in_channels == (1 if network == "resnet32" else 128)


@pytest.mark.parametrize("network", PROFILES)
def test_every_training_has_rows_of_its_own(network: Network) -> None:
    for profile in PROFILES[network]:
        words: dict[str, str] = {}
        for experiment in EXPERIMENTS.values():
            if network == experiment.NETWORK:
                runs = experiment.runs(profile).values()
                assert len({run.name for run in runs}) == len(runs)
                for run in runs:
                    assert words.setdefault(run.name, run.words) == run.words


@pytest.mark.parametrize("name", ["fig6", "table2", "tail", "long"])
def test_the_smallest_networks_can_be_planned(name: str) -> None:
    """Layers that are named are there, and every rank compresses something."""
    *_, last = recipes_of(name, profile_of("short", EXPERIMENTS[name].NETWORK)).values()
    for compression in (last.compression, last.frozen_compression):
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
    profile, models = profile_of("paper", "resnet32"), dict[str, nn.Module]()
    trainings = recipes_of("fig2", profile)
    assert sorted(size.ratio for size in profile.sizes) == list(fig2.PAPER)
    for size in profile.sizes:
        ours, other = trainings[fig2.deeptwist(size)], trainings[fig2.conventional(size)]
        assert (ours.mode, other.mode) == ("deeptwist", "finetune")
        assert replace(ours, mode="finetune") == other  # the same steps, from the same weights
        assert ratio_of(planned(ours, models)) == pytest.approx(size.ratio, rel=0.02)


def test_table_1_compresses_nine_layers_2_and_4_times() -> None:
    models: dict[str, nn.Module] = {}
    for name, recipe in recipes_of("table1", profile_of("paper", "resnet32")).items():
        plan = planned(recipe, models)
        assert len(plan.compressed) == 9
        assert ratio_of(plan) == int(name[-2])


def test_table_2_sizes_beside_the_paper_s() -> None:
    profile = profile_of("paper", "vgg19")
    results = Results(table2.runs(profile))
    rows = {row[0]: row[1:] for row in table2.report(results, profile).tables[0].rows}
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
    trainings, models = recipes_of("fig7", profile_of("paper", "resnet34")), dict[str, nn.Module]()
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
    ("name", "profile"),
    [
        *((name, "short") for name in ("fig2", "table1", "fig6", "interval", "noise", "tail")),
        *((name, "long") for name in ("fig3", "fig4", "long")),
        ("table2", "vgg19"),
        *((name, "") for name in STUDIES),
    ],
)
def test_what_was_run_is_drawn_again(name: str, profile: str, tmp_path: Path) -> None:
    """By the profile that has runs, without its name."""
    kept, page = RESULTS / (profile or name), f"{name if profile else 'README'}.md"
    shutil.copytree(kept, tmp_path / kept.name, ignore=shutil.ignore_patterns("*.md", "*.svg"))
    seeds = ("--seeds", *SEEDS.get(name, (0,))) if profile else ()
    shown = run(name, "--show", "--out", tmp_path, *seeds, main=main).stdout
    assert not [*tmp_path.rglob("*.md"), *tmp_path.rglob("*.svg")]  # nothing of its own accord
    run(name, "--show", "--write", "--out", tmp_path, *seeds, main=main)
    written = tmp_path / kept.name / page
    assert written.read_text("utf-8") == (kept / page).read_text("utf-8") == shown
    for figure in re.findall(r"\]\((.*\.svg)\)", shown):
        drawn, before = (ElementTree.parse(at / figure) for at in (written.parent, kept))
        assert drawn.find(".//{*}style") is not None
        assert len(list(drawn.iter())) == len(list(before.iter()))


def test_every_figure_is_on_a_page() -> None:
    for figure in RESULTS.rglob("*.svg"):
        pages = [page.read_text("utf-8") for page in figure.parent.glob("*.md")]
        assert any(f"]({figure.name})" in page for page in pages), figure


def test_curves_that_were_not_kept_are_said_so() -> None:
    words = ("fig7", "--show", "--out", RESULTS)
    assert "were not kept" in refused(*words, main=main)


@pytest.mark.parametrize(
    "table", sorted(RESULTS.glob("*/runs.csv")), ids=lambda path: path.parent.name
)
def test_a_row_says_what_it_is_and_how_to_make_it_again(table: Path) -> None:
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs = read_table(table.parent, "epochs")
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        if row["command"].startswith("deeptwist train "):
            recipe = Job(row["name"], row["command"].removeprefix("deeptwist train ")).recipe
            assert (recipe.mode, recipe.seed) == (row["mode"], int(row["seed"]))
            assert recipe.optimizer.lr == float(row["lr"])
        finished = row["state"] == "finished"
        assert finished == bool(row["accuracy"]) == bool(row["seconds"]) == bool(row["machine"])
        if row["name"] in epochs.index and not row.get("finetune_after"):
            last = epochs.loc[[row["name"]]].iloc[-1]
            assert last["epoch"] == int(row["epochs"]) or not finished
            assert last["step"] <= int(row["steps"])


def test_long_runs_are_gathered_over_seeds(tmp_path: Path) -> None:
    source = "deeptwist-tucker-4x-s0"
    for kind in ("runs", "epochs"):
        table = read_table(RESULTS / "long", kind)
        for name in (source, "finetune-tucker-4x-s0"):
            append(tmp_path / "long", kind, name, table.loc[[name]].to_dict("records"))
        for seed, mode, points in [(1, "deeptwist", 1), (0, "dense", 5)]:
            rows = table.loc[[source]].to_dict("records")
            if kind == "runs":
                rows[0] |= {"mode": mode, "seed": seed}
                rows[0]["accuracy"] += points / 100
            name = "dense-s0" if mode == "dense" else "deeptwist-tucker-4x-s1"
            append(tmp_path / "long", kind, name, rows)
    page = run("long", "--show", "--out", tmp_path, main=main).stdout
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert {row[0].strip("| "): row[1:6] for row in rows[2:]} == {
        "dense": ["85.67", "", "", "", "0"],
        # The mean of 80.67 and 81.67; the differences are those of seed 0, which all have.
        "Tucker 4×, DeepTwist": ["81.17 ± 0.71", "+1.56", "100 of 100", "−5.00", "0 1"],
        "Tucker 4×, conventional fine-tuning": ["79.11", "", "", "−6.56", "0"],
    }


# --- running


def test_an_experiment_is_run_resumed_and_read(tmp_path: Path) -> None:
    options = Options(profile="smoke", out=tmp_path / "results", runs=tmp_path / "runs", write=True)
    page = options.out / "smoke" / "fig3.md"
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
        run_experiment("fig3", options, interrupted)
    assert "0 of 2 runs are finished" in page.read_text("utf-8")
    words = "--profile", "smoke", "--out", options.out, "--runs", options.runs
    text = run("fig3", *words, main=main).stdout
    for name in ("fig3", "fig4"):  # what is finished is read, by others too
        run_experiment(name, options, interrupted)
    assert len(opened) == 2

    assert page.read_text("utf-8") == text
    assert "not run" not in text.lower()
    start = read_run(options.runs / "smoke" / "start-s0").summary
    kept = read_table(options.out / "smoke")
    assert list(kept["state"]) == 3 * ["finished"]
    learnt, tuned = (kept.loc[f"{mode}-tucker-4x-s0"] for mode in ("deeptwist", "finetune"))
    assert (
        learnt.accuracy_before
        == tuned.accuracy_before
        == pytest.approx(start["accuracy"], abs=1e-6)
    )
    command = shlex.split(learnt["command"])
    assert command[:2] == ["deeptwist", "train"]
    again = Job("again", shlex.join(command[2:])).recipe
    folder = options.runs / "smoke" / "deeptwist-tucker-4x-s0"
    assert again == make_recipe(read_run(folder).summary["recipe"])
    distortions = read_table(options.out / "smoke", "distortions")
    assert list(distortions["step"]) == [d["step"] for d in read_run(folder).distortions]
    shown = f"{100 * learnt.accuracy:.2f} | {100 * tuned.accuracy:.2f} |"
    assert f"| test accuracy at the end, % | {shown}" in text


def test_a_run_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    path = tmp_path / "vgg.safetensors"
    save_file(build_model("vgg19_bn", in_channels=1).state_dict(), path)
    words = ["fig3", "--profile", "smoke", "--weights", path]
    words += ["--out", tmp_path, "--runs", tmp_path / "runs"]
    done = run(*words, main=main)
    assert done.returncode == 2
    assert "2 runs of fig3 failed, 'Tucker 4×, DeepTwist' first" in done.stderr
    assert "0 of 2 runs are finished" in done.stdout
    assert "Not run: Tucker 4×, DeepTwist (" in done.stdout


def test_several_run_at_a_time(tmp_path: Path) -> None:
    words = ["fig3", "--profile", "smoke", "--workers", 2, "--out", tmp_path]
    done = run(*words, "--runs", tmp_path / "runs", main=main)
    assert "2 of 2 runs are finished" in done.stdout


def test_the_list_names_all_sixteen_and_what_they_took() -> None:
    lines = run("--list", main=main).stdout.splitlines()[1:]
    assert list(dict.fromkeys(line.split()[0] for line in lines)) == [*EXPERIMENTS, *STUDIES]
    assert len(EXPERIMENTS) + len(STUDIES) == 16
    (fig2,) = (
        line.split() for line in lines if line.split()[:4] == ["fig2", "Figure", "2", "short"]
    )
    table = read_table(RESULTS / "short")
    names = {run.name for run in EXPERIMENTS["fig2"].runs(profile_of("short", "resnet32")).values()}
    rows = table[table.index.str.rpartition("-s", expand=False).map(lambda p: p[0] in names)]
    assert fig2[4:] == [str(len(rows)), "0", f"{rows['seconds'].sum() / 3600:.1f}", "0.0"]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["fig22"], "unknown experiment 'fig22': did you mean 'fig2'?"),
        ([], "name an experiment"),
        (["fig2"], "resnet32 in profile short needs --weights"),
        (["fig7"], "torchvision/resnet34 in profile short needs --data"),
        (["fig2", "--profile", "smok"], "smok"),
        (["table2", "--profile", "long"], "profile long does not train vgg19"),
        (["fig2", "--profile", "smoke", "--only", "Tucker 4x, DeepTwist"], "'Tucker 4×, DeepTwist"),
        (["fig2", "--profile", "smoke", "--seeds", "-1"], "seed -1 is not a whole number"),
        (["fig2", "--profile", "smoke", "--data", "digit"], "did you mean 'digits'?"),
    ],
)
def test_mistakes_get_one_line(words: list[str], answer: str, tmp_path: Path) -> None:
    assert answer in refused(*words, "--out", tmp_path, "--runs", tmp_path / "runs", main=main)
