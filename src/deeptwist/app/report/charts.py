"""The plots of a group of runs: drawn by matplotlib, each left out where nothing was measured."""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from typing import Any, Literal, NamedTuple

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deeptwist.app.report.records import ONNX, PARAMETERS, Cost, Network, Record, dense_networks

INK, MUTED = "#1f2328", "#8a9098"
COLORS = "#0072b2", "#c24a00", "#007d5b", "#a5437c", "#8a6700", "#5e4fc0"
MARKERS, _DERIVED = "os^DvPX", "+x12"  # 42 runs look different, and what is derived from each
_MAX_POINTS = 400  # on one line: a drawing is not wider
_WIDTH, _HEIGHT, _LETTERS = 3.9, 2.4, 44  # of a drawing, in inches; of a line of its legend
_RC = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "lines.markersize": 5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), INK),
}
_MARKED = {"linestyle": "none", "markersize": 8, "markeredgewidth": 1.6, "clip_on": False}
_AFTER = {"linestyle": ":", "markerfacecolor": "none"}  # a distortion; out of the legend
Values = dict[str, Any]
Lines = list[tuple[float, Values]]  # of `metrics`, by epoch
Height = Callable[[Values], float | None]
Points = Iterable[tuple[float, float | None]]
Scale = Literal["linear", "log", "symlog"]


class Curve(NamedTuple):
    """Points that are drawn alike; those without a finite height are left out."""

    label: str  # in the legend; empty for none there
    points: Points
    look: Values  # options of `Axes.plot`


class Chart(NamedTuple):
    """A drawing with its title and what one sees."""

    title: str
    caption: str
    svg: str


def draw(
    title: str,
    caption: str,
    curves: Iterable[Curve],
    *,
    x: str,
    y: str,
    scale: Scale = "linear",
    from_zero: bool = False,
    marks: Iterable[float] = (),
    salt: str = "",
) -> list[Chart]:
    """Return a chart, or nothing where there is no point to draw.

    Args:
        title: of the chart.
        caption: what one sees.
        curves: see `Curve`.
        x: what goes across.
        y: what goes up.
        scale: of the upright axis: "log" where heights are far apart, "symlog" beyond ±1.
        from_zero: whether the x axis begins at zero.
        marks: where to draw dotted upright lines.
        salt: with the title unlike that of any other drawing of the page; ids depend on both.
    """
    context: list[Any] = ["default", _RC, {"svg.hashsalt": f"{title} {salt}"}]
    with style.context(context), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser's fonts have it
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        across: list[float] = []
        heights: list[float] = []
        for label, every, look in curves:
            points = [(a, b) for a, b in every if b is not None and math.isfinite(b)]
            if points:
                across += [place for place, _ in points]
                heights += [height for _, height in points]
                often = math.ceil(len(points) / 12)
                axes.plot(*zip(*points, strict=True), **look, markevery=often, label=_legend(label))
        if not heights:
            return []
        for mark in marks:
            axes.axvline(mark, color=MUTED, linestyle=":")
        if scale == "symlog" and max(map(abs, heights)) > 1:
            axes.set_yscale("symlog", linthresh=1)
        elif scale == "log" and 0 < 30 * min(heights) < max(heights):
            axes.set_yscale("log")
        if from_zero:
            axes.set_xlim(0, 1.08 * max(across))
            axes.margins(y=0.15)
        elif all(float(place).is_integer() for place in across):
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
        axes.set_title(y)
        axes.set_xlabel(x)
        return [Chart(title, caption, _to_svg(figure, title))]


def _legend(name: str) -> str:
    """Return a name not too long, and without what XML cannot hold; matplotlib drops "_"…."""
    name = name if len(name) <= 48 else f"{name[:47]}…"
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name or "_"


