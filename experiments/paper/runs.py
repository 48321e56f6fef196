"""The runs that experiments share: train what is missing, read what is there.

A run is known by its recipe, whatever its folder is called: experiments that ask for the same
training read the same run. It is trained in a folder of `RunStore.runs`; what is read afterwards
is its summary, its epochs and distortions and its recipe, which are kept with the results.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from deeptwist.data import ImageData, load_data
from deeptwist.errors import DeepTwistError
from deeptwist.serialization import write_text
from deeptwist.training.metrics import DENSE_WEIGHTS, METRICS, RECIPE, SUMMARY, Run, read_run
from deeptwist.training.recipe import Recipe, read_recipe
from deeptwist.training.run import build_run, train

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


def outcome_of(recipe: Recipe) -> Recipe:
    """Return what decides a run's outcome, but for the weights that it starts from."""
    mode, plain = recipe.training_mode, Recipe(model=recipe.model)
    return replace(
        recipe,
        weights=None,
        records=plain.records,
        interval=recipe.interval if mode.at_intervals else plain.interval,
        compression=recipe.compression if mode.compresses else plain.compression,
        data=replace(recipe.data, source=Path(recipe.data.source).name),
    )


def read_runs(folder: Path) -> dict[Recipe, Run]:
    """Read the finished runs in a folder, by what decides their outcome.

    Raises:
        DeepTwistError: if a run is damaged.
    """
    folders = sorted(path.parent for path in folder.glob(f"*/{SUMMARY}"))
    return {outcome_of(read_recipe(path / RECIPE)): read_run(path) for path in folders}


@dataclass(frozen=True)
class RunStore:
    """Where runs are trained and kept, and on what.

    Attributes:
        kept: a folder with what is read of finished runs.
        runs: a folder with whole runs, finished or not.
        data: see `DataRecipe.source`; `None` to read runs on whatever images.
        weights: a checkpoint; random weights without it.
        start: the training of the dense network that all others start from; `None` where they
            start from `weights`.
    """

    kept: Path
    runs: Path
    data: str | None
    weights: Path | None
    start: Recipe | None

    def read(self) -> Callable[[Recipe], Run | None]:
        """Read all runs; return what gives the run of a recipe, `None` where there is none."""
        runs = {self._key(recipe): run for recipe, run in read_runs(self.kept).items()}
        return lambda recipe: runs.get(self._key(self.with_inputs(recipe)))

    def _key(self, recipe: Recipe) -> Recipe:
        data = recipe.data if self.data else replace(recipe.data, source="any")
        return outcome_of(replace(recipe, data=data))

    def with_inputs(self, recipe: Recipe) -> Recipe:
        """Fill in the images, and the weights that a run starts from."""
        weights = self.weights
        if self.start is not None and recipe != self.start:
            weights = self.runs / run_name(self.start) / DENSE_WEIGHTS
        data = replace(recipe.data, source=self.data or recipe.data.source)
        return replace(recipe, weights=None if weights is None else str(weights), data=data)

    def train(self, recipe: Recipe, progress: Progress) -> None:
        """Train a run, or go on with it, and before it the dense network that it starts from.

        Raises:
            DeepTwistError: if a training fails, or its folder holds a run of another recipe.
        """
        folder = self.runs / run_name(recipe)
        if self.start is not None and recipe != self.start:
            start = self.runs / run_name(self.start)
            if not (start / SUMMARY).exists():
                self.train(self.start, progress)
        recipe = self.with_inputs(recipe)
        data = read_images(recipe.data.source, recipe.data.image_size)
        run = build_run(recipe, data, name=folder.name)
        with progress(folder.name, run.steps) as advance:
            train(run, folder, resume=True, latency_batch=None, on_step=advance)
        self._keep(folder)

    def _keep(self, folder: Path) -> None:
        try:
            (self.kept / folder.name).mkdir(parents=True, exist_ok=True)
            for name in (RECIPE, METRICS, SUMMARY):  # the last one says that it is finished
                text = (folder / name).read_text(encoding="utf-8")
                write_text(self.kept / folder.name / name, text)
        except OSError as error:
            raise DeepTwistError(f"cannot write {self.kept}: {error.strerror}") from error


def run_name(recipe: Recipe) -> str:
    """Return the name of a run's folder."""
    words = [Path(recipe.model).name, recipe.mode]
    compression, mode = recipe.compression, recipe.training_mode
    if mode.compresses:
        words.append(compression.decomposition.replace("_", "-"))
        if compression.tile is not None:
            words.append("x".join(map(str, compression.tile)))
        sizes = {"ratio": compression.ratio, "rank": compression.rank, "rc": compression.fraction}
        words += [f"{name}{size}" for name, size in sizes.items() if size is not None]
    if mode.at_intervals:
        words.append(f"every{recipe.interval}")
    words.append(f"{recipe.schedule.epochs}epochs")
    if recipe.tail is not None:
        words.append(f"tail{recipe.tail.epochs}")
    words.append(f"seed{recipe.seed}")
    return "-".join(words)


@cache  # runs share their images
def read_images(source: str, image_size: int | None) -> ImageData:
    """Load a data set, once."""
    return load_data(source, image_size=image_size)
