"""Run an experiment: train its missing runs, and write the page of those that are finished."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

from experiments.paper.presets import Preset, Profile, preset_of
from experiments.paper.results import Report, Results
from experiments.paper.runs import Progress, outcome_of, read_images, read_runs, run_name, train_run

from deeptwist._version import __version__
from deeptwist.app.cli.options import Several
from deeptwist.app.training.metrics import DENSE_WEIGHTS, SUMMARY, Run
from deeptwist.app.training.recipe import Recipe
from deeptwist.errors import DeepTwistError, check_int, unknown_name_error
from deeptwist.files import write_text
from deeptwist.measure.machine import describe_machine

Trial = tuple[str, int]  # a run's name in its experiment, and its seed


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked of an experiment.

    Attributes:
        profile: The paper's schedule, half of it on images of 16×16 or 32×32, a short one, or a
            smoke test; long for the experiment of that name, short for the others.
        data: digits, cifar10, or a folder with train/ and test/ (or val/) of class folders.
        weights: A checkpoint of the network to start from.
        out: Folder of the results, and of what is kept of each run.
        runs: Folder of the runs, which experiments share.
        seeds: Train each run once with each.
        only: Train only runs of these names or globs.
        show: Train nothing; draw what is finished.
    """

    profile: Profile | None = None
    data: str | None = None
    weights: Path | None = None
    out: Path = Path("results")
    runs: Path = Path("runs/paper")
    seeds: Several[int] = (0,)
    only: Several[str] = ()
    show: bool = False