def _to_svg(figure: Figure, title: str) -> str:
    """Add the legend; return a figure as an ``<svg>`` element of a page that has others."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = max(1, min(3, _LETTERS // (max(map(len, labels), default=0) + 7)))
    figure.set_size_inches(_WIDTH, _HEIGHT + 0.2 * math.ceil(len(labels) / columns))
    legend = figure.legend(handles, labels, loc="outside lower left", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a run may be called "$x$"
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r' id="[\w.]+_\d+"', "", buffer.getvalue())  # of groups, the same in every one
    # Coordinates are shortened; text, between > and <, stays as it is.
    svg = re.sub(r"(>[^<]+<)|\d+\.\d{3,}", lambda m: m[1] or f"{float(m[0]):.2f}", svg)
    spoken = escape(f"{title}: {', '.join(labels)}")
    return f'<svg role="img" aria-label="{spoken}" {svg[svg.index("<svg") + 5 :]}'


def _looks(records: Sequence[Record]) -> list[tuple[Record, dict[str, Any]]]:
    """Return the runs with how each looks in all charts: dense ones in grey."""
    colors = [COLORS[n % len(COLORS)] if r.small else MUTED for n, r in enumerate(records)]
    looks = [{"color": c, "marker": MARKERS[n % len(MARKERS)]} for n, c in enumerate(colors)]
    return list(zip(records, looks, strict=True))


def gain_charts(records: Sequence[Record]) -> list[Chart]:
    """Return accuracy against what networks cost: parameters, megabytes of ONNX, milliseconds."""
    if not any(record.small for record in records):
        return []
    dense = dense_networks(records)
    styled = [(n, {"color": MUTED, "marker": "+" if n.start else "o"}) for n in dense]
    ties: dict[str, list[Network]] = {}  # runs that differ in the ratio alone
    for record, look in _looks(records):
        for network, marker in zip(record.small, [look["marker"], *_DERIVED], strict=False):
            styled.append((network, look | {"marker": marker}))
        for network in record.small[:1]:
            ties.setdefault(network.kind.rpartition(", ")[0], []).append(network)
    charts = []
    for column in dict.fromkeys(column for network, _ in styled for column in network.costs):
        if column != PARAMETERS and column != ONNX and not column.startswith("ms"):
            continue
        million = 1e6 if column == PARAMETERS else 1
        curves = []
        for network, look in styled:
            points, y = _place(network, column, million), 100 * network.accuracy
            curves.append(Curve(network.name, points, _MARKED | look))
            ends = getattr(network.costs.get(column), "quartiles", None) or ()
            curves.append(Curve("", [(x, y) for x in ends], {"color": look["color"]}))
        for tied in ties.values():
            line = sorted(point for network in tied for point in _place(network, column, million))
            curves.append(Curve("", line, {"color": MUTED, "linewidth": 0.8, "zorder": 1}))
        unit, _, caption = column.partition(", ")
        unit = {"ms": "milliseconds", "MB": "megabytes"}.get(unit, unit)
        charts += draw(
            f"Accuracy against {unit}",
            caption,
            curves,
            x=f"million {unit}" if column == PARAMETERS else unit,
            y="test accuracy, %",
            from_zero=True,
            salt=f"{records[0].title} {column}",
        )
    return charts


def _place(network: Network, column: str, unit: float) -> list[tuple[float, float]]:
    """Return where a network's marker stands; nowhere if its cost was not measured."""
    cost = network.costs.get(column)
    return [(cost.value / unit, 100 * network.accuracy)] if isinstance(cost, Cost) else []


def _epochs(run: Record) -> Lines:
    return [(epoch["epoch"], epoch) for epoch in run.epochs]


def _distortions(run: Record) -> Lines:
    """Return a run's distortions by epoch, and no more than an axis can show."""
    steps = run.epochs[-1]["step"] / run.epochs[-1]["epoch"] if run.epochs else math.inf
    every = math.ceil(len(run.distortions) / _MAX_POINTS) or 1
    return [(line["step"] / steps, line) for line in run.distortions[::-1][::every][::-1]]


