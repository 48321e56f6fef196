"""A plot with its words and its key."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes

from deeptwist.report.curves import Line
from deeptwist.report.formatting import listed, printable
from deeptwist.report.styles import Look
from deeptwist.report.svg import render
from deeptwist.training.metrics import Run

Drawn = Sequence[tuple[Run, Look]]


@dataclass(frozen=True)
class Plot:
    """One plot with its words.

    Attributes:
        title: what is plotted.
        caption: what one sees, and how the axes are counted.
        svg: the drawing.
        key: the runs in it by name, and what else needs one, with their looks; empty where the
            drawing names them.
    """

    title: str
    caption: str
    svg: Markup
    key: tuple[tuple[str, Look], ...] = ()


def plot(
    title: str,
    caption: str,
    lines: Sequence[Line],
    paint: Callable[[Axes], None],
    name: str,
    *,
    also: Iterable[tuple[str, Look]] = (),
) -> Plot | None:
    """A plot of lines; none where there is no line.

    Args:
        title: see `Plot`.
        caption: see `Plot`.
        lines: of which the key names the runs.
        paint: draws them.
        name: see `svg.render`.
        also: what the key holds after the runs.
    """
    if not lines:
        return None
    svg = render(paint, name=name, label=label(title, [line.name for line in lines]))
    return Plot(title, caption, svg, (*((line.name, line.look) for line in lines), *also))


def label(title: str, names: Sequence[str]) -> str:
    """What is read out in a drawing's place."""
    return f"{title}; runs: {listed([printable(name, 48) for name in names])}"
