"""The runs that experiments share: train one, read all.

A run is known by its recipe, whatever its folder is called: experiments that ask for the same
training read the same run. Its recipe, summary, epochs and distortions are kept with the results.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from deeptwist.app.data import load_data
from deeptwist.app.training.metrics import METRICS, RECIPE, SUMMARY, Run, read_run
from deeptwist.app.training.recipe import Recipe, read_recipe
from deeptwist.app.training.run import build_run, train
from deeptwist.errors import DeepTwistError
from deeptwist.files import write_text

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
read_images = cache(load_data)  # runs share their images


def outcome_of(recipe: Recipe) -> Recipe:
    """Return what decides a run's outcome, but for the weights that it starts from."""
    mode, plain = recipe.training_mode, Recipe(model=recipe.model)
    return replace(
        recipe,
        weights=None,
        cuda_graphs=plain.cuda_graphs,
        compile=plain.compile,
        records=plain.records,
        interval=recipe.interval if mode.at_intervals else plain.interval,
        twist=recipe.twist if mode.distorts else plain.twist,
        compression=recipe.compression if mode.compresses else plain.compression,
        data=replace(recipe.data, source=Path(recipe.data.source).name),
    )


def read_runs(kept: Path) -> dict[Recipe, Run]:
    """Read the finished runs in a folder, by what decides their outcome.

    Raises:
        DeepTwistError: if a run is damaged.
    """
    folders = sorted(path.parent for path in kept.glob(f"*/{SUMMARY}"))
    return {outcome_of(read_recipe(path / RECIPE)): read_run(path) for path in folders}


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """Read the epochs of a run, finished or not."""
    events = map(json.loads, (folder / METRICS).read_text(encoding="utf-8").splitlines())
    return [event for event in events if event["event"] == "epoch"]


def read_cut_runs(kept: Path) -> dict[Recipe, list[dict[str, Any]]]:
    """Read the epochs of unfinished runs in a folder, by what decides their outcome."""
    folders = sorted(path.parent for path in kept.glob(f"*/{METRICS}"))
    cut = [path for path in folders if not (path / SUMMARY).exists()]
    return {outcome_of(read_recipe(path / RECIPE)): read_epochs(path) for path in cut}


def run_name(recipe: Recipe) -> str:
    """Return the name of a run's folder."""
    compression, mode = recipe.compression, recipe.training_mode
    sizes = {"ratio": compression.ratio, "rank": compression.rank, "rc": compression.fraction}
    words = [Path(recipe.model).name, recipe.mode]
    if mode.compresses:
        words += [name.replace("_", "-") for name in compression.decomposition]
        words += ["x".join(map(str, compression.tile))] if compression.tile else []
        words += [f"{name}{size}" for name, size in sizes.items() if size is not None]
    words += [f"every{recipe.interval}"] if mode.at_intervals else []
    words.append(f"{recipe.schedule.epochs}epochs")
    words += [f"tail{recipe.tail.epochs}"] if recipe.tail else []
    return "-".join([*words, f"seed{recipe.seed}"])


def train_run(recipe: Recipe, folder: Path, kept: Path, progress: Progress) -> None:
    """Train a run in a folder of its own, or go on with it, and keep its records in another.

    Raises:
        DeepTwistError: if it fails, or the folder holds a run of another recipe.
    """
    images = read_images(recipe.data)
    run = build_run(recipe, images, name=folder.name)
    with progress(folder.name, run.steps) as advance:
        train(run, folder, resume=True, latency_batch=None, on_step=advance)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        for name in (RECIPE, METRICS, SUMMARY):  # the last one says that it is finished
            write_text(kept / name, (folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise DeepTwistError(f"cannot write {kept}: {error.strerror}") from error
