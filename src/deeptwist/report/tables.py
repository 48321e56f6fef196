"""What a table is made of, and the table of every layer of a plan."""

from collections.abc import Sequence
from dataclasses import dataclass

from deeptwist.plan.plan import Plan
from deeptwist.plan.planned_layer import KeptLayer, PlannedLayer
from deeptwist.report.formatting import NONE, decomposition_name, fewer, listed
from deeptwist.training.metrics import Run, Summary


@dataclass(frozen=True)
class Column:
    """A column's heading; words are set on the left, numbers on the right."""

    heading: str
    words: bool = False


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Attributes:
        text: the first line.
        note: a smaller second line, if any.
        tooltip: more on it, if any.
        span: columns that it takes.
        under: whether the row that it begins belongs to the one above it.
    """

    text: str
    note: str = ""
    tooltip: str = ""
    span: int = 1
    under: bool = False


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
    before = plan.layer_macs(layer, factored=False)
    head = (
        Cell(layer.name, note=f"also {listed(list(layer.aliases))}" if layer.aliases else ""),
        Cell(str(number)),
        Cell(str(layer.convolution) if layer.convolution else layer.kind),
    )
    if isinstance(layer, KeptLayer):
        return (
            *head,
            Cell(f"kept: {layer.reason}", span=2),
            *(Cell(f"{count:,}") for count in (layer.weight_numel,) * 2 + (before,) * 2),
            Cell(NONE),
        )
    decomposition, error = layer.decomposition, layer.relative_error
    rank, tile = (getattr(decomposition, name, None) for name in ("rank", "tile"))
    return (
        *head,
        Cell(type(decomposition).__name__ + (f" {tile[0]}×{tile[1]}" if tile else "")),
        Cell("×".join(map(str, rank)) if isinstance(rank, tuple) else str(rank)),
        Cell(f"{layer.weight_numel:,}"),
        Cell(f"{layer.compressed_numel:,}"),
        Cell(f"{before:,}"),
        Cell(f"{plan.layer_macs(layer, factored=True):,}"),
        Cell(NONE if error is None else f"{error:.3f}"),
    )
