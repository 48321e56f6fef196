"""Figures as SVG files, inverted where the reader's page is dark."""

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from matplotlib import style
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.page import Figure

_INK, _MUTED = "#1f2328", "#8a9098"
_COLORS = "#0072b2", "#c24a00", "#007d5b", "#a5437c", "#8a6700", "#5e4fc0"
_MARKERS = "os^DvPX"
_DARK = "@media (prefers-color-scheme: dark) { svg { filter: invert(1) hue-rotate(180deg); } }"
_STYLE = {
    "svg.fonttype": "none",  # the browser's own letters
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "legend.frameon": False,
}
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Points with a name in the legend.

    Attributes:
        name: in the legend.
        points: (x, y); what has not been measured has no height.
        color: number of its colour and marker; `None` for the ink's.
        dashed: the line, and its markers hollow.
        markers: whether it has any.
        line: whether it has one.
        band: (x, lowest, highest), shaded behind it.
    """

    name: str
    points: Iterable[tuple[float, float | None]]
    color: int | None
    dashed: bool = False
    markers: bool = True
    line: bool = True
    band: Sequence[tuple[float, float, float]] = ()

    @property
    def look(self) -> dict[str, Any]:
        """Return the options of `Axes.plot`. Filled markers lie above hollow ones."""
        color = _INK if self.color is None else _COLORS[self.color % len(_COLORS)]
        return {
            "color": color,
            "marker": _MARKERS[(self.color or 0) % len(_MARKERS)] if self.markers else "",
            "markerfacecolor": "white" if self.dashed else color,
            "linestyle": "none" if not self.line else "--" if self.dashed else "-",
            "zorder": 2.5 if self.dashed else 3,
        }


def known(points: Iterable[tuple[float, float | None]]) -> tuple[tuple[float, float], ...]:
    """Return the points whose height has been measured."""
    return tuple((x, y) for x, y in points if y is not None)


def draw(
    name: str,
    title: str,
    curves: Sequence[Curve],
    level: tuple[str, float | None] = ("", None),
    *,
    x: str,
    y: str,
    scale: Literal["linear", "log"] = "linear",
    log_x: bool = False,
    marks: Sequence[float] = (),
) -> list[Figure]:
    """Draw curves over one another; return no figure where none has a point.

    Args:
        name: see `Figure`.
        title: see `Figure`.
        curves: see `Curve`.
        level: a name and a height to draw a dotted line at.
        x: what goes across.
        y: what goes up.
        scale: of the upright axis.
        log_x: whether equal factors are equally far apart, with a tick at every point.
        marks: where to draw dotted upright lines.
    """
    drawn = [(curve, points) for curve in curves if (points := known(curve.points))]
    if not drawn:
        return []
    with style.context(["default", _STYLE, {"svg.hashsalt": name}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser's letters have it
        canvas = Canvas(layout="constrained")
        axes = canvas.subplots()
        for curve, points in drawn:
            if curve.band:
                xs, lowest, highest = zip(*curve.band, strict=True)
                color = curve.look["color"]
                axes.fill_between(xs, lowest, highest, color=color, alpha=0.2, linewidth=0)
            often = math.ceil(len(points) / 12) if curve.line else 1
            x_y = zip(*points, strict=True)
            axes.plot(*x_y, **curve.look, label=curve.name, markevery=often)
        for mark in marks:
            axes.axvline(mark, color=_MUTED, linestyle=":")
        if level[1] is not None:
            axes.axhline(level[1], color=_MUTED, linestyle=":", label=level[0])
        axes.set_title(y)
        axes.set_xlabel(x)
        axes.set_yscale(scale)
        across = {place for _, points in drawn for place, _ in points}
        if log_x:
            axes.set_xscale("log")
            axes.set_xticks(sorted(across), minor=False)
            axes.set_xticks([], minor=True)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        elif all(float(place).is_integer() for place in across):
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        handles, names = axes.get_legend_handles_labels()
        columns = max(1, min(3, 66 // (max(map(len, names)) + 7)))
        canvas.set_size_inches(5.3, 3 + 0.19 * math.ceil(len(names) / columns))
        canvas.legend(handles, names, loc="outside lower left", ncols=columns)
        return [Figure(name, title, _to_svg(canvas, title))]


def _to_svg(canvas: Canvas, title: str) -> str:
    """Return a drawing of short numbers, the same every time, that is read out by its title."""
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    canvas.savefig(buffer, format="svg", metadata=nothing)
    svg = re.sub(r' id="[\w.]+_\d+"', "", buffer.getvalue())  # of groups, which change
    # Coordinates are shortened; text, between > and <, stays as it is.
    svg = re.sub(r"(>[^<]+<)|\d+\.\d{3,}", lambda m: m[1] or f"{float(m[0]):.2f}", svg)
    opening, _, rest = svg[svg.index("<svg") :].partition(">")
    spoken = f'<svg role="img" aria-label="{escape(title)}"'
    return f"{opening.replace('<svg', spoken, 1)}><style>{_DARK}</style>{rest}"
