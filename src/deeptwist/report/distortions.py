"""The plots over distortions: what they cost, and how far they move the weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from deeptwist.report.curves import Line, draw_lines, lines_of
from deeptwist.report.drawing import Drawn, Plot, plot
from deeptwist.report.formatting import power_of_ten
from deeptwist.report.styles import DOTS, MUTED, Look, before_and_after
from deeptwist.training.metrics import Run

_LINEAR_UP_TO = 0.5  # a ΔL/L beyond it would flatten all others on a linear axis
_LINEAR_WITHIN = 30  # between the least and the greatest loss
_MOST_POINTS = 400  # on one line: a drawing is not wider
_MOMENTS = ("just before", "just after")


def distortion_plots(drawn: Drawn, prefix: str) -> list[Plot | None]:
    """The plots of the runs that have distortions; their ids begin with the prefix."""
    some = [(run, look) for run, look in drawn if run.distortions]
    return [
        _loss_before_and_after(some, f"{prefix}-loss-beside"),
        _accuracy_before_and_after(some, f"{prefix}-accuracy-beside"),
        _loss_increase(some, f"{prefix}-increase"),
        _weight_shift(some, f"{prefix}-shift"),
    ]


def _loss_before_and_after(drawn: Drawn, name: str) -> Plot | None:
    before, after = _beside(drawn, "train", lambda evaluation: evaluation["loss"])
    heights = [y for line in (*before, *after) for y in line.y]
    logarithmic = bool(heights) and max(heights) > _LINEAR_WITHIN * min(heights) > 0

    def paint(axes: Axes) -> None:
        if logarithmic:
            _logarithmic(axes, heights, lambda value: f"{value:g}")
        _draw(axes, [*before, *after], "cross-entropy")

    return _beside_plot(
        "Training loss before and after each distortion",
        f"The mean cross-entropy over {_images(drawn)}images spread over the training split, "
        "not augmented." + (" The upright axis is logarithmic." if logarithmic else ""),
        before,
        after,
        paint,
        name,
    )


def _accuracy_before_and_after(drawn: Drawn, name: str) -> Plot | None:
    before, after = _beside(drawn, "test", lambda evaluation: 100 * evaluation["accuracy"])

    def paint(axes: Axes) -> None:
        _draw(axes, [*before, *after], "test accuracy, %")

    return _beside_plot(
        "Test accuracy before and after each distortion",
        f"The share recognised of {_images(drawn)}images spread over the test split.",
        before,
        after,
        paint,
        name,
    )


def _beside_plot(
    title: str,
    caption: str,
    before: Sequence[Line],
    after: Sequence[Line],
    paint: Callable[[Axes], None],
    name: str,
) -> Plot | None:
    words = (
        f"{caption} Solid and filled: just before each distortion; dashed and hollow: just after "
        "it (Figure 3 of the paper). As the gap closes, low rank costs less."
    )
    general = Look(MUTED, before[0].look.marker, True, ()) if before else None
    moments = () if general is None else zip(_MOMENTS, before_and_after(general), strict=True)
    return plot(title, words + _notes(before), before, paint, name, also=moments)


def _loss_increase(drawn: Drawn, name: str) -> Plot | None:
    lines = lines_of(drawn, lambda run: [(d["step"], d["loss_increase"]) for d in _drawn(run)])
    furthest = max((abs(y) for line in lines for y in line.y), default=0.0)
    linear = furthest <= _LINEAR_UP_TO

    def paint(axes: Axes) -> None:
        axes.axhline(0, color=MUTED, linewidth=0.8)
        if not linear:
            axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _draw(axes, lines, "ΔL/L")

    return plot(
        "What a distortion costs: ΔL/L",
        "At each distortion, how much the loss on the same training images rises, as a share of "
        "the loss just before (1 is a doubling; Figure 4 of the paper). Near zero, the weights "
        "have come to where low rank costs nothing."
        + ("" if linear else " The upright axis is linear up to ±0.1 and logarithmic beyond.")
        + _notes(lines),
        lines,
        paint,
        name,
    )


def _weight_shift(drawn: Drawn, name: str) -> Plot | None:
    lines = lines_of(
        drawn,
        lambda run: [(d["step"], d["weight_shift"]) for d in _drawn(run) if d["weight_shift"]],
    )

    def paint(axes: Axes) -> None:
        _logarithmic(axes, [y for line in lines for y in line.y], power_of_ten)
        _draw(axes, lines, "Δw")

    return plot(
        "How far a distortion moves the weights: Δw",
        "At each distortion, the last one at the end of training included, the distance from the "
        "weights to their low-rank approximation: Δw = ‖W − W′‖ ÷ N over all N compressed weights "
        "(Figure 4 of the paper). Falling, the weights stay closer to low rank in between. "
        "The upright axis is logarithmic." + _notes(lines),
        lines,
        paint,
        name,
    )


def _beside(
    drawn: Drawn, split: Literal["train", "test"], value: Callable[[dict[str, Any]], float]
) -> tuple[list[Line], list[Line]]:
    """Lines of what was found on a split before and after the distortions."""

    def lines(moment: int) -> list[Line]:
        looks = [(run, before_and_after(look)[moment]) for run, look in drawn]
        return lines_of(
            looks,
            lambda run: [(d["step"], value(d[split][moment])) for d in _drawn(run) if d[split]],
        )

    return lines(0), lines(1)


def _drawn(run: Run) -> list[dict[str, Any]]:
    """A run's distortions: one a step, and no more than an axis can show.

    The last one repeats the one before it where the interval divides the steps.
    """
    by_step = {distortion["step"]: distortion for distortion in reversed(run.distortions)}
    distortions = [by_step[step] for step in sorted(by_step)]
    every = max(1, math.ceil(len(distortions) / _MOST_POINTS))
    return distortions[::-1][::every][::-1]  # the last one stays


def _draw(axes: Axes, lines: Sequence[Line], y: str) -> None:
    """Draws lines over steps, and where their runs' learning rate drops."""
    for step in sorted({step for line in lines for step in _drops(line)}):
        axes.axvline(step, color=MUTED, linestyle=(0, DOTS), linewidth=1.1, zorder=1.5)
    draw_lines(axes, lines, x="optimizer step", y=y)


def _drops(line: Line) -> list[int]:
    """The steps at which a step schedule multiplies the learning rate by its factor."""
    schedule = line.run.summary.recipe.get("schedule", {})
    if schedule.get("kind") != "step":
        return []
    ends = [e["step"] for e in line.run.epochs if e["epoch"] in schedule["milestones"]]
    return [step for step in ends if step < line.x[-1]]


def _notes(lines: Sequence[Line]) -> str:
    """What the caption says where it holds."""
    notes = ""
    if any(_drops(line) for line in lines):
        notes += " Dotted: the learning rate drops."
    if any(len(line.run.distortions) > _MOST_POINTS for line in lines):
        notes += f" Of more than {_MOST_POINTS} distortions, evenly spaced ones are drawn."
    return notes


def _images(drawn: Drawn) -> str:
    """How many images the runs were measured on, and a space; nothing where they differ."""
    counts = {run.summary.recipe.get("records", {}).get("images") for run, _ in drawn}
    return f"{counts.pop()} " if len(counts) == 1 and None not in counts else ""


def _logarithmic(axes: Axes, heights: Sequence[float], written: Callable[[float], str]) -> None:
    axes.set_yscale("log")
    few_decades = max(heights) < 50 * min(heights)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
