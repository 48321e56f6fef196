"""The charts of a group of runs; each is left out where there is nothing to show."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from deeptwist.app.report.comparison import RunGroup
from deeptwist.app.report.formatting import (
    format_percent,
    join_words,
)
from deeptwist.app.report.latency_chart import LatencyChart, latency_chart
from deeptwist.app.report.plotting import Chart, Curve
from deeptwist.app.report.styles import (
    MUTED,
    PlotStyle,
    assign_styles,
    before_and_after,
    variant_styles,
)
from deeptwist.app.training.metrics import Run, Summary
from deeptwist.app.training.modes import MODES, find_mode
from deeptwist.plan.planned_layer import CompressedLayer

_SYMLOG_FROM = 0.5  # a ΔL/L beyond it would flatten all others on a linear axis
_LOG_FROM = 30  # between the least and the greatest loss
_MAX_POINTS = 400  # on one line: a drawing is not wider

StyledRuns = Sequence[tuple[Run, PlotStyle]]
Points = Iterable[tuple[float, float | None]]


def gain_charts(group: RunGroup) -> list[Chart]:
    """Return what compression brought: accuracy against size and time, and each layer's work."""
    styled = _with_styles(group)
    charts = _accuracy_against_size(group, styled), _accuracy_against_time(group, styled)
    layers = _layer_macs(styled)
    return [chart for chart in (*charts, layers) if chart is not None and chart.names]


def detail_charts(group: RunGroup) -> "list[Chart | LatencyChart]":
    """Return all further charts of a group that have something to show."""
    styled = _with_styles(group)
    charts = (
        _test_accuracy(styled),
        _train_loss(styled),
        _loss_before_and_after(styled),
        _accuracy_before_and_after(styled),
        _loss_increase(styled),
        _weight_shift(styled),
        latency_chart(styled),
        _relative_errors(styled),
    )
    return [chart for chart in charts if chart.names]


def _with_styles(group: RunGroup) -> StyledRuns:
    return list(zip(group.runs, assign_styles(group.runs), strict=True))


def _is_compressed(run: Run) -> bool:
    return find_mode(run.summary.mode).compresses


# --- was it worth it


def _accuracy_against_size(group: RunGroup, styled: StyledRuns) -> Chart | None:
    return _accuracy_against(
        group,
        styled,
        lambda summary: (summary.parameters_before / 1e6, summary.parameters / 1e6),
        "Accuracy against size",
        "further left is smaller, higher is better.",
        "million parameters",
    )


def _accuracy_against_time(group: RunGroup, styled: StyledRuns) -> Chart | None:
    def milliseconds(summary: Summary) -> tuple[float, float] | None:
        latency, batch = summary.latency, summary.latency_batch or 1
        if latency is None:
            return None
        return latency.dense.median / batch, latency.decomposed.median / batch

    return _accuracy_against(
        group,
        styled,
        milliseconds,
        "Accuracy against milliseconds",
        "further left is faster, higher is better. Across: the median time of a batch, dense and "
        "decomposed timed in turn, ÷ its images.",
        "milliseconds for one image",
    )


def _accuracy_against(
    group: RunGroup,
    styled: StyledRuns,
    costs: Callable[[Summary], tuple[float, float] | None],
    title: str,
    caption: str,
    x: str,
) -> Chart | None:
    """Draw accuracy against what a network costs; `costs` gives the dense and the small one's."""
    accuracy = group.dense_accuracy
    pairs = [(run, style, costs(run.summary)) for run, style in styled if _is_compressed(run)]
    points = [(run, style, pair[1]) for run, style, pair in pairs if pair is not None]
    if accuracy is None or not points:
        return None
    before = {pair[0] for _, _, pair in pairs if pair is not None}
    dense = Curve(
        tuple((x, 100 * accuracy) for x in sorted(before)), PlotStyle(MUTED, "o").as_marker()
    )
    runs = [
        Curve(((x, 100 * run.summary.accuracy),), style.as_marker(), run.summary.name)
        for run, style, x in points
    ]
    kinds = variant_styles(kind.name for run, _, _ in points for kind in run.summary.variants)
    variants = [
        Curve(
            ((x, 100 * variant.accuracy),),
            replace(kinds[variant.name], color=style.color),
            shift=11 + 8 * list(kinds).index(variant.name),
        )
        for run, style, x in points
        for variant in run.summary.variants
    ]
    return Chart(
        title,
        f"Each marker is one run with {_modes([run for run, _, _ in points])}, at the accuracy of "
        f"the network that it would deploy: {caption} Grey: the dense network, "
        f"{format_percent(accuracy)}. The accuracy axis need not begin at zero."
        + (" At a run's right, in its colour: the networks under it in the table." * bool(kinds)),
        (*_ties(points), dense, *runs, *variants),
        x=x,
        y="test accuracy, %",
        from_zero=True,
        level=("dense", 100 * accuracy),
        legend=tuple(kinds.items()),
    )


