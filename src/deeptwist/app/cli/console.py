"""What is shown: help and results, as tables or JSON; on standard error, progress."""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cyclopts.help import DefaultFormatter, HelpPanel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from deeptwist.app.tables import (
    HEADER,
    Values,
    job_rows,
    medians,
    percent,
    sweep_table,
)

if TYPE_CHECKING:
    from deeptwist.app.training.run import TrainingRun
    from deeptwist.measure.timing import Comparison
    from deeptwist.plan.plan import Plan

SHOWS_ALL: ContextVar[bool] = ContextVar("shows_all", default=False)  # of help
_SECONDS_TO_FIRST_LINE, _SECONDS_BETWEEN_LINES = 3.0, 20.0  # of progress, in a pipe
# A pipe has no width to fit: a table there keeps its lines whole.
_WIDE = None if sys.stdout.isatty() else 200


def is_main_process() -> bool:
    """Return whether this is the only process, or the first of those that ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


def print_result(values: Values, as_json: bool, show: Callable[[Values], None]) -> None:
    """Print what a command came to: for a script as JSON, or as `show` does for a person.

    Of several processes the first one alone prints.
    """
    if as_json and is_main_process():
        print(json.dumps(values))
    elif is_main_process():
        show(values)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column to the left and the others to the right."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=_WIDE).print(table)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Show progress on standard error; give the call that moves it.

    On a terminal it is a bar; elsewhere a line now and then, where the work takes that long.
    """
    console = Console(stderr=True)
    if not is_main_process():
        yield lambda: None
        return
    if not console.is_terminal:
        with _lines(label, total) as advance:
            yield advance
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


