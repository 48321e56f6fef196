"""Figures in the report's style, each a file of its own that follows light and dark."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from experiments.paper.findings import Figure
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


@dataclass(frozen=True)
class Curve:
    """Points with a name in the key.

    Attributes:
        name: none for a curve that the key leaves out.
        points: (x, y).
        color: its place in `styles.SERIES`; none for the ink's.
        dashed: the line, and its markers hollow.
        markers: whether it has any.
        line: whether it has one.
        band: (x, lowest, highest), shaded behind it.
    """

    name: str | None
    points: tuple[tuple[float, float], ...]
    color: int | None
    dashed: bool = False
    markers: bool = True
    line: bool = True
    band: tuple[tuple[float, float, float], ...] = ()

    @property
    def style(self) -> PlotStyle:
        """The same for the report's charts."""
        return PlotStyle(
            INK if self.color is None else SERIES[self.color % len(SERIES)],
            _MARKERS[(self.color or 0) % len(_MARKERS)] if self.markers else "",
            filled=not self.dashed,
            line=NO_LINE if not self.line else DASHED if self.dashed else SOLID,
        )


@dataclass(frozen=True)
class _BandChart(plotting.Chart):
    """A chart with a range behind some of its curves.

    Attributes:
        bands: a colour and (x, lowest, highest).
    """

    bands: tuple[tuple[str, tuple[tuple[float, float, float], ...]], ...] = ()

    def draw(self, axes: Axes) -> None:
        """Draw the ranges, and over them the rest."""
        for color, points in self.bands:
            x, lowest, highest = zip(*points, strict=True)
            axes.fill_between(x, lowest, highest, color=color, alpha=0.2, linewidth=0)
        super().draw(axes)


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
    marks: Sequence[float] = (),
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
        marks: where to draw dotted upright lines.
    """
    plotted = [curve for curve in curves if curve.points]
    if not plotted:
        return None
    drawing = _BandChart(
        title,
        "",
        tuple(plotting.Curve(curve.points, curve.style, curve.name or "") for curve in plotted),
        x=x,
        y=y,
        scale="log" if log_y else "linear",
        log_x=log_x,
        level=level,
        marks=tuple(marks),
        bands=tuple((curve.style.color, curve.band) for curve in plotted if curve.band),
    )
    return Figure(name, title, _as_file(plotting.render(drawing, name=name)))


def _as_file(svg: str) -> str:
    """Return a drawing of a page as a file of its own, with the page's colours."""
    opening, _, rest = svg.partition(">")
    return f"{opening}><style>{_STYLE}</style>{rest}"
