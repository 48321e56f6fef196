"""Figures in the report's style, each a file of its own that follows light and dark."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from experiments.paper.findings import Figure
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deeptwist.report.formatting import power_of_ten
from deeptwist.report.styles import CARD, DASHES, DOTS, INK, MUTED, VARIABLES
from deeptwist.report.svg import render

COLORS = tuple(color for color, name in VARIABLES.items() if "series" in name)
_MARKERS = "os^DvPX"
_SHEET = files("deeptwist.report").joinpath("style.css").read_text(encoding="utf-8")
_STYLE = (
    _SHEET.partition("\n* {")[0]  # its colours
    + "svg { background: var(--card); }\n"
    + 'text { font-family: system-ui, "Noto Sans", "DejaVu Sans", sans-serif !important; }'
)


@dataclass(frozen=True)
class Curve:
    """Points with a name in the key.

    Attributes:
        name: none for a curve that the key leaves out.
        points: (x, y).
        color: its place in `COLORS`; none for the ink's.
        dashed: the line, and its markers hollow.
        markers: whether it has any.
        line: whether it has one.
    """

    name: str | None
    points: tuple[tuple[float, float], ...]
    color: int | None
    dashed: bool = False
    markers: bool = True
    line: bool = True


def known(points: Iterable[tuple[float, float | None]]) -> tuple[tuple[float, float], ...]:
    """The points whose height has been measured."""
    return tuple((x, y) for x, y in points if y is not None)


def chart(
    name: str,
    title: str,
    curves: Sequence[Curve],
    *,
    x: str,
    y: str,
    level: tuple[str, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure | None:
    """Curves over one another, with a key; none where no curve has a point.

    Args:
        name: see `Figure`.
        title: what is shown.
        curves: those without points are left out.
        x: what goes across.
        y: what goes up.
        level: a name and a height to draw a dotted line at.
        log_x: whether equal factors are equally far apart.
        log_y: the same upwards.
    """
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return None

    def paint(axes: Axes) -> None:
        for curve in drawn:
            _draw(axes, curve)
        if level is not None:
            axes.axhline(level[1], color=MUTED, linestyle=(0, DOTS), label=level[0])
        if log_x:
            axes.set_xscale("log")
            across = sorted({point[0] for curve in drawn for point in curve.points})
            axes.set_xticks(across, minor=False)
            axes.set_xticks([], minor=True)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))  # short numbers
        axes.set_title(y)
        axes.set_xlabel(x)
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.2), ncols=2, frameon=False, fontsize=9
        )

    named = [curve.name for curve in drawn if curve.name is not None]
    rows = (len(named) + (level is not None) + 1) // 2
    label = f"{title}: {', '.join(named)}"
    drawing = render(paint, name=name, label=label, height=3.2 + 0.2 * rows)
    return Figure(name, title, _as_file(str(drawing)))


def _draw(axes: Axes, curve: Curve) -> None:
    color = INK if curve.color is None else COLORS[curve.color % len(COLORS)]
    axes.plot(
        *zip(*curve.points, strict=True),
        color=color,
        label=curve.name or "_",
        linestyle="none" if not curve.line else (0, DASHES) if curve.dashed else "solid",
        marker=_MARKERS[(curve.color or 0) % len(_MARKERS)] if curve.markers else "",
        markerfacecolor=CARD if curve.dashed else color,
        markeredgecolor=color,
        markevery=max(1, len(curve.points) // 40),
    )


def _as_file(drawing: str) -> str:
    """A drawing of a page as a file: with a size, its name space and the page's colours."""
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    assert found is not None
    width, height = found.groups()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    opening, _, rest = drawing.partition(">")
    return f"{opening.replace('<svg ', head, 1)}><style>{_STYLE}</style>{rest}\n"
