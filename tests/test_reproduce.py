"""Every experiment of the paper, in a smoke test that shares its runs."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from experiments.paper.__main__ import main
from experiments.paper.cells import Workplace, title
from experiments.paper.experiments import EXPERIMENTS, fig2, fig5, fig7, table1, table2
from experiments.paper.findings import Finished
from experiments.paper.job import Request, reproduce
from experiments.paper.profiles import Network, ProfileName, setting_of
from PIL import Image
from safetensors.torch import save_file
from test_cli import refused, run
from torch import nn

from deeptwist.models import build_model
from deeptwist.training.metrics import DENSE_WEIGHTS, read_run
from deeptwist.training.recipe import Recipe, read_recipe

ALL = ["fig2", "fig3", "fig4", "fig5", "table1", "fig6", "table2", "fig7", "interval", "noise"]
ALL += ["tail"]
RECIPES = Path(__file__).parents[1] / "recipes"


class Trained:
    """Names of the trainings that were opened, as a progress bar would see them."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def __call__(self, label: str, total: int) -> Iterator[object]:
        self.names.append(label)
        steps = []
        yield lambda: steps.append(label)
        assert len(steps) == total


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reproduce")


@pytest.fixture(scope="module")
def request_(folder: Path) -> Request:
    return Request(profile="smoke", out=folder / "results", runs=folder / "runs")


def test_the_list_names_all_eleven() -> None:
    lines = run("--list", main=main).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ALL
    assert list(EXPERIMENTS) == ALL


# --- training


def test_an_experiment_from_the_command_line(folder: Path, request_: Request) -> None:
    words = "--profile", "smoke", "--out", request_.out, "--runs", request_.runs
    done = run("fig2", *words, main=main)
    page = folder / "results" / "fig2" / "smoke.md"
    assert done.stdout.split() == [str(page)]
    assert done.returncode == 0

    again = Trained()
    assert reproduce(EXPERIMENTS["fig2"], request_, progress=again) == page
    assert again.names == []  # finished cells are read

    record = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    ours, conventional, dense = record["cells"]
    for cell in record["cells"]:
        summary = read_run(request_.runs / "smoke" / cell["run"]).summary
        assert (cell["state"], cell["seed"], cell["data"]) == ("finished", 0, "digits")
        assert cell["accuracy"] == summary.accuracy
        assert cell["machine"]
        assert cell["version"]
        assert Path(cell["recipe"]["weights"]).name == DENSE_WEIGHTS
        assert cell["accuracy_before"] == ours["accuracy_before"]  # all start from one network
    assert (ours["mode"], conventional["mode"], dense["mode"]) == (
        "deeptwist",
        "finetune",
        "dense",
    )
    assert ours["parameters"] == conventional["parameters"] < dense["parameters"]

    (row,) = [row for row in record["tables"][0]["rows"] if row[0] == "4×"]
    shown = [f"{100 * cell['accuracy']:.2f}" for cell in (ours, conventional)]
    assert row[2:4] == shown
    assert row[5:] == ["4.28×", "91.49", "90.96"]  # the paper's nearest
    text = page.read_text(encoding="utf-8")
    assert f"| {' | '.join(row)} |" in text
    assert "![Accuracy over the compression ratio](smoke-accuracy.svg)" in text
    assert "3 of 3 cells have been run" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name != "fig5"])
def test_every_experiment_runs_to_the_end(name: str, request_: Request) -> None:
    page = reproduce(EXPERIMENTS[name], request_)
    record = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    cells = {cell["name"]: cell for cell in record["cells"]}
    assert len(cells) == len(EXPERIMENTS[name].cells_of("smoke"))
    assert all(cell["state"] == "finished" for cell in cells.values())
    text = page.read_text(encoding="utf-8")
    assert "not run" not in text.lower()
    for cell in cells.values():
        accuracies = [cell["accuracy"], *(one["accuracy"] for one in cell["variants"])]
        if name != "fig4":  # it shows distortions alone
            assert any(f" {100 * accuracy:.2f} " in text for accuracy in accuracies)
    drawings = sorted(page.parent.glob("*.svg"))
    assert {path.name for path in drawings} == set(_linked(text))
    assert bool(drawings) == (name != "noise")
    for path in drawings:
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find(".//{*}style") is not None


