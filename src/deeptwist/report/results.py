"""The tables of results: what the runs came to, and how fast they trained."""

from itertools import groupby
from statistics import median

from deeptwist.plan.timing import Timing
from deeptwist.report.comparison import Case
from deeptwist.report.formatting import (
    NBSP,
    NONE,
    decomposition_name,
    fewer,
    file_size,
    milliseconds,
    mode_name,
    percent,
    points,
    refinement,
    speed,
)
from deeptwist.report.tables import Cell, Column, Table
from deeptwist.training.metrics import Run, Summary, Variant

_RESULTS = (
    Column("run", words=True),
    Column("mode", words=True),
    Column("decomposition", words=True),
    Column("ratio asked"),
    Column("accuracy, %"),
    Column("change, points"),
    Column("decomposed, untrained, %"),
    Column("parameters"),
    Column("MACs"),
    Column("file"),
    Column("latency, ms"),
    Column("steps"),
    Column("minutes"),
)
_TRAINING = (
    Column("run", words=True),
    Column("images per second"),
    Column("learning rate"),
    Column("distortions"),
    Column("one takes, ms"),
    Column("of the training time, %"),
)


def results(case: Case) -> Table:
    """One row per run, with a rule between decompositions."""
    groups = groupby(case.runs, key=lambda run: run.summary.decomposition)
    return Table(
        f"Results: {case.name}",
        "On the test images after the last epoch, with the network that would be deployed. "
        "Change: against the dense network that the run started from.",
        _RESULTS,
        tuple(tuple(row for run in group for row in _rows(run.summary)) for _, group in groups),
    )


def _rows(summary: Summary) -> list[tuple[Cell, ...]]:
    return [_result(summary), *(_refined(summary, refined) for refined in summary.variants)]


def _result(summary: Summary) -> tuple[Cell, ...]:
    dense = summary.mode == "dense"
    untrained, difference = summary.accuracy_untrained, summary.output_difference
    about = f"test loss {summary.loss:.3f}"
    if difference is not None:
        about += f"; decomposed and distorted outputs differ by {difference:.1e}, relatively"
    return (
        Cell(summary.name),
        Cell(mode_name(summary)),
        Cell(decomposition_name(summary)),
        Cell(NONE if summary.ratio is None else f"{summary.ratio:g}×"),
        Cell(f"{summary.accuracy * 100:.2f}", tooltip=about),
        Cell(
            points(summary.accuracy - summary.accuracy_before),
            tooltip=f"it started from {percent(summary.accuracy_before)}",
        ),
        Cell(NONE if untrained is None else f"{untrained * 100:.2f}"),
        _count(summary.parameters_before, summary.parameters, dense),
        _count(summary.macs_before, summary.macs, dense),
        Cell(file_size(summary.bytes), tooltip=f"{summary.bytes:,} bytes"),
        _latency(summary),
        Cell(f"{summary.steps:,}"),
        Cell(f"{summary.seconds / 60:.1f}", tooltip=f"{summary.seconds:,.0f} seconds"),
    )


def _refined(summary: Summary, refined: Variant) -> tuple[Cell, ...]:
    started = f"it started from {percent(summary.accuracy_before)}"
    return (
        Cell(refined.name, tooltip=f"of {summary.name}; in {refined.path}", under=True),
        Cell(refinement(summary, refined.name), span=3),
        Cell(f"{refined.accuracy * 100:.2f}", tooltip=f"test loss {refined.loss:.3f}"),
        Cell(points(refined.accuracy - summary.accuracy_before), tooltip=started),
        Cell("", span=len(_RESULTS) - 6),
    )


def _count(before: int, after: int, dense: bool) -> Cell:
    return Cell(f"{after:,}", "" if dense else fewer(before, after), f"{before:,} → {after:,}")


def _latency(summary: Summary) -> Cell:
    latency = summary.latency
    if latency is None:
        return Cell(NONE)
    sides = ("dense", latency.dense), ("decomposed", latency.decomposed)
    return Cell(
        f"{milliseconds(latency.dense.median)}{NBSP}→{NBSP}{milliseconds(latency.decomposed.median)}",
        speed(latency.speedup),
        "; ".join(f"{side}: {_quartiles(timing)}" for side, timing in sides)
        + f" for a batch of {summary.latency_batch}",
    )


def _quartiles(timing: Timing) -> str:
    lower, median, upper = map(milliseconds, (timing.lower, timing.median, timing.upper))
    return f"median {median} ms, quartiles {lower} to {upper}"


def training(case: Case) -> Table | None:
    """How fast each run trained, and what the distortions took of it; none without epochs."""
    rows = tuple(_training(run) for run in case.runs if run.epochs)
    if not rows:
        return None
    return Table(
        f"Training: {case.name}",
        "The median over the epochs, evaluations and distortions not counted; the learning rate "
        "at the start and after the last epoch; the median time of a distortion, and that of all "
        "distortions as a share of training and distortions together.",
        _TRAINING,
        (rows,),
    )


def _training(run: Run) -> tuple[Cell, ...]:
    speeds = [epoch["images_per_second"] for epoch in run.epochs]
    started = run.summary.recipe.get("optimizer", {}).get("lr")
    rates = [f"{rate:.2g}" for rate in (started, run.epochs[-1]["lr"]) if rate is not None]
    distortions = [distortion["seconds"] for distortion in run.distortions]
    trained = sum(epoch["seconds"] for epoch in run.epochs)
    return (
        Cell(run.summary.name),
        Cell(f"{median(speeds):,.0f}", tooltip=f"from {min(speeds):,.0f} to {max(speeds):,.0f}"),
        Cell(f"{NBSP}→{NBSP}".join(rates)),
        Cell(f"{len(distortions):,}" if distortions else NONE),
        Cell(milliseconds(1000 * median(distortions)) if distortions else NONE),
        Cell(f"{_share(sum(distortions), trained):.1f}" if distortions else NONE),
    )


def _share(part: float, rest: float) -> float:
    return 100 * part / (part + rest)
