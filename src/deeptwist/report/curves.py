"""Runs as lines and markers on axes, each in its look."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from deeptwist.report.styles import MUTED, Look
from deeptwist.training.metrics import Run

_MOST_MARKERS = 12  # on one line


@dataclass(frozen=True)
class Line:
    """One run's points."""

    run: Run
    look: Look
    x: tuple[float, ...]
    y: tuple[float, ...]

    @property
    def name(self) -> str:
        """The run's."""
        return self.run.summary.name


def lines_of(
    drawn: Iterable[tuple[Run, Look]],
    points: Callable[[Run], Iterable[tuple[float, float | None]]],
) -> list[Line]:
    """One line for every run that has points with a finite value."""
    lines = []
    for run, look in drawn:
        known = [(x, y) for x, y in points(run) if y is not None and math.isfinite(y)]
        if known:
            lines.append(Line(run, look, *zip(*known, strict=True)))
    return lines


def draw_lines(axes: Axes, lines: Iterable[Line], *, x: str, y: str) -> None:
    """Draws lines over a whole number, with markers a reader can still tell apart."""
    for line in lines:
        every = math.ceil(len(line.x) / _MOST_MARKERS)
        _draw(axes, line, linestyle=_linestyle(line.look), markevery=every)
    axes.set_title(y)
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))


def draw_markers(axes: Axes, lines: Iterable[Line]) -> None:
    """Draws markers alone; of two in one place, the hollow one is a ring around the filled."""
    for line in lines:
        size = 6.5 if line.look.filled else 10.0
        _draw(axes, line, linestyle="none", markersize=size, clip_on=False)


def draw_ratios(axes: Axes, lines: Iterable[Line]) -> None:
    """Ties together the markers of runs that differ in nothing but the ratio."""
    curves: dict[tuple[str, str | None], list[Line]] = {}
    for line in lines:
        summary = line.run.summary
        curves.setdefault((summary.mode, summary.decomposition), []).append(line)
    for curve in curves.values():
        x, y = zip(*sorted((*line.x, *line.y) for line in curve), strict=True)
        style = _linestyle(curve[0].look)
        axes.plot(x, y, color=MUTED, linewidth=0.9, linestyle=style, zorder=1.5)


def draw_refined(axes: Axes, lines: Iterable[Line], looks: Mapping[str, Look]) -> None:
    """Draws what comes of each run at its right, one column for each refinement."""
    for line in lines:
        for refined in line.run.summary.variants:
            column = list(looks).index(refined.name)
            aside = ScaledTranslation((11 + 8 * column) / 72, 0, axes.figure.dpi_scale_trans)
            point = (line.x[-1], refined.accuracy * 100)
            axes.plot(
                *point,
                color=line.look.color,
                marker=looks[refined.name].marker.code,
                markeredgewidth=1.4,
                transform=axes.transData + aside,
                clip_on=False,
            )
            axes.update_datalim([point])  # which matplotlib does not under such a transform
            axes.autoscale_view()


def _draw(axes: Axes, line: Line, **options: Any) -> None:
    look = line.look
    axes.plot(
        line.x,
        line.y,
        color=look.color,
        marker=look.marker.code,
        markerfacecolor=look.fill,
        markeredgecolor=look.color,
        markeredgewidth=1.4,
        zorder=3 if look.filled else 2.5,
        **options,
    )


def _linestyle(look: Look) -> Any:
    return (0, look.dashes) if look.dashes else "solid"
