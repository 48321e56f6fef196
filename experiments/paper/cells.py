"""A cell of an experiment: one training, in a folder that experiments share."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from deeptwist.errors import DeepTwistError
from deeptwist.training.metrics import DENSE_WEIGHTS
from deeptwist.training.recipe import Recipe

_MODES_IN_NAMES = {  # as the runs that are there were named
    "finetune": "decomposed",
    "projected": "projection",
    "random_noise": "noise",
    "decompose_at_end": "once",
}


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        name: in its experiment.
        recipe: weights and images are filled in where it is run.
    """

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Workplace:
    """Where cells are run, and on what.

    A run's folder is named for what decides its outcome: the recipe, the name of the images'
    folder and the weights that it starts from, whatever their paths. Cells of several experiments
    that agree in these are one run. Which images of that name it saw is recorded in the folder.

    Attributes:
        runs: the folder of all runs.
        data: see `training.recipe.DataRecipe.source`.
        weights: a checkpoint, none for random weights.
        start: the training of the dense network that all others start from; none where they
            start from `weights`.
    """

    runs: Path
    data: str
    weights: Path | None
    start: Recipe | None

    def bound(self, recipe: Recipe) -> Recipe:
        """A cell's recipe with its images and weights filled in."""
        weights = self.weights
        if self.start is not None and recipe != self.start:
            weights = self.folder(self.start) / DENSE_WEIGHTS
        return replace(
            recipe,
            weights=None if weights is None else str(weights),
            data=replace(recipe.data, source=self.data),
        )

    def folder(self, recipe: Recipe) -> Path:
        """The folder of a cell's run."""
        origin = None if self.weights is None else _checksum(self.weights)
        if self.start is not None and recipe != self.start:
            origin = self.folder(self.start).name
        essence = _changed(recipe.to_dict(), Recipe(model="").to_dict())
        essence.pop("data", None)
        if "mode" in essence:
            essence["mode"] = _MODES_IN_NAMES.get(recipe.mode, recipe.mode)
        held = [essence, Path(self.data).name, recipe.data.image_size, origin]
        digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:8]
        return self.runs / f"{title(recipe)}-{digest}"


def title(recipe: Recipe) -> str:
    """What a run holds, in words that a folder can be called by."""
    words = [Path(recipe.model).name, _MODES_IN_NAMES.get(recipe.mode, recipe.mode)]
    compression = recipe.compression
    if recipe.mode != "dense":
        words.append(compression.decomposition.replace("_", "-"))
        if compression.tile is not None:
            words.append("x".join(map(str, compression.tile)))
        sizes = {"ratio": compression.ratio, "rank": compression.rank, "rc": compression.fraction}
        words += [f"{name}{size}" for name, size in sizes.items() if size is not None]
    if recipe.training_mode.at_intervals:
        words.append(f"every{recipe.interval}")
    words.append(f"{recipe.schedule.epochs}epochs")
    if recipe.tail is not None:
        words.append(f"tail{recipe.tail.epochs}")
    words.append(f"seed{recipe.seed}")
    return "-".join(words)


def _changed(values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the defaults, so that a new field of recipes renames no folder."""
    return {
        name: _changed(value, usual[name])
        if isinstance(value, dict) and isinstance(usual[name], dict)
        else value
        for name, value in values.items()
        if value != usual[name]
    }


@cache  # every cell's folder is asked for several times, and a checkpoint may be large
def _checksum(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DeepTwistError(f"cannot read weights {path}: {error.strerror}") from None
