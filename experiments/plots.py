"""Figures as SVG files that follow light and dark."""

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from experiments.page import Figure

_INK, _MUTED, _GRID, _CARD = "#a1b2c0", "#a1b2c1", "#a1b2c2", "#a1b2c3"
_SERIES = [f"#a1b2d{index}" for index in range(6)]
_COLORS = {  # what stands in the drawing: in the light, in the dark
    _INK: ("#1f2328", "#e4e6e9"),
    _MUTED: ("#6a717a", "#98a0aa"),
    _GRID: ("#e9e7e3", "#2b3037"),
    _CARD: ("#ffffff", "#1c2025"),
    **dict(
        zip(
            _SERIES,
            [
                ("#0072b2", "#5ab4f0"),
                ("#c24a00", "#ff8d4d"),
                ("#007d5b", "#35c79c"),
                ("#a5437c", "#e89bc9"),
                ("#8a6700", "#e3b341"),
                ("#5e4fc0", "#a99cf5"),
            ],
            strict=True,
        )
    ),
}
_VARIABLES = {color: f"--c{index}" for index, color in enumerate(_COLORS)}
_LIGHT, _DARK = (
    " ".join(f"{_VARIABLES[color]}: {shades[index]};" for color, shades in _COLORS.items())
    for index in (0, 1)
)
_STYLE = f"""<style>:root {{ color-scheme: light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
svg {{ background: var({_VARIABLES[_CARD]}); }}
text {{ font-family: system-ui, "Noto Sans", "DejaVu Sans", sans-serif !important; }}</style>"""
_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "axes.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}
_DOTTED, _DASHED = (0, (1.0, 1.6)), (0, (4.0, 2.0))
_MARKERS = "os^DvPX"
_MAX_MARKERS = 12  # on one line
_LEGEND_LETTERS = 66  # that fit beside one another
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
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
    def style(self) -> dict[str, Any]:
        """Return the options of `Axes.plot`. Filled markers lie above hollow ones."""
        color = _INK if self.color is None else _SERIES[self.color % len(_SERIES)]
        return {
            "color": color,
            "marker": _MARKERS[(self.color or 0) % len(_MARKERS)] if self.markers else "",
            "markersize": 5.5,
            "markerfacecolor": _CARD if self.dashed else color,
            "markeredgecolor": color,
            "markeredgewidth": 1.4,
            "linestyle": "none" if not self.line else _DASHED if self.dashed else "solid",
            "linewidth": 1.6,
            "zorder": 2.5 if self.dashed else 3,
        }


def known(points: Iterable[tuple[float, float | None]]) -> tuple[tuple[float, float], ...]:
    """Return the points whose height has been measured."""
    return tuple((x, y) for x, y in points if y is not None)


def draw(
    name: str,
    title: str,
    curves: Sequence[Curve],
    start: float | None = None,
    *,
    x: str,
    y: str,
    scale: Literal["linear", "log"] = "linear",
    log_x: bool = False,
    level: tuple[str, float] | None = None,
    marks: Sequence[float] = (),
) -> list[Figure]:
    """Draw curves over one another; return no figure where none has a point.

    Args:
        name: see `Figure`.
        title: see `Figure`.
        curves: see `Curve`.
        start: accuracy before compression, to draw a dotted line at.
        x: what goes across.
        y: what goes up.
        scale: of the upright axis.
        log_x: whether equal factors are equally far apart, with a tick at every point.
        level: a name and a height to draw a dotted line at.
        marks: where to draw dotted upright lines.
    """
    drawn = [(curve, points) for curve in curves if (points := known(curve.points))]
    if not drawn:
        return []
    if start is not None:
        level = ("before compression", start)
    legend = [(curve.name, curve.style) for curve, _ in drawn]
    if level is not None:
        legend.append((level[0], {"color": _MUTED, "linestyle": _DOTTED, "linewidth": 1.6}))
    longest = max(len(entry) for entry, _ in legend)
    columns = max(1, min(3, _LEGEND_LETTERS // (longest + 7)))
    height = 3.0 + 0.19 * math.ceil(len(legend) / columns)
    buffer = io.StringIO()
    with style.context(["default", _RC, {"svg.hashsalt": name}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser's fonts have it
        canvas = Canvas(figsize=(5.3, height), layout="constrained")
        axes = canvas.subplots()
        _plot(axes, drawn)
        for mark in marks:
            axes.axvline(mark, color=_MUTED, linestyle=_DOTTED, linewidth=1.1, zorder=1.5)
        if level is not None:
            axes.axhline(level[1], color=_MUTED, linestyle=_DOTTED, linewidth=1.6)
        axes.set_title(y)
        axes.set_xlabel(x)
        _scale_axes(axes, [point for _, points in drawn for point in points], scale, log_x)
        handles = [axes.plot([], [], **options)[0] for _, options in legend]
        names = [entry for entry, _ in legend]
        place = {"loc": "outside lower left", "ncols": columns, "columnspacing": 1.2}
        canvas.legend(handles, names, **place)
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return [Figure(name, title, _follow_colors(buffer.getvalue(), title))]


def _plot(axes: Axes, drawn: Sequence[tuple[Curve, Points]]) -> None:
    for curve, _ in drawn:
        if curve.band:
            color = curve.style["color"]
            axes.fill_between(*zip(*curve.band, strict=True), color=color, alpha=0.2, linewidth=0)
    for curve, points in drawn:
        more = {"markevery": math.ceil(len(points) / _MAX_MARKERS)} if curve.line else {}
        axes.plot(*zip(*points, strict=True), **curve.style, **(more or {"clip_on": False}))


def _scale_axes(axes: Axes, points: Points, scale: str, log_x: bool) -> None:
    across, heights = zip(*points, strict=True)
    if log_x:
        axes.set_xscale("log")
        axes.set_xticks(sorted(set(across)), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        whole = all(x == int(x) for x in across)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=whole))
    if scale == "log":
        axes.set_yscale("log")
        few_decades = max(heights) < 50 * min(heights)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        shown = _power_of_ten if max(heights) < 0.1 else "{:g}".format
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))  # short numbers


def _power_of_ten(value: float) -> str:
    """Return ``"2·10⁻⁵"``."""
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    return power if mantissa == "1" else f"{mantissa}·{power}"


def _follow_colors(svg: str, title: str) -> str:
    """Return a drawing of short numbers, whose colours are those of the reader's page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # of groups, the same in every drawing
    # Coordinates are shortened; text, between > and <, stays as it is.
    svg = re.sub(r"(>[^<]+<)|\d+\.\d{3,}", lambda m: m[1] or f"{float(m[0]):.2f}", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    opening, _, rest = svg.partition(">")
    spoken = f'<svg role="img" aria-label="{escape(title)}" '
    return f"{opening}>{_STYLE}{rest}".replace("<svg ", spoken, 1)
