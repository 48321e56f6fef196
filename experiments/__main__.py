"""``python -m experiments``: run an experiment, or show what its runs came to."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated

import pandas as pd
from cyclopts import App, Parameter

from deeptwist._version import __version__
from deeptwist.app import cli
from deeptwist.app.cli.console import print_table, progress_bar
from deeptwist.app.cli.options import Several
from deeptwist.app.folders import DENSE_WEIGHTS
from deeptwist.errors import DeepTwistError, check_int, unknown_name_error
from deeptwist.files import write_text
from deeptwist.measure.machine import describe_machine
from experiments import studies
from experiments.page import Figure, Report, Results, page
from experiments.profiles import PROFILES, START, Profile, Run, merge_options
from experiments.runs import FINISHED, Job, Progress, finished_names, read_table, train_jobs
from experiments.studies import STUDIES

_NAMES = "fig2 fig3 fig4 fig5 table1 fig6 table2 fig7 interval noise tail long"
EXPERIMENTS = {name: import_module(f"experiments.{name}") for name in _NAMES.split()}
TABLES = "Every run's command, machine and result: [runs.csv](runs.csv)."
EXACT = "exact"  # the folder of what is not trained
Train = Callable[[], dict[str, str]]  # returns why runs failed, by what a page calls them
Page = tuple[Path, str, Sequence[Figure]]
Show = Callable[[Mapping[str, str]], Page]
app = App(
    name="python -m experiments",
    help_format="markdown",
    default_parameter=Parameter(negative=(), show_env_var=False),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked of an experiment.

    Attributes:
        profile: How long and on what to train; without it, the one that most runs are there of.
        data: digits, cifar10, or a folder with train/ and test/ (or val/) of class folders.
        weights: A checkpoint of the network to start from.
        out: Folder of the results, tables and pages.
        runs: Folder of the runs, which experiments share.
        seeds: Train each run once with each.
        only: Train only runs of these names or globs.
        workers: Trainings at a time.
        show: Train nothing.
        write: Write the page and its figures, beside the tables.
    """

    profile: str | None = None
    data: str | None = None
    weights: Path | None = None
    out: Path = Path("results")
    runs: Path = Path("runs")
    seeds: Several[int] = (0,)
    only: Several[str] = ()
    workers: int = 1
    show: bool = False
    write: bool = False


@app.default
def experiment(
    name: str | None = None,
    *,
    list_: Annotated[bool, Parameter("--list")] = False,
    options: Annotated[Options | None, Parameter(name="*")] = None,
) -> None:
    """Train what an experiment lacks, and print its table beside the paper's numbers.

    Args:
        name: One that --list names.
        list_: Show all experiments: what has been run, and what it took.
        options: What is asked of it.
    """
    options = options or Options()
    if list_:
        header = ["experiment", "of", "profile", "runs", "lacks", "processor hours", "GPU hours"]
        rows = [row for each in EXPERIMENTS for row in costs(each, options.out)]
        rows += [_study_costs(each, options.out) for each in STUDIES]
        print_table("", header, rows)
        return
    if name is None:
        raise DeepTwistError("name an experiment: 'python -m experiments --list' shows them")
    if name not in {**EXPERIMENTS, **STUDIES}:
        raise unknown_name_error("experiment", name, [*EXPERIMENTS, *STUDIES])
    run_experiment(name, options)


def run_experiment(name: str, options: Options, progress: Progress = progress_bar) -> None:
    """Train the missing runs of an experiment, unless asked not to, and print its page.

    A run that fails leaves the others alone. What is finished is printed even where the rest is
    interrupted.

    Raises:
        DeepTwistError: if something is missing, or runs failed.
    """
    check_int("workers", options.workers, 1)
    train, show = (_study if name in STUDIES else _of_paper)(name, options, progress)
    failures: dict[str, str] = {}
    interrupt = None
    try:
        failures |= {} if options.show else train()
    except KeyboardInterrupt as error:
        interrupt = error
    path, text, figures = show(failures)
    print(text)
    if options.write:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for figure in figures:
                write_text(path.with_name(f"{name}-{figure.name}.svg"), figure.svg)
            write_text(path, f"{text}\n")
        except OSError as error:
            raise DeepTwistError(f"cannot write {path}: {error.strerror}") from error
    if interrupt is not None:
        raise interrupt
    if failures:
        first, reason = next(iter(failures.items()))
        failed = f"{len(failures)} runs of {name} failed, {first!r} first"
        raise DeepTwistError(f"{failed} ({reason})")


