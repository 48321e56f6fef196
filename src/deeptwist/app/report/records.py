"""What a report shows of a run, read from its folder: in one shape for every kind of run."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from deeptwist.app.folders import RECIPE, flatten, read_job, read_run
from deeptwist.app.tables import job_rows
from deeptwist.plan.plan import Plan

PARAMETERS, MACS, MEGABYTES, ONNX = "parameters", "MACs", "MB", "MB, ONNX"
_HIDDEN = {"dense": ("interval", "twist.", "compression."), "finetune": ("interval", "twist.")}


class Cost(NamedTuple):
    """What a network costs: parameters, MACs, megabytes, or milliseconds for a batch."""

    value: float  # of times the median
    ratio: float | None = None  # dense ÷ this; of times over rounds, in which drift cancels
    quartiles: tuple[float, float] | None = None  # of times


@dataclass(frozen=True)
class Network:
    """A network that was evaluated: a row of the table, a marker of the plots."""

    name: str  # of the run, and how it was derived if it was
    kind: str  # mode, decomposition, ratio; empty where it was derived
    accuracy: float  # on the test split, 0 to 1
    start: float | None = None  # accuracy of the dense network that it comes from
    untrained: float | None = None  # accuracy of the same decomposition without training
    costs: dict[str, Cost | str] = field(default_factory=dict)  # by column; or why there is none


@dataclass(frozen=True)
class Record:
    """A finished run: `dense` is what it started from, or the result of a dense run."""

    name: str
    title: str  # the network and its images: accuracies are comparable where these are equal
    dense: list[Network]  # as it is, and derived from it
    small: list[Network]  # as the run ended, and derived from it; empty for a dense run
    epochs: list[dict[str, Any]]  # see `metrics`
    distortions: list[dict[str, Any]]  # see `metrics`; one for each step
    plan: Plan | None
    milestones: list[int]  # epochs after which the learning rate drops
    settings: dict[str, str]  # by the recipe's names
    command: str  # that does the same again
    outcome: list[list[str]] = field(default_factory=list)  # of a job: the terminal's table


def read_record(folder: Path) -> Record:
    """Read what 'deeptwist train' or 'deeptwist compress' finished.

    Raises:
        DeepTwistError: if the folder holds no finished run, or a damaged one.
    """
    run, job = read_run(folder), read_job(folder)
    values = run.summary
    dense, small = _networks(values)
    if job is not None:
        _add_results(job["results"], dense, small)
    schedule = values["recipe"].get("schedule", {})
    by_step = {line["step"]: line for line in reversed(run.distortions)}  # the last may be twice
    return Record(
        name=values["name"],
        title=f"{values['model'].rpartition(':')[2]} on {values['data']}",
        dense=dense,
        small=small if values["mode"] != "dense" else [],
        epochs=run.epochs,
        distortions=[by_step[step] for step in sorted(by_step)],
        plan=run.plan,
        milestones=schedule["milestones"] if schedule.get("kind") == "step" else [],
        settings=_settings(values, run.epochs, run.distortions),
        command=_command(folder, job),
        outcome=[] if job is None else job_rows(job["results"]),
    )


def dense_networks(records: Sequence[Record]) -> list[Network]:
    """Return every dense run, and what the others start from where it is none of these."""
    networks: list[Network] = []
    for record in sorted(records, key=lambda record: bool(record.small)):
        for start in record.dense:
            same = (n for n in networks if (n.kind, n.accuracy) == (start.kind, start.accuracy))
            known = next(same, None) if record.small else None
            if known is None:
                networks.append(start)
            else:  # what was measured of it there, the first time it was
                known.costs.update({**start.costs, **known.costs})
    return networks


def _networks(run: Mapping[str, Any]) -> tuple[list[Network], list[Network]]:
    """Return the dense and the small networks of a run's summary."""
    is_dense, before = run["mode"] == "dense", run["accuracy_before"]
    name, accuracy = (run["name"], run["accuracy"]) if is_dense else ("dense", before)
    dense = Network(name, "dense", accuracy)
    ratio = None if run["ratio"] is None else f"{run['ratio']:g}×"
    decomposition = (run["decomposition"] or "").removesuffix("()")
    is_trained = run["steps"] > 0
    mode = "" if run["mode"] == run["name"] or not is_trained else run["mode"]
    kind = ", ".join(filter(None, (mode, decomposition, ratio)))
    untrained = run["accuracy_untrained"] if is_trained else None
    small = Network(run["name"], kind, run["accuracy"], before, untrained)
    _add_sizes(PARAMETERS, (run["parameters_before"], run["parameters"]), dense, small)
    _add_sizes(MACS, (run["macs_before"], run["macs"]), dense, small)
    (dense if is_dense else small).costs[MEGABYTES] = Cost(run["bytes"] / 1e6)
    if run["latency"] is not None:
        _add_times(f"ms, eager, batch {run['latency_batch']}", run["latency"], dense, small)
    names = [(f"{run['name']}, {variant['name']}", variant) for variant in run["variants"]]
    return [dense], [small, *(Network(n, "", v["accuracy"], before) for n, v in names)]


