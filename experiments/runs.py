"""Train runs, and keep them as tables: ``results/PROFILE/{runs,epochs,distortions}.csv``.

A run that is finished is a row of ``runs.csv``, with the command that makes it again; its epochs
and distortions are rows of the other two, by the same name. Numbers have six significant digits;
shifts of single layers stay in the run's own folder.
"""

import multiprocessing
import shlex
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from deeptwist.app.cli.commands import app
from deeptwist.app.data import ImageData, load_data
from deeptwist.app.folders import read_run
from deeptwist.app.training.recipe import DataRecipe, Recipe
from deeptwist.app.training.run import build_run, train
from deeptwist.compress import Values
from deeptwist.errors import DeepTwistError
from deeptwist.files import write_text

FINISHED, CUT = "finished", "cut"
KINDS = ("epochs", "distortions", "runs")  # the last one says that a run is finished
ALL_IMAGES = "all"
_EPOCH = ("epoch", "step", "lr", "train_loss", "seconds")
_DISTORTION = ("step", "lr", "weight_shift", "loss_increase", "seconds")
_SUMMARY = (
    *("steps", "accuracy_before", "accuracy_untrained", "accuracy", "loss", "top5_before", "top5"),
    *("parameters_before", "parameters", "macs_before", "macs", "bytes", "output_difference"),
    *("seconds", "processes", "machine", "version"),
)
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class NoiseInPlaceOfDistortion:
    """Moves a weight as far as a distortion would, in a random direction: see `DeepTwist.perturb`.

    Attributes:
        seed: of the directions.
    """

    seed: int

    def __call__(self, name: str, step: int, weight: Tensor, approximation: Tensor) -> Tensor:
        """Return the weight with noise of the norm of its distortion, other at every step."""
        seed = zlib.crc32(f"{self.seed}/{step}/{name}".encode())
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        noise = noise.to(weight, non_blocking=True)
        size = torch.linalg.vector_norm(approximation - weight)
        moved: Tensor = weight + size / torch.linalg.vector_norm(noise) * noise
        return moved


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        name: of its folder and its rows.
        words: of ``deeptwist train``, but for the folder.
        test_images: to test on: ``"first 3000"`` of a fixed shuffle, or the ``"rest 7000"``.
        has_noise: whether noise takes a distortion's place, which no word says.
    """

    name: str
    words: str
    test_images: str = ALL_IMAGES
    has_noise: bool = False

    @property
    def recipe(self) -> Recipe:
        """Return what the words say."""
        words = ["train", *shlex.split(self.words), "--out", self.name]
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        recipe: Recipe = bound.arguments["recipe"]
        return recipe


def read_table(folder: Path, kind: str = "runs") -> pd.DataFrame:
    """Read a table, by the names of the runs; an empty one where there is none.

    Raises:
        DeepTwistError: if it is damaged.
    """
    path = folder / f"{kind}.csv"
    if not path.exists():
        return pd.DataFrame(columns=["state"], index=pd.Index([], name="name"))
    try:
        return pd.read_csv(path, dtype_backend="numpy_nullable").set_index("name")
    except (KeyError, OSError, ValueError) as error:
        raise DeepTwistError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def finished_names(folder: Path) -> set[str]:
    """Return the names of the runs that are finished."""
    table = read_table(folder)
    return {*table.index[table["state"] == FINISHED]}


def append(folder: Path, kind: str, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of a run into a table, in place of those that it has there.

    Raises:
        DeepTwistError: if it cannot be written.
    """
    added = pd.DataFrame(rows, index=pd.Index([name] * len(rows), name="name"))
    table = pd.concat([read_table(folder, kind).drop(name, errors="ignore"), added])
    table = table[sorted(table, key=lambda column: column == "command")]  # the longest last
    try:
        folder.mkdir(parents=True, exist_ok=True)
        csv = table.dropna(axis=1, how="all").to_csv(float_format="%.6g", lineterminator="\n")
        write_text(folder / f"{kind}.csv", csv)
    except OSError as error:
        raise DeepTwistError(f"cannot write {folder}: {error.strerror}") from error


