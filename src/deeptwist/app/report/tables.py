"""The page's tables: what the runs came to, how fast they trained, and every layer of a plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

from deeptwist.app.report.comparison import RunGroup
from deeptwist.app.report.formatting import (
    NBSP,
    NONE,
    decomposition_name,
    format_bytes,
    format_milliseconds,
    format_percent,
    format_points,
    format_ratio,
    format_speedup,
    join_words,
    mode_name,
)
from deeptwist.app.training.metrics import Run, Summary, Variant
from deeptwist.app.training.modes import find_mode
from deeptwist.measure.timing import Timing
from deeptwist.plan.plan import Plan
from deeptwist.plan.table import layer_row


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: the first line.
        note: a smaller second line, if any.
        tooltip: more on it, if any.
        span: columns that it takes.
        is_subrow: whether the row that it begins belongs to the one above it.
    """

    text: str
    note: str = ""
    tooltip: str = ""
    span: int = 1
    is_subrow: bool = False


Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Rows in groups, with rules between the groups; a row's first cell is its heading.

    Attributes:
        name: unlike that of any other table on the page.
        caption: what is counted, and how.
        columns: headings; those of `words` are set on the left, of numbers on the right.
        groups: of rows.
        words: the headings of columns that hold words.
        total: the last row, if any.
        summary: the whole in a few words, if any.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    groups: tuple[tuple[Row, ...], ...]
    words: tuple[str, ...] = ("run",)
    total: Row = ()
    summary: str = ""


# --- results

_RESULTS = (
    "run",
    "mode",
    "decomposition",
    "ratio asked",
    "accuracy, %",
    "change, points",
    "decomposed, untrained, %",
    "parameters",
    "MACs",
    "file",
    "latency, ms",
    "steps",
    "minutes",
)


def results_table(group: RunGroup) -> Table:
    """Return one row per run and variant, with a rule between decompositions."""
    groups = groupby(group.runs, key=lambda run: run.summary.decomposition)
    return Table(
        f"Results: {group.name}",
        "On the test images after the last epoch, with the network that would be deployed. "
        "Change: against the dense network that the run started from.",
        _RESULTS,
        tuple(tuple(row for run in runs for row in _result_rows(run)) for _, runs in groups),
        words=("run", "mode", "decomposition"),
    )


def _result_rows(run: Run) -> list[Row]:
    variants = [_variant_row(run.summary, variant) for variant in run.summary.variants]
    return [_result_row(run.summary), *variants]


def _result_row(summary: Summary) -> Row:
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
        _change(summary, summary.accuracy),
        Cell(NONE if untrained is None else f"{untrained * 100:.2f}"),
        _count(summary, summary.parameters_before, summary.parameters),
        _count(summary, summary.macs_before, summary.macs),
        Cell(format_bytes(summary.bytes), tooltip=f"{summary.bytes:,} bytes"),
        _latency(summary),
        Cell(f"{summary.steps:,}"),
        Cell(f"{summary.seconds / 60:.1f}", tooltip=f"{summary.seconds:,.0f} seconds"),
    )


def _variant_row(summary: Summary, variant: Variant) -> Row:
    where = f"of {summary.name}; in {variant.path}"
    return (
        Cell(variant.name, tooltip=where, is_subrow=True),
        Cell(_variant_note(summary, variant.name), span=3),
        Cell(f"{variant.accuracy * 100:.2f}", tooltip=f"test loss {variant.loss:.3f}"),
        _change(summary, variant.accuracy),
        Cell("", span=len(_RESULTS) - 6),
    )


def _variant_note(summary: Summary, name: str) -> str:
    """Return what was done besides to a run's network, from what its recipe says of it."""
    recipe = summary.recipe
    epochs = (recipe.get("tail") or {}).get("epochs")
    images = (recipe.get("data") or {}).get("validation")
    notes = {
        "recalibrated": f"batch norm's statistics taken anew on {recipe.get('recalibration')} "
        "training batches",
        "not recalibrated": "batch norm's statistics as training left them",
        "moving average": f"of the weights while training, decay {recipe.get('ema')}",
        "best on validation": f"chosen while training on {images} images held out",
        "int8": "quantised by onnxruntime, calibrated on training images",
        "tail": f"{epochs} more epoch{'' if epochs == 1 else 's'}, of the factors",
    }
    return notes.get(name, "")


def _change(summary: Summary, accuracy: float) -> Cell:
    if not find_mode(summary.mode).compresses:
        if not summary.steps:
            return Cell(NONE, tooltip="it is what the others are compared with")
        if not summary.recipe.get("weights"):
            return Cell(NONE, tooltip="it started from random weights")
    before = summary.accuracy_before
    return Cell(format_points(accuracy - before), tooltip=f"from {format_percent(before)}")


