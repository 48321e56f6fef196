import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from torch import nn

import deeptwist as dt
from deeptwist.app.report import formatting, write_report
from deeptwist.app.report.charts import detail_charts, gain_charts
from deeptwist.app.report.comparison import RunGroup, group_runs, summary_sentence
from deeptwist.app.report.config_table import config_table
from deeptwist.app.report.latency_chart import LatencyChart
from deeptwist.app.report.plotting import Chart, Curve, render
from deeptwist.app.report.styles import (
    DASHED,
    MUTED,
    NO_LINE,
    SERIES,
    SOLID,
    PlotStyle,
    assign_styles,
)
from deeptwist.app.training import metrics
from deeptwist.app.training.metrics import (
    DistortionRecord,
    Epoch,
    Evaluation,
    Run,
    Summary,
    Variant,
    read_run,
)
from deeptwist.app.training.recipe import make_recipe
from deeptwist.errors import DeepTwistError
from deeptwist.measure.comparison import Comparison
from deeptwist.measure.timing import Timing
from deeptwist.twist.distortion import Distortion

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> {{ 7 * 7 }} &amp; $x$ \x07"


def small_plan(decomposition: dt.Decomposition) -> dt.Plan:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 10)
    )
    return dt.plan(
        model,
        decomposition,
        ratio=2,
        example_input=torch.zeros(1, 3, 8, 8),
    )


def make_recipe_values(*changes: str) -> dict[str, Any]:
    values: dict[str, Any] = {"model": "resnet20"}
    for change in changes:
        key, _, text = change.partition("=")
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = yaml.safe_load(text)
    return make_recipe(values).to_dict()


VARIANTS = (
    Variant("recalibrated", 0.87, 0.41, "model-recalibrated"),
    Variant("tail", 0.95, 0.2, "model-tail"),
)
STEPS = ("schedule.kind=step", "schedule.milestones=[2, 4]")
PLANS = {"tucker": small_plan(dt.Tucker()), "spatial_svd": small_plan(dt.SpatialSVD())}


def make_run(
    name: str = "dense", mode: str = "dense", decomposition: str | None = None, **changes: Any
) -> Run:
    plan = PLANS.get(decomposition or "")
    latency = Comparison(Timing(8.0, 7.5, 9.0), Timing(10.0, 9.25, 12.0), speedup=0.78)
    summary = Summary(
        name=name,
        mode=mode,
        model="resnet20",
        data="digits",
        decomposition=decomposition,
        ratio=None if decomposition is None else 4.0,
        accuracy_before=0.8890,
        accuracy_untrained=None if decomposition is None else 0.1234,
        accuracy=0.8890 if decomposition is None else 0.8641,
        loss=0.4321,
        parameters_before=464_154,
        parameters=464_154 if decomposition is None else 116_000,
        macs_before=69_124_736,
        macs=69_124_736 if decomposition is None else 16_458_270,
        bytes=1_870_000 if decomposition is None else 473_210,
        steps=2340,
        seconds=3312.0,
        output_difference=3e-7 if mode == "deeptwist" else None,
        latency=None if decomposition is None else latency,
        latency_batch=None if decomposition is None else 16,
        variants=(),
        recipe=make_recipe_values(f"mode={mode}"),
        processes=1,
        machine="a machine",
        version="0.1.0",
    )
    epochs = [
        {
            "event": "epoch",
            "epoch": epoch,
            "step": 390 * epoch,
            "train_loss": 1 / epoch,
            "test": {"loss": 1 / epoch, "accuracy": 0.7 + 0.02 * epoch, "top5": None},
            "lr": 0.05 / epoch,
            "seconds": 1.0,
            "images_per_second": 1000.0 + epoch,
        }
        for epoch in range(1, 7)
    ]
    distortions = [
        {
            "event": "distortion",
            "step": 200 * turn,
            "weight_shift": 1e-4 / 3**turn,
            "layer_shifts": {},
            "loss_increase": 2.0 / turn**2 if turn < 8 else None,
            "lr": 0.05,
            "seconds": 0.02 * turn,
            "train": moments(1 / turn, 3 / turn),
            "test": moments(1 / turn, 3 / turn, 0.7 + turn / 50, 0.5 + turn**2 / 300),
        }
        for turn in range(1, 9)
    ]
    run = Run(summary, epochs, [] if mode in ("dense", "finetune") else distortions, plan)
    return replace(run, summary=replace(summary, **changes))