def train_jobs(
    jobs: Sequence[Job], kept: Path, runs: Path, progress: Progress, workers: int = 1
) -> Iterator[tuple[str, str]]:
    """Train what is not finished, and keep what each comes to as soon as it is.

    Args:
        jobs: in the order of what matters most.
        kept: folder of the tables.
        runs: folder of the runs' own folders; one that is there is gone on with.
        progress: called with a name and a number of steps, gives the call that counts one.
        workers: trainings at a time.

    Yields:
        The name of a job that failed, and the reason.

    Raises:
        DeepTwistError: if there are no such images, or a table cannot be written.
    """
    jobs = [job for job in jobs if job.name not in finished_names(kept)]
    for source in {job.recipe.data: job for job in jobs}.values():
        load_images(source.recipe.data, source.test_images)  # no run's fault
    if workers == 1:
        for job in jobs:
            reason = _train(job, runs, progress)
            yield from [(job.name, reason)] if reason else keep(job, runs, kept)
        return
    # An executor's processes, unlike a pool's, may have children: those that decode images.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        futures = {executor.submit(_train, job, runs): job for job in jobs}
        for future in as_completed(futures):
            job, reason = futures[future], future.result()
            yield from [(job.name, reason)] if reason else keep(job, runs, kept)


def _train(job: Job, runs: Path, progress: Progress | None = None) -> str:
    """Train a run, or go on with it; return why it failed, or nothing."""
    if progress is None:  # one of several
        torch.set_num_threads(1)
    try:
        recipe = job.recipe
        run = build_run(recipe, load_images(recipe.data, job.test_images), name=job.name)
        if job.has_noise:
            run = replace(run, perturb=NoiseInPlaceOfDistortion(recipe.seed))
        with progress(job.name, run.steps) if progress else nullcontext(lambda: None) as advance:
            train(run, runs / job.name, resume=True, latency_batch=None, on_step=advance)
    except DeepTwistError as error:
        return str(error)
    return ""


def keep(job: Job, runs: Path, kept: Path) -> tuple[()]:
    """Write a finished run into the tables."""
    run, recipe = read_run(runs / job.name), job.recipe
    rows = {
        "epochs": [
            {key: epoch[key] for key in _EPOCH} | _evaluation(epoch["test"]) for epoch in run.epochs
        ],
        "distortions": [
            {key: distortion[key] for key in _DISTORTION}
            | {
                f"{split}_{key}_{when}": value
                for split in ("train", "test")
                for when, each in zip(("before", "after"), distortion[split], strict=False)
                for key, value in _evaluation(each).items()
                if key != "top5"
            }
            for distortion in run.distortions
        ],
        "runs": [_settings(job, recipe) | _outcome(run.summary) | {"command": _command(job)}],
    }
    for kind in KINDS:
        append(kept, kind, job.name, rows[kind])
    return ()


def _command(job: Job) -> str:
    if job.has_noise:
        return f"python -m experiments noise --only {job.name.rpartition('-s')[0]}"
    return f"deeptwist train {job.words}"


def _evaluation(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values.get(key) for key in ("loss", "accuracy", "top5")}


def _settings(job: Job, recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says, as far as tables show it."""
    compresses, distorts = recipe.compresses, recipe.distorts
    return {
        "model": recipe.model,
        "mode": "random_noise" if job.has_noise else recipe.mode,
        "decomposition": recipe.compression.label if compresses else None,
        "ratio": recipe.compression.ratio if compresses else None,
        "interval": recipe.interval if distorts else None,
        "lr": recipe.optimizer.lr,
        "weight_decay": recipe.optimizer.weight_decay,
        "epochs": recipe.schedule.epochs,
        "finetune_after": recipe.finetune_after.epochs if recipe.finetune_after else None,
        "precision": recipe.precision,
        "image_size": recipe.data.image_size,
        "seed": recipe.seed,
        "data": Path(recipe.data.source).name,
        "test_images": None if job.test_images == ALL_IMAGES else job.test_images,
        "logged_images": recipe.logging.images or None,
        "state": FINISHED,
    }


def _outcome(summary: Values) -> dict[str, Any]:
    """Return what a run came to."""
    variants = {
        f"accuracy_{each['name'].replace(' ', '_')}": each["accuracy"]
        for each in summary["variants"]
    }
    return {key: summary[key] for key in _SUMMARY} | variants


@cache  # decoding takes a minute, and most runs share their images
def load_images(recipe: DataRecipe, test_images: str = ALL_IMAGES) -> ImageData:
    """Load images; see `Job.test_images`."""
    data = load_data(recipe)
    if test_images == ALL_IMAGES:
        return data
    part, _, count = test_images.partition(" ")
    order = torch.randperm(len(data.test.labels), generator=torch.Generator().manual_seed(0))
    rows = order[: int(count)] if part == "first" else order[len(order) - int(count) :]
    name = f"{data.name}, {test_images} test images"
    return replace(data, test=data.test.subset(rows), name=name)
