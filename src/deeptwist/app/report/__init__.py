"""Finished runs as one page that opens offline. Reads records only, never trains.

Tables and charts are made first, the template only lays them out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deeptwist.app.report.records import (
    MACS,
    PARAMETERS,
    Cost,
    Network,
    Record,
    dense_networks,
    read_record,
)
from deeptwist.app.tables import HEADER, sweep_table
from deeptwist.errors import DeepTwistError, require_extra
from deeptwist.files import explaining_writes, write_text
from deeptwist.plan.plan import Plan, layer_row

with require_extra():
    from jinja2 import Environment, PackageLoader

    from deeptwist.app.report import charts
    from deeptwist.app.report.charts import Curve, distinct_plans


_NONE, _NBSP = "–", "\N{NO-BREAK SPACE}"
Cell = str | tuple[str, str, str]  # a text; or it, a smaller line below it, and a tooltip
_OUTCOME = (
    "As the job told it at its end: both networks are timed in turn, milliseconds are medians, how "
    "many times as fast is the median of the rounds' own ratios."
)
_WORDS = {"ms": ("faster", "slower"), "MB": ("smaller", "larger")}


@dataclass(frozen=True)
class Table:
    """Rows under a header, each as long as it; the first cell of a row is its heading."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: Sequence[str] = ()  # the columns that are set on the left
    title: str = ""  # what stands there where the table is folded


def write_report(folders: Sequence[Path], path: Path, *, title: str) -> Path:
    """Write finished runs as one HTML file that needs nothing else, not even a network.

    Args:
        folders: of runs or jobs; those of several networks or data sets get a part each.
        path: the file to write; an old one is replaced.
        title: of the page.

    Returns:
        The path.

    Raises:
        DeepTwistError: if there is no run, one cannot be read, or the file cannot be written.
    """
    if not folders:
        raise DeepTwistError("there is no run to report on")
    groups: dict[str, list[Record]] = {}
    for record in map(read_record, folders):
        groups.setdefault(record.title, []).append(record)
    sections: list[dict[str, Any]] = []
    for name, records in groups.items():
        lead, table = _summary(records), _results_table(records)
        plans = [_layer_table(run.plan, records) for run, _ in distinct_plans(records) if run.plan]
        sections += [
            {"heading": f"{run.name} in short", "table": Table(_OUTCOME, HEADER, run.outcome)}
            for run in records
            if run.outcome
        ]
        sections += [
            {"heading": name, "lead": lead, "table": table, "charts": charts.gain_charts(records)},
            {"heading": "While training", "charts": charts.training_charts(records)},
            {"heading": "Layers", "charts": charts.layer_charts(records), "folded": plans},
        ]
    ordered = [record for records in groups.values() for record in records]
    commands = [record.command for record in ordered]
    sections.append({"heading": "Settings", **_settings(ordered), "commands": commands})
    _write_page(path, title, sections)
    return path


