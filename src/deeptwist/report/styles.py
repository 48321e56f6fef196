"""Which run gets which colour, dash and marker: the same in every plot of a case."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from deeptwist.report.formatting import METHOD_MODES
from deeptwist.training.metrics import Run

# matplotlib wants a colour now, the page decides on it later (light, dark, print): these stand in
# for the variables of style.css and are replaced in the SVG.
INK, MUTED, GRID, CARD = "#a1b2c0", "#a1b2c1", "#a1b2c2", "#a1b2c3"
_SERIES = tuple(f"#a1b2d{number}" for number in range(6))
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    CARD: "var(--card)",
    **{color: f"var(--series-{number})" for number, color in enumerate(_SERIES)},
}
DOTS, DASHES, _DASHES_AND_DOTS = (1.0, 1.6), (4.0, 2.0), (4.0, 1.6, 1.0, 1.6)


@dataclass(frozen=True)
class Marker:
    """A marker as matplotlib calls it, and as a path in 10 × 10 around the origin."""

    code: str
    path: str


_MARKERS = (
    Marker("o", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z"),
    Marker("s", "M-3.6-3.6h7.2v7.2h-7.2z"),
    Marker("^", "M0-4.4l4.4 8h-8.8z"),
    Marker("D", "M0-4.8l4.8 4.8l-4.8 4.8l-4.8-4.8z"),
    Marker("v", "M0 4.4l4.4-8h-8.8z"),
    Marker("P", "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z"),
    Marker(
        "X", "M0-2l2.4-2.4l2 2l-2.4 2.4l2.4 2.4l-2 2l-2.4-2.4l-2.4 2.4l-2-2l2.4-2.4l-2.4-2.4l2-2z"
    ),
)


_STROKES = (
    Marker("+", "M-4 0h8M0-4v8"),
    Marker("x", "M-3.4-3.4l6.8 6.8M3.4-3.4l-6.8 6.8"),
    Marker("1", "M0 0v4.4M0 0l-4-2.4M0 0l4-2.4"),
    Marker("2", "M0 0v-4.4M0 0l-4 2.4M0 0l4 2.4"),
)


@dataclass(frozen=True)
class Look:
    """How a run is drawn.

    Attributes:
        color: one of `VARIABLES`.
        marker: see `Marker`.
        filled: whether the marker is.
        dashes: of the line, on and off in turn; empty for a solid one.
        line: whether there is one.
    """

    color: str
    marker: Marker
    filled: bool
    dashes: tuple[float, ...]
    line: bool = True

    @property
    def variable(self) -> str:
        """The colour as the style sheet knows it."""
        return VARIABLES[self.color]

    @property
    def fill(self) -> str:
        """The marker's inside."""
        return self.color if self.filled else CARD


def looks_of(runs: Sequence[Run]) -> list[Look]:
    """One look per run.

    DeepTwist and conventional fine-tuning of the same decomposition and ratio share colour and
    marker; the line and the marker's inside tell them apart. A control has its own. With six
    colours and seven markers, 42 pairs or controls look different.
    """
    numbers: dict[tuple[str | None, float | None, str, int], int] = {}
    repeats: Counter[tuple[str | None, float | None, str]] = Counter()
    looks = []
    for run in runs:
        summary = run.summary
        if summary.mode == "dense":
            looks.append(Look(MUTED, _MARKERS[0], filled=True, dashes=DOTS))
            continue
        alike = summary.decomposition, summary.ratio, summary.mode
        control = "" if summary.mode in METHOD_MODES else summary.mode
        pair = summary.decomposition, summary.ratio, control, repeats[alike]
        repeats[alike] += 1
        number = numbers.setdefault(pair, len(numbers))
        deeptwist = summary.mode == "deeptwist"
        dashes = _DASHES_AND_DOTS if control else () if deeptwist else DASHES
        looks.append(
            Look(
                color=_SERIES[number % len(_SERIES)],
                marker=_MARKERS[number % len(_MARKERS)],
                filled=deeptwist,
                dashes=dashes,
            )
        )
    return looks


def refined_looks(names: Iterable[str]) -> dict[str, Look]:
    """For each refinement a marker of strokes; its colour is that of the run that it came of."""
    return {
        name: Look(MUTED, _STROKES[number % len(_STROKES)], filled=False, dashes=(), line=False)
        for number, name in enumerate(dict.fromkeys(names))
    }


def before_and_after(look: Look) -> tuple[Look, Look]:
    """A run's look just before a distortion, and just after it."""
    return replace(look, filled=True, dashes=()), replace(look, filled=False, dashes=DASHES)