def _ties(points: Iterable[tuple[Run, PlotStyle, float]]) -> list[Curve]:
    """Return thin lines between runs that differ in nothing but the ratio."""
    lines: dict[tuple[str, str | None], tuple[PlotStyle, list[tuple[float, float]]]] = {}
    for run, style, x in points:
        summary = run.summary
        _, line = lines.setdefault((summary.mode, summary.decomposition), (style, []))
        line.append((x, 100 * summary.accuracy))
    return [
        Curve(tuple(sorted(line)), PlotStyle(MUTED, line=style.line, width=0.9))
        for style, line in lines.values()
        if len(line) > 1
    ]


def _modes(runs: Sequence[Run]) -> str:
    modes = {find_mode(run.summary.mode) for run in runs}
    words = {
        "DeepTwist (filled)": MODES["deeptwist"] in modes,
        "conventional fine-tuning (hollow)": MODES["finetune"] in modes,
        "a control (hollow, in a colour of its own)": any(mode.is_ablation for mode in modes),
    }
    return join_words([word for word, is_present in words.items() if is_present], "or")


# --- over epochs


def _test_accuracy(styled: StyledRuns) -> Chart:
    caption = "One line a run: the share of test images that are recognised after each epoch."
    if any(run.distortions for run, _ in styled):
        caption += (
            " Where weights are distorted, these are the weights as training left them, some steps "
            "after the last distortion; what is deployed is decomposed once more, and its accuracy "
            "is in the table above."
        )
    curves = _curves(styled, lambda run: [(e["epoch"], _accuracy(e["test"])) for e in run.epochs])
    title = "Test accuracy while training"
    return Chart(title, caption, curves, x="epoch", y="test accuracy, %")


def _train_loss(styled: StyledRuns) -> Chart:
    return Chart(
        "Training loss",
        "One line a run: the mean cross-entropy over the epoch's images, augmented, each taken "
        "before the step that learns from it.",
        _curves(styled, lambda run: [(e["epoch"], e["train_loss"]) for e in run.epochs]),
        x="epoch",
        y="cross-entropy",
    )


# --- over distortions


def _loss_before_and_after(styled: StyledRuns) -> Chart:
    chart = _before_and_after(
        styled,
        "train",
        lambda evaluation: float(evaluation["loss"]),
        "Training loss before and after each distortion",
        f"The mean cross-entropy over {_count_images(styled)}images spread over the training "
        "split, not augmented.",
        "cross-entropy",
    )
    heights = [y for curve in chart.curves for _, y in curve.points]
    if not heights or not max(heights) > _LOG_FROM * min(heights) > 0:
        return chart
    caption = f"{chart.caption} The upright axis is logarithmic."
    return replace(chart, scale="log", caption=caption)


def _accuracy_before_and_after(styled: StyledRuns) -> Chart:
    return _before_and_after(
        styled,
        "test",
        _accuracy,
        "Test accuracy before and after each distortion",
        f"The share recognised of {_count_images(styled)}images spread over the test split.",
        "test accuracy, %",
    )


def _before_and_after(
    styled: StyledRuns,
    split: Literal["train", "test"],
    value: Callable[[dict[str, Any]], float],
    title: str,
    caption: str,
    y: str,
) -> Chart:
    def curves(moment: int) -> tuple[Curve, ...]:
        return _curves(
            [(run, before_and_after(style)[moment]) for run, style in styled],
            lambda run: [(d["step"], value(d[split][moment])) for d in _thin(run) if d[split]],
        )

    before, after = curves(0), [replace(curve, label="") for curve in curves(1)]
    marker = before[0].style.marker if before else ""
    moments = before_and_after(PlotStyle(MUTED, marker))
    return Chart(
        title,
        f"{caption} Solid and filled: just before each distortion; dashed and hollow: just after "
        "it (Figure 3 of the paper). As the gap closes, low rank costs less."
        + _notes(styled, before),
        (*before, *after),
        x="optimizer step",
        y=y,
        marks=_lr_milestones(styled, before),
        legend=tuple(zip(("just before", "just after"), moments, strict=True)),
    )


def _loss_increase(styled: StyledRuns) -> Chart:
    curves = _curves(styled, lambda run: [(d["step"], d["loss_increase"]) for d in _thin(run)])
    furthest = max((abs(y) for curve in curves for _, y in curve.points), default=0.0)
    linear = furthest <= _SYMLOG_FROM
    axis = " The upright axis is linear up to ±0.1 and logarithmic beyond."
    return Chart(
        "What a distortion costs: ΔL/L",
        "At each distortion, how much the loss on the same training images rises, as a share of "
        "the loss just before (1 is a doubling; Figure 4 of the paper). Near zero, the weights "
        f"have come to where low rank costs nothing.{'' if linear else axis}"
        + _notes(styled, curves),
        curves,
        x="optimizer step",
        y="ΔL/L",
        scale="linear" if linear else "symlog",
        marks=_lr_milestones(styled, curves),
    )


