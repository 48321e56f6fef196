import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
import yaml
from torch import nn

import deeptwist as dt
from deeptwist.app.report import write_report, write_sweep
from deeptwist.app.training.recipe import make_recipe
from deeptwist.errors import DeepTwistError

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> {{ 7 * 7 }} &amp; $x$ \x07"


def small_plan(decomposition: dt.Decomposition) -> dt.Plan:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 10)
    )
    return dt.plan(model, decomposition, ratio=2, example_input=torch.zeros(1, 3, 8, 8))


PLANS = {"tucker": small_plan(dt.Tucker()), "spatial_svd": small_plan(dt.SpatialSVD())}
DENSE = yaml.safe_load("""
  {mode: dense, model: resnet20, data: digits, decomposition: null, ratio: null, loss: 0.4321,
  accuracy_before: 0.8890, accuracy_untrained: null, accuracy: 0.8890, parameters_before: 464154,
  parameters: 464154, macs_before: 69124736, macs: 69124736, bytes: 1870000, steps: 2340,
  seconds: 3312.0, output_difference: null, latency: null, latency_batch: null, variants: [],
  processes: 1, machine: a machine, version: 0.1.0}
""")


def timing(median: float) -> dict[str, float]:
    return {"median": median, "lower": median - 0.5, "upper": median + 1}


TIMES = {"dense": timing(8.0), "decomposed": timing(10.0), "speedup": 0.78}
SMALL = yaml.safe_load("""
  {ratio: 4.0, accuracy_untrained: 0.1234, accuracy: 0.8641, parameters: 116000, macs: 16458270,
  bytes: 473210, latency_batch: 16}
""")
SMALL["latency"] = TIMES
VARIANT = {"name": "tail", "accuracy": 0.95, "loss": 0.2, "path": "model-tail"}
STEPS = {"schedule": {"kind": "step", "milestones": [2, 4]}}


def epoch(number: int) -> dict[str, Any]:
    times = {"lr": 0.05 / number, "seconds": 1.0, "images_per_second": 1000.0 + number}
    losses = {"train_loss": 1 / number, "test": {"loss": 1.0, "accuracy": 0.7 + 0.02 * number}}
    return {"event": "epoch", "epoch": number, "step": 390 * number, **losses, **times}


def distortion(turn: int, **changes: Any) -> dict[str, Any]:
    around = [{"loss": 1 / turn, "accuracy": 0.7}, {"loss": 3 / turn, "accuracy": 0.5}]
    shifts = {"weight_shift": 1e-4 / 3**turn, "loss_increase": 2 / turn**2 if turn < 8 else None}
    values = {"event": "distortion", "step": 200 * turn, "lr": 0.05, "seconds": 0.09}
    return {**values, **shifts, "train": around, "test": around, **changes}


