"""Colours, lines and markers: a run looks the same in every chart of its group."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deeptwist.app.training.metrics import Run
from deeptwist.app.training.modes import find_mode

# matplotlib wants a colour now, the page decides on it later (light, dark, print): these stand in
# for the variables of style.css, which replace them in the SVG.
INK, MUTED, GRID, CARD = "#a1b2c0", "#a1b2c1", "#a1b2c2", "#a1b2c3"
SERIES = tuple(f"#a1b2d{number}" for number in range(6))
CSS_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    CARD: "var(--card)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES)},
}

LineStyle = str | tuple[int, tuple[float, ...]]
SOLID, NO_LINE = "solid", "none"
DOTTED, DASHED = (0, (1.0, 1.6)), (0, (4.0, 2.0))
_DASH_DOTTED = (0, (4.0, 1.6, 1.0, 1.6))
_MARKERS, _STROKES = "os^DvPX", "+x12"


@dataclass(frozen=True)
class PlotStyle:
    """How a curve is drawn.

    Attributes:
        color: one of `CSS_VARIABLES`.
        marker: as matplotlib calls it; empty for none.
        filled: whether the marker is.
        line: as matplotlib takes it.
        width: of the line, in points.
        size: of the marker, in points.
    """

    color: str
    marker: str = ""
    filled: bool = True
    line: LineStyle = SOLID
    width: float = 1.6
    size: float = 5.5

    def options(self) -> dict[str, Any]:
        """Return the style as options of `Axes.plot`. Filled markers lie above hollow ones."""
        return {
            "color": self.color,
            "marker": self.marker,
            "markersize": self.size,
            "markerfacecolor": self.color if self.filled else CARD,
            "markeredgecolor": self.color,
            "markeredgewidth": 1.4,
            "linestyle": self.line,
            "linewidth": self.width,
            "zorder": 3 if self.filled else 2.5,
        }

    def as_marker(self) -> "PlotStyle":
        """Return the style without its line; a hollow marker is a ring around a filled one."""
        return replace(self, line=NO_LINE, size=6.5 if self.filled else 10.0)


def assign_styles(runs: Sequence[Run]) -> list[PlotStyle]:
    """Return one style per run.

    DeepTwist and conventional fine-tuning of the same decomposition and ratio share colour and
    marker; the line and the marker's inside tell them apart. A control has its own. With six
    colours and seven markers, 42 pairs or controls look different.
    """
    numbers: dict[tuple[str | None, float | None, str, int], int] = {}
    repeats: Counter[tuple[str | None, float | None, str]] = Counter()
    styles = []
    for run in runs:
        summary = run.summary
        mode = find_mode(summary.mode)
        if not mode.compresses:
            styles.append(PlotStyle(MUTED, _MARKERS[0], line=DOTTED))
            continue
        same = summary.decomposition, summary.ratio, summary.mode
        control = mode.name if mode.is_ablation else ""
        pair = summary.decomposition, summary.ratio, control, repeats[same]
        repeats[same] += 1
        number = numbers.setdefault(pair, len(numbers))
        styles.append(
            PlotStyle(
                SERIES[number % len(SERIES)],
                _MARKERS[number % len(_MARKERS)],
                filled=mode.name == "deeptwist",
                line=_DASH_DOTTED if control else SOLID if mode.name == "deeptwist" else DASHED,
            )
        )
    return styles


def variant_styles(names: Iterable[str]) -> dict[str, PlotStyle]:
    """Return a marker of strokes for each kind of variant; its colour is to be the run's."""
    return {
        name: PlotStyle(MUTED, _STROKES[number % len(_STROKES)], line=NO_LINE)
        for number, name in enumerate(dict.fromkeys(names))
    }


def before_and_after(style: PlotStyle) -> tuple[PlotStyle, PlotStyle]:
    """Return a run's style just before a distortion, and just after it."""
    return replace(style, filled=True, line=SOLID), replace(style, filled=False, line=DASHED)
