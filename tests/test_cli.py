"""The command line as a person meets it: its output and its exit code."""

import contextlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.cases import EVERY_LAYER, every_layer
from torch import nn

import deeptwist as dt
from deeptwist import Plan
from deeptwist.app.cli import console, main
from deeptwist.app.cli.commands import app, train
from deeptwist.app.cli.sweep import RATIOS, find_knee, sweep
from deeptwist.app.data import load_data
from deeptwist.app.training.evaluation import evaluate
from deeptwist.app.training.recipe import Recipe, make_recipe
from deeptwist.networks.build import build_model
from deeptwist.networks.weights import load_weights


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*words: object, main: Callable[[list[str]], None] = main) -> Done:
    """The command in this process: a new one would spend its time on importing torch."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*map(str, words)])
        except SystemExit as ended:
            code = ended.code or 0
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())


def refused(*words: object, main: Callable[[list[str]], None] = main) -> str:
    """The one line that a mistake is answered with."""
    done = run(*words, main=main)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("deeptwist: ")
    return done.stderr


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    save_file(build_model("resnet20", in_channels=1).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["plam"], 'Did you mean "plan"?'),
        (["plan", "resnet20", "--ratio", "4", "--input", "3x99999999x99999999"], "no memory for"),
        (["plan", "resnet20", "--ratio", "4", "--input", f"3x{10**30}x9"], "no memory for"),
        (["plan", "resnet20", "--ratio", "4", "--num-classes", f"{10**15}"], "not enough memory"),
        (["plan", "resnet20", "--ratoi", "4"], "Did you mean --ratio?"),
        (["plan", "resnet20", "--ratio", "four"], "--ratio"),
        (["plan", "resnet20", "--ratio", "0.5"], "ratio 0.5 compresses nothing"),
        (["plan", "resnet20"], "say how small: --ratio 4, --weight-budget 4"),
        (["plan", "resnt20", "--ratio", "4"], "did you mean 'resnet20'?"),
        (["plan", "resnet20", "--ratio", "4", "--exclude", "layer1.0.conv"], "'layer1.0.conv2'?"),
        (
            ["plan", "resnet20", "--ratio", "4", "--input", "3x8x8", "--image-size", "8"],
            "--input and --image-size say the same",
        ),
        (["plan", "resnet20", "--ratio", "4", "--tile", "8x8"], "tile is for tiled_svd"),
        (
            ["plan", "resnet20", "--ratio", "4", "--tile", "64by64"],
            "'64by64' is not a size",
        ),
        (["plan", "resnet20", "--ratio", "4", "--override", "conv1"], "'conv1'"),
        (["plan", "resnet20", "--ratio", "4", "--override", "conv1=sdv"], "did you mean 'svd'?"),
        (
            [
                "plan",
                "resnet20",
                "--decomposition",
                "tucker",
                "--rank",
                "80x80",
                "--override",
                "layer3.1.conv2=tucker:rank=80x80",
            ],
            "(64→64, 3×3) cannot hold Tucker ranks (80, 80): at most (64, 64)",
        ),
        (["plan", "resnet20", "--plan", "nowhere.json"], "nowhere.json"),
        (["evaluate", "resnet20", "--data", "digist", "--small", "x"], "did you mean 'digits'?"),
        (["evaluate", "resnet20", "--data", "digits", "--small", "nowhere"], "no config.json"),
        (["evaluate", "resnet20", "--data", "digits"], "--weights"),
        (["export", "--out", "x.onnx"], "name a network, or the folder of a small one"),
        (
            ["train", "resnet20", "--data", "/nowhere/at/all", "--ratio", "4", "--out", "x"],
            "/nowhere/at/all",
        ),
        (["train", "resnet20", "--data", "/nowhere/at/all", "--out", "x"], "say how small"),
        (["train", "resnet20", "--data", "digits", "--ratio", "4", "--out", "/proc/x"], "/proc/x"),
        (["train", "resnet20", "--optimiser.lr", "1", "--out", "x"], "mean --optimizer.lr?"),
        (["train", "resnet20", "--optimizer.ln", "1", "--out", "x"], "mean --optimizer.lr?"),
        (["train", "resnet20", "--lr", "-1", "--out", "x"], '"-1.0" for --lr. Must be >= 0'),
        (
            ["train", "resnet20", "--seed", "2.5", "--out", "x"],
            "'2.5' is not a whole number",
        ),
        (["train", "resnet20", "--plan", "p", "--ratio", "2", "--out", "x"], "leave out ratio"),
        (["train", "nowhere.yaml", "--out", "x"], "nowhere.yaml"),
        (
            ["benchmark", "resnet20", "--ratio", "4", "--rounds", "1"],
            '"1" for --rounds. Must be >= 2',
        ),
        (
            ["benchmark", "resnet20", "--small", "x", "--decomposition", "cp", "--ratio", "100"],
            "decomposed already: leave out the options of a plan",
        ),
        (["plan", "resnet20", "--ratio", "4", "--out", "."], "cannot write .: Is a directory"),
        (["train", "resnet20", "--ratio", "4", "--tile", "64", "--out", "x"], '"64" for --tile'),
        (
            ["train", "resnet20", "--rank", "8x8x8", "--out", "x"],
            '"(8, 8, 8)" for --rank. Write one rank, or two such as 24x24',
        ),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], answer: str) -> None:
    assert answer in refused(*words)


def test_a_process_ends_the_same_way() -> None:
    command = [sys.executable, "-m", "deeptwist", "plan", "resnt20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == "deeptwist: unknown model 'resnt20': did you mean 'resnet20'?\n"


def test_a_bug_report_s_facts() -> None:
    printed = run("--version", "--verbose").stdout
    for fact in (
        f"deeptwist {dt.__version__}",
        f"torch {torch.__version__}",
        "vector instructions",
    ):
        assert fact in printed
    assert run("--version").stdout.strip() == dt.__version__


def test_a_warning_is_said_once_in_one_line(tmp_path: Path) -> None:
    """Torch's own, of a network that makes many, and of one that nobody named."""
    (tmp_path / "noisy.py").write_text(
        "import warnings\nfrom deeptwist.networks.build import build_model\n"
        "def net(**_):\n"
        "    for _ in range(3):\n"
        "        warnings.warn('mind the gap\\nand the rest', stacklevel=1)\n"
        "    return build_model('resnet20')\n"
    )
    command = [sys.executable, "-m", "deeptwist", "plan", "noisy:net", "--ratio", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "mind the gap\n"


def test_help_names_every_command_and_shows_examples() -> None:
    overview = run("--help").stdout
    for command in (
        "demo",
        "plan",
        "train",
        "decompose",
        "evaluate",
        "benchmark",
        "export",
        "report",
    ):
        assert command in overview
        assert f"deeptwist {command}" in run(command, "--help").stdout


@pytest.mark.parametrize("command", ["compress", "plan", "train"])
def test_help_shows_the_common_options_and_help_all_the_others(command: str) -> None:
    common, every = (
        {*re.findall(r"^│ (?:\*  |   )?(?:[A-Z]+ )?(--[\w.-]+)", run(command, option).stdout, re.M)}
        for option in ("--help", "--help-all")
    )
    assert {"--out", "--json"} <= common < every
    assert 15 <= len(common) <= 25
    assert len(every) > 1.5 * len(common)
    assert run(command, "--help").stdout.count("╭─ Compression") == 1
    assert all(
        name in run(command, "--help-all").stdout for name in app[command].help_formatter.common
    )


def test_help_tells_each_command_s_own_defaults() -> None:
    for command, mode, rate in (("compress", "finetune", "0.02"), ("train", "deeptwist", "0.05")):
        text = " ".join(run(command, "--help").stdout.replace("│", "").split())
        assert re.search(rf"--mode \S+ How to train\. \[.*?\] \[default: {mode}\]", text)
        assert re.search(rf"--lr [^\[]*\[default: {rate}\]", text)
    for command, default in (("benchmark", "float32"), ("decompose", "spatial_svd")):
        text = run(command, "--help").stdout
        assert default in {*re.findall(r"\[default: (.*?)\]", text)}  # as it is typed
        assert not re.search(r"default: (\(|False|None)", text)


def test_what_is_not_there_is_refused_before_torch_is_imported() -> None:
    mistakes = [
        "compress timm/nonsense --data digits --ratio 4 --out x",
        "plan resnet20 --ratio 4 --weights nowhere.pt",
        "train resnet20 --ratio 4 --data no/where --out x",
        "evaluate --data digits --small nowhere",
        "plan resnet20 --plan nowhere.json",
        "report nowhere",
    ]
    code = (
        "import sys; from deeptwist.app.cli import main\n"
        f"for words in {mistakes}:\n"
        "    try: main(words.split())\n"
        "    except SystemExit as ended: assert ended.code == 2\n"
        "assert not {'torch', 'timm', 'matplotlib'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (0, len(mistakes)), done.stderr


def test_a_plan_printed_as_json_reads_back_and_serves_as_input(tmp_path: Path) -> None:
    words = ["plan", "resnet20", "--decomposition", "tucker", "--ratio", 4, "--skip-first-conv"]
    printed = run(*words, "--json", "--out", tmp_path / "plan.json").stdout
    plan = Plan.from_json(printed)
    assert plan.layers[0].reason == "first convolution"
    again = run("plan", "resnet20", "--plan", tmp_path / "plan.json", "--json").stdout
    assert Plan.from_json(again) == plan
    told = refused("plan", "resnet32", "--plan", tmp_path / "plan.json")
    assert "the plan is for another model: it counts 269,722 parameters" in told
    (tmp_path / "plan.json").write_text("{}")
    told = refused("plan", "resnet20", "--plan", tmp_path / "plan.json")
    assert "plan.json: not a plan: format None is unknown" in told


def test_a_recipe_is_read_and_the_command_line_wins_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "{model: resnet20, data: {source: nowhere, validation: 100}, finetune_after: {epochs: 1}, "
        "optimizer: {lr: 1e-2, momentum: 0.5}, weights: null,\n"
        "compression: {decomposition: tucker, rank: [3, 4], linear: false, exclude: []}}"
    )
    recipes: list[Recipe] = []

    def build_run(recipe: Recipe, data: object, **_: object) -> None:
        recipes.append(recipe)
        sys.exit(0)

    monkeypatch.setattr("deeptwist.app.training.run.build_run", build_run)
    words = [
        "--lr",
        "1e-3",
        "--data",
        "digits",
        "--finetune-after.epochs",
        3,
        "--compression.exclude",
        "a",
        "--no-skip-first-conv",  # of the compression, as all names without a section
        "--override",
        "a=keep",
        "--frozen-compression.no-skip-first-conv",
        "--frozen-compression.override",
        "b=2",
    ]
    assert run("train", path, "--out", tmp_path / "x", *words, "--exclude", "b").returncode == 0
    (recipe,) = recipes
    assert recipe == make_recipe(
        {
            "model": "resnet20",
            "data": {"source": "digits", "validation": 100},
            "finetune_after": {"epochs": 3},
            "optimizer": {"lr": 1e-3, "momentum": 0.5},
            "compression": {
                "decomposition": "tucker",
                "rank": (3, 4),
                "linear": False,
                "exclude": ("a", "b"),
                "skip_first_conv": False,
                "overrides": ("a=keep",),
            },
            "frozen_compression": {"skip_first_conv": False, "overrides": ("b=2",)},
        }
    )


def test_decompose_then_evaluate_is_the_library_s_own_result(weights: Path, tmp_path: Path) -> None:
    network = ["resnet20", "--weights", weights, "--input", "1x8x8"]
    plan = ["--decomposition", "svd", "--ratio", 2, "--no-skip-first-conv"]
    sizes = json.loads(
        run("decompose", *network, *plan, "--out", tmp_path / "model", "--json").stdout
    )
    assert sizes["parameters"] < sizes["parameters_before"] / 1.9
    words = ["evaluate", "resnet20", "--small", tmp_path, "--data", "digits", "--json"]
    printed = json.loads(run(*words).stdout)

    dense = build_model("resnet20", in_channels=1)
    load_weights(dense, weights)
    made = dt.plan(
        dense,
        dt.SVD(),
        ratio=2,
        example_input=torch.zeros(2, 1, 8, 8),
        layers=every_layer(linear=False),
    )
    digits = load_data("digits")
    test = digits.test, digits
    expected = evaluate(dt.decompose(dense, made), *test)
    assert printed["images"] == 360
    assert printed["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert evaluate(dense, *test).loss != pytest.approx(expected.loss, rel=1e-3)


def test_train_report_and_benchmark_follow_one_another(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    plan = ["--decomposition", "spatial-svd", "--ratio", 4]
    words = [
        "train",
        "resnet20",
        "--weights",
        weights,
        "--data",
        "digits",
        *plan,
        "--epochs",
        2,
        "--interval",
        5,
        "--out",
        out,
    ]
    done = run(*words, "--json")
    assert re.search(r"^epoch 2/2: loss \d.* test accuracy .*%.* 0.0 s left$", done.stderr, re.M)
    summary = json.loads(done.stdout)
    assert summary["mode"] == "deeptwist"
    assert summary["steps"] == 22
    assert summary["output_difference"] < 1e-5
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["event"] == "distortion"]
    assert steps == [5, 10, 15, 20, 22]
    assert "holds a run" in refused(*words)

    evaluated = json.loads(
        run("evaluate", "--small", out / "model", "--data", "digits", "--json").stdout
    )
    assert evaluated["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-9)

    timed = json.loads(
        run(
            "benchmark",
            "--small",
            out / "model",
            "--rounds",
            3,
            "--batch",
            4,
            8,
            "--threads",
            1,
            "--json",
        ).stdout
    )
    assert timed["parameters"] == summary["parameters"]
    assert timed["macs"] == summary["macs"]
    assert [network["setting"]["batch"] for network in timed["networks"]] == [4, 8]
    assert all(network["times"]["speedup"] > 0 for network in timed["networks"])
    assert len(timed["layers"]) == 18
    for layer in timed["layers"]:
        kept = layer["times"]["speedup"] / layer["macs_ratio"]
        assert layer["efficiency"] == pytest.approx(kept)
    page = tmp_path / "report.html"
    assert run("report", out, "--out", page).returncode == 0
    assert f"{summary['accuracy']:.1%}".rstrip("%") in page.read_text()


def test_the_examples_of_training_can_be_followed() -> None:
    """Every recipe is there, and what is continued is what was begun."""
    text = train.__doc__ or ""  # the help, not yet cut to a terminal's width
    recipes = re.findall(r"recipes/[\w.-]+", text)
    assert recipes
    for recipe in recipes:
        assert (Path(__file__).parents[1] / recipe).is_file(), recipe
    examples = [line.strip() for line in text.splitlines() if "deeptwist train" in line]
    (continued,) = [line.removesuffix(" --resume") for line in examples if "--resume" in line]
    assert continued in examples


def test_the_demo_erases_only_what_is_its_own(tmp_path: Path) -> None:
    users = tmp_path / "small" / "recipe.yaml"
    users.parent.mkdir()
    users.write_text("model: resnet20")
    assert f"{tmp_path} is not an earlier demo's" in refused("demo", "--out", tmp_path)
    (tmp_path / ".demo").touch()
    assert '"-1" for [schedule][epochs]' in refused("demo", "--out", tmp_path, "--epochs", "-1")
    assert users.is_file()


@pytest.mark.sweep  # a build runs the demo itself, as the README says
def test_the_demo_shows_the_whole_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deeptwist.app.cli.demo._BATCH", 8)  # .ci/run times the whole batch
    for name in ("dense/recipe.yaml", "small/compress.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / ".demo").touch()
    done = run("demo", "--out", tmp_path, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "small" / "compress.json").read_text())["results"]
    assert results["plan"]["dense_parameters"] > 4 * results["plan"]["parameters"]
    assert results["verify"]["accuracy"] > 0.9
    assert done.stdout.index("5.31× fewer") < done.stdout.index("deeptwist compress torchvision/")
    assert (tmp_path / "small" / "report.html").is_file()


def test_training_free_compression_is_one_command(tmp_path: Path, weights: Path) -> None:
    network = ["resnet20", "--weights", weights, "--input", "1x8x8"]
    data = ["--calibrate", "digits", "--calibration-images", 256]
    methods = ["--decomposition", "spatial-svd", "tucker", "--macs", 2, "--weight-budget", 1.5]
    planned = run("plan", *network, *methods, *data, "--json")
    small = tmp_path / "small"
    done = run("decompose", *network, *methods, *data, "--recalibrate", "--out", small, "--json")
    assert (planned.returncode, done.returncode) == (0, 0), (planned, done)
    plan, told = Plan.from_json(planned.stdout), json.loads(done.stdout)
    assert (told["macs"], told["parameters"]) == (plan.macs, plan.parameters)
    assert {x.decomposition.method for x in plan.compressed} <= {"spatial_svd", "tucker", "svd"}
    plain = run("plan", *network, *methods, "--json")
    assert Plan.from_json(plain.stdout) != plan
    loaded = dt.load(small, model=lambda: build_model("resnet20", in_channels=1))
    assert not torch.equal(loaded.state_dict()["bn1.running_mean"], torch.zeros(16))
    assert "give --calibrate" in refused(
        "decompose", *network, "--ratio", 2, "--recalibrate", "--out", small
    )


def test_what_no_decomposition_takes_is_refused() -> None:
    several = ["plan", "resnet20", "--macs", "2", "--decomposition", "spatial-svd", "tiled-svd"]
    assert run(*several, "--tile", "16x72").returncode == 0
    assert "fraction" in refused(*several, "--fraction", "0.5")


def test_a_rank_beside_a_ratio_is_refused() -> None:
    words = "plan", "resnet20", "--image-size", "8", "--decomposition", "svd", "--ratio", "4"
    assert "rank 3 beside ratio 4.0: give one" in refused(*words, "--rank", "3")


def test_long_work_is_told_of_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("_SECONDS_TO_FIRST_LINE", "_SECONDS_BETWEEN_LINES"):
        monkeypatch.setattr(console, name, 0.01)
    shown = ""

    def wait_for(line: str) -> None:
        nonlocal shown
        while not re.search(line, shown):
            shown += capsys.readouterr().err

    with console.progress_bar("time", 3) as advance:
        wait_for("^time: 0 of 3\n")  # before anything is done
        advance()
        wait_for(r"\ntime: 1 of 3, [\d.]+ s left\n")
        advance()
        wait_for(r"\ntime: 2 of 3, [\d.]+ s left\n")
    monkeypatch.setattr(console, "_SECONDS_TO_FIRST_LINE", 0.5)
    with console.progress_bar("resumed", 1000) as advance:
        for _ in range(900):
            advance()
        wait_for(r"\nresumed: 900 of 1,000\n")  # in no time, from which nothing follows


# --- a sweep over ratios: its points, its knee, what the command prints and draws

NETWORK = "tests.test_compress:network"


def test_error_and_savings_rise_with_the_ratio() -> None:
    model = nn.Sequential(nn.Conv2d(24, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    x = torch.randn(1, 24, 8, 8)
    points = sweep(
        lambda ratio: dt.plan(
            model, dt.SpatialSVD(), ratio=ratio, example_input=x, layers=EVERY_LAYER
        )
    )
    assert [point["ratio"] for point in points] == [*RATIOS]
    for values in zip(*((p["error"], p["weights"], p["macs"]) for p in points), strict=True):
        assert [*values] == sorted(values)
    plan = dt.plan(model, dt.SpatialSVD(), ratio=4, example_input=x, layers=EVERY_LAYER)
    errors = torch.tensor([layer.relative_error for layer in plan.compressed])
    assert points[4]["error"] == pytest.approx(float(errors.square().mean().sqrt()))


@pytest.mark.parametrize("corner", [1, 3, 6])
@pytest.mark.parametrize("has_accuracy", [False, True])
def test_the_knee_is_where_two_straight_lines_meet(corner: int, has_accuracy: bool) -> None:
    losses = [0.01 * step + 0.1 * max(0, step - corner) for step in range(8)]
    points = [
        {"ratio": 2.0**step, "error": loss, "accuracy": 0.9 - loss if has_accuracy else None}
        for step, loss in enumerate(losses)
    ]
    assert find_knee(points, 0.9 if has_accuracy else None) == corner


def test_a_loss_that_rises_ever_more_slowly_has_no_knee() -> None:
    assert find_knee([{"ratio": r, "error": math.log(math.log(r + 1))} for r in RATIOS]) is None


def test_a_loss_that_does_not_rise_has_its_knee_at_the_end() -> None:
    points = [{"ratio": ratio, "error": 0.0} for ratio in RATIOS]
    assert find_knee(points) == len(RATIOS) - 1


def test_the_command_tells_accuracy_and_draws_a_page(tmp_path: Path) -> None:
    words = ["plan", NETWORK, "--sweep", "--data", "digits", "--calibration-images", 64]
    words += ["--test-images", 50, "--decomposition", "spatial-svd", "--page", tmp_path / "a.html"]
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["knee"] in RATIOS
    assert [point["ratio"] for point in result["points"]] == [*RATIOS]
    assert all(0 <= point["accuracy"] <= 1 for point in result["points"])
    page = (tmp_path / "a.html").read_text()
    assert page.count("<svg") == 3
    assert re.search(
        rf">{result['knee']:g}×</th>(\s*<td>[\d.]+[×%]?</td>){{4}}\s*<td>knee</td>", page
    )


def test_the_command_needs_no_data() -> None:
    words = ["plan", NETWORK, "--input", "1x8x8", "--sweep", "--decomposition", "spatial-svd"]
    table = run(*words).stdout
    assert "accuracy" not in table
    assert "knee" not in table  # of random weights, whose error rises ever more slowly
    result = json.loads(run(*words, "--json").stdout)
    assert result["knee"] is None
    assert all(point["accuracy"] is None for point in result["points"])
    assert "leave out macs" in refused(*words, "--macs", 3)
    assert "add --sweep" in refused("plan", NETWORK, "--ratio", 4, "--page", "a.html")
