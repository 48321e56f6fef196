"""The page of a sweep over ratios: what is lost, and what is saved, at each."""

from collections.abc import Sequence
from pathlib import Path

from deeptwist.app.cli.ratio_sweep import SweepPoint
from deeptwist.app.report.formatting import NONE, format_percent
from deeptwist.app.report.html import write_page
from deeptwist.app.report.plotting import Chart, Curve, render
from deeptwist.app.report.styles import SERIES, PlotStyle
from deeptwist.app.report.tables import Cell, Table

_KNEE = "The dotted line is the knee: from there on each step costs more than the one before it."


def write_sweep(
    points: Sequence[SweepPoint],
    knee: int,
    path: Path,
    *,
    title: str,
    dense_accuracy: float | None = None,
) -> None:
    """Write a sweep as one HTML file that needs nothing else.

    Args:
        points: see `deeptwist.app.cli.ratio_sweep.sweep`.
        knee: the index of the point that is marked.
        path: the file to write; an old one is replaced.
        title: of the page.
        dense_accuracy: of the dense network, where the points have accuracies.

    Raises:
        DeepTwistError: if the file cannot be written.
    """
    charts = _charts(points, knee, dense_accuracy)
    plots = [(chart, render(chart, name=chart.title)) for chart in charts]
    write_page("sweep.html.j2", path, title=title, plots=plots, table=_table(points, knee))


def _charts(points: Sequence[SweepPoint], knee: int, dense_accuracy: float | None) -> list[Chart]:
    mark = (points[knee].ratio,)

    def curve(values: Sequence[float], number: int, label: str = "") -> Curve:
        xy = tuple(zip((point.ratio for point in points), values, strict=True))
        return Curve(xy, PlotStyle(SERIES[number], "os"[number]), label)

    charts = [
        Chart(
            "Predicted error",
            "The root mean square, over the layers, of the relative error of each: of its outputs "
            f"on the calibration images, or of its weights where there are none. {_KNEE}",
            (curve([point.error for point in points], 0),),
            x="ratio asked",
            y="relative error",
            log_x=True,
            marks=mark,
            bottom=0,
        ),
        Chart(
            "What is saved",
            "Of the whole network, layers that stay dense included.",
            (
                curve([point.weights for point in points], 0, "weights"),
                curve([point.macs for point in points], 1, "MACs"),
            ),
            x="ratio asked",
            y="times fewer",
            log_x=True,
            marks=mark,
        ),
    ]
    accuracies = [100 * point.accuracy for point in points if point.accuracy is not None]
    if accuracies and dense_accuracy is not None:
        charts.append(
            Chart(
                "Accuracy without training",
                f"Decomposed, batch norm's statistics taken anew, nothing trained. {_KNEE}",
                (curve(accuracies, 0),),
                x="ratio asked",
                y="test accuracy, %",
                log_x=True,
                marks=mark,
                level=("dense", 100 * dense_accuracy),
            )
        )
    return charts


def _table(points: Sequence[SweepPoint], knee: int) -> Table:
    rows = tuple(
        (
            Cell(f"{point.ratio:g}×", note="knee" * (index == knee)),
            Cell(f"{point.error:.3f}"),
            Cell(f"{point.weights:.2f}×"),
            Cell(f"{point.macs:.2f}×"),
            Cell(NONE if point.accuracy is None else format_percent(point.accuracy)),
        )
        for index, point in enumerate(points)
    )
    columns = "ratio", "relative error", "fewer weights", "fewer MACs", "accuracy, untrained"
    return Table("ratios", "The same in numbers.", columns, (rows,))
