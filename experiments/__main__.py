"""``python -m experiments``: run an experiment, or show what its runs came to."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Annotated

import pandas as pd
from cyclopts import App, Parameter

from deeptwist._version import __version__
from deeptwist.app import cli
from deeptwist.app.cli.console import print_table, progress_bar
from deeptwist.app.cli.options import Several
from deeptwist.app.training.metrics import DENSE_WEIGHTS
from deeptwist.errors import DeepTwistError, check_int, unknown_name_error
from deeptwist.files import write_text
from deeptwist.measure.machine import describe_machine
from experiments import studies
from experiments.page import Report, Results
from experiments.profiles import PROFILES, START, Profile, Run, merge_options
from experiments.runs import FINISHED, Job, Progress, read_table, train_jobs
from experiments.studies import STUDIES

_NAMES = "fig2 fig3 fig4 fig5 table1 fig6 table2 fig7 interval noise tail long"
EXPERIMENTS = {name: import_module(f"experiments.{name}") for name in _NAMES.split()}
_TABLES = "Every run's command, machine and result: [runs.csv](runs.csv)."
EXACT = "exact"  # the folder of what is not trained
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
    if name in STUDIES:
        run_study(name, options)
    elif name in EXPERIMENTS:
        run_experiment(name, options)
    else:
        raise unknown_name_error("experiment", name, [*EXPERIMENTS, *STUDIES])


def run_experiment(name: str, options: Options, progress: Progress = progress_bar) -> None:
    """Train the missing runs of an experiment, unless asked not to, and print its page.

    A run that fails leaves the others alone. What is finished is printed even where the rest is
    interrupted.

    Raises:
        DeepTwistError: if something is missing, or runs failed.
    """
    module, profile = EXPERIMENTS[name], find_profile(name, options)
    runs = module.runs(profile)
    _check(runs, profile, options)
    folder = options.out / (profile.name if runs else EXACT)
    failures: dict[str, str] = {}
    interrupt = None
    try:
        if not options.show:
            failures |= _train(profile, runs, folder, options, progress)
    except KeyboardInterrupt as error:
        interrupt = error
    results = Results(runs, tuple(dict.fromkeys(options.seeds)), folder, read_table(folder))
    report: Report = module.report(results, profile)
    text = _page(name, profile, results, report, failures)
    print(text)
    if options.write:
        _write(folder, name, text, report)
    if interrupt is not None:
        raise interrupt
    if failures:
        first, reason = next(iter(failures.items()))
        count = f"{len(failures)} of {len(runs) * len(results.seeds)} runs of {name}"
        raise DeepTwistError(f"{count} failed, {first!r} first ({reason})")


def run_study(name: str, options: Options, progress: Progress = progress_bar) -> None:
    """Train what a study's table has cut, unless asked not to, and print its page.

    Raises:
        DeepTwistError: if runs failed.
    """
    study, folder = STUDIES[name], options.out / name
    given = {"--data": options.data, "--weights": options.weights}
    changes = [f"{option} {value}" for option, value in given.items() if value]
    jobs = [
        replace(job, words=merge_options(job.words, *changes))
        for job in studies.unfinished(read_table(folder))
        if any(fnmatch(job.name, each) for each in options.only or ("*",))
    ]
    failures: dict[str, str] = {}
    if not options.show:
        runs = options.runs / name
        failures |= train_jobs(jobs, folder, runs, progress, options.workers)
    table = read_table(folder)
    report = studies.report(table, read_table(folder, "epochs"))
    command = f"python -m experiments {name} --show"
    parts = [f"# {study.title} (`{name}`)", f"{study.question} {study.answer}", study.same]
    parts += _lines_of_machines(table)
    parts += [f"`{command}`", *(each.markdown() for each in report.tables)]
    text = "\n\n".join([*parts, *report.notes, _TABLES])
    print(text)
    if options.write:
        _write(folder, "README", text, report)
    if failures:
        first, reason = next(iter(failures.items()))
        raise DeepTwistError(
            f"{len(failures)} of {len(jobs)} runs failed, {first} first ({reason})"
        )


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
    check_int("workers", options.workers, 1)
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

    def job(run: Run, seed: int) -> Job:
        words = merge_options(run.words, "--data DATA" if options.data else "")
        words = words.replace("DATA", shlex.quote(options.data or ""))
        start = f"--weights {shlex.quote(str(weights))}" if weights else ""
        return Job(
            f"{run.name}-s{seed}",
            f"{words.replace(f'--weights {START}', start)} --seed {seed}",
            has_noise=run.has_noise,
        )

    labels = {f"{run.name}-s{seed}": label for seed in options.seeds for label, run in runs.items()}
    only = options.only or ("*",)
    wanted = [
        (run, seed)
        for seed in options.seeds
        for label, run in runs.items()
        if any(fnmatch(name, each) for each in only for name in (label, run.name))
    ]
    finished = read_table(kept).query("state == 'finished'").index
    if profile.start and not {f"{run.name}-s{seed}" for run, seed in wanted} <= {*finished}:
        start = job(profile.start_run, 0)  # trained once
        for _, reason in train_jobs([start], kept, folder, progress):
            return {labels[f"{run.name}-s{seed}"]: reason for run, seed in wanted}
        weights = folder / start.name / DENSE_WEIGHTS
    jobs = [job(run, seed) for run, seed in wanted]
    failures = train_jobs(jobs, kept, folder, progress, options.workers)
    return {labels[name]: reason for name, reason in failures}


def _page(
    name: str, profile: Profile, results: Results, report: Report, failures: Mapping[str, str]
) -> str:
    """Return the page: what was claimed, how it was run, tables, figures, what they say."""
    module = EXPERIMENTS[name]
    parts = [f"# {module.PLACE} (`{name}`)", module.CLAIM]
    if results.runs:
        parts += _describe(name, profile, results, failures)
    else:
        parts.append(f"Nothing is trained. deeptwist {__version__}, {describe_machine()}.")
    for table in report.tables:
        parts += [f"## {table.title}", table.markdown()]
    parts += [f"![{figure.title}]({name}-{figure.name}.svg)" for figure in report.figures]
    parts.append("\n".join(f"- {note}" for note in report.notes))
    if results.runs:
        parts.append(_TABLES)
    return "\n\n".join(parts)


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
    yield from _lines_of_machines(rows)
    command = f"python -m experiments {name} --profile {profile.name} --data {data}"
    weights = " --weights FILE" if "weights" in profile.needs else ""
    yield f"`{command}{weights} --seeds {' '.join(seeds)}`"
    reasons = [f"{label} ({failures[label]})" if label in failures else label for label in missing]
    if reasons:
        yield f"Not run: {'; '.join(reasons)}."


def _lines_of_machines(rows: pd.DataFrame) -> list[str]:
    known = rows.dropna(subset=["machine"]) if len(rows) else rows
    lines = {
        f"Run with deeptwist {row['version']}, {row['machine']}." for _, row in known.iterrows()
    }
    return sorted(lines)


def _write(folder: Path, name: str, text: str, report: Report) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in report.figures:
            write_text(folder / f"{name}-{figure.name}.svg", figure.svg)
        write_text(folder / f"{name}.md", f"{text}\n")
    except OSError as error:
        raise DeepTwistError(f"cannot write {folder}: {error.strerror}") from error


def main(words: Sequence[str] | None = None) -> None:
    """Run an experiment; bad input ends with one line and exit code 2."""
    cli.run(app, words)


if __name__ == "__main__":
    main()
