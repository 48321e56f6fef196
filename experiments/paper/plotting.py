"""Figures in the report's style, each a file of its own that follows light and dark."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from experiments.paper.results import Figure
from matplotlib.axes import Axes

from deeptwist.app.report import plotting
from deeptwist.app.report.styles import DASHED, INK, NO_LINE, SERIES, SOLID, PlotStyle

_MARKERS = "os^DvPX"
_SHEET = files("deeptwist.app.report").joinpath("style.css").read_text(encoding="utf-8")
_STYLE = (
    _SHEET.partition("\n* {")[0]  # its colours
    + "svg { background: var(--card); }\n"
    + 'text { font-family: system-ui, "Noto Sans", "DejaVu Sans", sans-serif !important; }'
)
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
    """A chart with shaded bands behind its curves."""

    shaded: tuple[Curve, ...] = ()

    def draw(self, axes: Axes) -> None:
        """Draw the bands, and over them the rest."""
        for curve in self.shaded:
            x, lowest, highest = zip(*curve.band, strict=True)
            axes.fill_between(x, lowest, highest, color=curve.style.color, alpha=0.2, linewidth=0)
        super().draw(axes)


def known(points: Iterable[tuple[float, float | None]]) -> tuple[tuple[float, float], ...]:
    """Return the points whose height has been measured."""
    return tuple((x, y) for x, y in points if y is not None)


def draw(
    name: str, title: str, curves: Sequence[Curve], start: float | None = None, **options: Any
) -> list[Figure]:
    """Draw curves over one another; return no figure where none has a point.

    Args:
        name: see `Figure`.
        title: see `Figure`.
        curves: see `Curve`.
        start: accuracy before compression, to draw a dotted line at.
        options: further fields of `deeptwist.app.report.plotting.Chart`.
    """
    drawn = [(known(curve.points), curve.style, curve.name) for curve in curves]
    if start is not None:
        options["level"] = ("before compression", start)
    chart = _Chart(
        title,
        "",
        tuple(plotting.Curve(*each) for each in drawn if each[0]),
        shaded=tuple(curve for curve in curves if curve.band),
        **options,
    )
    if not chart.curves:
        return []
    opening, _, rest = plotting.render(chart, name=name).partition(">")
    return [Figure(name, title, f"{opening}><style>{_STYLE}</style>{rest}")]