def moments(before: float, after: float, *accuracies: float) -> list[dict[str, float]]:
    evaluations = zip((before, after), accuracies or (0.5, 0.25), strict=True)
    return [{"loss": loss, "accuracy": accuracy, "top5": None} for loss, accuracy in evaluations]  # type: ignore[dict-item]


def pair(decomposition: str, **changes: Any) -> list[Run]:
    return [
        make_run(f"{mode}-{decomposition}", mode, decomposition, **changes)
        for mode in ("deeptwist", "finetune")
    ]


def without_curves(run: Run) -> Run:
    """The same run with next to nothing to draw, which takes most of the time."""
    summary = replace(run.summary, latency=None, latency_batch=None)
    return replace(run, summary=summary, epochs=[], distortions=[], plan=None)


RUNS = [make_run(), *pair("tucker"), *pair("spatial_svd")]


class Page(HTMLParser):
    """What a page holds: tables by heading, the elements with their attributes, the text."""

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
        cell = {"td", "th"} & set(self._open)
        if cell:
            separator = "|" if self._open[-1] == "small" else ""
            self.tables[-1][-1][-1] += separator + data
        if self._open and not cell:
            self.texts[self._open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def rows(self, table: int = 0) -> list[dict[str, str]]:
        heading, *rows = self.tables[table]
        return [dict(zip(heading, row, strict=True)) for row in rows]

    @property
    def drawings(self) -> list[dict[str, str | None]]:
        return [svg for svg in self.all("svg") if svg.get("role") == "img"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of all `RUNS`."""
    path = tmp_path_factory.mktemp("whole") / "report.html"
    write_report(RUNS, path, title="Tucker & co")
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., Page]:
    def write(*runs: Run, title: str = "A title") -> Page:
        path = write_report(runs, tmp_path / "report.html", title=title)
        return Page(path.read_text(encoding="utf-8"))

    return write


def error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(DeepTwistError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the page


def test_the_page_has_its_parts_in_order(whole: Page) -> None:
    assert [text.strip() for text in whole.texts["h1"]] == ["Tucker & co"]
    assert whole.texts["title"] == ["Tucker & co"]
    assert [text.split(":")[0] for text in whole.texts["h2"]] == [
        "Was it worth it?",
        "Results",
        "Plots",
        "Training",
        "Layers",
        "Settings",
        "How to read this page",
    ]
    assert summary_sentence(group_of(RUNS)) in whole.texts["p"][0]
    assert len(whole.texts["figcaption"]) == len(whole.drawings) == 11
    assert all(len(caption) > 40 for caption in whole.texts["figcaption"])


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


def test_the_same_runs_give_the_same_page_and_leave_matplotlib_alone(
    whole: Page, page: Callable[..., Page]
) -> None:
    before = dict(matplotlib.rcParams)
    assert page(*RUNS, title="Tucker & co").html == whole.html
    assert dict(matplotlib.rcParams) == before


def test_drawings_and_tables_can_be_read_out(whole: Page) -> None:
    for svg in whole.drawings:
        assert "deeptwist-tucker" in (svg["aria-label"] or "")
    for svg in whole.all("svg"):
        assert svg.get("role") == "img" or svg.get("aria-hidden") == "true"
    assert {cell["scope"] for cell in whole.all("th")} == {"col", "row"}


def test_drawings_take_their_colours_from_the_page(whole: Page) -> None:
    drawn = "".join(re.findall(r"<svg .*?</svg>", whole.html, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #", drawn)
    used = set(re.findall(r"var\((--[\w-]+)\)", whole.html))
    assert used <= set(re.findall(r"(--[\w-]+):", whole.html))


def test_hostile_names_are_only_names(page: Callable[..., Page]) -> None:
    runs = [
        make_run(HOSTILE, mode, decomposition, model=HOSTILE, data=HOSTILE, machine=HOSTILE)
        for mode, decomposition in (("dense", None), ("deeptwist", "tucker"))
    ]
    runs[1] = replace(runs[1], summary=replace(runs[1].summary, decomposition=HOSTILE))
    html = page(*runs, title=HOSTILE)
    assert not {tag for tag, _ in html.elements} & {"script", "img"}
    assert not [key for _, attributes in html.elements for key in attributes if key[:2] == "on"]
    assert html.texts["h1"] == [HOSTILE]
    assert [row["run"] for row in html.rows()] == [HOSTILE, HOSTILE]
    drawn = [text.strip("\u200b") for text in html.texts["text"] if "alert" in text]
    assert drawn  # in the legends, shortened
    assert all(HOSTILE.startswith(text.partition("…")[0]) for text in drawn)


def test_a_name_that_is_no_text_does_no_harm(page: Callable[..., Page]) -> None:
    names = ["\ud800", "層", "x" * 500, "_hidden", ""]
    runs = [make_run(name, "finetune", "tucker") for name in names]
    html = page(*[replace(run, epochs=[], plan=None) for run in runs])
    assert [row["run"] for row in html.rows()] == ["?", *names[1:]]


def test_what_is_imported() -> None:
    code = (
        "import sys, deeptwist\n"
        "assert not {'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "import deeptwist.app.training.metrics\n"
        "before = set(sys.modules)\n"
        "import deeptwist.app.report\n"
        "assert not {'matplotlib.pyplot'} & (set(sys.modules) - before)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors(tmp_path: Path) -> None:
    assert "no run" in error_of(write_report, [], tmp_path / "x.html", title="")
    missing = tmp_path / "missing" / "x.html"
    assert str(missing) in error_of(write_report, RUNS[:1], missing, title="")
    assert list(tmp_path.iterdir()) == []


# --- results


def test_the_table_says_what_the_records_say(whole: Page) -> None:
    rows = whole.rows()
    assert [row["run"] for row in rows] == [run.summary.name for run in RUNS]
    assert rows[0] == {
        "run": "dense",
        "mode": "dense",
        "decomposition": "–",
        "ratio asked": "–",
        "accuracy, %": "88.90",
        "change, points": "–",  # against random weights it would mean nothing
        "decomposed, untrained, %": "–",
        "parameters": "464,154",
        "MACs": "69,124,736",
        "file": "1.87\xa0MB",
        "latency, ms": "–",
        "steps": "2,340",
        "minutes": "55.2",
    }
    assert rows[2] == {
        "run": "finetune-tucker",
        "mode": "conventional fine-tuning",
        "decomposition": "Tucker",
        "ratio asked": "4×",
        "accuracy, %": "86.41",
        "change, points": "−2.49",
        "decomposed, untrained, %": "12.34",
        "parameters": "116,000|4.00×\xa0fewer",
        "MACs": "16,458,270|4.20×\xa0fewer",
        "file": "473\xa0kB",
        "latency, ms": "8.00\xa0→\xa010.0|0.78×\xa0(slower)",
        "steps": "2,340",
        "minutes": "55.2",
    }


def test_quartiles_are_in_the_tooltip(whole: Page) -> None:
    tooltips = [cell["title"] or "" for cell in whole.all("td") if "title" in cell]
    assert (
        "dense: median 8.00 ms, quartiles 7.50 to 9.00; "
        "decomposed: median 10.0 ms, quartiles 9.25 to 12.0 for a batch of 16"
    ) in tooltips


def test_runs_of_one_decomposition_sit_together(page: Callable[..., Page]) -> None:
    dense, tucker, tucker_too, spatial, spatial_too = RUNS
    given = [tucker, dense, spatial, tucker_too, spatial_too]
    html = page(*map(without_curves, given))
    assert [row["run"] for row in html.rows()] == [
        run.summary.name for run in (tucker, tucker_too, dense, spatial, spatial_too)
    ]


def test_networks_and_data_sets_are_not_mixed(page: Callable[..., Page]) -> None:
    other = [make_run("other", "deeptwist", "tucker", model="vgg19", accuracy=0.99)]
    html = page(*map(without_curves, [*RUNS, *other]))
    assert html.texts["span"] == ["resnet20 on digits", "vgg19 on digits"]
    assert [row["run"] for row in html.rows(1)] == ["other"]
    gains = [text.strip() for text in html.texts["h2"] if text.startswith("Was it worth it?")]
    assert gains == ["Was it worth it? resnet20 on digits", "Was it worth it? vgg19 on digits"]
    assert "the dense network 88.9" in summary_sentence(group_of([*RUNS, *other]))


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        (
            [make_run(), make_run("a", "deeptwist", "tucker")],
            "DeepTwist, Tucker: 86.4 % at 4.0× fewer parameters and 4.2× fewer MACs; "
            "the dense network has 88.9 %.",
        ),
        (
            [make_run("a", "deeptwist", "Tucker()", accuracy=0.9)],
            "DeepTwist, Tucker: 90.0 % at 4.0× fewer parameters and 4.2× fewer MACs; "
            "the dense network that it started from has 88.9 %.",
        ),
        (
            [
                make_run(),
                make_run("a", "deeptwist", "TiledSVD(tile=(64, 72))", accuracy=0.85, ratio=8.0),
                make_run("b", "deeptwist", "tucker", accuracy=0.8641),
                make_run("c", "finetune", "tucker", accuracy=0.8702, macs=80_000_000),
                make_run("d", "deeptwist", "tucker", accuracy=0.866, steps=1),
            ],
            "Conventional fine-tuning, Tucker: 87.0 % at 4.0× fewer parameters and 1.2× more MACs; "
            "DeepTwist at the same ratio has 86.4 %, the dense network 88.9 %.",
        ),
        ([make_run()], "The dense network has 88.9 %; none is compressed yet."),
    ],
)
def test_the_summary_sentence(runs: list[Run], sentence: str) -> None:
    assert summary_sentence(group_of(runs)).replace("\xa0", " ") == sentence


# --- charts


def group_of(runs: list[Run]) -> RunGroup:
    return group_runs(runs)[0]


def charts_of(runs: list[Run]) -> list[Chart | LatencyChart]:
    return [*gain_charts(group_of(runs)), *detail_charts(group_of(runs))]


def titles(runs: list[Run]) -> list[str]:
    return [chart.title.split(":")[0] for chart in charts_of(runs)]


def chart_called(title: str, runs: list[Run]) -> Chart:
    (chart,) = (chart for chart in charts_of(runs) if chart.title.startswith(title))
    assert isinstance(chart, Chart)
    return chart


def labelled(chart: Chart) -> list[Curve]:
    return [curve for curve in chart.curves if curve.label]


def test_a_chart_without_data_is_left_out(page: Callable[..., Page]) -> None:
    dense, _, conventional, *_ = RUNS
    assert titles([dense]) == ["Test accuracy while training", "Training loss"]
    assert titles([dense, conventional]) == [
        "Accuracy against size",
        "Accuracy against milliseconds",
        "What each layer gained",
        "Test accuracy while training",
        "Training loss",
        "Latency",
        "Relative error of each layer",
    ]
    bare = without_curves(make_run("bare", "deeptwist", "tucker", ratio=None))
    assert titles([bare]) == ["Accuracy against size"]
    bare_page = page(bare)
    assert bare_page.rows()[0]["latency, ms"] == bare_page.rows()[0]["ratio asked"] == "–"
    assert "Layers" not in bare_page.texts["h2"]


def test_every_run_is_in_the_legends(whole: Page) -> None:
    names = {chart.title.split(":")[0]: chart.names for chart in charts_of(RUNS)}
    every = [run.summary.name for run in RUNS]
    twisted = ["deeptwist-tucker", "deeptwist-spatial_svd"]
    assert names["Test accuracy while training"] == names["Training loss"] == every
    assert names["Accuracy against size"] == names["Latency"] == every[1:]
    assert names["What a distortion costs"] == twisted
    assert names["Relative error of each layer"] == twisted  # both modes had the same plan
    texts = [text.strip("\u200b") for text in whole.texts["text"]]
    assert set(every) <= set(texts)
    assert {f"{name}: 0.78×\xa0(slower)" for name in every[1:]} <= set(texts)


def test_accuracy_stands_against_what_was_gained() -> None:
    size, time, layers = gain_charts(group_of(RUNS))
    assert labelled(size)[0].points == ((0.116, 86.41),)
    assert labelled(time)[0].points == ((10 / 16, 86.41),)  # milliseconds of a batch of 16
    dense = [chart.curves[0].points for chart in (size, time)]
    assert dense == [((0.464154, 88.9),), ((8 / 16, 88.9),)]
    plan = PLANS["tucker"]
    before, after, *_ = (curve.points for curve in layers.curves)
    assert sum(y for _, y in before) == pytest.approx(plan.dense_macs / 1e6)
    assert sum(y for _, y in after) == pytest.approx(plan.macs / 1e6)


def test_numbers_on_axes_are_not_rounded() -> None:
    """As coordinates are: two ticks would be called the same."""
    curve = Curve(((1.0, 0.0051), (2.0, 0.0249)), PlotStyle(MUTED), "lr0.0125")
    svg = render(Chart("title", "", (curve,), x="x", y="y"), name="ticks")
    texts = re.findall(r"<text[^>]*>([^<]+)<", svg)
    assert len(texts) == len(set(texts))
    assert {"0.005", "0.025", "\u200blr0.0125"} <= set(texts)
    assert re.search(r' d="[^"]*\d\.\d\d', svg)
    assert not re.search(r' d="[^"]*\d\.\d{3}', svg)


def test_runs_that_differ_in_the_ratio_are_tied_together() -> None:
    runs = [make_run(f"{p}", "deeptwist", "tucker", parameters=p) for p in (232_077, 464_154)]
    tie, *markers = chart_called("Accuracy against size", runs).curves
    assert [x for x, _ in tie.points] == [0.232077, 0.464154]
    assert (tie.label, tie.style.marker, tie.style.color) == ("", "", MUTED)
    assert {curve.style.line for curve in markers} == {NO_LINE}


def test_values_that_no_axis_can_show() -> None:
    run = without_curves(make_run("a", "deeptwist", "tucker"))
    odd = [
        {**make_run("", "deeptwist").distortions[0], "train": [], "test": []}
        | {"step": step, "weight_shift": shift, "loss_increase": increase}
        for step, shift, increase in [(1, 0.0, float("inf")), (2, 1e-9, float("nan")), (3, 1, -9.0)]
    ]
    assert len(titles([replace(run, distortions=odd)])) == 3
    assert len(titles([replace(run, distortions=odd[:1])])) == 1


def test_many_runs_and_long_ones(page: Callable[..., Page]) -> None:
    runs = [
        make_run(f"{mode}-{ratio}", mode, "tucker", ratio=float(ratio), parameters=464_154 // ratio)
        for ratio in range(2, 9)
        for mode in ("deeptwist", "finetune")
    ]
    long = [
        {**runs[0].distortions[0], "step": step, "weight_shift": 2.0 + step % 7}
        for step in range(2000)
    ]
    runs[0] = replace(runs[0], distortions=long)
    long_page = page(*runs)
    shift = chart_called("How far", runs[:1])
    (curve,) = shift.curves
    assert 300 < len(curve.points) <= 400
    assert curve.points[-1][0] == 1999
    assert "Of more than 400 distortions, evenly spaced ones are drawn." in shift.caption
    assert "evenly spaced" not in chart_called("How far", RUNS).caption
    assert [row["run"] for row in long_page.rows()] == [run.summary.name for run in runs]
    assert len(long_page.html) < 500_000


def test_styles_differ_and_pairs_share_colour_and_marker() -> None:
    runs = [
        make_run(f"{mode}{ratio}", mode, "tucker", ratio=float(ratio))
        for ratio in range(42)
        for mode in ("deeptwist", "finetune")
    ]
    styles = assign_styles(runs)
    assert len(set(styles)) == len(styles)
    for deeptwist, conventional in pairwise(styles):
        if deeptwist.filled:
            assert deeptwist.color == conventional.color
            assert deeptwist.marker == conventional.marker
            assert deeptwist.line != conventional.line


def test_a_control_looks_like_no_other_run() -> None:
    modes = ("deeptwist", "finetune", "projected", "random_noise", "decompose_at_end")
    styles = assign_styles([make_run(mode, mode, "tucker") for mode in modes])
    assert styles[0].color == styles[1].color
    assert len({style.color for style in styles}) == 4
    assert not any(style.filled for style in styles[2:])


def test_runs_that_differ_in_a_setting_alone_look_different() -> None:
    styles = assign_styles([make_run(f"{n}", "deeptwist", "tucker") for n in range(3)])
    assert len({style.color for style in styles}) == 3


@pytest.mark.parametrize(
    "title",
    ["Training loss before and after each distortion", "Test accuracy before and after each"],
)
def test_before_is_a_line_and_after_a_dashed_one(title: str) -> None:
    chart = chart_called(title, RUNS[:3])
    before, after = chart.curves
    assert (before.style.line, before.style.filled) == (SOLID, True)
    assert (after.style.line, after.style.filled) == (DASHED, False)
    assert before.style.color == after.style.color == SERIES[0]
    assert len(before.points) == len(after.points) == 8
    better = 1 if "accuracy" in title else -1
    for (step, height), (other_step, other_height) in zip(before.points, after.points, strict=True):
        assert step == other_step
        assert better * height > better * other_height
    names = [name for name, _ in chart.entries]
    assert names == ["deeptwist-tucker", "just before", "just after"]
    assert "100 images spread" in chart.caption


def test_before_and_after_need_images() -> None:
    run = make_run("a", "deeptwist", "tucker")
    unseen = [distortion | {"train": [], "test": []} for distortion in run.distortions]
    assert not any("before" in title for title in titles([replace(run, distortions=unseen)]))


def test_losses_far_apart_have_a_logarithmic_axis() -> None:
    run = make_run("a", "deeptwist", "tucker")
    for train, scale in (((1.0, 3.0), "linear"), ((0.01, 10.0), "log"), ((0.0, 10.0), "linear")):
        lines = [line | {"train": moments(*train)} for line in run.distortions]
        chart = chart_called("Training loss before", [replace(run, distortions=lines)])
        assert chart.scale == scale
        assert ("logarithmic" in chart.caption) == (scale == "log")


@pytest.mark.parametrize("title", ["Training loss before", "Test accuracy b", "What a", "How far"])
def test_drops_of_the_learning_rate_are_marked(title: str) -> None:
    run = make_run("a", "deeptwist", "tucker", recipe=make_recipe_values(*STEPS))
    chart = chart_called(title, [run])
    end = 1600 if title != "What a" else 1400  # the last ΔL/L is not known
    assert chart.curves[0].points[-1][0] == end
    assert chart.marks == tuple(step for step in (780, 1560) if step < end)
    assert "the learning rate drops" in chart.caption
    smooth = chart_called(title, [make_run("a", "deeptwist", "tucker")])
    assert smooth.marks == ()
    assert "the learning rate drops" not in smooth.caption


def test_what_a_chart_says_is_drawn() -> None:
    run = make_run("a", "deeptwist", "tucker", recipe=make_recipe_values(*STEPS))
    axes = Figure(layout="constrained").subplots()
    chart = chart_called("How far", [run])
    chart.draw(axes)
    lines = {line.get_color(): line for line in axes.lines if len(line.get_xdata())}
    curve = lines[SERIES[0]]
    assert tuple(zip(curve.get_xdata(), curve.get_ydata(), strict=True)) == chart.curves[0].points
    assert {tuple(line.get_xdata()) for line in axes.lines if line.get_color() == MUTED} == {
        (780, 780),
        (1560, 1560),
    }
    assert axes.get_yscale() == "log"
    assert [text.get_text().strip("\u200b") for text in axes.figure.legends[0].texts] == ["a"]


def test_a_distortion_is_drawn_once() -> None:
    run = make_run("a", "deeptwist", "tucker")
    again = [*run.distortions, run.distortions[-1] | {"weight_shift": 1e-12}]
    assert chart_called("How far", [replace(run, distortions=again)]) == chart_called(
        "How far", [run]
    )


# --- what comes of a run besides


def test_variants_are_rows_of_their_own(page: Callable[..., Page]) -> None:
    recipe = make_recipe_values("recalibration=4", "tail.epochs=2")
    plain = make_run("a", "deeptwist", "tucker")
    run = make_run("a", "deeptwist", "tucker", variants=VARIANTS, recipe=recipe)
    assert summary_sentence(group_of([run])) == summary_sentence(group_of([plain]))
    html = page(run)
    _, own, *rows = html.tables[0]
    assert own[4] == "86.41"
    described = "batch norm's statistics taken anew on 4 training batches"
    assert rows == [
        ["recalibrated", described, "87.00", "−1.90", ""],
        ["tail", "2 more epochs, of the factors", "95.00", "+6.10", ""],
    ]
    assert len([cell for cell in html.all("th") if "data-under" in cell]) == 2
    assert "recalibrated, tail" in html.texts["dt"]
    assert not [cell for cell in page(plain).all("th") if "data-under" in cell]


def test_variants_stand_beside_their_run() -> None:
    runs = [make_run("a", "deeptwist", "tucker", variants=VARIANTS)]
    chart = chart_called("Accuracy against size", runs)
    assert [name for name, _ in chart.entries] == ["a", "recalibrated", "tail", "dense"]
    _, run, recalibrated, tail = chart.curves
    assert run.points[0][0] == recalibrated.points[0][0] == tail.points[0][0]
    assert run.shift < recalibrated.shift - 8 < tail.shift - 8
    assert tail.points[0][1] > recalibrated.points[0][1] > run.points[0][1]
    assert run.style.color == recalibrated.style.color == tail.style.color
    axes = Figure().subplots()
    chart.draw(axes)
    assert axes.get_ylim()[1] > 95  # also what is beside its place is inside
    assert "in the table" not in chart_called("Accuracy against size", RUNS).caption


def test_controls_are_named_and_are_no_rivals(page: Callable[..., Page]) -> None:
    runs = [
        make_run(mode, mode, "tucker", accuracy=accuracy)
        for mode, accuracy in (
            ("deeptwist", 0.9),
            ("finetune", 0.8),
            ("projected", 0.85),
            ("random_noise", 0.84),
            ("decompose_at_end", 0.83),
        )
    ]
    assert "conventional fine-tuning at the same ratio has 80.0" in summary_sentence(group_of(runs))
    html = page(*map(without_curves, runs))
    names = [row["mode"] for row in html.rows()]
    assert names == [
        "DeepTwist",
        "conventional fine-tuning",
        "control: projection at every step",
        "control: random noise",
        "control: decomposed once, at the end",
    ]
    assert set(names) <= set(html.texts["dt"])
    caption = chart_called("Accuracy against size", runs).caption
    assert "DeepTwist (filled), conventional fine-tuning (hollow) or a control" in caption


def test_training_says_how_fast(whole: Page) -> None:
    rows = whole.rows(1)
    assert [row["run"] for row in rows] == [run.summary.name for run in RUNS]
    assert rows[1] == {
        "run": "deeptwist-tucker",
        "images per second": "1,004",
        "learning rate": "0.05\xa0→\xa00.0083",
        "distortions": "8",
        "one takes, ms": "90.0",
        "of the training time, %": "10.7",  # 0.72 s of 6.72
    }
    assert rows[2]["distortions"] == rows[2]["one takes, ms"] == "–"


# --- layers and settings


def test_each_distinct_plan_has_one_table(whole: Page) -> None:
    assert len(whole.all("details")) == 2
    assert whole.texts["summary"][0].strip() == (
        "Tucker, ratio 4×: deeptwist-tucker and finetune-tucker"
    )
    heading, *rows = whole.tables[2]
    first, second, linear, total = rows
    plan = PLANS["tucker"]
    layer = plan.layers[1]
    assert heading[0] == "layer"
    assert first[:6] == ["0", "1", "3→8, 3×3", "", "", ""]
    assert first[6:] == ["216", "7,776", "kept: first convolution"]
    dense, small = (plan.layer_macs(layer, factored=factored) for factored in (False, True))
    assert second == [
        "2",
        "2",
        "8→16, 3×3",
        "",
        "tucker",
        "×".join(map(str, getattr(layer.decomposition, "rank", ()))),
        f"{layer.weight_numel:,} → {layer.compressed_numel:,}",
        f"{dense:,} → {small:,}",
        f"{layer.relative_error:.3f}",
    ]
    assert linear[-1] == "kept: linear layer"
    assert total[0] == f"whole network|with {plan.other_parameters} other parameters"
    assert total[2:4] == [
        f"{plan.dense_parameters:,} → {plan.parameters:,}",
        f"{plan.dense_macs:,} → {plan.macs:,}",
    ]


def test_settings_are_said_once_or_run_by_run(whole: Page, page: Callable[..., Page]) -> None:
    shared = dict(zip(whole.texts["dt"], whole.texts["dd"], strict=True))
    assert (shared["seed"], shared["epochs"], shared["batch size"]) == ("0", "6", "128")
    assert (shared["machine"], shared["deeptwist"]) == ("a machine", "0.1.0")
    assert (shared["network"], shared["data"]) == ("resnet20", "digits")

    seeds = [
        make_run(f"seed {n}", recipe=make_recipe_values(f"seed={n}") | {"n": n}) for n in (1, 2)
    ]
    seeds.append(make_run("other", recipe={"seed": 3}))
    html = page(*map(without_curves, seeds))
    assert "seed" not in html.texts["dt"]
    rows = html.rows(-1)
    assert [row["seed"] for row in rows] == ["1", "2", "3"]
    assert [row["n"] for row in rows] == ["1", "2", "–"]


def settings_of(mode: str = "deeptwist", *changes: str, processes: int = 1) -> dict[str, str]:
    recipe = make_recipe_values(f"mode={mode}", *changes)
    run = make_run("a", mode, "tucker", recipe=recipe, processes=processes)
    return dict(config_table([run]).shared)


def test_settings_are_named_and_defaults_that_say_nothing_left_out() -> None:
    plain = settings_of()
    assert not [name for name in plain if "." in name or "_" in name.replace("S_D", "")]
    assert plain["interval S_D, steps between distortions"] == "200"
    assert plain["learning rate falls"] == "by a cosine to zero"
    assert plain["first convolution kept"] == "no"
    silent = {"validation images held out", "label smoothing", "processes", "layers included"}
    assert not silent & set(plain)

    loud = settings_of(
        "deeptwist",
        "data.validation=100",
        "label_smoothing=0.1",
        "compression.include=[conv*, fc]",
        "tail.epochs=1",
        "fixed.min_in_channels=128",
        *STEPS,
        processes=2,
    )
    assert {name: loud[name] for name in silent} == {
        "validation images held out": "100",
        "label smoothing": "0.1",
        "processes": "2",
        "layers included": "conv*, fc",
    }
    assert (loud["tail, epochs"], loud["tail, learning rate at the start"]) == ("1", "0.01")
    assert loud["fixed layers: fewest input channels compressed"] == "128"
    assert loud["learning rate falls"] == "×0.1 after epochs 2 and 4"


def test_settings_of_other_modes_are_left_out() -> None:
    interval = "interval S_D, steps between distortions"
    assert interval in settings_of("random_noise")
    assert not any(
        interval in settings_of(mode) for mode in ("dense", "finetune", "decompose_at_end")
    )
    assert "first convolution kept" not in settings_of("dense")


# --- wording


def test_numbers_are_said_plainly() -> None:
    assert formatting.format_points(-0.0000001) == formatting.format_points(0.0) == "0.00"
    assert formatting.format_points(0.0123) == "+1.23"
    assert formatting.format_speedup(0.5).endswith("(slower)")
    assert formatting.format_speedup(2.0).endswith("(faster)")
    assert formatting.format_speedup(0.999) == "1.00×"
    assert formatting.format_ratio(0, 0) == ""
    assert formatting.format_ratio(7, 7) == "as many"
    assert formatting.format_ratio(100, 150) == "1.50×\xa0more"
    assert formatting.power_of_ten(2e-5) == "2·10⁻⁵"
    assert formatting.power_of_ten(1e-4) == "10⁻⁴"
    assert formatting.format_milliseconds(123.4) == "123"
    assert formatting.join_words(["a", "b", "c"]) == "a, b and c"
    assert formatting.join_words(["a"]) == "a"
    assert formatting.join_words([]) == ""


# --- records


def test_these_runs_are_what_a_folder_holds(tmp_path: Path) -> None:
    run = make_run("a", "deeptwist", "tucker", variants=VARIANTS)
    assert run.plan is not None
    run.summary.write(tmp_path)
    (tmp_path / metrics.PLAN).write_text(run.plan.to_json(), encoding="utf-8")
    for epoch in run.epochs:
        values = without(epoch, "event") | {"test": Evaluation(**epoch["test"])}
        metrics.append_record(tmp_path / metrics.METRICS, Epoch(**values))
    for line in run.distortions:
        beside = {key: line[key] for key in ("lr", "seconds")} | {
            split: tuple(Evaluation(**evaluation) for evaluation in line[split])
            for split in ("train", "test")
        }
        distortion = Distortion(**without(line, "event", "train", "test", *beside))
        metrics.append_record(tmp_path / metrics.METRICS, DistortionRecord(distortion, **beside))
    assert read_run(tmp_path) == run


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
