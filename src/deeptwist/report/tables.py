"""The tables: results, every layer of a plan, and what the runs were set to."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from deeptwist.planning import Plan, PlannedLayer
from deeptwist.report.cases import Case
from deeptwist.report.wording import (
    NBSP,
    NONE,
    decomposition_name,
    fewer,
    file_size,
    listed,
    milliseconds,
    mode_name,
    percent,
    points,
    speed,
)
from deeptwist.timing import Timing
from deeptwist.training.records import Run, Summary


@dataclass(frozen=True)
class Column:
    """A column's heading; words are set on the left, numbers on the right."""

    heading: str
    words: bool = False


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, with a smaller second line and a tooltip where they are not empty."""

    text: str
    note: str = ""
    tooltip: str = ""
    span: int = 1


@dataclass(frozen=True)
class Table:
    """Rows in groups, with rules between the groups; a row's first cell is its heading.

    Attributes:
        name: unlike that of any other table on the page.
        caption: what is counted, and how.
        columns: see `Column`.
        groups: of rows.
        total: the last row, if any.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    groups: tuple[tuple[tuple[Cell, ...], ...], ...]
    total: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class PlanTable:
    """A plan's table, with what the plan comes to in a few words."""

    summary: str
    table: Table


@dataclass(frozen=True)
class SettingsTable:
    """What all runs share, and a table of what they do not."""

    shared: tuple[tuple[str, str], ...]
    differing: Table | None


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
_LAYERS = (
    Column("layer", words=True),
    Column("no."),
    Column("shape", words=True),
    Column("decomposition", words=True),
    Column("rank"),
    Column("weights before"),
    Column("after"),
    Column("MACs before"),
    Column("after"),
    Column("relative error"),
)
_SETTINGS = {
    "batch_size": "batch size",
    "lr": "learning rate at the start",
    "weight_decay": "weight decay",
    "interval": "interval S_D, steps between distortions",
    "version": "deeptwist",
}


def results(case: Case) -> Table:
    """One row per run, with a rule between decompositions."""
    groups = groupby(case.runs, key=lambda run: run.summary.decomposition)
    return Table(
        f"Results: {case.name}",
        "On the test images after the last epoch, with the network that would be deployed. "
        "Change: against the dense network that the run started from.",
        _RESULTS,
        tuple(tuple(_result(run.summary) for run in group) for _, group in groups),
    )


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


def plans(runs: Sequence[Run]) -> list[PlanTable]:
    """One table per distinct plan, named for the runs that have it."""
    distinct: list[tuple[Plan, list[Summary]]] = []
    for run in runs:
        if run.plan is None:
            continue
        users = next((users for plan, users in distinct if plan == run.plan), None)
        if users is None:
            distinct.append((run.plan, [run.summary]))
        else:
            users.append(run.summary)
    return [_plan_table(plan, users) for plan, users in distinct]


def _plan_table(plan: Plan, users: list[Summary]) -> PlanTable:
    first = users[0]
    ratio = "" if first.ratio is None else f", ratio {first.ratio:g}×"
    name = f"{decomposition_name(first)}{ratio}: {listed([user.name for user in users])}"
    summary = (
        f"{len(plan.compressed)} of {len(plan.layers)} layers decomposed, "
        f"{fewer(plan.dense_parameters, plan.parameters)} parameters"
    )
    rows = tuple(_layer(plan, layer, number) for number, layer in enumerate(plan.layers, start=1))
    counts = plan.dense_parameters, plan.parameters, plan.dense_macs, plan.macs
    total = (
        Cell("whole network", note=f"with {plan.other_parameters:,} other parameters"),
        Cell("", span=4),
        *(Cell(f"{count:,}") for count in counts),
        Cell(""),
    )
    caption = (
        "Weights without biases; MACs for one image; relative error ‖W − W′‖ ÷ ‖W‖ of the "
        "approximation before any training."
    )
    return PlanTable(summary, Table(name, caption, _LAYERS, (rows,), total))


def _layer(plan: Plan, layer: PlannedLayer, number: int) -> tuple[Cell, ...]:
    decomposition, error = layer.decomposition, layer.relative_error
    before = plan.layer_macs(layer, factored=False)
    head = (
        Cell(layer.name, note=f"also {listed(list(layer.aliases))}" if layer.aliases else ""),
        Cell(str(number)),
        Cell(str(layer.convolution) if layer.convolution else layer.kind),
    )
    if decomposition is None:
        return (
            *head,
            Cell(f"kept: {layer.reason}", span=2),
            *(Cell(f"{count:,}") for count in (layer.num_weights,) * 2 + (before,) * 2),
            Cell(NONE),
        )
    rank, tile = (getattr(decomposition, name, None) for name in ("rank", "tile"))
    return (
        *head,
        Cell(type(decomposition).__name__ + (f" {tile[0]}×{tile[1]}" if tile else "")),
        Cell("×".join(map(str, rank)) if isinstance(rank, tuple) else str(rank)),
        Cell(f"{layer.num_weights:,}"),
        Cell(f"{layer.factored_weights:,}"),
        Cell(f"{before:,}"),
        Cell(f"{plan.layer_macs(layer, factored=True):,}"),
        Cell(NONE if error is None else f"{error:.3f}"),
    )


def settings(runs: Sequence[Run]) -> SettingsTable:
    """Settings, machine and version: once where all runs share them, else run by run."""
    values = [_settings(run.summary) for run in runs]
    keys = list(dict.fromkeys(key for value in values for key in value))
    differing = [key for key in keys if len({value.get(key, NONE) for value in values}) > 1]
    rows = tuple(
        (Cell(run.summary.name), *(Cell(value.get(key, NONE)) for key in differing))
        for run, value in zip(runs, values, strict=True)
    )
    columns = (Column("run", words=True), *(Column(key, words=True) for key in differing))
    differences = Table("Settings", "What the runs differ in.", columns, (rows,))
    return SettingsTable(
        shared=tuple((key, values[0].get(key, NONE)) for key in keys if key not in differing),
        differing=differences if differing else None,
    )


def _settings(summary: Summary) -> dict[str, str]:
    everything = {
        "network": summary.model,
        "data": summary.data,
        **summary.settings,
        "machine": summary.machine,
        "version": summary.version,
    }
    return {_SETTINGS.get(key, key): _plain(value) for key, value in everything.items()}


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