def _linked(text: str) -> list[str]:
    return [part.partition(")")[0] for part in text.split("](") if ".svg)" in part[:99]]


def test_experiments_share_cells() -> None:
    setting = setting_of("short", "resnet32")
    place = Workplace(Path("runs"), "cifar10", None, setting.start)
    folders = {
        name: {place.folder(cell.recipe) for cell in EXPERIMENTS[name].cells_of("short")}
        for name in ("fig2", "fig3", "fig4", "fig6", "interval", "noise", "tail")
    }
    assert folders["fig4"] < folders["fig3"] < folders["fig2"]
    assert folders["fig2"] - folders["fig6"] == {place.folder(setting.dense)}
    for name in ("interval", "noise"):
        assert folders["fig4"] < folders[name]
    assert len(folders["fig6"] & folders["tail"]) == len(setting.points)  # plain SVD


def test_cells_have_names_and_folders_of_their_own() -> None:
    for profile in ("paper", "short", "smoke"):
        for experiment in EXPERIMENTS.values():
            place = Workplace(
                Path("runs"), "x", None, setting_of(profile, experiment.network).start
            )
            cells = experiment.cells_of(profile)
            assert len({cell.name for cell in cells}) == len(cells)
            assert len({place.folder(cell.recipe) for cell in cells}) == len(cells)


def test_a_folder_is_named_for_what_decides_the_outcome(tmp_path: Path) -> None:
    setting = setting_of("short", "resnet32")
    assert setting.start is not None
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    one.write_bytes(b"weights")
    other.write_bytes(b"other weights")
    (tmp_path / "elsewhere").mkdir()
    same = tmp_path / "elsewhere" / "same.safetensors"
    same.write_bytes(b"weights")

    def folder(recipe: Recipe, data: str = "set", weights: Path = one) -> Path:
        return Workplace(Path("runs"), data, weights, setting.start).folder(recipe)

    cell = setting.compressed("deeptwist", ratio=4)
    for recipe in (cell, setting.start):
        assert folder(recipe) == folder(recipe, "/a/path/to/set", same)
        assert folder(recipe) != folder(recipe, "another")
        assert folder(recipe) != folder(recipe, weights=other)
        assert folder(recipe) != folder(replace(recipe, seed=1))
        assert folder(recipe).name.startswith(title(recipe))
    assert folder(cell) != folder(replace(cell, label_smoothing=0.1))


def test_several_seeds_are_averaged(folder: Path, request_: Request) -> None:
    name = fig2.conventional(setting_of("smoke", "resnet32").middle)
    request = replace(request_, seeds=(0, 1), only=(name,), out=folder / "seeds")
    page = reproduce(EXPERIMENTS["fig3"], request)
    record = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    found = [100 * cell["accuracy"] for cell in record["cells"] if cell["name"] == name]
    assert len(found) == 2
    text = page.read_text(encoding="utf-8")
    assert f"{np.mean(found):.2f} ± {np.std(found, ddof=1):.2f}" in text
    assert "seeds 0, 1." in text
    assert "Tucker 4×, DeepTwist, seed 1" in text.partition("Not run: ")[2]


def test_top_5_is_averaged_as_top_1_is(folder: Path, request_: Request) -> None:
    request = replace(request_, seeds=(0, 1), only=(fig7.TUCKER,), out=folder / "seeds")
    page = reproduce(EXPERIMENTS["fig7"], request)
    record = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    cells = [cell for cell in record["cells"] if cell["name"] == fig7.TUCKER]
    (row,) = [row for row in record["tables"][0]["rows"] if row[0] == fig7.TUCKER]
    for shown, name in zip(row[2:4], ("accuracy", "top5"), strict=True):
        first, second = (100 * cell[name] for cell in cells)
        assert shown == f"{(first + second) / 2:.2f} ± {abs(first - second) / 2**0.5:.2f}"
    assert len({cell["top5"] for cell in cells}) == 2


# --- whose images


