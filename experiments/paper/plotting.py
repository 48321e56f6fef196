"""Figures in the report's style, each a file of its own that follows light and dark."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.paper.results import Figure

from deeptwist.app.report import charts

_STYLE = "@media (prefers-color-scheme: dark) { svg { filter: invert(1) hue-rotate(180deg); } }"
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Points with a name in the legend.

    Attributes:
        name: in the legend.
        points: (x, y); what has not been measured has no height.
        color: index into `styles.SERIES`; `None` for the ink's.
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
        """Return the options of `Axes.plot`."""
        color = charts.INK if self.color is None else charts.COLORS[self.color % len(charts.COLORS)]
        marker = charts.MARKERS[(self.color or 0) % len(charts.MARKERS)] if self.markers else ""
        line = "none" if not self.line else "--" if self.dashed else "-"
        face = "none" if self.dashed else color
        return {"color": color, "marker": marker, "markerfacecolor": face, "linestyle": line}


def known(points: Iterable[tuple[float, float | None]]) -> tuple[tuple[float, float], ...]:
    """Return the points whose height has been measured."""
    return tuple((x, y) for x, y in points if y is not None)


def draw(
    name: str,
    title: str,
    curves: Sequence[Curve],
    start: float | None = None,
    level: tuple[str, float] | None = None,
    log_x: bool = False,
    **options: Any,
) -> list[Figure]:
    """Draw curves over one another; return no figure where none has a point.

    Args:
        name: see `Figure`.
        title: see `Figure`.
        curves: see `Curve`.
        start: accuracy before compression, to draw a dotted line at.
        level: a name and a height to draw a dotted line at.
        log_x: unused.
        options: further ones of `deeptwist.app.report.charts.draw`.
    """
    drawn = [charts.Curve(curve.name, known(curve.points), curve.look) for curve in curves]
    for curve in curves:
        for end in (1, 2):
            edge = [(each[0], each[end]) for each in curve.band]
            drawn.append(charts.Curve("", edge, {"color": curve.look["color"], "linewidth": 0.6}))
    across = [x for curve in drawn for x, _ in curve.points]
    level = ("before compression", start) if start is not None else level
    if level is not None and across:
        ends = [(x, level[1]) for x in (min(across), max(across))]
        drawn.append(charts.Curve(level[0], ends, {"color": charts.MUTED, "linestyle": ":"}))
    figures = charts.draw(title, "", drawn, salt=name, **options) if across else []
    return [
        Figure(name, title, figure.svg.replace(">", f"><style>{_STYLE}</style>", 1))
        for figure in figures
    ]