@contextmanager
def _lines(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Give the call that counts; tell soon, then now and then, how much is left, done or not."""
    done, ended = 0, threading.Event()

    def tell() -> None:
        seconds = _SECONDS_TO_FIRST_LINE / 2
        ended.wait(seconds)  # what an earlier process did is counted at once, and tells no speed
        before, started = done, time.monotonic()
        while not ended.wait(seconds):
            left = (time.monotonic() - started) / max(1, done - before) * (total - done)
            estimate = f", {_duration(left)} left" if before < done < total else ""
            print(f"{label}: {done:,} of {total:,}{estimate}", file=sys.stderr, flush=True)
            seconds = _SECONDS_BETWEEN_LINES

    def advance() -> None:
        nonlocal done
        done += 1

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield advance
    finally:
        ended.set()


@contextmanager
def telling(label: str, run: "TrainingRun") -> Iterator[dict[str, Any]]:
    """Show a training on standard error: its steps, and each epoch in a line.

    Gives the arguments of `train`; where there are no steps, its evaluations are shown.
    """
    if not run.steps:
        yield {"progress": progress_bar}
        return
    epochs = run.recipe.schedule.epochs

    def tell(values: Values) -> None:
        if values["event"] != "epoch":
            return
        left = max(0, epochs - values["epoch"]) * values["seconds"]
        print(
            f"epoch {values['epoch']}/{epochs}: loss {values['train_loss']:.4f}, test accuracy "
            f"{percent(values['test']['accuracy'])}, learning rate {values['lr']:.3g}, "
            f"{_duration(values['seconds'])}, {_duration(left)} left",
            file=sys.stderr,
            flush=True,
        )

    with progress_bar(label, run.steps) as advance:
        yield {"on_step": advance, "on_record": tell}


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


# --- plans and their times


def plan_counts(plan: "Plan") -> dict[str, int]:
    """Return what a network costs by a plan, before and after, as plain values."""
    parameters = {"parameters_before": plan.dense_parameters, "parameters": plan.parameters}
    return {**parameters, "macs_before": plan.dense_macs, "macs": plan.macs}


def layer_rows(plan: "Plan", times: "Mapping[str, Comparison]") -> list[Values]:
    """Return what each layer that was timed by itself promises and keeps, as plain values.

    Returns:
        A row a layer: its name, `macs_ratio` (dense ÷ factored: the speed-up that the count
        promises), its times and `efficiency`, the share of the promise that is kept.
    """
    from deeptwist.plan.latency import most_expensive_call

    rows = []
    for layer in plan.compressed:
        if layer.name in times:
            size, measured = most_expensive_call(layer).size, times[layer.name]
            ratio = layer.convolution.macs(size) / layer.decomposition.macs(layer.convolution, size)
            values = {"macs_ratio": ratio, "efficiency": measured.speedup / ratio}
            rows.append({"name": layer.name, "times": asdict(measured), **values})
    return rows


def print_benchmark(name: str, result: Values) -> None:
    """Print the layers that were timed, the whole network in every setting, and the machine."""

    def row(label: str, times: Values, promise: float, middle: str) -> list[str]:
        both, speedup = medians(times), times["speedup"]
        verdict = "" if speedup > 1 else "not worth it"
        return [label, *both, middle, f"{speedup:.2f}×", f"{speedup / promise:.2f}", verdict]

    layers, networks, machine = (result[key] for key in ("layers", "networks", "machine"))
    if layers:
        header = ["layer", "dense ms", "factored ms", "MAC ratio", "speed-up", "efficiency", ""]
        ratios = [layer["macs_ratio"] for layer in layers]
        rows = [
            row(layer["name"], layer["times"], ratio, f"{ratio:.2f}")
            for layer, ratio in zip(layers, ratios, strict=True)
        ]
        print_table("each layer by itself", header, rows)
        print()
    ratio, rows = result["macs_before"] / max(1, result["macs"]), []
    for network in networks:
        label = "{runtime}, {dtype}, {threads} threads, batch {batch}".format(**network["setting"])
        if network["times"] is None:
            rows.append([label, "", "", "", "", "", network["reason"]])
            continue
        quartiles = "{lower:.2f} – {upper:.2f}".format(**network["times"]["decomposed"])
        rows.append(row(label, network["times"], ratio, quartiles))
    header = ["setting", "dense ms", "decomposed ms", "quartiles", "speed-up", "efficiency", ""]
    print_table(f"{name}, {ratio:.2f}× fewer MACs", header, rows)
    print(f"\n{machine}")


def print_sweep(title: str, result: Values) -> None:
    """Print a row for each ratio, and which of them is the knee."""
    header, *rows = sweep_table(result)
    print_table(title, header, rows)


def print_exported(result: Values) -> None:
    """Print what was written, and how exact it is."""
    version = "" if result["opset"] is None else f" (opset {result['opset']})"
    print(f"{result['path']}: {result['format']}{version}, {result['bytes']:,} bytes")
    if result["worst_difference"] is not None:
        batches = ", ".join(map(str, result["batches"]))
        sizes = ", ".join("×".join(map(str, size)) for size in result["sizes"])
        print(
            f"outputs differ from PyTorch's by {result['worst_difference']:.1e} at most, "
            f"at batches {batches}" + (f" and sizes {sizes}" if sizes else "")
        )


def print_info(result: Values) -> None:
    """Print a saved network's layers, its sizes, and what else its folder says."""
    header = "layer", "shape", "decomposition", "rank", "weights"
    rows = [[row[key] for key in header] for row in result["layers"]]
    title = f"{result['base_model']}, saved by deeptwist {result['deeptwist_version']}"
    print_table(title, header, rows)
    print(f"\n{result['path']}: {result['bytes']:,} bytes, {result['numbers']:,} numbers")
    for key, value in result["metadata"].items():
        if value is not None:
            print(f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


def print_predictions(result: Values) -> None:
    """Print a line for each image: its likeliest classes."""
    for image in result["images"]:
        classes = ", ".join(f"{name} {share:.1%}" for name, share in image["classes"].items())
        print(f"{image['path']}: {classes}")


# --- runs and jobs


def print_summary(title: str, run: Values) -> None:
    """Print a row for a run, then one for each network derived from it."""
    header = ["run", "accuracy", "untrained", "parameters", "MACs", "file", "latency", "speed-up"]
    times, latency = run["latency"], ["", ""]
    if times is not None:
        latency = [f"{times['decomposed']['median']:.2f} ms", f"{times['speedup']:.2f}×"]
    row = [
        run["name"],
        percent(run["accuracy"]),
        percent(run["accuracy_untrained"]),
        f"{run['parameters']:,}",
        f"{run['macs']:,}",
        f"{run['bytes'] / 1024:,.0f} kB",
        *latency,
    ]
    derived = [
        [f"{run['name']}, {variant['name']}", percent(variant["accuracy"]), *[""] * 6]
        for variant in run["variants"]
    ]
    print_table(title, header, [row, *derived])


def print_compressed(title: str, result: Values) -> None:
    """Print what `deeptwist compress` came to: its files, and a table of before and after."""
    results = result["results"]
    print(f"small network: {results['verify']['path']}\nreport: {results['report']['path']}\n")
    print_table(title, HEADER, job_rows(results))


# --- help


class CommonOptions(DefaultFormatter):
    """Panels of the options that are common, until all are asked for.

    Attributes:
        common: their names, apart by spaces; all are, where none is named.
        defaults: of the command, where they are other than those of the recipe that it reads.
    """

    def __init__(self, common: str = "", defaults: Mapping[str, Any] | None = None):
        super().__init__()
        self.common, self.defaults = {*common.split()}, defaults or {}

    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        """Print a panel, if anything is left in it."""
        shows_all = SHOWS_ALL.get() or not self.common
        is_common = [shows_all or bool(self.common & {*e.names}) for e in panel.entries]
        entries = [
            entry.copy(default=default_of(entry.names, entry.default, self.defaults))
            for entry, is_shown in zip(panel.entries, is_common, strict=True)
            if is_shown
        ]
        if entries:
            super().__call__(console, options, panel.copy(entries=entries))


def default_of(names: tuple[str, ...], default: Any, defaults: Mapping[str, Any]) -> Any:
    """Return an option's default: one of the command's, nested as in a recipe, or else its own."""
    for name in names:
        value: Any = defaults
        for key in name.removeprefix("--").replace("-", "_").split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and not isinstance(value, Mapping):
            return str(value)
    plain = re.sub(r"[(),']", "", str(default))  # a tuple as it is typed
    return None if plain in ("", "False", "None") else plain
