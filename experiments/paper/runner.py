"""Run an experiment: train its missing runs, and write the page of those that are finished."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from experiments.paper.presets import Network, Preset, Profile, preset_of
from experiments.paper.results import Report, Results
from experiments.paper.runs import Progress, RunStore, read_images

from deeptwist._version import __version__
from deeptwist.benchmark.environment import describe_machine
from deeptwist.cli.options import Several
from deeptwist.errors import DeepTwistError, check_int, unknown_name_error
from deeptwist.serialization import write_text
from deeptwist.training.metrics import Run
from deeptwist.training.recipe import Recipe

_ENOUGH_SEEDS = 3  # from which on a difference of half a point says something
Trial = tuple[str, int]  # a run's name in its experiment, and its seed


class Experiment(Protocol):
    """A figure, a table or a statement of the paper: what its module holds."""

    PLACE: str
    CLAIM: str
    NETWORK: Network

    def recipes(self, preset: Preset) -> Mapping[str, Recipe]:
        """Return the trainings by name, in the order of what matters most."""

    def report(self, results: Results, preset: Preset) -> Report:
        """Return the tables and figures of those that are finished."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked of an experiment.

    Attributes:
        profile: The paper's schedule, half of it on images of 16×16 or 32×32, a short one, or a
            smoke test; long for the experiment of that name, short for the others.
        data: digits, cifar10, or a folder with train/ and test/ (or val/) of class folders.
        weights: A checkpoint of the network to start from.
        out: Folder of the results, and of what is kept of each run.
        runs: Folder of the runs, which experiments share; finished ones are read.
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


def default_profile(name: str) -> Profile:
    """Return the profile that an experiment is trained in if none is named."""
    return "long" if name == "long" else "short"


@contextmanager
def _silent(label: str, total: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


def run_experiment(
    name: str, experiment: Experiment, options: Options, *, progress: Progress = _silent
) -> Path:
    """Train an experiment's missing runs and write its page; return the page's path.

    A run that fails leaves the others alone. What is finished is written even where the rest is
    interrupted.

    Raises:
        DeepTwistError: if something is missing, or runs failed.
    """
    profile = options.profile or default_profile(name)
    preset = preset_of(profile, experiment.NETWORK)
    recipes = experiment.recipes(preset)
    for seed in options.seeds:
        check_int("seed", seed, 0)
    trials = {
        (each, seed): replace(recipe, seed=seed)
        for seed in dict.fromkeys(options.seeds)
        for each, recipe in recipes.items()
    }
    _check_names(recipes, options.only)
    data = options.data
    if recipes and not options.show:
        preset.check_inputs(data, options.weights)
        data = data or preset.recipe.data.source
    store = RunStore(
        options.out / profile, options.runs / profile, data, options.weights, preset.start
    )
    failures: dict[Trial, str] = {}
    try:
        if trials and not options.show:
            failures = _train(trials, store, options.only, progress)
    finally:
        read = store.read()
        finished = {trial: run for trial, recipe in trials.items() if (run := read(recipe))}
        page = _write(name, experiment, preset, options, trials, finished, failures)
    if failures:
        (first, _), reason = next(iter(failures.items()))
        raise DeepTwistError(
            f"{len(failures)} of {len(trials)} runs of {name} failed, {first!r} first "
            f"({reason}); the others are in {page}"
        )
    return page


def _check_names(names: Mapping[str, Recipe], only: Sequence[str]) -> None:
    for pattern in only:
        if not any(fnmatch(name, pattern) for name in names):
            raise unknown_name_error("run", pattern, names)


def _train(
    trials: Mapping[Trial, Recipe], store: RunStore, only: Sequence[str], progress: Progress
) -> dict[Trial, str]:
    """Train those of these names that are not finished; return the reasons of those that fail."""
    read = store.read()
    wanted = [
        (trial, recipe)
        for trial, recipe in trials.items()
        if read(recipe) is None and (not only or any(fnmatch(trial[0], each) for each in only))
    ]
    if wanted:  # a mistake in the images is not each run's
        recipe = store.with_inputs(wanted[0][1])
        read_images(recipe.data.source, recipe.data.image_size)
    failures = {}
    for trial, recipe in wanted:
        try:
            store.train(recipe, progress)
        except DeepTwistError as error:
            failures[trial] = str(error)
    return failures


def _write(
    name: str,
    experiment: Experiment,
    preset: Preset,
    options: Options,
    trials: Mapping[Trial, Recipe],
    finished: Mapping[Trial, Run],
    failures: Mapping[Trial, str],
) -> Path:
    """Write the page and its figures; return the page's path."""
    runs: dict[str, list[Run]] = {}
    for (each, _), run in finished.items():
        runs.setdefault(each, []).append(run)
    report = experiment.report(Results(runs, options.out), preset)
    label = preset.profile if trials else "exact"
    state = _state(name, preset, options, trials, finished, failures)
    parts = [f"# {experiment.PLACE} (`{name}`)", experiment.CLAIM, *state]
    for table in report.tables:
        parts += [f"## {table.title}", table.markdown()]
    parts += [f"![{figure.title}]({label}-{figure.name}.svg)" for figure in report.figures]
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes))
    if trials:
        parts.append(f"Every run's recipe, machine and records: [{label}](../{label}).")
    page = options.out / name / f"{label}.md"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for figure in report.figures:
            write_text(page.parent / f"{label}-{figure.name}.svg", figure.svg)
        write_text(page, "\n\n".join(parts) + "\n")
    except OSError as error:
        raise DeepTwistError(f"cannot write {page.parent}: {error.strerror}") from error
    return page


def _state(
    name: str,
    preset: Preset,
    options: Options,
    trials: Mapping[Trial, Recipe],
    finished: Mapping[Trial, Run],
    failures: Mapping[Trial, str],
) -> list[str]:
    """Return on what, how, how far and where an experiment was run."""
    if not trials:
        return [f"Nothing is trained. deeptwist {__version__}, {describe_machine()}."]
    seeds = list(dict.fromkeys(options.seeds))
    images = dict.fromkeys(run.summary.data for run in finished.values())
    data = Path(options.data).name if options.data else " ".join(images) or "DATA"
    lines = [
        f"Profile `{preset.profile}`, {preset.description}; {data}, "
        f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}. "
        f"{len(finished)} of {len(trials)} runs are finished."
    ]
    if len(seeds) < _ENOUGH_SEEDS and preset.profile != "smoke":
        lines[0] += " With fewer than three seeds, half a point means little."
    machines = {f"deeptwist {r.summary.version}, {r.summary.machine}" for r in finished.values()}
    lines += [f"Run with {machine}." for machine in sorted(machines)]
    weights = " --weights FILE" if preset.needs_weights else ""
    lines.append(
        f"`python -m experiments.paper {name} --profile {preset.profile} --data {data}{weights} "
        f"--seeds {' '.join(map(str, seeds))}`"
    )
    missing = [
        each
        + (f", seed {seed}" if len(seeds) > 1 else "")
        + (f" ({failures[each, seed]})" if (each, seed) in failures else "")
        for each, seed in trials
        if (each, seed) not in finished
    ]
    return [*lines, f"Not run: {'; '.join(missing)}."] if missing else lines
