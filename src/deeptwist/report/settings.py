"""What the runs were set to: once where all share it, else run by run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deeptwist.report.formatting import NONE, listed
from deeptwist.report.tables import Cell, Column, Table
from deeptwist.training.metrics import Run, Summary
from deeptwist.training.modes import find_mode
from deeptwist.training.recipe import CompressionRecipe, DistillationRecipe, Recipe, TailRecipe

_NAMES = {
    "weights": "starting weights",
    "batch_size": "batch size",
    "interval": "interval S_D, steps between distortions",
    "tolerance": "tolerance of a distortion",
    "data.image_size": "image size",
    "data.validation": "validation images held out",
    "optimizer.lr": "learning rate at the start",
    "optimizer.momentum": "momentum",
    "optimizer.nesterov": "Nesterov momentum",
    "optimizer.weight_decay": "weight decay",
    "schedule.epochs": "epochs",
    "compression.skip_first_conv": "first convolution kept",
    "compression.linear": "linear layers compressed",
    "compression.min_in_channels": "fewest input channels compressed",
    "compression.rank_multiple": "ranks are multiples of",
    "compression.include": "layers included",
    "compression.exclude": "layers excluded",
    "compression.plan": "plan read from",
    "label_smoothing": "label smoothing",
    "ema": "moving average, decay",
    "distillation.weight": "distillation, weight",
    "distillation.temperature": "distillation, temperature",
    "recalibration": "recalibration, batches",
    "tail.epochs": "tail, epochs",
    "tail.lr": "tail, learning rate at the start",
    "records.images": "images seen before and after a distortion",
}
_ALWAYS = (
    "batch_size",
    "interval",
    "seed",
    "precision",
    "optimizer.lr",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "schedule.epochs",
    "compression.skip_first_conv",
    "compression.linear",
    "distillation.weight",
    "distillation.temperature",
    "tail.epochs",
    "tail.lr",
)
_NEVER = (  # in the table of results, or of no consequence
    "model",
    "mode",
    "data.source",
    "schedule.kind",
    "schedule.milestones",
    "schedule.factor",
    *(f"compression.{key}" for key in ("decomposition", "ratio", "rank", "fraction", "tile")),
    "records.checkpoint_every",
)


@dataclass(frozen=True)
class SettingsTable:
    """What all runs share, and a table of what they do not."""

    shared: tuple[tuple[str, str], ...]
    differing: Table | None


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
    recipe = summary.recipe
    values = {
        "network": summary.model,
        "data": summary.data,
        **{_name(key): value for key, value in _flat(recipe).items() if _says(key, value, summary)},
        "learning rate falls": _schedule(recipe.get("schedule", {})),
        "processes": summary.processes if summary.processes > 1 else None,
        "machine": summary.machine,
        "deeptwist": summary.version,
    }
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's values by dotted keys."""
    values: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def _says(key: str, value: Any, summary: Summary) -> bool:
    """Whether a value tells something of the run, a default only where readers look for it."""
    if key in _NEVER or value is None:
        return False
    if key == "interval":
        return find_mode(summary.mode).at_intervals
    if key.startswith("compression.") and summary.mode == "dense":
        return False
    return key in _ALWAYS or value != _DEFAULTS.get(key)


def _name(key: str) -> str:
    fixed, _, own = key.partition("fixed.")
    if own and not fixed:
        return f"fixed layers: {_NAMES.get(f'compression.{own}', own)}"
    return _NAMES.get(key, key)


def _schedule(schedule: Mapping[str, Any]) -> str | None:
    if schedule.get("kind") != "step":
        return {"cosine": "by a cosine to zero"}.get(schedule.get("kind", ""))
    milestones = [str(epoch) for epoch in schedule["milestones"]]
    ends = f"epoch{'s' if len(milestones) > 1 else ''} {listed(milestones)}"
    return f"×{schedule['factor']:g} after {ends}" if milestones else "not at all"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


_DEFAULTS = _flat(
    Recipe(
        model="",
        fixed=CompressionRecipe(),
        distillation=DistillationRecipe(),
        tail=TailRecipe(),
    ).to_dict()
)
