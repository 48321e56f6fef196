"""The plots of a case; each is left out where there is nothing to show."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from deeptwist.benchmark.comparison import Comparison
from deeptwist.report.comparison import Case
from deeptwist.report.curves import draw_lines, draw_markers, draw_ratios, draw_refined, lines_of
from deeptwist.report.distortions import distortion_plots
from deeptwist.report.drawing import Drawn, Plot, label, plot
from deeptwist.report.formatting import (
    METHOD_MODES,
    listed,
    milliseconds,
    percent,
    printable,
    speed,
)
from deeptwist.report.styles import DOTS, INK, MUTED, Look, looks_of, refined_looks
from deeptwist.report.svg import render
from deeptwist.training.metrics import Run, Summary

_REFINED = " At a run's right, in its colour: the networks under it in the table."


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
        *distortion_plots(drawn, prefix),
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
    refined = refined_looks(
        refined.name for run in case.compressed for refined in run.summary.variants
    )

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
        draw_refined(axes, lines, refined)
        axes.margins(y=0.12)
        across = [x for line in lines for x in line.x]
        axes.set_xlim(0.8 * min(across), 1.12 * max(across))
        axes.set_title("test accuracy, %")
        axes.set_xlabel("dense ÷ decomposed parameters")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))

    return plot(
        "Accuracy against compression",
        f"Each marker is one run with {_modes(case.compressed)}, at the accuracy of the network "
        "that it would deploy: further right is smaller, higher is better. The dotted line is the "
        f"dense network, {percent(dense)}. Across: parameters of the whole dense network ÷ "
        "those of the decomposed one. The accuracy axis need not begin at zero."
        + (_REFINED if refined else ""),
        lines,
        paint,
        name,
        also=refined.items(),
    )


def _test_accuracy(drawn: Drawn, name: str) -> Plot | None:
    lines = lines_of(
        drawn, lambda run: [(e["epoch"], 100 * e["test"]["accuracy"]) for e in run.epochs]
    )
    caption = "One line a run: the share of test images that are recognised after each epoch."
    if any(run.distortions for run, _ in drawn):
        caption += (
            " Where weights are distorted, these are the weights as training left them, some steps "
            "after the last distortion; what is deployed is decomposed once more, and its accuracy "
            "is in the table above."
        )

    def paint(axes: Axes) -> None:
        draw_lines(axes, lines, x="epoch", y="test accuracy, %")

    return plot("Test accuracy while training", caption, lines, paint, name)


def _train_loss(drawn: Drawn, name: str) -> Plot | None:
    lines = lines_of(drawn, lambda run: [(e["epoch"], e["train_loss"]) for e in run.epochs])

    def paint(axes: Axes) -> None:
        draw_lines(axes, lines, x="epoch", y="cross-entropy")

    return plot(
        "Training loss",
        "One line a run: the mean cross-entropy over the epoch's images, augmented, each taken "
        "before the step that learns from it.",
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
            label=label(title, [summary.name for summary, _, _ in timed]),
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
            (number, getattr(layer, "relative_error", None))
            for number, layer in enumerate(run.plan.layers if run.plan else (), start=1)
        ],
    )

    def paint(axes: Axes) -> None:
        draw_lines(axes, lines, x="layer, as numbered in its table below", y="‖W − W′‖ ÷ ‖W‖")
        axes.set_ylim(0, 1.08 * max(y for line in lines for y in line.y) or 1)

    return plot(
        "Relative error of each layer",
        "How much of each layer's weights its approximation misses before any training: 0 is "
        "exact, 1 is all of it. Layers that are kept have no point. Runs with the same plan share "
        "one line, under the first one's name.",
        lines,
        paint,
        name,
    )


def _compression_and_accuracy(summary: Summary) -> tuple[float, float]:
    return summary.parameters_before / summary.parameters, summary.accuracy * 100


def _modes(runs: Sequence[Run]) -> str:
    present = {run.summary.mode for run in runs}
    words = {
        "DeepTwist (filled)": "deeptwist" in present,
        "conventional fine-tuning (hollow)": "finetune" in present,
        "a control (hollow, in a colour of its own)": not present <= set(METHOD_MODES),
    }
    return listed([word for word, there in words.items() if there], "or")
