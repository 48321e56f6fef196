"""The runs' settings: once where all share them, else run by run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deeptwist.app.report.formatting import NONE, join_words
from deeptwist.app.report.tables import Cell, Table
from deeptwist.app.training.metrics import Run, Summary
from deeptwist.app.training.modes import find_mode

_LABELS = {
    "interval": "interval S_D, steps between distortions",
    "optimizer.name": "optimizer",
    "lr": "learning rate at the start",
    "optimizer.nesterov": "Nesterov momentum",
    "data.validation": "validation images held out",
    "ema": "moving average, decay",
    "recalibration": "recalibration, batches",
    "skip_first_conv": "first convolution kept",
    "linear": "linear layers compressed",
    "min_in_channels": "fewest input channels compressed",
    "rank_multiple": "ranks are multiples of",
    "include": "layers included",
    "exclude": "layers excluded",
    "plan": "plan read from",
    "weights": "starting weights",
    "records.images": "images seen before and after a distortion",
}
_ALWAYS_SHOWN = ("seed", "optimizer.momentum", "optimizer.weight_decay")
_ALWAYS_SHOWN_IN = ("compression.", "fixed.")
_HIDDEN = (  # in other tables, said in words, or of no consequence
    "model",
    "mode",
    "data.source",
    "records.checkpoint_every",
    *(f"schedule.{name}" for name in ("kind", "milestones", "factor", "power")),
    *(f"compression.{name}" for name in ("decomposition", "ratio", "rank", "fraction", "tile")),
)
_NEUTRAL = {
    "optimizer.decay_all": True,
    "optimizer.accumulate": 1,
    "min_in_channels": 1,
    "rank_multiple": 1,
    "include": ["*"],
    "latency_batch": 16,
    "latency_runtime": "eager",
}


@dataclass(frozen=True)
class ConfigTable:
    """What all runs share, and a table of what they do not."""

    shared: tuple[tuple[str, str], ...]
    differing: Table | None


def config_table(runs: Sequence[Run]) -> ConfigTable:
    """Return settings, machine and version: once where all runs share them, else run by run."""
    settings = [_settings(run.summary) for run in runs]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    differing = [key for key in keys if len({values.get(key, NONE) for values in settings}) > 1]
    rows = tuple(
        (Cell(run.summary.name), *(Cell(values.get(key, NONE)) for key in differing))
        for run, values in zip(runs, settings, strict=True)
    )
    columns = ("run", *differing)
    table = Table("Settings", "What the runs differ in.", columns, (rows,), words=columns)
    return ConfigTable(
        shared=tuple((key, settings[0][key]) for key in keys if key not in differing),
        differing=table if differing else None,
    )


def _settings(summary: Summary) -> dict[str, str]:
    recipe = _flatten(summary.recipe)
    values = {
        "network": summary.model,
        "data": summary.data,
        **{_label(key): value for key, value in recipe.items() if _is_shown(key, value, summary)},
        "learning rate falls": _describe_schedule(summary.recipe.get("schedule", {})),
        "processes": summary.processes if summary.processes > 1 else None,
        "machine": summary.machine,
        "deeptwist": summary.version,
    }
    return {name: _format(value) for name, value in values.items() if value is not None}


def _flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a recipe's values by dotted keys."""
    values: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            values |= _flatten(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def _is_shown(key: str, value: Any, summary: Summary) -> bool:
    """Whether a value says something of the run: one that is off does where readers look for it."""
    name = key.rpartition(".")[2]
    neutral = _NEUTRAL.get(key, _NEUTRAL.get(name))
    if key in _HIDDEN or value is None or value == [] or value == neutral:
        return False
    if key == "interval":
        return find_mode(summary.mode).at_intervals
    if key.startswith(_ALWAYS_SHOWN_IN):
        return find_mode(summary.mode).compresses
    return key in _ALWAYS_SHOWN or bool(value)


def _label(key: str) -> str:
    """Return a name for readers: of what is not the training's own, with its section."""
    section, _, name = key.rpartition(".")
    label = _LABELS.get(key) or _LABELS.get(name) or name.replace("_", " ")
    if section == "fixed":
        return f"fixed layers: {label}"
    return f"{section}, {label}" if section in ("distillation", "tail") else label


def _describe_schedule(schedule: Mapping[str, Any]) -> str | None:
    if schedule.get("kind") != "step":
        power = f"by a polynomial of power {schedule.get('power', 1):g} to zero"
        words = {"cosine": "by a cosine to zero", "polynomial": power}
        return words.get(schedule.get("kind", ""))
    milestones = [str(epoch) for epoch in schedule["milestones"]]
    ends = f"epoch{'s' if len(milestones) > 1 else ''} {join_words(milestones)}"
    return f"×{schedule['factor']:g} after {ends}" if milestones else "not at all"


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