def images(root: Path, *classes: str) -> Path:
    """Enough for one batch of a smoke test."""
    for split, count in (("train", 256), ("test", 4)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            image = Image.new("RGB", (8, 8), (90 * label, 0, 0))
            for number in range(count):
                image.save(root / split / name / f"{number}.png")
    return root


class Interrupted(Trained):
    """Stopped after the first step of the second training."""

    @contextmanager
    def __call__(self, label: str, total: int) -> Iterator[object]:
        self.names.append(label)

        def step() -> None:
            if len(self.names) == 2:
                raise KeyboardInterrupt

        yield step


def test_a_run_is_of_its_own_images_whatever_their_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPTWIST_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "weights.safetensors"
    save_file(build_model("resnet20", num_classes=2).state_dict(), weights)
    cats = images(tmp_path / "cats" / "images", "tabby", "tiger")
    cars = images(tmp_path / "cars" / "images", "bus", "van")
    fig4, out = EXPERIMENTS["fig4"], tmp_path / "results"
    request = Request(
        profile="smoke", data=str(cats), weights=weights, out=out, runs=tmp_path / "runs"
    )
    with pytest.raises(KeyboardInterrupt):
        reproduce(fig4, request, progress=Interrupted())

    # Everything has moved meanwhile; what was begun goes on, what was finished is read.
    moved = weights.rename(tmp_path / "moved.safetensors")
    runs = request.runs.rename(tmp_path / "moved")
    elsewhere = cats.rename(tmp_path / "images")
    request = replace(request, data=str(elsewhere), weights=moved, runs=runs)
    again = Trained()
    reproduce(fig4, request, progress=again)
    assert len(again.names) == 1

    others = replace(request, data=str(cars))
    for other in (others, replace(others, draw_only=True)):
        with pytest.raises(ValueError, match=r"is a run on other images than .*/cars/images"):
            reproduce(fig4, other)
    absent = replace(request, data="images", draw_only=True)  # as the page says to repeat it
    assert "1 of 1 cells have been run" in reproduce(fig4, absent).read_text(encoding="utf-8")
    for record in runs.rglob("images.json"):
        record.unlink()  # as in runs of before there were such records
    page = reproduce(fig4, replace(others, draw_only=True))
    assert "1 of 1 cells have been run" in page.read_text(encoding="utf-8")


# --- what is missing


def test_what_is_not_run_is_marked(tmp_path: Path) -> None:
    request = Request(profile="smoke", out=tmp_path, runs=tmp_path / "runs", draw_only=True)
    for name in ALL:
        if name != "fig5":  # there is nothing to run
            text = reproduce(EXPERIMENTS[name], request).read_text(encoding="utf-8")
            assert " not run " in text
            assert f"0 of {len(EXPERIMENTS[name].cells_of('smoke'))} cells have been run" in text
    assert not (tmp_path / "runs").exists()


def test_a_cell_that_fails_leaves_the_others_alone(folder: Path, request_: Request) -> None:
    setting = setting_of("smoke", "resnet32")
    recipe = setting.compressed("deeptwist", decomposition="tiled_svd", tile=(64, 64), rank=99)
    learnt, conventional = fig2.pair(setting, setting.middle)
    cells = [replace(learnt, recipe=recipe), conventional]
    broken = replace(EXPERIMENTS["fig3"], cells=lambda _: cells)
    request = replace(request_, out=folder / "broken")
    with pytest.raises(ValueError, match=r"1 of [12] cells of fig3 failed, 'Tucker 4×, DeepTwist'"):
        reproduce(broken, request)
    text = (folder / "broken" / "fig3" / "smoke.md").read_text(encoding="utf-8")
    assert "1 of 2 cells have been run" in text
    assert "Not run: Tucker 4×, DeepTwist (" in text


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["fig22"], "unknown experiment 'fig22': did you mean 'fig2'?"),
        ([], "name an experiment"),
        (["fig2"], "starts from a trained resnet32: give it with --weights FILE"),
        (["fig7"], "give it with --data FOLDER"),
        (["fig7", "--profile", "paper"], "give it with --weights FILE"),
        (["fig2", "--profile", "smok"], "smok"),
        (
            ["fig2", "--profile", "smoke", "--only", "Tucker 4x, DeepTwist"],
            "'Tucker 4×, DeepTwist'",
        ),
        (["fig2", "--profile", "smoke", "--seeds", "-1"], "seed -1 is not a whole number"),
        (["fig2", "--profile", "smoke", "--data", "digit"], "did you mean 'digits'?"),
        (["fig2", "--weights", "none.safetensors"], "cannot read weights none.safetensors"),
    ],
)
def test_mistakes_get_one_line(words: list[str], answer: str, tmp_path: Path) -> None:
    assert answer in refused(*words, "--out", tmp_path, "--runs", tmp_path / "runs", main=main)