def _study(name: str, options: Options, progress: Progress) -> tuple[Train, Show]:
    """Return what trains a study's runs that were cut, and what shows all."""
    study, folder = STUDIES[name], options.out / name

    def train() -> dict[str, str]:
        given = {"--data": options.data, "--weights": options.weights}
        changes = [f"{option} {value}" for option, value in given.items() if value]
        jobs = [
            replace(job, words=merge_options(job.words, *changes))
            for job in studies.unfinished(read_table(folder))
            if any(fnmatch(job.name, each) for each in options.only or ("*",))
        ]
        return dict(train_jobs(jobs, folder, options.runs / name, progress, options.workers))

    def show(failures: Mapping[str, str]) -> Page:
        table = read_table(folder)
        report = studies.report(table, read_table(folder, "epochs"))
        about = [study.same, *_machines(table), f"`python -m experiments {name} --show`", TABLES]
        title, claim = study.title, f"{study.question} {study.answer}"
        return folder / "README.md", page(name, title, claim, about, report), ()

    return train, show


def _of_paper(name: str, options: Options, progress: Progress) -> tuple[Train, Show]:
    """Return what trains an experiment's missing runs, and what shows those that are finished."""
    module, profile = EXPERIMENTS[name], find_profile(name, options)
    runs = module.runs(profile)
    _check(runs, profile, options)
    folder = options.out / (profile.name if runs else EXACT)

    def show(failures: Mapping[str, str]) -> Page:
        seeds = tuple(dict.fromkeys(options.seeds))
        results = Results(runs, seeds, folder, read_table(folder))
        report: Report = module.report(results, profile)
        about = list(_describe(name, profile, results, failures))
        if not runs:
            about = [f"Nothing is trained. deeptwist {__version__}, {describe_machine()}."]
        text = page(name, module.PLACE, module.CLAIM, about, report)
        return folder / f"{name}.md", text, report.figures

    return partial(_train, profile, runs, folder, options, progress), show


def find_profile(name: str, options: Options) -> Profile:
    """Return the profile that is asked for, or the one that has most of an experiment's runs.

    Raises:
        DeepTwistError: if there is none of that name.
    """
    profiles = {profile.name: profile for profile in PROFILES[EXPERIMENTS[name].NETWORK]}
    if options.profile is None:
        return max(profiles.values(), key=lambda each: len(_rows(name, each, options.out)))
    if options.profile not in profiles:
        every = {profile.name for each in PROFILES.values() for profile in each}
        if options.profile in every:
            network = EXPERIMENTS[name].NETWORK
            raise DeepTwistError(f"profile {options.profile} does not train {network}")
        raise unknown_name_error("profile", options.profile, profiles)
    return profiles[options.profile]


def costs(name: str, out: Path) -> Iterator[list[str]]:
    """Yield what has been run of an experiment by profile, what is not, and the hours it took."""
    module, lines = EXPERIMENTS[name], []
    for profile in PROFILES[module.NETWORK]:
        rows, runs = _rows(name, profile, out, epochs=False), module.runs(profile)
        if len(rows):
            lacks = {run.name for run in runs.values()} - {
                _configuration(row) for row in rows.index
            }
            lines.append([profile.name, str(len(rows)), str(len(lacks)), *_hours(rows)])
    nothing = ["", "0", str(len(module.runs(PROFILES[module.NETWORK][0]))), "", ""]
    for line in lines or [nothing]:
        yield [name, module.PLACE, *line]


def _study_costs(name: str, out: Path) -> list[str]:
    table = read_table(out / name)
    finished = table[table["state"] == FINISHED]
    counts = [str(len(finished)), str(len(table) - len(finished))]
    return [name, STUDIES[name].title, name, *counts, *(_hours(finished) if len(finished) else [])]


def _hours(rows: pd.DataFrame) -> list[str]:
    """Return the hours that runs took, of a processor and of a GPU."""
    hours = rows["seconds"] * rows["processes"] / 3600
    on_gpu = rows["machine"].str.startswith("NVIDIA")
    return [f"{hours[which].sum():.1f}" for which in (~on_gpu, on_gpu)]


