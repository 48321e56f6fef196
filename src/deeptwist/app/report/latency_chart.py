"""The times of a group of runs, dense and decomposed, as bars."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from deeptwist.app.report.formatting import (
    format_milliseconds,
    format_speedup,
    join_words,
    sanitize,
)
from deeptwist.app.report.styles import INK, MUTED, PlotStyle
from deeptwist.app.training.metrics import Run
from deeptwist.measure.comparison import Comparison


@dataclass(frozen=True)
class LatencyChart:
    """Bars of the dense and the decomposed network, run by run.

    Attributes:
        title: what is shown.
        caption: what one sees.
        bars: a run's name, its latencies, and the colour of the decomposed network.
    """

    title: str
    caption: str
    bars: tuple[tuple[str, Comparison, str], ...]

    @property
    def names(self) -> list[str]:
        """The runs'."""
        return [name for name, _, _ in self.bars]

    @property
    def height(self) -> float:
        """The drawing's, in inches."""
        return 0.75 + 0.56 * len(self.bars)

    def draw(self, axes: Axes) -> None:
        """Draw two bars with their quartiles for every run."""
        longest = max(max(bar.dense.upper, bar.decomposed.upper) for _, bar, _ in self.bars)
        for row, (name, latency, color) in enumerate(self.bars):
            axes.text(0, row - 0.2, f"{sanitize(name)}: {format_speedup(latency.speedup)}")
            sides = (latency.dense, MUTED, "dense"), (latency.decomposed, color, "decomposed")
            for side, (time, fill, word) in enumerate(sides):
                y = row + 0.26 * side
                quartiles = [[time.median - time.lower], [time.upper - time.median]]
                axes.barh(y, time.median, height=0.22, color=fill)
                axes.errorbar(time.median, y, xerr=quartiles, color=INK, elinewidth=0.9, capsize=2)
                label = f"{format_milliseconds(time.median)} {word}"
                x = time.upper + 0.02 * longest
                axes.text(x, y, label, verticalalignment="center", fontsize=9.5)
        axes.set_xlim(0, longest * 1.32)  # room for the words behind the longest bar
        axes.set_ylim(len(self.bars) - 0.55, -0.5)
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("milliseconds for one batch")


def latency_chart(styled: Sequence[tuple[Run, PlotStyle]]) -> LatencyChart:
    """Return the bars of all runs that were timed."""
    bars = tuple(
        (run.summary.name, run.summary.latency, style.color)
        for run, style in styled
        if run.summary.latency is not None
    )
    batches = {run.summary.latency_batch or 0 for run, _ in styled if run.summary.latency}
    return LatencyChart(
        "Latency",
        f"One forward pass of a batch of {join_words([str(size) for size in sorted(batches)])} "
        "images, dense in grey and decomposed in the run's colour, timed in turn on the machine "
        "named below. Bars are medians, whiskers the quartiles; shorter is better. The axis "
        "begins at zero.",
        bars,
    )