@dataclass(frozen=True)
class Runner:
    """Runs an experiment.

    Attributes:
        name: of the experiment.
        experiment: its module: `PLACE` in the paper, `CLAIM`, `NETWORK`, and two functions.
            `recipes(preset)` returns the trainings by name, in the order of what matters most;
            `report(results, preset)` the tables and figures of those that are finished.
        options: what is asked of it.
    """

    name: str
    experiment: ModuleType
    options: Options = Options()

    @property
    def preset(self) -> Preset:
        """Return what its runs vary."""
        profile = self.options.profile or ("long" if self.name == "long" else "short")
        return preset_of(profile, self.experiment.NETWORK)

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Return the trainings by name."""
        trainings: dict[str, Recipe] = self.experiment.recipes(self.preset)
        return trainings

    def run(self, progress: Progress) -> Path:
        """Train the missing runs and write the page; return the page's path.

        A run that fails leaves the others alone. What is finished is written even where the rest
        is interrupted.

        Raises:
            DeepTwistError: if something is missing, or runs failed.
        """
        options, recipes = self.options, self.recipes
        self._check(recipes)
        source = self._source()
        trials = {
            (name, seed): replace(recipe, seed=seed, data=replace(recipe.data, source=source))
            for seed in dict.fromkeys(options.seeds)
            for name, recipe in recipes.items()
        }
        failures: dict[Trial, str] = {}
        try:
            failures |= () if options.show else self._train(trials, progress)
        finally:
            runs = read_runs(options.out / self.preset.profile)
            keys = {trial: outcome_of(recipe) for trial, recipe in trials.items()}
            finished = {trial: runs[key] for trial, key in keys.items() if key in runs}
            missing = {trial: failures.get(trial, "") for trial in trials if trial not in finished}
            page = self._write(finished, missing)
        if failures:
            (first, _), reason = next(iter(failures.items()))
            failed = f"{len(failures)} of {len(trials)} runs of {self.name} failed, {first!r} first"
            raise DeepTwistError(f"{failed} ({reason}); the others are in {page}")
        return page

    def _check(self, recipes: Mapping[str, Recipe]) -> None:
        options, preset = self.options, self.preset
        for seed in options.seeds:
            check_int("seed", seed, 0)
        for pattern in options.only:
            if not any(fnmatch(name, pattern) for name in recipes):
                raise unknown_name_error("run", pattern, recipes)
        for option in preset.needs if recipes and not options.show else ():
            if getattr(options, option) is None:
                run = f"{preset.recipe.model} in profile {preset.profile}"
                raise DeepTwistError(f"{run} needs --{option}: give it")

    def _source(self) -> str:
        """Return the images that are asked for; to show runs, those of the runs that are there."""
        options, preset = self.options, self.preset
        sources = [options.data] if options.data else []
        if options.show:
            runs = read_runs(options.out / preset.profile)
            sources += [each.data.source for each in runs if each.model == preset.recipe.model]
        return next(iter(sources), preset.recipe.data.source)

    def _train(
        self, trials: Mapping[Trial, Recipe], progress: Progress
    ) -> Iterator[tuple[Trial, str]]:
        """Train what is asked for and not finished; yield the reasons of what fails."""
        options, start = self.options, self.preset.start
        kept, runs = (each / self.preset.profile for each in (options.out, options.runs))
        finished, only = read_runs(kept), options.only or ("*",)

        def train(recipe: Recipe, weights: Path | None) -> None:
            recipe = replace(recipe, weights=None if weights is None else str(weights))
            name = run_name(recipe)
            train_run(recipe, runs / name, kept / name, progress)

        for trial, recipe in trials.items():
            if outcome_of(recipe) in finished or not any(fnmatch(trial[0], each) for each in only):
                continue
            read_images(recipe.data)  # no run's fault
            weights = options.weights
            try:
                if start is not None:  # trained once, as its folder shows
                    folder = runs / run_name(start)
                    weights = folder / DENSE_WEIGHTS
                    if not (folder / SUMMARY).exists():
                        train(replace(start, data=recipe.data), options.weights)
                train(recipe, weights)
            except DeepTwistError as error:
                yield trial, str(error)

    def _write(self, finished: Mapping[Trial, Run], missing: Mapping[Trial, str]) -> Path:
        """Write the page and its figures; return the page's path."""
        runs: dict[str, list[Run]] = {}
        for (name, _), run in finished.items():
            runs.setdefault(name, []).append(run)
        report: Report = self.experiment.report(Results(runs, self.options.out), self.preset)
        label = self.preset.profile if finished or missing else "exact"
        parts = [f"# {self.experiment.PLACE} (`{self.name}`)", self.experiment.CLAIM]
        if label == "exact":
            parts.append(f"Nothing is trained. deeptwist {__version__}, {describe_machine()}.")
        else:
            parts += self._describe(finished, missing)
        for table in report.tables:
            parts += [f"## {table.title}", table.markdown()]
        parts += [f"![{figure.title}]({label}-{figure.name}.svg)" for figure in report.figures]
        parts.append("\n".join(f"- {note}" for note in report.notes))
        if label != "exact":
            parts.append(f"Every run's recipe, machine and records: [{label}](../{label}).")
        folder = self.options.out / self.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for figure in report.figures:
                write_text(folder / f"{label}-{figure.name}.svg", figure.svg)
            write_text(folder / f"{label}.md", "\n\n".join(parts) + "\n")
        except OSError as error:
            raise DeepTwistError(f"cannot write {folder}: {error.strerror}") from error
        return folder / f"{label}.md"

    def _describe(
        self, finished: Mapping[Trial, Run], missing: Mapping[Trial, str]
    ) -> Iterator[str]:
        """Yield on what, how, how far and where an experiment was run."""
        options, preset = self.options, self.preset
        summaries = [run.summary for run in finished.values()]
        seeds = [str(seed) for seed in dict.fromkeys(options.seeds)]
        several = "s" if len(seeds) > 1 else ""
        data = " ".join(dict.fromkeys(each.data for each in summaries)) or options.data or "DATA"
        few = " With fewer than three seeds, half a point means little."
        yield (
            f"Profile `{preset.profile}`, {preset.description}; {data}, seed{several} "
            f"{', '.join(seeds)}. {len(finished)} of {len(finished) + len(missing)} runs are "
            f"finished.{few if len(seeds) < 3 and preset.profile != 'smoke' else ''}"
        )
        yield from sorted({f"Run with deeptwist {s.version}, {s.machine}." for s in summaries})
        command = (
            f"python -m experiments.paper {self.name} --profile {preset.profile} --data {data}"
        )
        weights = " --weights FILE" if "weights" in preset.needs else ""
        yield f"`{command}{weights} --seeds {' '.join(seeds)}`"
        names = [
            name + (f", seed {seed}" if several else "") + (f" ({reason})" if reason else "")
            for (name, seed), reason in missing.items()
        ]
        if names:
            yield f"Not run: {'; '.join(names)}."