def test_another_network_s_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet20.safetensors"
    save_file(build_model("vgg19_bn", in_channels=1).state_dict(), path)
    words = ["fig4", "--profile", "smoke", "--weights", path, "--out", tmp_path, "--runs", tmp_path]
    assert "1 of 1 cells of fig4 failed" in refused(*words, main=main)


# --- what is exact


@pytest.mark.parametrize("tile", [8, 16, 64, 128])
def test_the_approximation_of_figure_5_is_the_svd_of_every_tile(tile: int) -> None:
    matrix = fig5.gaussian(3, size=128)
    expected = np.empty((128, 128))
    for top in range(0, 128, tile):
        for left in range(0, 128, tile):
            place = np.s_[top : top + tile, left : left + tile]
            u, s, vt = np.linalg.svd(matrix.numpy()[place])
            s[tile // 8 :] = 0
            expected[place] = u * s @ vt
    assert np.abs(fig5.approximated(matrix, tile).numpy() - expected).max() < 1e-10


def test_a_distribution_is_counted() -> None:
    found = fig5.distribution(torch.tensor([0.05, -0.05, 1.0, -3.0], dtype=torch.float64))
    assert (found.small, found.large) == (0.5, 0.25)
    assert found.variance == pytest.approx(np.var([0.05, -0.05, 1, -3], ddof=1))
    # Each bin is a tenth wide and holds a quarter of the weights: 2.5.
    assert [x for x, y in found.density if y > 0] == pytest.approx([-2.95, -0.05, 0.05, 1.05])
    assert [y for _, y in found.density if y > 0] == pytest.approx([2.5] * 4)


def test_figure_5(request_: Request) -> None:
    """Shares and variance as calculated before there was this command."""
    page = reproduce(EXPERIMENTS["fig5"], request_)
    assert page.name == "exact.md"
    record = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    rows = {row[0]: [float(value) for value in row[3:]] for row in record["tables"][0]["rows"]}
    assert rows["1024×1024"] == pytest.approx([0.130, 0.0013, 0.376], rel=0.01, abs=2e-4)
    assert rows["64×64"] == pytest.approx([0.139, 0.0032, 0.379], rel=0.01, abs=2e-4)
    assert rows["8×8"] == pytest.approx([0.274, 0.0119, 0.385], rel=0.01, abs=2e-4)
    assert "holds for every seed" in page.read_text(encoding="utf-8")
    assert (page.parent / "exact-density.svg").exists()


def test_table_2_sizes_beside_the_paper_s() -> None:
    findings = table2.show(Finished({}), setting_of("short", "vgg19"))
    rows = {row[0]: row for row in findings.tables[0].rows}
    assert rows["before compression"][1:5] == ("18.98", "18.98", "647.87", "647.87")
    assert rows["Tucker R_c = 0.45"][3:5] == ("196.62", "191.77")  # a misprint
    assert rows["tiled SVD R = 9"][1:3] == ("5.34", "5.55")  # another
    for row in rows.values():
        weights, theirs, flops, their_flops = map(float, row[1:5])
        assert weights == pytest.approx(theirs, rel=0.06)
        assert flops == pytest.approx(their_flops, rel=0.06)
        assert row[5] == "not run"


def test_table_1_compresses_the_nine_layers() -> None:
    with torch.device("meta"):
        model = build_model("resnet32")
    for cell in table1.cells(setting_of("paper", "resnet32")):
        made = cell.recipe.compression.make_plan(model, torch.empty(2, 3, 32, 32, device="meta"))
        assert len(made.compressed) == 9
        dense = sum(layer.weight_numel for layer in made.compressed)
        factored = sum(layer.compressed_numel for layer in made.compressed)
        assert dense / factored == int(cell.name[-2])


def test_what_stays_dense_of_resnet34_is_a_seventieth() -> None:
    """Section 4.3: the layers that are not compressed are 1.4 % of the network."""
    with torch.device("meta"):
        model = build_model("torchvision/resnet34")
        image = torch.empty(1, 3, 224, 224)
    tiled, tucker = fig7.cells(setting_of("paper", "resnet34"))
    made = tiled.recipe.compression.make_plan(model, image)
    kept = sum(layer.weight_numel for layer in made.kept if layer.kind == "Conv2d")
    assert (kept, made.dense_parameters) == (312_512, 21_797_672)
    other = tucker.recipe.compression.make_plan(model, image)
    assert other.parameters == pytest.approx(made.parameters, rel=0.02)  # as many weights


# --- the profiles


@pytest.mark.parametrize("profile", ["paper", "short"])
def test_every_cell_can_be_planned(profile: ProfileName) -> None:
    """Layers that are named are there, and every rank compresses something."""
    models: dict[str, nn.Module] = {}
    seen = set()
    for experiment in EXPERIMENTS.values():
        for cell in experiment.cells_of(profile):
            recipe = cell.recipe
            with torch.device("meta"):
                model = models.setdefault(recipe.model, build_model(recipe.model))
                image = torch.empty(2, 3, *[recipe.data.image_size or 32] * 2)
            for compression in (recipe.compression, recipe.fixed):
                key = recipe.model, str(compression)
                if compression is not None and recipe.mode != "dense" and key not in seen:
                    seen.add(key)
                    assert compression.make_plan(model, image).compressed, cell


@pytest.mark.parametrize(
    ("network", "file"),
    [
        ("resnet32", "resnet32-cifar10-paper.yaml"),
        ("vgg19", "vgg19-cifar10-paper.yaml"),
        ("resnet34", "resnet34-imagenet-paper.yaml"),
    ],
)
def test_the_paper_s_profile_is_the_paper_s_recipe(network: Network, file: str) -> None:
    written = read_recipe(RECIPES / file)
    ours = setting_of("paper", network).recipe
    assert replace(ours, compression=written.compression) == written


def test_the_short_profile_is_the_short_recipe_cut_further() -> None:
    written = read_recipe(RECIPES / "resnet32-cifar10-short.yaml")
    ours = setting_of("short", "resnet32").compressed(
        "deeptwist", decomposition="spatial_svd", ratio=4
    )
    assert ours.schedule.epochs < written.schedule.epochs
    cut = replace(written, schedule=ours.schedule, interval=ours.interval, records=ours.records)
    assert ours == cut


def test_the_paper_s_points_are_its_fractions() -> None:
    """The fraction of each point gives about the ratio that it is called by."""
    with torch.device("meta"):
        model = build_model("resnet32")
    setting = setting_of("paper", "resnet32")
    for point in setting.points:
        recipe = setting.compressed("deeptwist", **point.of("tucker"))
        made = recipe.compression.make_plan(model, torch.empty(2, 3, 32, 32, device="meta"))
        dense = sum(layer.weight_numel for layer in made.compressed)
        factored = sum(layer.compressed_numel for layer in made.compressed)
        assert dense / factored == pytest.approx(point.ratio, rel=0.02)


# --- the long profile


RESULTS = Path(__file__).parents[1] / "results"


def test_long_runs_are_gathered_over_seeds(tmp_path: Path) -> None:
    for seed, mode, points in [(0, "deeptwist", 0), (1, "deeptwist", 1), (0, "dense", 5)]:
        source = RESULTS / "long" / "deeptwist-tucker-4x"
        folder = shutil.copytree(source, tmp_path / "long-32" / f"{mode}-{seed}")
        recipe = replace(read_recipe(source / "recipe.yaml"), mode=mode, seed=seed)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
        summary = json.loads((source / "run.json").read_text(encoding="utf-8"))
        summary["accuracy"] += points / 100
        (folder / "run.json").write_text(json.dumps(summary), encoding="utf-8")
    shutil.copytree(RESULTS / "long", tmp_path / "long")
    run("long", "--show", "--out", tmp_path, main=main)
    page = (tmp_path / "long" / "long.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    accuracies = {row[0].strip("| "): row[1:6] for row in rows}
    assert accuracies == {
        "": ["test accuracy, %", "− conventional", "epochs ahead of it", "− dense", "seeds"],
        ":--": ["--:"] * 5,
        "dense": ["85.67", "", "", "", "0"],
        # The mean of 80.67 and 81.67; the differences are those of seed 0, which all have.
        "Tucker 4×, DeepTwist": ["81.17 ± 0.71", "+1.56", "100 of 100", "−5.00", "0 1"],
        "Tucker 4×, conventional fine-tuning": ["79.11", "", "", "−6.56", "0"],
    }