def _around(split: str, name: str, unit: int = 1) -> tuple[Height, Height]:
    """Return what reads a measurement just before a distortion, and just after it."""

    def read(line: Values, moment: int) -> float | None:
        return unit * line[split][moment][name] if line[split] else None

    return partial(read, moment=0), partial(read, moment=1)


_TRAINING: tuple[tuple[str, str, Callable[[Record], Lines], tuple[Height, ...], str, Scale], ...]
_TRAINING = (  # title, caption, lines of a run, heights (the second dotted), what goes up, scale
    (
        "Test accuracy while training",
        "After each epoch, with the weights as training left them.",
        _epochs,
        (lambda epoch: 100 * epoch["test"]["accuracy"],),
        "test accuracy, %",
        "linear",
    ),
    (
        "Training loss",
        "The mean over each epoch's images, augmented.",
        _epochs,
        (lambda epoch: epoch["train_loss"],),
        "cross-entropy",
        "log",
    ),
    (
        "Training loss around distortions",
        "On some images, not augmented: just before each one and, dotted, just after it.",
        _distortions,
        _around("train", "loss"),
        "cross-entropy",
        "log",
    ),
    (
        "Test accuracy around distortions",
        "On some test images: just before each one and, dotted, just after it.",
        _distortions,
        _around("test", "accuracy", 100),
        "test accuracy, %",
        "linear",
    ),
    (
        "What a distortion costs: ΔL/L",
        "The share by which the loss rises at each; logarithmic beyond ±1.",
        _distortions,
        (lambda line: line["loss_increase"],),
        "ΔL/L",
        "symlog",
    ),
    (
        "How far a distortion moves the weights: Δw",
        "‖W − W′‖ ÷ N, over all N compressed weights.",
        _distortions,
        (lambda line: line["weight_shift"],),
        "Δw",
        "log",
    ),
)


def training_charts(records: Sequence[Record]) -> list[Chart]:
    """Return loss and accuracy over epochs, then what distortions changed."""
    marks = sorted({epoch for record in records for epoch in record.milestones})
    drops = " Upright dots: the learning rate drops." * bool(marks)
    over = partial(draw, x="epoch", marks=marks, salt=records[0].title)
    charts = []
    for title, caption, lines_of, heights, y, scale in _TRAINING:
        curves = [
            Curve(
                "" if change else run.name,
                [(x, height(v)) for x, v in lines_of(run)],
                look | change,
            )
            for height, change in zip(heights, ({}, _AFTER), strict=False)
            for run, look in _looks(records)
        ]
        charts += over(title, caption + drops, curves, y=y, scale=scale)
    return charts


def distinct_plans(records: Sequence[Record]) -> list[tuple[Record, dict[str, Any]]]:
    """Return the first run of every plan, with its looks."""
    plans = [record.plan for record in records]
    looks = enumerate(_looks(records))
    return [(r, look) for n, (r, look) in looks if r.plan and r.plan not in plans[:n]]


def layer_charts(records: Sequence[Record]) -> list[Chart]:
    """Return the work of each layer, before and after."""

    def macs(run: Record, *, factored: bool) -> Points:
        assert run.plan is not None
        counts = [run.plan.layer_macs(layer, factored=factored) for layer in run.plan.layers]
        return [(number, count / 1e6) for number, count in enumerate(counts, start=1)]

    plans = distinct_plans(records)
    dense = [Curve("dense", macs(r, factored=False), {"color": MUTED}) for r, _ in plans[:1]]
    return draw(
        "The work of each layer",
        "For one image, dense and as planned: the gap is what is saved. Runs with the same plan "
        "share one line, under the first one's name.",
        [*dense, *(Curve(r.name, macs(r, factored=True), look) for r, look in plans)],
        x="layer, as numbered in its table",
        y="million MACs",
        salt=records[0].title,
    )