def _weight_shift(styled: StyledRuns) -> Chart:
    curves = _curves(
        styled,
        lambda run: [(d["step"], d["weight_shift"]) for d in _thin(run) if d["weight_shift"]],
    )
    return Chart(
        "How far a distortion moves the weights: Δw",
        "At each distortion, the last one at the end of training included, the distance from the "
        "weights to their low-rank approximation: Δw = ‖W − W′‖ ÷ N over all N compressed weights "
        "(Figure 4 of the paper). Falling, the weights stay closer to low rank in between. "
        "The upright axis is logarithmic." + _notes(styled, curves),
        curves,
        x="optimizer step",
        y="Δw",
        scale="log",
        marks=_lr_milestones(styled, curves),
    )


def _curves(styled: StyledRuns, points_of: Callable[[Run], Points]) -> tuple[Curve, ...]:
    """Return one curve for every run that has points of a finite height."""
    curves = []
    for run, style in styled:
        points = tuple((x, y) for x, y in points_of(run) if y is not None and math.isfinite(y))
        if points:
            curves.append(Curve(points, style, run.summary.name))
    return tuple(curves)


def _accuracy(evaluation: dict[str, Any]) -> float:
    return 100 * float(evaluation["accuracy"])


def _thin(run: Run) -> list[dict[str, Any]]:
    """Return a run's distortions: one a step, and no more than an axis can show.

    The last one repeats the one before it where the interval divides the steps.
    """
    by_step = {distortion["step"]: distortion for distortion in reversed(run.distortions)}
    distortions = [by_step[step] for step in sorted(by_step)]
    every = max(1, math.ceil(len(distortions) / _MAX_POINTS))
    return distortions[::-1][::every][::-1]  # the last one stays


def _lr_milestones(styled: StyledRuns, curves: Sequence[Curve]) -> tuple[float, ...]:
    """Return the steps, within the curves, at which a step schedule lowers the learning rate."""
    end = max((curve.points[-1][0] for curve in curves), default=0)
    steps = set()
    for run, _ in styled:
        schedule = run.summary.recipe.get("schedule", {})
        if run.distortions and schedule.get("kind") == "step":
            milestones = schedule["milestones"]
            steps |= {epoch["step"] for epoch in run.epochs if epoch["epoch"] in milestones}
    return tuple(sorted(step for step in steps if step < end))


def _notes(styled: StyledRuns, curves: Sequence[Curve]) -> str:
    notes = ""
    if _lr_milestones(styled, curves):
        notes += " Dotted: the learning rate drops."
    if any(len(run.distortions) > _MAX_POINTS for run, _ in styled):
        notes += f" Of more than {_MAX_POINTS} distortions, evenly spaced ones are drawn."
    return notes


def _count_images(styled: StyledRuns) -> str:
    """Return on how many images the runs were measured, and a space; "" where they differ."""
    counts = {
        run.summary.recipe.get("records", {}).get("images") for run, _ in styled if run.distortions
    }
    return f"{counts.pop()} " if len(counts) == 1 and None not in counts else ""


# --- layers


def _layer_macs(styled: StyledRuns) -> Chart:
    distinct = _distinct_plans(styled)
    dense = [(run, PlotStyle(MUTED, "o")) for run, _ in distinct[:1]]
    before = [replace(c, label="") for c in _curves(dense, partial(_macs, factored=False))]
    curves = _curves(distinct, partial(_macs, factored=True))
    return Chart(
        "What each layer gained",
        "The work of each layer for one image, before (grey) and after: the gap is what was "
        "saved. Runs with the same plan share one line, under the first one's name.",
        (*before, *curves),
        x="layer, as numbered in its table below",
        y="million MACs",
        bottom=0,
        legend=(("dense", PlotStyle(MUTED, "o")),) if curves else (),
    )


def _macs(run: Run, *, factored: bool) -> Points:
    plan = run.plan
    if plan is None:
        return []
    macs = [plan.layer_macs(layer, factored=factored) / 1e6 for layer in plan.layers]
    return list(enumerate(macs, start=1))


def _relative_errors(styled: StyledRuns) -> Chart:
    curves = _curves(_distinct_plans(styled), _layer_errors)
    return Chart(
        "Relative error of each layer",
        "How much of each layer's weights its approximation misses before any training: 0 is "
        "exact, 1 is all of it. Layers that are kept have no point. Runs with the same plan share "
        "one line, under the first one's name.",
        curves,
        x="layer, as numbered in its table below",
        y="‖W − W′‖ ÷ ‖W‖",
        bottom=0,
    )


def _distinct_plans(styled: StyledRuns) -> list[tuple[Run, PlotStyle]]:
    """Return the first run of every plan."""
    first: list[tuple[Run, PlotStyle]] = []
    for run, style in styled:
        if run.plan and all(run.plan != other.plan for other, _ in first):
            first.append((run, style))
    return first


def _layer_errors(run: Run) -> Points:
    layers = run.plan.layers if run.plan else ()
    return [
        (number, layer.relative_error)
        for number, layer in enumerate(layers, start=1)
        if isinstance(layer, CompressedLayer)
    ]
