"""Figures in the report's style, each a file of its own that follows light and dark."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from experiments.paper.results import Figure
from matplotlib.axes import Axes

from deeptwist.report import plotting
from deeptwist.report.styles import DASHED, INK, NO_LINE, SERIES, SOLID, PlotStyle

_MARKERS = "os^DvPX"
_SHEET = files("deeptwist.report").joinpath("style.css").read_text(encoding="utf-8")
_STYLE = (
    _SHEET.partition("\n* {")[0]  # its colours
    + "svg { background: var(--card); }\n"
    + 'text { font-family: system-ui, "Noto Sans", "DejaVu Sans", sans-serif !important; }'
)
BEFORE = "before compression"
Points = Iterable[tuple[float, float | None]]


@dataclass(frozen=True)
class Curve:
    """Points with a name in the legend.

    Attributes:
        name: in the legend.
        points: (x, y); those without a height have not been measured.
        color: index into `styles.SERIES`; `None` for the ink's.
        dashed: the line, and its markers hollow.
        markers: whether it has any.
        line: whether it has one.
        band: (x, lowest, highest), shaded behind it.
    """

    name: str
    points: Points
    color: int | None
    dashed: bool = False
    markers: bool = True
    line: bool = True
    band: tuple[tuple[float, float, float], ...] = ()

    @property
    def style(self) -> PlotStyle:
        """Return the same for the report's charts."""
        return PlotStyle(
            INK if self.color is None else SERIES[self.color % len(SERIES)],
            _MARKERS[(self.color or 0) % len(_MARKERS)] if self.markers else "",
            filled=not self.dashed,
            line=NO_LINE if not self.line else DASHED if self.dashed else SOLID,
        )


@dataclass(frozen=True)
class _Chart(plotting.Chart):
    """A chart with ranges behind its curves: a colour and (x, lowest, highest) each."""

    bands: tuple[tuple[str, tuple[tuple[float, float, float], ...]], ...] = ()

    def draw(self, axes: Axes) -> None:
        """Draw the ranges, and over them the rest."""
        for color, points in self.bands:
            x, lowest, highest = zip(*points, strict=True)
            axes.fill_between(x, lowest, highest, color=color, alpha=0.2, linewidth=0)
        super().draw(axes)


def known(points: Points) -> tuple[tuple[float, float], ...]:
    """Return the points whose height has been measured."""
    return tuple((x, y) for x, y in points if y is not None)


def draw(
    name: str,
    title: str,
    curves: Sequence[Curve],
    *,
    x: str,
    y: str,
    start: float | None = None,
    start_name: str = BEFORE,
    **options: Any,
) -> tuple[Figure, ...]:
    """Draw curves over one another; return no figure where none has a point.

    Args:
        name: see `Figure`.
        title: what is shown.
        curves: see `Curve`.
        x: what goes across.
        y: what goes up.
        start: a height to draw a dotted line at.
        start_name: its name.
        options: further fields of `deeptwist.report.plotting.Chart`.
    """
    drawn = [(curve, points) for curve in curves if (points := known(curve.points))]
    if not drawn:
        return ()
    chart = _Chart(
        title,
        "",
        tuple(plotting.Curve(points, curve.style, curve.name) for curve, points in drawn),
        x=x,
        y=y,
        level=None if start is None else (start_name, start),
        bands=tuple((curve.style.color, curve.band) for curve, _ in drawn if curve.band),
        **options,
    )
    opening, _, rest = plotting.render(chart, name=name).partition(">")
    return (Figure(name, title, f"{opening}><style>{_STYLE}</style>{rest}"),)
