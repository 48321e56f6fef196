"""Charts as SVG that takes its colours from the page (or file) that it stands in."""

import io
import math
import re
import warnings
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, Protocol

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from deeptwist.app.report.formatting import join_words, power_of_ten, sanitize
from deeptwist.app.report.styles import (
    CSS_VARIABLES,
    DOTTED,
    GRID,
    INK,
    MUTED,
    NO_LINE,
    PlotStyle,
)

_WIDTH = 5.3  # of every drawing, in inches
_MAX_MARKERS = 12  # on one line
_LEGEND_LETTERS = 66  # that fit beside one another
_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a run may be called "$x$"
    "font.size": 10.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Curve:
    """Points in a style.

    Attributes:
        points: (x, y), finite.
        style: see `PlotStyle`.
        label: in the legend; empty for a curve that the legend leaves out.
        shift: how far the points are drawn to the right of their place, in points of 1/72 inch.
    """

    points: tuple[tuple[float, float], ...]
    style: PlotStyle
    label: str = ""
    shift: float = 0


@dataclass(frozen=True)
class Chart:
    """Curves over one another.

    Attributes:
        title: what is shown.
        caption: what one sees, and how the axes are counted.
        curves: see `Curve`.
        x: what goes across.
        y: what goes up.
        scale: of the upright axis; "symlog" is linear up to ±0.1.
        from_zero: whether the x axis begins at zero.
        log_x: whether equal factors are equally far apart, with a tick at every point.
        level: a name and a height to draw a dotted line at.
        marks: where to draw dotted upright lines.
        bottom: where the upright axis begins; `None` for wherever the points do.
        legend: further entries.
    """

    title: str
    caption: str
    curves: tuple[Curve, ...]
    x: str
    y: str
    scale: Literal["linear", "log", "symlog"] = "linear"
    from_zero: bool = False
    log_x: bool = False
    level: tuple[str, float] | None = None
    marks: tuple[float, ...] = ()
    bottom: float | None = None
    legend: tuple[tuple[str, PlotStyle], ...] = ()

    @property
    def names(self) -> list[str]:
        """The labels of the curves."""
        return [curve.label for curve in self.curves if curve.label]

    @property
    def entries(self) -> list[tuple[str, PlotStyle]]:
        """All entries of the legend."""
        labelled = [(curve.label, curve.style) for curve in self.curves if curve.label]
        level = [(self.level[0], PlotStyle(MUTED, line=DOTTED))] if self.level else []
        return [*labelled, *self.legend, *level]

    @property
    def height(self) -> float:
        """The drawing's, in inches."""
        return 3.0 + 0.19 * math.ceil(len(self.entries) / self._columns)

    @property
    def _columns(self) -> int:
        longest = max((len(sanitize(name)) for name, _ in self.entries), default=0)
        return max(1, min(3, _LEGEND_LETTERS // (longest + 7)))

    def draw(self, axes: Axes) -> None:
        """Draw the curves, the axes and the legend."""
        for curve in self.curves:
            _draw_curve(axes, curve)
        for mark in self.marks:
            axes.axvline(mark, color=MUTED, linestyle=DOTTED, linewidth=1.1, zorder=1.5)
        if self.level is not None:
            axes.axhline(self.level[1], color=MUTED, linestyle=DOTTED, linewidth=1.6)
        axes.set_title(self.y)
        axes.set_xlabel(self.x)
        self._draw_x_axis(axes)
        self._draw_y_axis(axes)
        handles = [axes.plot([], [], **style.options())[0] for _, style in self.entries]
        axes.figure.legend(
            handles,
            [_legend_label(name) for name, _ in self.entries],
            loc="outside lower left",
            ncols=self._columns,
            columnspacing=1.2,
        )

    def _draw_x_axis(self, axes: Axes) -> None:
        across = [x for curve in self.curves for x, _ in curve.points]
        if self.from_zero:
            axes.set_xlim(0, 1.12 * max(across))
        elif self.log_x:
            axes.set_xscale("log")
            axes.set_xticks(sorted(set(across)), minor=False)
            axes.set_xticks([], minor=True)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            whole = all(x == int(x) for x in across)
            locator = MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=whole)
            axes.xaxis.set_major_locator(locator)

    def _draw_y_axis(self, axes: Axes) -> None:
        heights = [y for curve in self.curves for _, y in curve.points]
        if self.scale == "log":
            axes.set_yscale("log")
            few_decades = max(heights) < 50 * min(heights)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
            small = max(heights) < 0.1
            axes.yaxis.set_major_formatter(
                FuncFormatter(lambda value, _: power_of_ten(value) if small else f"{value:g}")
            )
        elif self.scale == "symlog":
            axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))  # short numbers
            if self.bottom is not None:
                axes.set_ylim(self.bottom, 1.08 * max(heights) or 1)
            elif self.from_zero:
                axes.margins(y=0.12)


class Drawable(Protocol):
    """What `render` draws."""

    @property
    def title(self) -> str:
        """What is shown; read out in the drawing's place, with the names."""

    @property
    def names(self) -> list[str]:
        """Of the runs in it."""

    @property
    def height(self) -> float:
        """The drawing's, in inches."""

    def draw(self, axes: Axes) -> None:
        """Draw on empty axes."""


def render(chart: Drawable, *, name: str) -> str:
    """Return a chart as an ``<svg>`` element whose colours are CSS variables.

    Args:
        chart: see `Drawable`.
        name: unlike that of any other drawing on the page; its ids depend on it.
    """
    buffer = io.StringIO()
    with style.context(["default", _RC, {"svg.hashsalt": name}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser's fonts have it
        figure = Figure(figsize=(_WIDTH, chart.height), layout="constrained")
        chart.draw(figure.subplots())
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # of groups, the same in every drawing
    # Coordinates are shortened; text, between > and <, stays as it is.
    svg = re.sub(r"(>[^<]+<)|\d+\.\d{3,}", lambda m: m[1] or f"{float(m[0]):.2f}", svg)
    for color, variable in CSS_VARIABLES.items():
        svg = svg.replace(color, variable)
    spoken = f"{chart.title}; runs: {join_words([sanitize(label) for label in chart.names])}"
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(spoken)}" ', 1)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    x, y = zip(*curve.points, strict=True)
    options = curve.style.options()
    if curve.style.line == NO_LINE:
        options["clip_on"] = False
    else:
        options["markevery"] = math.ceil(len(x) / _MAX_MARKERS)
    if curve.shift:
        aside = ScaledTranslation(curve.shift / 72, 0, axes.figure.dpi_scale_trans)
        options["transform"] = axes.transData + aside
        axes.update_datalim(curve.points)  # which matplotlib does not under such a transform
    axes.plot(x, y, **options)
    axes.autoscale_view()


def _legend_label(name: str) -> str:
    # matplotlib leaves out what begins with an underscore.
    return f"\N{ZERO WIDTH SPACE}{sanitize(name)}"