def _count(summary: Summary, before: int, after: int) -> Cell:
    note = format_ratio(before, after) if find_mode(summary.mode).compresses else ""
    return Cell(f"{after:,}", note, f"{before:,} → {after:,}")


def _latency(summary: Summary) -> Cell:
    latency = summary.latency
    if latency is None:
        return Cell(NONE)
    medians = [format_milliseconds(side.median) for side in (latency.dense, latency.decomposed)]
    return Cell(
        f"{NBSP}→{NBSP}".join(medians),
        format_speedup(latency.speedup),
        f"dense: {_quartiles(latency.dense)}; decomposed: {_quartiles(latency.decomposed)} "
        f"for a batch of {summary.latency_batch}",
    )


def _quartiles(timing: Timing) -> str:
    lower, middle, upper = map(format_milliseconds, (timing.lower, timing.median, timing.upper))
    return f"median {middle} ms, quartiles {lower} to {upper}"


# --- training


def training_table(group: RunGroup) -> Table | None:
    """Return how fast each run trained, and what distortions took; `None` without epochs."""
    rows = tuple(_training_row(run) for run in group.runs if run.epochs)
    if not rows:
        return None
    return Table(
        f"Training: {group.name}",
        "The median over the epochs, evaluations and distortions not counted; the learning rate "
        "at the start and after the last epoch; the median time of a distortion, and that of all "
        "distortions as a share of training and distortions together.",
        (
            "run",
            "images per second",
            "learning rate",
            "distortions",
            "one takes, ms",
            "of the training time, %",
        ),
        (rows,),
    )


def _training_row(run: Run) -> Row:
    speeds = [epoch["images_per_second"] for epoch in run.epochs]
    initial = run.summary.recipe.get("optimizer", {}).get("lr")
    rates = [f"{rate:.2g}" for rate in (initial, run.epochs[-1]["lr"]) if rate is not None]
    seconds = [distortion["seconds"] for distortion in run.distortions]
    trained = sum(epoch["seconds"] for epoch in run.epochs)
    share = 100 * sum(seconds) / (sum(seconds) + trained) if seconds else 0
    return (
        Cell(run.summary.name),
        Cell(f"{median(speeds):,.0f}", tooltip=f"from {min(speeds):,.0f} to {max(speeds):,.0f}"),
        Cell(f"{NBSP}→{NBSP}".join(rates)),
        Cell(f"{len(seconds):,}" if seconds else NONE),
        Cell(format_milliseconds(1000 * median(seconds)) if seconds else NONE),
        Cell(f"{share:.1f}" if seconds else NONE),
    )


# --- layers

_LAYERS = ("layer", "no.", "shape", "lowered", "decomposition", "rank")
_COSTS = ("weights", "MACs", "relative error")


def layer_tables(runs: Sequence[Run]) -> list[Table]:
    """Return one table per distinct plan, named for the runs that have it."""
    plans: list[tuple[Plan, list[Summary]]] = []
    for run in runs:
        if run.plan is None:
            continue
        users = next((users for plan, users in plans if plan == run.plan), None)
        if users is None:
            plans.append((run.plan, [run.summary]))
        else:
            users.append(run.summary)
    return [_layer_table(plan, users) for plan, users in plans]


def _layer_table(plan: Plan, users: list[Summary]) -> Table:
    ratio = "" if users[0].ratio is None else f", ratio {users[0].ratio:g}×"
    names = join_words([user.name for user in users])
    fewer = format_ratio(plan.dense_parameters, plan.parameters)
    return Table(
        f"{decomposition_name(users[0])}{ratio}: {names}",
        "Weights without biases; MACs for one image; relative error ‖W − W′‖ ÷ ‖W‖ of the "
        "approximation before any training.",
        (*_LAYERS, *_COSTS),
        (tuple(_layer_row(plan, number) for number in range(len(plan.layers))),),
        words=("layer", "shape", "lowered", "decomposition", "relative error"),
        total=(
            Cell("whole network", note=f"with {plan.other_parameters:,} other parameters"),
            Cell("", span=len(_LAYERS) - 1),
            Cell(f"{plan.dense_parameters:,} → {plan.parameters:,}"),
            Cell(f"{plan.dense_macs:,} → {plan.macs:,}"),
            Cell(""),
        ),
        summary=f"{len(plan.compressed)} of {len(plan.layers)} layers decomposed, "
        f"{fewer} parameters",
    )


def _layer_row(plan: Plan, index: int) -> Row:
    layer = plan.layers[index]
    macs = (plan.layer_macs(layer, factored=factored) for factored in (False, True))
    name, *cells = layer_row(layer, *macs)
    note = f"also {join_words(layer.aliases)}" if layer.aliases else ""
    return (Cell(name, note), Cell(str(index + 1)), *map(Cell, cells))
