"""Run an experiment: train its missing runs, and write the page of those that are finished."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from experiments.paper.presets import Network, Preset, Profile, preset_of
from experiments.paper.results import Report, Results
from experiments.paper.runs import Progress, outcome_of, read_images, read_runs, run_name, train_run

from deeptwist._version import __version__
from deeptwist.benchmark.environment import describe_machine
from deeptwist.cli.options import Several
from deeptwist.errors import DeepTwistError, check_int, unknown_name_error
from deeptwist.serialization import write_text
from deeptwist.training.metrics import DENSE_WEIGHTS, SUMMARY, Run
from deeptwist.training.recipe import Recipe

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


def default_profile(name: str) -> Profile:
    """Return the profile that an experiment is trained in if none is named."""
    return "long" if name == "long" else "short"


def run_experiment(name: str, experiment: Experiment, options: Options, progress: Progress) -> Path:
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
    for pattern in options.only:
        if not any(fnmatch(each, pattern) for each in recipes):
            raise unknown_name_error("run", pattern, recipes)
    for option in preset.needs if recipes and not options.show else ():
        if getattr(options, option) is None:
            model = preset.recipe.model
            raise DeepTwistError(f"{model} in profile {profile} needs --{option}: give it")
    source = _source(options, preset)
    trials = {
        (each, seed): replace(recipe, seed=seed, data=replace(recipe.data, source=source))
        for seed in dict.fromkeys(options.seeds)
        for each, recipe in recipes.items()
    }
    failures: dict[Trial, str] = {}
    try:
        if not options.show:
            failures |= _train(trials, preset, options, progress)
    finally:
        runs = read_runs(options.out / profile)
        keys = {trial: outcome_of(recipe) for trial, recipe in trials.items()}
        finished = {trial: runs[key] for trial, key in keys.items() if key in runs}
        missing = {trial: failures.get(trial, "") for trial in trials if trial not in finished}
        page = _write(name, experiment, preset, options, finished, missing)
    if failures:
        (first, _), reason = next(iter(failures.items()))
        failed = f"{len(failures)} of {len(trials)} runs of {name} failed, {first!r} first"
        raise DeepTwistError(f"{failed} ({reason}); the others are in {page}")
    return page


def _source(options: Options, preset: Preset) -> str:
    """Return the images that are asked for; to show runs, those of the runs that are there."""
    sources = [options.data] if options.data else []
    if options.show:
        kept, model = read_runs(options.out / preset.profile), preset.recipe.model
        sources += [each.data.source for each in kept if each.model == model]
    return next(iter(sources), preset.recipe.data.source)


def _train(
    trials: Mapping[Trial, Recipe], preset: Preset, options: Options, progress: Progress
) -> Iterator[tuple[Trial, str]]:
    """Train what is asked for and not finished; yield the reasons of what fails."""
    kept, runs = options.out / preset.profile, options.runs / preset.profile
    finished, only = read_runs(kept), options.only or ("*",)

    def train(recipe: Recipe, weights: Path | None) -> Path:
        recipe = replace(recipe, weights=None if weights is None else str(weights))
        name = run_name(recipe)
        train_run(recipe, runs / name, kept / name, progress)
        return runs / name

    for trial, recipe in trials.items():
        if outcome_of(recipe) in finished or not any(fnmatch(trial[0], each) for each in only):
            continue
        read_images(recipe.data.source, image_size=recipe.data.image_size)  # not each run's fault
        weights = options.weights
        try:
            if preset.start is not None:  # trained once, as its folder shows
                start = replace(preset.start, data=recipe.data)
                folder = runs / run_name(start)
                weights = folder / DENSE_WEIGHTS
                if not (folder / SUMMARY).exists():
                    train(start, options.weights)
            train(recipe, weights)
        except DeepTwistError as error:
            yield trial, str(error)


def _write(
    name: str,
    experiment: Experiment,
    preset: Preset,
    options: Options,
    finished: Mapping[Trial, Run],
    missing: Mapping[Trial, str],
) -> Path:
    """Write the page and its figures; return the page's path."""
    runs: dict[str, list[Run]] = {}
    for (each, _), run in finished.items():
        runs.setdefault(each, []).append(run)
    report = experiment.report(Results(runs, options.out), preset)
    trained = bool(finished or missing)
    label = preset.profile if trained else "exact"
    parts = [f"# {experiment.PLACE} (`{name}`)", experiment.CLAIM]
    if trained:
        parts += _describe(name, preset, options, finished, missing)
    else:
        parts.append(f"Nothing is trained. deeptwist {__version__}, {describe_machine()}.")
    for table in report.tables:
        parts += [f"## {table.title}", table.markdown()]
    parts += [f"![{figure.title}]({label}-{figure.name}.svg)" for figure in report.figures]
    parts.append("\n".join(f"- {note}" for note in report.notes))
    if trained:
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


def _describe(
    name: str,
    preset: Preset,
    options: Options,
    finished: Mapping[Trial, Run],
    missing: Mapping[Trial, str],
) -> list[str]:
    """Return on what, how, how far and where an experiment was run."""
    summaries = [run.summary for run in finished.values()]
    seeds = [str(seed) for seed in dict.fromkeys(options.seeds)]
    several = "s" if len(seeds) > 1 else ""
    data = " ".join(dict.fromkeys(each.data for each in summaries)) or options.data or "DATA"
    state = (
        f"Profile `{preset.profile}`, {preset.description}; {data}, seed{several} "
        f"{', '.join(seeds)}. {len(finished)} of {len(finished) + len(missing)} runs are finished."
    )
    if len(seeds) < 3 and preset.profile != "smoke":
        state += " With fewer than three seeds, half a point means little."
    machines = {f"Run with deeptwist {each.version}, {each.machine}." for each in summaries}
    weights = " --weights FILE" if "weights" in preset.needs else ""
    command = f"python -m experiments.paper {name} --profile {preset.profile} --data {data}"
    lines = [state, *sorted(machines), f"`{command}{weights} --seeds {' '.join(seeds)}`"]
    if missing:
        names = [
            each + (f", seed {seed}" if several else "") + (f" ({reason})" if reason else "")
            for (each, seed), reason in missing.items()
        ]
        lines.append(f"Not run: {'; '.join(names)}.")
    return lines