def _add_sizes(column: str, sizes: tuple[int, int], dense: Network, small: Network) -> None:
    before, after = (size / 1e6 if column in (MEGABYTES, ONNX) else size for size in sizes)
    dense.costs[column] = Cost(before)
    small.costs[column] = Cost(after, before / after if after else None)


def _add_times(column: str, times: Mapping[str, Any], dense: Network, small: Network) -> None:
    sides = (dense, times["dense"], None), (small, times["decomposed"], times["speedup"])
    for network, time, speedup in sides:
        network.costs[column] = Cost(time["median"], speedup, (time["lower"], time["upper"]))


def _add_results(results: Mapping[str, Any], dense: list[Network], small: list[Network]) -> None:
    """Add what the stages of a job measured besides the training."""
    ends = dense[0], small[0]
    _add_sizes(MEGABYTES, (results["dense"]["bytes"], results["verify"]["bytes"]), *ends)
    if "export" in results:
        _add_sizes(ONNX, (results["export"]["dense"], results["export"]["small"]), *ends)
    columns: dict[str, str] = {}
    for row in results["time"]["settings"]:
        dtype = "" if row["dtype"] == "float32" else f"{row['dtype']}, "
        threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
        column = f"ms, {row['runtime']}, {dtype}{threads}, batch {row['batch']}"
        columns.setdefault(row["runtime"], column)  # int8 is timed in the runtime's first setting
        if row["times"]:
            _add_times(column, row["times"], *ends)
        else:
            small[0].costs[column] = row["reason"]
    if "int8" in results:
        int8 = [results["int8"][side] for side in ("dense", "small")]
        before, after = (
            Network(f"{network.name}, int8", "", values["accuracy"], network.accuracy)
            for network, values in zip(ends, int8, strict=True)
        )
        _add_sizes(ONNX, (int8[0]["bytes"], int8[1]["bytes"]), before, after)
        _add_times(columns["onnxruntime"], results["int8"]["times"], before, after)
        dense.append(before)
        small.append(after)


def _settings(
    run: Mapping[str, Any], epochs: Sequence[Any], distortions: Sequence[Any]
) -> dict[str, str]:
    """Return the recipe as far as it speaks of the mode, and how the training went."""
    hidden = _HIDDEN.get(run["mode"], ())
    values = {key: v for key, v in flatten(run["recipe"]).items() if not key.startswith(hidden)}
    if epochs:
        values["images per second"] = round(median(epoch["images_per_second"] for epoch in epochs))
    if distortions:
        each = 1000 * median(line["seconds"] for line in distortions)
        values["distortions"] = f"{len(distortions):,}, {each:.3g} ms each"
    values["optimizer steps"] = f"{run['steps']:,}"
    values["minutes"] = f"{run['seconds'] / 60:.1f}"
    values |= {name: run[name] for name in ("processes", "machine")} | {"deeptwist": run["version"]}
    return {key: _text(value) for key, value in values.items() if value not in (None, [], ())}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _command(folder: Path, job: Mapping[str, Any] | None) -> str:
    """Return the command that does the same again, from the recipe in the folder."""
    words = ["deeptwist", "train" if job is None else "compress", str(folder / RECIPE)]
    for name, value in ({} if job is None else job["job"]["options"]).items():
        if value not in (None, False, []):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join([*words, "--out", f"{folder}-again"])