def _rows(name: str, profile: Profile, out: Path, *, epochs: bool = True) -> pd.DataFrame:
    """Return an experiment's finished rows of all seeds; with epochs, where curves need them."""
    module, table = EXPERIMENTS[name], read_table(out / profile.name)
    names = {run.name for run in module.runs(profile).values()}
    is_ours = table.index.map(_configuration).isin(names) & (table["state"] == FINISHED)
    if epochs and getattr(module, "NEEDS_EPOCHS", False):
        is_ours &= table.index.isin(read_table(out / profile.name, "epochs").index)
    return table[is_ours]


def _configuration(row: str) -> str:
    """Return the name of a row's run, without the seed."""
    return row.rpartition("-s")[0]


def _check(runs: Mapping[str, Run], profile: Profile, options: Options) -> None:
    for seed in options.seeds:
        check_int("seed", seed, 0)
    names = [*runs, *(run.name for run in runs.values())]
    for pattern in options.only:
        if not any(fnmatch(name, pattern) for name in names):
            raise unknown_name_error("run", pattern, names)
    for option in profile.needs if runs and not options.show else ():
        if getattr(options, option) is None:
            network = profile.words.split()[0]
            raise DeepTwistError(f"{network} in profile {profile.name} needs --{option}: give it")


def _train(
    profile: Profile, runs: Mapping[str, Run], kept: Path, options: Options, progress: Progress
) -> dict[str, str]:
    """Train what is asked for and not finished; return why runs failed."""
    weights, folder = options.weights, options.runs / profile.name
    only = options.only or ("*",)

    def job(run: Run, seed: int) -> Job:
        words = merge_options(run.words, "--data DATA" if options.data else "")
        words = words.replace("DATA", shlex.quote(options.data or ""))
        start = f"--weights {shlex.quote(str(weights))}" if weights else ""
        words = words.replace(f"--weights {START}", start)
        name = f"{run.name}-s{seed}"
        return Job(name, f"{words} --seed {seed}", has_noise=run.has_noise)

    wanted = {
        f"{run.name}-s{seed}": (label, run, seed)
        for seed in options.seeds
        for label, run in runs.items()
        if any(fnmatch(name, each) for each in only for name in (label, run.name))
    }
    if profile.start and not wanted.keys() <= finished_names(kept):
        start = job(profile.start_run, 0)  # trained once
        for _, reason in train_jobs([start], kept, folder, progress):
            return {label: reason for label, _, _ in wanted.values()}
        weights = folder / start.name / DENSE_WEIGHTS
    jobs = [job(run, seed) for _, run, seed in wanted.values()]
    failed = train_jobs(jobs, kept, folder, progress, options.workers)
    return {wanted[name][0]: reason for name, reason in failed}


def _describe(
    name: str, profile: Profile, results: Results, failures: Mapping[str, str]
) -> Iterator[str]:
    """Yield on what, how, how far and where an experiment was run."""
    rows, missing = results.finished, results.missing()
    seeds = [str(seed) for seed in results.seeds]
    data = " ".join(rows["data"].unique()) if len(rows) else "DATA"
    few = " With fewer than three seeds, half a point means little."
    yield (
        f"Profile `{profile.name}`, {profile.description}; {data}, seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(seeds)}. {len(rows)} of {len(rows) + len(missing)} runs are "
        f"finished.{few if len(seeds) < 3 and profile.name != 'smoke' else ''}"
    )
    yield from _machines(rows)
    command = f"python -m experiments {name} --profile {profile.name} --data {data}"
    weights = " --weights FILE" if "weights" in profile.needs else ""
    yield f"`{command}{weights} --seeds {' '.join(seeds)}`"
    reasons = [f"{label} ({failures[label]})" if label in failures else label for label in missing]
    if reasons:
        yield f"Not run: {'; '.join(reasons)}."
    yield TABLES


def _machines(rows: pd.DataFrame) -> list[str]:
    known = rows.dropna(subset="machine") if len(rows) else rows
    lines = {f"{row['version']}, {row['machine']}" for _, row in known.iterrows()}
    return [f"Run with deeptwist {line}." for line in sorted(lines)]


def main(words: Sequence[str] | None = None) -> None:
    """Run an experiment; bad input ends with one line and exit code 2."""
    cli.run(app, words)


if __name__ == "__main__":
    main()