EPOCHS = [epoch(number) for number in range(1, 7)]
DISTORTIONS = [distortion(turn) for turn in range(1, 9)]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Write the folder of a run, as training does."""

    def write(
        name: str = "dense",
        mode: str = "dense",
        decomposition: str | None = None,
        *,
        lines: list[dict[str, Any]] | None = None,
        job: dict[str, Any] | None = None,
        recipe: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp("run")
        recipe = make_recipe({"model": "resnet20", "mode": mode} | (recipe or {})).to_dict()
        values = DENSE | {"name": name, "mode": mode, "recipe": recipe}
        if decomposition is not None:
            values |= SMALL | {"decomposition": decomposition}
            plan = PLANS.get(decomposition, PLANS["tucker"])
            (folder / "plan.json").write_text(plan.to_json())
        (folder / "run.json").write_text(json.dumps(values | changes))
        if lines is None:
            lines = EPOCHS + DISTORTIONS * (mode == "deeptwist")
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        if job is not None:
            (folder / "compress.json").write_text(json.dumps(job))
        return folder

    return write


@pytest.fixture(scope="module")
def five(make: Make) -> list[Path]:
    """A dense run, and two modes of two decompositions."""
    pairs = [(m, d) for d in ("tucker", "spatial_svd") for m in ("deeptwist", "finetune")]
    return [make(), *(make(f"{mode}-{name}", mode, name) for mode, name in pairs)]


NAMES = ["dense"]
NAMES += [f"{m}-{d}" for d in ("tucker", "spatial_svd") for m in ("deeptwist", "finetune")]


class Page(HTMLParser):
    """What a page holds: tables, elements with their attributes, texts by tag, drawings."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, html: str):
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []
        drawing = r"<h3>(.*?)</h3>(<svg .*?</svg>)\s*(?:<figc\w+>(.*?)<)?"
        self.drawings = {  # several are called "Accuracy against milliseconds"
            f"{title}, {caption}" if "against" in title and caption else title: svg
            for title, svg, caption in re.findall(drawing, html, re.DOTALL)
        }

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += ("|" if self._open[-1] == "small" else "") + data
        elif self._open:
            self.texts[self._open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def rows(self, table: int = 0) -> list[dict[str, str]]:
        heading, *rows = self.tables[table]
        return [dict(zip(heading, row, strict=True)) for row in rows]

    def words(self, title: str) -> list[str]:
        """The texts of a drawing: its axes and its legend."""
        texts = (
            element.text or ""
            for element in ElementTree.fromstring(self.drawings[title]).iter(f"{SVG}text")
        )
        return [text.strip("\u200b") for text in texts]

    def places(self, title: str) -> dict[str, set[float]]:
        """Where the markers of a drawing stand on its linear x axis, by colour."""
        lines: dict[float, list[tuple[float, float]]] = {}
        for text in ElementTree.fromstring(self.drawings[title]).iter(f"{SVG}text"):
            if re.fullmatch(r"[\d.]+", text.text or ""):
                x, y = (float(text.get(axis, "nan")) for axis in "xy")
                lines.setdefault(y, []).append((x, float(text.text or 0)))
        below, ticks = max(lines.items(), key=lambda line: len(line[1]))
        (x0, first), *_, (x1, last) = ticks
        places: dict[str, set[float]] = {}
        for use in ElementTree.fromstring(self.drawings[title]).iter(f"{SVG}use"):
            x, y = (float(use.get(axis, "nan")) for axis in "xy")
            color = re.findall(r"#\w{6}", use.get("style", ""))[0]
            if y < below:  # above the axis' numbers, so that those of the legend are left out
                place = first + (x - x0) / (x1 - x0) * (last - first)
                places.setdefault(color, set()).add(round(place, 2))
        return places


SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., Page]:
    def write(*folders: Path, title: str = "A title") -> Page:
        path = write_report(folders, tmp_path / "report.html", title=title)
        return Page(path.read_text(encoding="utf-8"))

    return write


