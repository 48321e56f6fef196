"""The plots of a case; each is left out where there is nothing to show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from deeptwist.benchmark.comparison import Comparison
from deeptwist.report.cases import Case
from deeptwist.report.curves import Line, draw_lines, draw_markers, draw_ratios, lines_of
from deeptwist.report.looks import DOTS, INK, MUTED, Look, looks_of
from deeptwist.report.svg import render
from deeptwist.report.wording import (
    listed,
    milliseconds,
    percent,
    power_of_ten,
    printable,
    speed,
)
from deeptwist.training.records import Run, Summary

_LINEAR_UP_TO = 0.5  # a ΔL/L beyond it would flatten all others on a linear axis


@dataclass(frozen=True)
class Plot:
    """One plot with its words.

    Attributes:
        title: what is plotted.
        caption: what one sees, and how the axes are counted.
        svg: the drawing.
        key: the runs in it by name, with their looks; empty where the drawing names them.
    """

    title: str
    caption: str
    svg: Markup
    key: tuple[tuple[str, Look], ...] = ()


Drawn = Sequence[tuple[Run, Look]]


def plots_of(case: Case, prefix: str) -> list[Plot]:
    """All plots of a case that have something to show.

    Args:
        case: see `Case`.
        prefix: unlike that of any other case on the page; the drawings' ids begin with it.
    """
    drawn = list(zip(case.runs, looks_of(case.runs), strict=True))
    plots = (
        _accuracy_against_compression(case, drawn, f"{prefix}-compression"),
        _test_accuracy(drawn, f"{prefix}-accuracy"),
        _train_loss(drawn, f"{prefix}-loss"),
        _loss_increase(drawn, f"{prefix}-increase"),
        _weight_shift(drawn, f"{prefix}-shift"),
        _latency(drawn, f"{prefix}-latency"),
        _relative_errors(drawn, f"{prefix}-errors"),
    )
    return [plot for plot in plots if plot is not None]


def _accuracy_against_compression(case: Case, drawn: Drawn, name: str) -> Plot | None:
    dense = case.dense_accuracy
    if dense is None:
        return None
    compressed = [(run, look) for run, look in drawn if run.summary.mode != "dense"]
    lines = lines_of(compressed, lambda run: [_compression_and_accuracy(run.summary)])

    def paint(axes: Axes) -> None:
        axes.axhline(dense * 100, color=MUTED, linestyle=(0, DOTS))
        axes.annotate(
            "dense",
            (0, dense * 100),
            xycoords=("axes fraction", "data"),
            xytext=(5, -4),
            textcoords="offset points",
            verticalalignment="top",
        )
        draw_ratios(axes, lines)
        draw_markers(axes, lines)
        axes.margins(y=0.12)
        across = [x for line in lines for x in line.x]
        axes.set_xlim(0.8 * min(across), 1.12 * max(across))
        axes.set_title("test accuracy, %")
        axes.set_xlabel("dense ÷ decomposed parameters")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))

    return _plot(
        "Accuracy against compression",
        f"Each marker is one run with {_modes(case.compressed)}, at the accuracy of the network "
        "that it would deploy: further right is smaller, higher is better. The dotted line is the "
        f"dense network, {percent(dense)}. Across: parameters of the whole dense network ÷ "
        "those of the decomposed one. The accuracy axis need not begin at zero.",
        lines,
        paint,
        name,
    )


def _test_accuracy(drawn: Drawn, name: str) -> Plot | None:
    lines = lines_of(
        drawn, lambda run: [(e["epoch"], 100 * e["test"]["accuracy"]) for e in run.epochs]
    )
    caption = "One line a run: the share of test images that are recognised after each epoch."
    if any(run.summary.mode == "deeptwist" for run, _ in drawn):
        caption += (
            " In DeepTwist mode these are the weights as training left them, some steps after the "
            "last distortion; what is deployed is decomposed once more, and its accuracy is in the "
            "table above."
        )

    def paint(axes: Axes) -> None:
        draw_lines(axes, lines, x="epoch", y="test accuracy, %")

    return _plot("Test accuracy while training", caption, lines, paint, name)


def _train_loss(drawn: Drawn, name: str) -> Plot | None:
    lines = lines_of(drawn, lambda run: [(e["epoch"], e["train_loss"]) for e in run.epochs])

    def paint(axes: Axes) -> None:
        draw_lines(axes, lines, x="epoch", y="cross-entropy")

    return _plot(
        "Training loss",
        "One line a run: the mean cross-entropy over the epoch's images, augmented, each taken "
        "before the step that learns from it.",
        lines,
        paint,
        name,
    )


def _loss_increase(drawn: Drawn, name: str) -> Plot | None:
    lines = lines_of(drawn, lambda run: [(d["step"], d["loss_increase"]) for d in run.distortions])
    furthest = max((abs(y) for line in lines for y in line.y), default=0.0)
    linear = furthest <= _LINEAR_UP_TO

    def paint(axes: Axes) -> None:
        axes.axhline(0, color=MUTED, linewidth=0.8)
        if not linear:
            axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        draw_lines(axes, lines, x="optimizer step", y="ΔL/L")

    return _plot(
        "What a distortion costs: ΔL/L",
        "At each distortion, how much the training loss on a fixed batch rises, as a share of the "
        "loss just before (1 is a doubling; Figure 4 of the paper). Near zero, the weights have "
        "come to where low rank costs nothing."
        + ("" if linear else " The upright axis is linear up to ±0.1 and logarithmic beyond."),
        lines,
        paint,
        name,
    )


def _weight_shift(drawn: Drawn, name: str) -> Plot | None:
    lines = lines_of(
        drawn,
        lambda run: [(d["step"], d["weight_shift"]) for d in run.distortions if d["weight_shift"]],
    )

    def paint(axes: Axes) -> None:
        axes.set_yscale("log")
        heights = [y for line in lines for y in line.y]
        few_decades = max(heights) < 50 * min(heights)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        draw_lines(axes, lines, x="optimizer step", y="Δw")

    return _plot(
        "How far a distortion moves the weights: Δw",
        "At each distortion, the last one at the end of training included, the distance from the "
        "weights to their low-rank approximation: Δw = ‖W − W′‖ ÷ N over all N compressed weights "
        "(Figure 4 of the paper). Falling, the weights stay closer to low rank in between. "
        "The upright axis is logarithmic.",
        lines,
        paint,
        name,
    )


def _latency(drawn: Drawn, name: str) -> Plot | None:
    timed = [
        (run.summary, run.summary.latency, look)
        for run, look in drawn
        if run.summary.latency is not None
    ]
    if not timed:
        return None
    furthest = max(max(latency.dense.upper, latency.decomposed.upper) for _, latency, _ in timed)

    def paint(axes: Axes) -> None:
        for row, (summary, latency, look) in enumerate(timed):
            _draw_bars(axes, row, summary.name, latency, look, furthest)
        axes.set_xlim(0, furthest * 1.32)  # room for the words behind the longest bar
        axes.set_ylim(len(timed) - 0.55, -0.5)
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("milliseconds for one batch")

    batches = sorted({summary.latency_batch or 0 for summary, _, _ in timed})
    title = "Latency"
    return Plot(
        title,
        f"One forward pass of a batch of {listed([str(batch) for batch in batches])} images, "
        "dense in grey and decomposed in the run's colour, timed in turn on the machine named "
        "below. Bars are medians, whiskers the quartiles; shorter is better. The axis begins at "
        "zero.",
        render(
            paint,
            name=name,
            label=_label(title, [summary.name for summary, _, _ in timed]),
            height=0.75 + 0.56 * len(timed),
        ),
    )


def _draw_bars(
    axes: Axes, row: int, name: str, latency: Comparison, look: Look, furthest: float
) -> None:
    axes.text(0, row - 0.2, f"{printable(name, 48)}: {speed(latency.speedup)}")
    sides = (latency.dense, MUTED, "dense"), (latency.decomposed, look.color, "decomposed")
    for side, (timing, color, word) in enumerate(sides):
        y = row + 0.26 * side
        axes.barh(y, timing.median, height=0.22, color=color)
        quartiles = [[timing.median - timing.lower], [timing.upper - timing.median]]
        axes.errorbar(timing.median, y, xerr=quartiles, color=INK, elinewidth=0.9, capsize=2)
        axes.text(
            timing.upper + 0.02 * furthest,
            y,
            f"{milliseconds(timing.median)} {word}",
            verticalalignment="center",
            fontsize=9.5,
        )


def _relative_errors(drawn: Drawn, name: str) -> Plot | None:
    first: list[tuple[Run, Look]] = []
    for run, look in drawn:
        if all(run.plan != other.plan for other, _ in first):
            first.append((run, look))
    lines = lines_of(
        first,
        lambda run: [
            (number, layer.relative_error)
            for number, layer in enumerate(run.plan.layers if run.plan else (), start=1)
        ],
    )

    def paint(axes: Axes) -> None:
        draw_lines(axes, lines, x="layer, as numbered in its table below", y="‖W − W′‖ ÷ ‖W‖")
        axes.set_ylim(0, 1.08 * max(y for line in lines for y in line.y) or 1)

    return _plot(
        "Relative error of each layer",
        "How much of each layer's weights its approximation misses before any training: 0 is "
        "exact, 1 is all of it. Layers that are kept have no point. Runs with the same plan share "
        "one line, under the first one's name.",
        lines,
        paint,
        name,
    )


def _plot(
    title: str, caption: str, lines: Sequence[Line], paint: Callable[[Axes], None], name: str
) -> Plot | None:
    if not lines:
        return None
    svg = render(paint, name=name, label=_label(title, [line.name for line in lines]))
    return Plot(title, caption, svg, tuple((line.name, line.look) for line in lines))


def _label(title: str, names: Sequence[str]) -> str:
    return f"{title}; runs: {listed([printable(name, 48) for name in names])}"


def _compression_and_accuracy(summary: Summary) -> tuple[float, float]:
    return summary.parameters_before / summary.parameters, summary.accuracy * 100


def _modes(runs: Sequence[Run]) -> str:
    words = {
        "deeptwist": "DeepTwist (filled)",
        "decomposed": "conventional fine-tuning (hollow)",
    }
    present = {run.summary.mode for run in runs}
    return listed([word for mode, word in words.items() if mode in present], "or")