def _write_page(path: Path, title: str, sections: Sequence[dict[str, Any]]) -> None:
    """Lay sections out by the template, without those that hold nothing, and write the page."""
    environment = Environment(
        loader=PackageLoader("deeptwist.app", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [
        section for section in sections if any(section[key] for key in {*section} - {"heading"})
    ]
    page = environment.get_template("page.html.j2").render(title=title, sections=shown)
    with explaining_writes(path):
        # A name read from JSON may hold half a surrogate pair, which UTF-8 cannot.
        write_text(path, page.encode(errors="replace").decode())


# --- results


def _summary(records: Sequence[Record]) -> str:
    """Return one sentence: the best compressed network beside the dense one."""
    accuracies = [record.dense[0].accuracy for record in records if not record.small]
    ends = [record.small[0] for record in records if record.small]
    if not ends:
        return f"The dense network has {_percent(max(accuracies))}; none is compressed yet."
    best = max(ends, key=lambda network: (network.accuracy, _ratio(network)))
    sizes = " and ".join(
        f"{_times(best.costs[column], column, 1)} {column}" for column in (PARAMETERS, MACS)
    )
    dense = _percent(max(accuracies, default=best.start or 0))
    accuracy = f"{best.name} ({best.kind}): {_percent(best.accuracy)}"
    return f"{accuracy} at {sizes}; the dense network has {dense}."


def _ratio(network: Network) -> float:
    cost = network.costs[PARAMETERS]
    return cost.ratio or 0 if isinstance(cost, Cost) else 0


def _percent(share: float) -> str:
    return f"{100 * share:.1f}{_NBSP}%"


def _results_table(records: Sequence[Record]) -> Table:
    """Return one row for each network, and a column for each thing that was measured."""
    networks = [*dense_networks(records), *(n for record in records for n in record.small)]
    columns = list(dict.fromkeys(column for network in networks for column in network.costs))
    untrained = ["untrained, %"] * any(network.untrained is not None for network in networks)
    rows = [
        (
            (network.name, network.kind if network.kind != network.name else "", ""),
            (f"{100 * network.accuracy:.2f}", _change(network), ""),
            *(_share(network.untrained) for _ in untrained),
            *(_cost(network.costs.get(column), column) for column in columns),
        )
        for network in networks
    ]
    caption = (
        "On the test images, of what would be deployed. Small: against the dense network that the "
        "run started from, of the same precision, and timed in turn; the accuracy of int8 against "
        "the same network's in fp32. Milliseconds are medians for "
        "a batch; in the plots, lines through markers are their quartiles, and the accuracy axis "
        "does not begin at zero."
    )
    return Table(caption, ["network", "accuracy, %", *untrained, *columns], rows)


def _change(network: Network) -> str:
    if network.start is None:
        return ""
    points = f"{100 * (network.accuracy - network.start):+.2f}"
    return f"{'0.00' if float(points) == 0 else points.replace('-', '−')}{_NBSP}points"


def _share(share: float | None) -> str:
    return _NONE if share is None else f"{100 * share:.2f}"


def _cost(cost: Cost | str | None, column: str) -> Cell:
    if not isinstance(cost, Cost):
        return (_NONE, cost or "", "")
    if cost.quartiles:
        tooltip = "quartiles {} to {}".format(*map(_milliseconds, cost.quartiles))
        return (_milliseconds(cost.value), _times(cost, column), tooltip)
    number = f"{cost.value:,.0f}" if column in (PARAMETERS, MACS) else f"{cost.value:.2f}"
    return (number, _times(cost, column), "")


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _times(cost: Cost | str, column: str, digits: int = 2) -> str:
    """Return how many times less than the dense network's a cost is: ``"4.15× fewer"``."""
    if not isinstance(cost, Cost) or not cost.ratio:
        return ""
    less, more = _WORDS.get(column[:2], ("fewer", "more"))
    ratio, word = (cost.ratio, less) if cost.ratio >= 1 else (1 / cost.ratio, more)
    return f"{ratio:.{digits}f}×{_NBSP}{word}"


# --- layers, settings


def _layer_table(plan: Plan, records: Sequence[Record]) -> Table:
    """Return every layer of a plan, named for the runs that have it."""
    header = ["layer", "no.", "shape", "lowered", "decomposition", "rank"]
    rows: list[list[Cell]] = []
    for number, layer in enumerate(plan.layers, start=1):
        name, *cells = layer_row(layer, plan.examples)
        aliases = f"also {', '.join(layer.aliases)}" if layer.aliases else ""
        rows.append([(name, aliases, ""), str(number), *cells])
    total = ("all", f"with {plan.other_parameters:,} other parameters", "")
    weights = f"{plan.dense_parameters:,} → {plan.parameters:,}"
    rows.append([total, *[""] * 5, weights, f"{plan.dense_macs:,} → {plan.macs:,}", ""])
    users = ", ".join(record.name for record in records if record.plan == plan)
    return Table(
        "Weights without biases; MACs for one image; the relative error is that before training.",
        [*header, "weights", "MACs", "relative error"],
        rows,
        words=("decomposition", "relative error"),
        title=f"{users}: {len(plan.compressed)} of {len(plan.layers)} layers decomposed",
    )


def _settings(records: Sequence[Record]) -> dict[str, Any]:
    """Return what all runs have in common, and a table of what they differ in."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    values = {key: [record.settings.get(key, _NONE) for record in records] for key in keys}
    differing = [key for key in keys if len({*values[key]}) > 1]
    rows = [
        [record.name, *(values[key][number] for key in differing)]
        for number, record in enumerate(records)
    ]
    table = Table("What the runs differ in.", ["run", *differing], rows, words=differing)
    shared = [(key, values[key][0]) for key in keys if key not in differing]
    return {"terms": shared, "table": table if differing else None}


# --- a sweep over ratios


def write_sweep(sweep: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Write a sweep over ratios as one HTML file that needs nothing else.

    Args:
        sweep: what `deeptwist.app.cli.sweep.sweep_network` returns: plain values.
        path: the file to write; an old one is replaced.
        title: of the page.

    Raises:
        DeepTwistError: if the file cannot be written.
    """
    points, knee, dense = sweep["points"], sweep["knee"], sweep["dense_accuracy"]
    note = " Dotted: the knee, farthest below the straight line between the two ends." * bool(knee)
    marks = [knee] if knee else []

    def draw(name: str, caption: str, y: str, **heights: Iterable[float | None]) -> None:
        curves = [
            Curve(
                label,
                zip((point["ratio"] for point in points), values, strict=True),
                {"color": charts.COLORS[number], "marker": "os"[number]},
            )
            for number, (label, values) in enumerate(heights.items())
        ]
        drawn.extend(charts.draw(name, caption, curves, x="ratio asked", y=y, marks=marks))

    drawn: list[charts.Chart] = []
    draw(
        "Predicted error",
        "The root mean square, over the layers, of the relative error of each: of its outputs on "
        f"the calibration images, or of its weights where there are none.{note}",
        "relative error",
        error=[point["error"] for point in points],
    )
    draw(
        "What is saved",
        "Of the whole network, layers that stay dense included.",
        "times fewer",
        weights=[point["weights"] for point in points],
        MACs=[point["macs"] for point in points],
    )
    if dense is not None:
        draw(
            "Accuracy without training",
            f"Decomposed, batch norm's statistics taken anew, nothing trained.{note}",
            "test accuracy, %",
            decomposed=[100 * point["accuracy"] for point in points],
            dense=[100 * dense] * len(points),
        )
    header, *rows = sweep_table(sweep)
    table = Table("The whole network, planned at each ratio.", header, rows)
    _write_page(path, title, [{"table": table, "charts": drawn}])