@pytest.fixture(scope="module")
def whole(five: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("whole") / "report.html"
    return Page(write_report(five, path, title="Tucker & co").read_text(encoding="utf-8"))


def error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(DeepTwistError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the page


def test_the_page_has_its_parts_in_order(whole: Page) -> None:
    assert whole.texts["h1"] == whole.texts["title"] == ["Tucker & co"]
    assert whole.texts["h2"] == ["resnet20 on digits", "While training", "Layers", "Settings"]
    assert whole.html.index("<table>") < whole.html.index("<svg")  # it leads with the numbers
    assert len(whole.drawings) == len(whole.all("svg")) == 9
    for svg in whole.all("svg"):
        assert svg["role"] == "img"
        assert "deeptwist-tucker" in (svg["aria-label"] or "")
    assert {cell["scope"] for cell in whole.all("th")} == {"col", "row"}


def test_the_page_needs_nothing_from_elsewhere(whole: Page) -> None:
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+", whole.html))
    assert addresses <= {"http://www.w3.org"}
    assert not {tag for tag, _ in whole.elements} & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in whole.html
    references = re.findall(r"url\(([^)]*)\)", whole.html)
    references += [use["xlink:href"] or "" for use in whole.all("use")]
    identifiers = [attributes["id"] for _, attributes in whole.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert references
    assert {reference.removeprefix("#") for reference in references} == set(identifiers)


def test_the_page_follows_light_and_dark(whole: Page) -> None:
    assert {"name": "color-scheme", "content": "light dark"} in whole.all("meta")
    dark = whole.html.partition("(prefers-color-scheme: dark)")[2].partition("\n}")[0]
    defined = set(re.findall(r"(--[\w-]+):", whole.html))
    assert set(re.findall(r"(--[\w-]+):", dark)) == defined
    assert set(re.findall(r"var\((--[\w-]+)\)", whole.html)) == defined
    assert "svg { filter: invert" in dark


def test_the_same_runs_give_the_same_page_and_leave_matplotlib_alone(
    whole: Page, five: list[Path], page: Callable[..., Page]
) -> None:
    before = dict(matplotlib.rcParams)
    assert page(*five, title="Tucker & co").html == whole.html
    assert dict(matplotlib.rcParams) == before


def test_hostile_names_are_only_names(make: Make, page: Callable[..., Page]) -> None:
    words = {"model": HOSTILE, "data": HOSTILE, "machine": HOSTILE}
    runs = [
        make(HOSTILE, **words),
        make(HOSTILE, "deeptwist", HOSTILE, **words, variants=[VARIANT | {"name": HOSTILE}]),
    ]
    html = page(*runs, title=HOSTILE)
    assert not {tag for tag, _ in html.elements} & {"script", "img"}
    assert not [key for _, attributes in html.elements for key in attributes if key[:2] == "on"]
    assert html.texts["h1"] == [HOSTILE]
    assert [row["network"].partition("|")[0] for row in html.rows()][:2] == [HOSTILE, HOSTILE]
    drawn = [text.strip("\u200b") for text in html.texts["text"] if "alert" in text]
    assert drawn  # in the legends, shortened
    assert all(HOSTILE.startswith(text.partition("…")[0]) for text in drawn)


def test_a_name_that_is_no_text_does_no_harm(make: Make, page: Callable[..., Page]) -> None:
    names = ["\ud800", "層", "x" * 500, "_hidden", ""]
    html = page(*[make(name, "finetune", "tucker", lines=[]) for name in names])
    rows = [row["network"].partition("|")[0] for row in html.rows()]
    assert rows == ["dense", "?", *names[1:]]
    assert "_hidden" in html.words("Accuracy against parameters")


def test_what_is_imported() -> None:
    code = (
        "import sys, deeptwist\n"
        "assert not {'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "import deeptwist.app.folders\n"
        "before = set(sys.modules)\n"
        "import deeptwist.app.report\n"
        "assert not {'matplotlib.pyplot'} & (set(sys.modules) - before)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors(make: Make, tmp_path: Path) -> None:
    assert "no run" in error_of(write_report, [], tmp_path / "x.html", title="")
    missing = tmp_path / "missing" / "x.html"
    assert str(missing) in error_of(write_report, [make(lines=[])], missing, title="")
    assert "run.json" in error_of(write_report, [tmp_path], missing, title="")
    damaged = make("a", "finetune", "tucker", job={"job": {}})
    assert "compress.json" in error_of(write_report, [damaged], missing, title="")
    assert list(tmp_path.iterdir()) == []


# --- results


def test_the_table_says_what_the_records_say(whole: Page) -> None:
    rows = whole.rows()
    assert [row["network"].partition("|")[0] for row in rows] == NAMES
    shown = ["; ".join(row).replace("\xa0", " ") for row in whole.tables[0]]
    assert shown[0] == (
        "network; accuracy, %; untrained, %; parameters; MACs; MB; ms, eager, batch 16"
    )
    assert shown[1] == "dense; 88.90; –; 464,154; 69,124,736; 1.87; 8.00"  # timed beside others
    assert shown[3] == (
        "finetune-tucker|finetune, tucker, 4×; 86.41|−2.49 points; 12.34; "
        "116,000|4.00× fewer; 16,458,270|4.20× fewer; 0.47; 10.0|1.28× slower"
    )
    tooltips = [cell["title"] for cell in whole.all("td") if "title" in cell]
    assert tooltips == ["quartiles 7.50 to 9.00", *["quartiles 9.50 to 11.0"] * 4]


def test_markers_stand_at_what_was_measured(whole: Page) -> None:
    for title, dense, small in (
        ("Accuracy against parameters", 0.46, 0.12),
        ("Accuracy against milliseconds, eager, batch 16", 8.0, 10.0),
    ):
        grey, *colored = whole.places(title).items()
        assert dense in grey[1]
        assert [places for _, places in colored] == [{small}] * 4


def job_results() -> Any:
    results = yaml.safe_load("""
      dense: {bytes: 1900000, accuracy: 0.889}
      verify: {bytes: 475000, accuracy: 0.8641, goal: 0.87}
      plan: {dense_parameters: 464000, parameters: 116000, dense_macs: 69000, macs: 23000}
      export: {difference: 1.0e-7, dense: 2000000, small: 500000}
      time:
        settings:
        - {runtime: eager, dtype: float32, threads: 2, batch: 16}
        - {runtime: eager, dtype: bfloat16, threads: 1, batch: 16, reason: no bfloat16 here}
        - {runtime: onnxruntime, dtype: float32, threads: 2, batch: 16}
      int8: {dense: {accuracy: 0.88, bytes: 600000}, small: {accuracy: 0.85, bytes: 150000}}
    """)
    onnx = {"dense": timing(6.0), "decomposed": timing(4.0), "speedup": 1.5}
    for row, times in zip(results["time"]["settings"], (TIMES, None, onnx), strict=True):
        row["times"] = times
    int8 = {"dense": timing(3.0), "decomposed": timing(2.0), "speedup": 1.48}
    return results | {"int8": {**results["int8"], "batch": 16, "times": int8}}


def test_a_job_shows_every_runtime_and_int8(make: Make, page: Callable[..., Page]) -> None:
    options = {"int8": True, "goal": None, "batch": [16, 1], "threads": [], "layers": False}
    job = {"job": {"options": options}, "results": job_results(), "seconds": {}}
    folder = make("small", "finetune", "tucker", job=job, latency=None, latency_batch=None)
    html = page(folder)
    assert html.tables[0] == [  # what the terminal shows
        ["", "dense", "small", ""],
        ["accuracy", "88.90%", "86.41%", "−2.49 points"],
        ["weights", "464,000", "116,000", "4.00× fewer"],
        ["MACs", "69,000", "23,000", "3.00× fewer"],
        ["ms, eager, batch 16", "8.00", "10.00", "1.28× SLOWER"],
        ["ms, eager, batch 16", "", "", "no bfloat16 here"],
        ["ms, onnxruntime, batch 16", "6.00", "4.00", "1.50× as fast"],
        ["bytes, ONNX", "2,000,000", "500,000", "4.00× fewer"],
        ["int8: accuracy", "88.00%", "85.00%", "−0.90 and −1.41 points from fp32"],
        ["int8: ms, onnxruntime, batch 16", "3.00", "2.00", "1.48× as fast"],
        ["int8: bytes, ONNX", "600,000", "150,000", "4.00× fewer"],
        ["goal", "", "87.00%", "not met"],
    ]
    rows = {row.pop("network").partition("|")[0]: row for row in html.rows(1)}
    assert [*rows] == ["dense", "dense, int8", "small", "small, int8"]
    onnx = "ms, onnxruntime, 2 threads, batch 16"
    assert {
        name: (row["accuracy, %"], row["MB, ONNX"], row[onnx]) for name, row in rows.items()
    } == {
        "dense": ("88.90", "2.00", "6.00"),
        "dense, int8": ("88.00|−0.90\xa0points", "0.60", "3.00"),
        "small": ("86.41|−2.49\xa0points", "0.50|4.00×\xa0smaller", "4.00|1.50×\xa0faster"),
        "small, int8": (
            "85.00|−1.41\xa0points",  # beside the same network in fp32
            "0.15|4.00×\xa0smaller",
            "2.00|1.48×\xa0faster",
        ),
    }
    small = rows["small"]
    assert (rows["dense"]["MB"], small["MB"]) == ("1.90", "0.47|4.00×\xa0smaller")
    assert small["ms, eager, 2 threads, batch 16"] == "10.0|1.28×\xa0slower"
    assert small["ms, eager, bfloat16, 1 thread, batch 16"] == "–|no bfloat16 here"
    assert rows["small, int8"]["parameters"] == "–"
    gains = {title: html.places(title) for title in html.drawings if "against" in title}
    assert [{*places["#0072b2"]} for places in gains.values()] == [
        {0.12},
        {0.5, 0.15},
        {10.0},
        {4, 2},
    ]
    assert {3.0, 6.0} <= gains["Accuracy against milliseconds, onnxruntime, 2 threads, batch 16"][
        "#8a9098"
    ]
    (command,) = html.texts["pre"]
    recipe = folder / "recipe.yaml"
    again = f"deeptwist compress {recipe} --int8 --batch 16 1 --out {folder}-again"
    assert command.strip() == again


def test_networks_and_data_sets_are_not_mixed(
    make: Make, five: list[Path], page: Callable[..., Page]
) -> None:
    html = page(*five, make("other", "deeptwist", "tucker", model="vgg19", accuracy=0.99, lines=[]))
    assert [title for title in html.texts["h2"] if " on " in title] == [
        "resnet20 on digits",
        "vgg19 on digits",
    ]
    tables = [[row["network"].partition("|")[0] for row in html.rows(n)] for n in (0, 3)]
    assert tables == [NAMES, ["dense", "other"]]
    assert "the dense network has 88.9" in html.texts["p"][0]
    identifiers = [attributes["id"] for _, attributes in html.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        (
            [{}, {"name": "a", "mode": "deeptwist", "decomposition": "tucker"}],
            "a (deeptwist, tucker, 4×): 86.4 % at 4.0× fewer parameters and 4.2× fewer MACs; "
            "the dense network has 88.9 %.",
        ),
        (
            [
                {"name": "a", "mode": "deeptwist", "decomposition": "Tucker()", "accuracy": 0.85},
                {"name": "b", "mode": "finetune", "decomposition": "tucker", "macs": 80_000_000},
            ],
            "b (finetune, tucker, 4×): 86.4 % at 4.0× fewer parameters and 1.2× more MACs; "
            "the dense network has 88.9 %.",
        ),
        ([{}], "The dense network has 88.9 %; none is compressed yet."),
    ],
)
def test_the_summary_sentence(
    make: Make, page: Callable[..., Page], runs: list[dict[str, Any]], sentence: str
) -> None:
    html = page(*[make(**run, lines=[]) for run in runs])
    assert html.texts["p"][0].replace("\xa0", " ") == sentence


def test_variants_are_rows_of_their_own(make: Make, page: Callable[..., Page]) -> None:
    html = page(make("a", "deeptwist", "tucker", variants=[VARIANT], lines=[]))
    rows = [(row["network"], row["accuracy, %"], row["parameters"]) for row in html.rows()[1:]]
    assert rows == [
        ("a|deeptwist, tucker, 4×", "86.41|−2.49\xa0points", "116,000|4.00×\xa0fewer"),
        ("a, tail", "95.00|+6.10\xa0points", "–"),
    ]
    assert "86.4" in html.texts["p"][0]
    assert "a, tail" not in html.words("Accuracy against parameters")  # its size was not measured


# --- charts


def test_a_chart_without_data_is_left_out(make: Make, page: Callable[..., Page]) -> None:
    assert [*page(make()).drawings] == ["Test accuracy while training", "Training loss"]
    assert [*page(make("a", "finetune", "tucker")).drawings] == [
        "Accuracy against parameters",
        "Accuracy against milliseconds, eager, batch 16",
        "Test accuracy while training",
        "Training loss",
        "The work of each layer",
    ]
    bare = make("bare", "deeptwist", "tucker", lines=[], latency=None, ratio=None)
    (bare / "plan.json").unlink()
    html = page(bare)
    assert [*html.drawings] == ["Accuracy against parameters"]
    assert html.texts["h2"] == ["resnet20 on digits", "Settings"]
    unseen = [distortion(turn, train=[], test=[]) for turn in range(1, 9)]
    html = page(make("a", "deeptwist", "tucker", lines=EPOCHS + unseen))
    assert not [title for title in html.drawings if "around" in title]
    assert [title for title in html.drawings if "distortion " in title]


def test_every_run_is_in_the_legends(whole: Page) -> None:
    twisted = ["deeptwist-tucker", "deeptwist-spatial_svd"]
    for title in whole.drawings:
        names = NAMES if "Accuracy" in title or "ing" in title.split()[-1] else twisted
        names = NAMES if title == "Training loss" else names
        assert [word for word in whole.words(title) if word in NAMES[1:]] == [
            name for name in names if name in NAMES[1:]
        ]


def test_values_that_no_axis_can_show(make: Make, page: Callable[..., Page]) -> None:
    odd = [(1, 0.0, float("inf")), (2, 1e-9, float("nan")), (3, 1, -9.0)]
    lines = [
        distortion(1, step=step, weight_shift=shift, loss_increase=increase)
        for step, shift, increase in odd
    ]
    html = page(make("a", "deeptwist", "tucker", lines=EPOCHS + lines))
    assert "What a distortion costs: ΔL/L" in html.drawings
    html = page(make("a", "deeptwist", "tucker", lines=EPOCHS + lines[:1]))
    assert "What a distortion costs: ΔL/L" not in html.drawings


def test_many_runs_and_long_ones(make: Make, page: Callable[..., Page]) -> None:
    runs = [
        make(f"{mode}-{ratio}", mode, "tucker", ratio=float(ratio), parameters=464_154 // ratio)
        for ratio in range(2, 9)
        for mode in ("deeptwist", "finetune")
    ]
    long = [distortion(1, step=step, weight_shift=2.0 + step % 7) for step in range(2000)]
    runs[0] = make("deeptwist-2", "deeptwist", "tucker", ratio=2.0, lines=EPOCHS + long)
    html = page(*runs)
    names = [row["network"].partition("|")[0] for row in html.rows()]
    assert names == ["dense", *(f"{m}-{r}" for r in range(2, 9) for m in ("deeptwist", "finetune"))]
    assert len(html.html) < 500_000


def test_drops_of_the_learning_rate_are_marked(make: Make, page: Callable[..., Page]) -> None:
    captions = page(make("a", "deeptwist", "tucker", recipe=STEPS)).texts["figcaption"]
    assert len([text for text in captions if "the learning rate drops" in text]) == 6
    assert "rate drops" not in page(make("a", "deeptwist", "tucker")).html


# --- layers and settings


def test_each_distinct_plan_has_one_table(whole: Page) -> None:
    assert len(whole.all("details")) == 2
    assert (
        whole.texts["summary"][0] == "deeptwist-tucker, finetune-tucker: 1 of 3 layers decomposed"
    )
    heading, first, second, linear, total = whole.tables[1]
    plan = PLANS["tucker"]
    layer = plan.layers[1]
    assert heading[:2] == ["layer", "no."]
    assert first[:6] == ["0", "1", "3→8, 3×3", "", "", ""]
    assert first[6:] == ["216", "7,776", "kept: first convolution"]
    dense, small = (plan.layer_macs(layer, factored=factored) for factored in (False, True))
    rank = "×".join(map(str, getattr(layer.decomposition, "rank", ())))
    weights = f"{layer.weight_numel:,} → {layer.compressed_numel:,}"
    assert second[:6] == ["2", "2", "8→16, 3×3", "", "tucker", rank]
    assert second[6:] == [weights, f"{dense:,} → {small:,}", f"{layer.relative_error:.3f}"]
    assert linear[-1] == "kept: linear layer"
    assert total[0] == f"all|with {plan.other_parameters} other parameters"
    weights = f"{plan.dense_parameters:,} → {plan.parameters:,}"
    assert total[6:8] == [weights, f"{plan.dense_macs:,} → {plan.macs:,}"]


def test_settings_are_said_once_or_run_by_run(
    whole: Page, make: Make, page: Callable[..., Page]
) -> None:
    shared = dict(zip(whole.texts["dt"], whole.texts["dd"], strict=True))
    assert (shared["seed"], shared["schedule.epochs"], shared["batch_size"]) == ("0", "6", "128")
    assert (shared["machine"], shared["deeptwist"]) == ("a machine", "0.1.0")
    assert (shared["images per second"], shared["optimizer steps"]) == ("1004", "2,340")
    twisted = whole.rows(-1)[1]
    assert (twisted["run"], twisted["distortions"]) == ("deeptwist-tucker", "8, 90 ms each")
    assert (twisted["interval"], whole.rows(-1)[0]["interval"]) == ("200", "–")

    html = page(*[make(f"seed {seed}", recipe={"seed": seed}, lines=[]) for seed in (1, 2, 3)])
    assert "seed" not in html.texts["dt"]
    assert [row["seed"] for row in html.rows(-1)] == ["1", "2", "3"]


def test_settings_of_other_modes_are_left_out(make: Make, page: Callable[..., Page]) -> None:
    names = {
        mode: page(make("a", mode, decomposition, lines=[])).texts["dt"]
        for mode, decomposition in (
            ("dense", None),
            ("finetune", "tucker"),
            ("deeptwist", "tucker"),
        )
    }
    assert [mode for mode in names if "interval" in names[mode]] == ["deeptwist"]
    assert not [name for name in names["dense"] if name.startswith("compression.")]
    assert "compression.skip_first_conv" in names["finetune"]


# --- a sweep


@pytest.mark.parametrize("dense", [None, 0.9])
def test_a_sweep_has_a_page(tmp_path: Path, dense: float | None) -> None:
    accuracies = [None] * 3 if dense is None else [0.88, 0.8, 0.4]
    points = [
        {"ratio": n + 1.5, "error": n / 8, "weights": n + 1, "macs": n + 1.25, "accuracy": a}
        for n, a in enumerate(accuracies)
    ]
    sweep = {"points": points, "knee": 2.5, "dense_accuracy": dense}
    write_sweep(sweep, tmp_path / "a.html", title=HOSTILE)
    html = Page((tmp_path / "a.html").read_text())
    assert html.texts["h1"] == [HOSTILE]
    titles = ["Predicted error", "What is saved", "Accuracy without training"]
    assert [*html.drawings] == titles[: 2 if dense is None else 3]
    accuracy = [] if dense is None else ["80.00%"]
    assert html.tables[0][-2] == ["2.5×", "0.125", "2.00×", "2.25×", *accuracy, "knee"]
