"""Runs an experiment's cells, those that are not finished, and writes what they came to."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from experiments.paper.cells import Cell, Workplace, title
from experiments.paper.experiment import Experiment
from experiments.paper.findings import Findings, Finished
from experiments.paper.profiles import ProfileName, Setting, check_given, setting_of

from deeptwist._version import __version__
from deeptwist.benchmark.environment import describe_machine
from deeptwist.data import ImageData, dataset_signature, load_data
from deeptwist.errors import DeepTwistError, check_int, unknown_name_error
from deeptwist.serialization import write_text
from deeptwist.training.metrics import RECIPE, SUMMARY, Run, read_run
from deeptwist.training.recipe import Recipe, read_recipe
from deeptwist.training.run import build_run, train

_IMAGES = "images.json"  # in a run's folder: what it was trained on, see `dataset_signature`
_ENOUGH = 3  # seeds from which on a difference of half a point says something

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of an experiment.

    Attributes:
        profile: see `profiles`.
        data: see `training.recipe.DataRecipe.source`; the profile's own if not given.
        weights: a checkpoint of the network to start from.
        out: folder of the results.
        runs: folder of the runs, which experiments share.
        seeds: each cell is trained once with each.
        only: globs of the names of the cells to train; all if empty.
        draw_only: whether nothing is to be trained.
    """

    profile: ProfileName = "short"
    data: str | None = None
    weights: Path | None = None
    out: Path = Path("results")
    runs: Path = Path("runs/reproduce")
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] = ()
    draw_only: bool = False


@dataclass(frozen=True)
class _Turn:
    """A cell with a seed."""

    cell: Cell
    seed: int

    @property
    def recipe(self) -> Recipe:
        return replace(self.cell.recipe, seed=self.seed)


@contextmanager
def _silent(label: str, total: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


def reproduce(experiment: Experiment, request: Request, *, progress: Progress = _silent) -> Path:
    """Trains an experiment's cells, reads those that are finished, and writes its result.

    A cell that fails leaves the others alone. What is finished is written even where the rest is
    interrupted.

    Args:
        experiment: see `experiments.EXPERIMENTS`.
        request: see `Request`.
        progress: opened for each training with its name and its number of steps; gives what is
            called after every step.

    Returns:
        The page of the result.

    Raises:
        DeepTwistError: if something is missing, runs are of other images of this name, or cells
            failed; their reasons are in the result.
    """
    setting = setting_of(request.profile, experiment.network)
    for seed in request.seeds:
        check_int("seed", seed, 0)
    seeds = dict.fromkeys(request.seeds)
    turns = [_Turn(cell, seed) for seed in seeds for cell in experiment.cells(setting)]
    wanted = _wanted(turns, request.only)
    if turns:
        check_given(setting, request.data, request.weights)
    place = Workplace(
        request.runs / setting.profile,
        request.data or setting.recipe.data.source,
        request.weights,
        setting.start,
    )
    if turns:
        _check_images(turns, place)
    failures: dict[_Turn, str] = {}
    pending = [] if request.draw_only else [turn for turn in wanted if not _finished(turn, place)]
    if pending:
        _data(place.data, setting.recipe.data.image_size)  # a mistake in it is not each cell's
    try:
        for turn in pending:
            try:
                _train(turn.recipe, place, progress)
            except DeepTwistError as error:
                failures[turn] = str(error)
    finally:
        page = _write(experiment, setting, request, turns, place, failures)
    if failures:
        turn, reason = next(iter(failures.items()))
        raise DeepTwistError(
            f"{len(failures)} of {len(pending)} cells of {experiment.name} failed, "
            f"{turn.cell.name!r} first ({reason}); the others are in {page}"
        )
    return page


def _wanted(turns: Sequence[_Turn], only: Sequence[str]) -> list[_Turn]:
    names = [turn.cell.name for turn in turns]
    for pattern in only:
        if not any(fnmatch(name, pattern) for name in names):
            raise unknown_name_error("cell", pattern, names)
    return [
        turn
        for turn in turns
        if not only or any(fnmatch(turn.cell.name, pattern) for pattern in only)
    ]


def _train(recipe: Recipe, place: Workplace, progress: Progress) -> None:
    """Trains a cell that is not finished, and before it the dense network that it starts from."""
    folder = place.folder(recipe)
    if (folder / SUMMARY).exists():
        return
    if place.start is not None and recipe != place.start:
        _train(place.start, place, progress)
    bound = place.bound(recipe)
    name = title(recipe)
    run = build_run(bound, _data(bound.data.source, bound.data.image_size), name=name)
    run = replace(run, recipe=_as_begun(bound, folder))
    _record_images(folder, place.data)
    with progress(name, run.steps) as advance:
        train(run, folder, resume=True, latency_batch=None, on_step=advance)


def _as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the paths that its run was begun with, if it was.

    What lies there is the same: the folder's name and the record of its images say so.
    """
    if not (folder / RECIPE).is_file():
        return recipe
    before = read_recipe(folder / RECIPE)
    data = replace(recipe.data, source=before.data.source)
    return replace(recipe, weights=before.weights, data=data)


def _check_images(turns: Sequence[_Turn], place: Workplace) -> None:
    """Checks that runs which are there are of these images, where they have a record of them.

    Raises:
        DeepTwistError: naming a run that is not.
    """
    recipes = [turn.recipe for turn in turns]
    if place.start is not None:
        recipes.append(place.start)
    places = [place.folder(recipe) / _IMAGES for recipe in recipes]
    records = [record for record in places if record.is_file()]
    if not records:
        return
    try:
        contents = _contents(place.data)
    except DeepTwistError:
        return  # what is finished is drawn without the images; to train, they are asked for again
    for record in records:
        if json.loads(record.read_text(encoding="utf-8")) != contents:
            raise DeepTwistError(
                f"{record.parent} is a run on other images than {place.data}, with other classes "
                "or counts: choose another --runs, or rename the folder of these images"
            )


def _record_images(folder: Path, source: str) -> None:
    if (folder / _IMAGES).is_file():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _IMAGES, json.dumps(_contents(source)))
    except OSError as error:
        raise DeepTwistError(f"cannot write {folder}: {error.strerror}") from None


@cache
def _contents(source: str) -> dict[str, Any]:
    return dataset_signature(source)


@cache  # cells share their images
def _data(source: str, image_size: int | None) -> ImageData:
    return load_data(source, image_size=image_size)


def _finished(turn: _Turn, place: Workplace) -> bool:
    return (place.folder(turn.recipe) / SUMMARY).exists()


def _read(turns: Sequence[_Turn], place: Workplace) -> dict[_Turn, Run]:
    done = [turn for turn in turns if _finished(turn, place)]
    return {turn: read_run(place.folder(turn.recipe)) for turn in done}


def _write(
    experiment: Experiment,
    setting: Setting,
    request: Request,
    turns: Sequence[_Turn],
    place: Workplace,
    failures: dict[_Turn, str],
) -> Path:
    """Writes the page, its figures and the record of all cells; returns the page's path."""
    read = _read(turns, place)
    by_name: dict[str, list[Run]] = {}
    for turn, found in read.items():
        by_name.setdefault(turn.cell.name, []).append(found)
    findings = experiment.show(Finished(by_name), setting)
    folder = request.out / experiment.name
    label = setting.profile if turns else "exact"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in findings.figures:
            write_text(folder / f"{label}-{figure.name}.svg", figure.svg)
        record = {
            "experiment": experiment.name,
            "place": experiment.place,
            "claim": experiment.claim,
            "profile": label,
            "machine": describe_machine(),
            "version": __version__,
            "cells": [_cell_record(turn, place, read, failures) for turn in turns],
            "tables": [asdict(table) for table in findings.tables],
            "notes": findings.notes,
        }
        write_text(folder / f"{label}.json", json.dumps(record, indent=1, ensure_ascii=False))
        page = folder / f"{label}.md"
        state = _state(experiment, setting, request, turns, place, read, failures)
        write_text(page, _page(experiment, findings, label, state))
    except OSError as error:
        raise DeepTwistError(f"cannot write {folder}: {error.strerror}") from None
    return page


def _cell_record(
    turn: _Turn, place: Workplace, read: dict[_Turn, Run], failures: dict[_Turn, str]
) -> dict[str, Any]:
    """A cell as the record tells of it."""
    known = {"name": turn.cell.name, "seed": turn.seed, "run": place.folder(turn.recipe).name}
    if turn not in read:
        recipe = place.bound(turn.recipe).to_dict()
        return {**known, "state": "not run", "failure": failures.get(turn), "recipe": recipe}
    summary = asdict(read[turn].summary)
    return {**known, "state": "finished", **{k: v for k, v in summary.items() if k not in known}}


def _state(
    experiment: Experiment,
    setting: Setting,
    request: Request,
    turns: Sequence[_Turn],
    place: Workplace,
    read: dict[_Turn, Run],
    failures: dict[_Turn, str],
) -> list[str]:
    """On what, how, how far and where an experiment was run."""
    if not turns:
        return [f"Nothing is trained. deeptwist {__version__}, {describe_machine()}."]
    seeds = ", ".join(map(str, request.seeds))
    count = len(set(request.seeds))
    lines = [
        f"Profile `{setting.profile}`, {setting.words}; {Path(place.data).name}, "
        f"{'seeds' if count > 1 else 'seed'} {seeds}. "
        f"{len(read)} of {len(turns)} cells have been run."
    ]
    if count < _ENOUGH and setting.profile != "smoke":
        lines[0] += " With fewer than three seeds, half a point means little."
    made = {f"deeptwist {run.summary.version}, {run.summary.machine}" for run in read.values()}
    lines += [f"Run with {one}." for one in sorted(made)]
    files = "" if place.weights is None else f" --weights {place.weights.name}"
    again = f"python -m experiments.paper {experiment.name} --profile {setting.profile} --data "
    lines.append(f"`{again}{Path(place.data).name}{files} --seeds {seeds.replace(',', '')}`")
    missing = [turn for turn in turns if turn not in read]
    if missing:
        names = [
            turn.cell.name
            + (f", seed {turn.seed}" if count > 1 else "")
            + (f" ({failures[turn]})" if turn in failures else "")
            for turn in missing
        ]
        lines.append(f"Not run: {'; '.join(names)}.")
    return lines


def _page(experiment: Experiment, findings: Findings, label: str, state: Sequence[str]) -> str:
    parts = [f"# {experiment.place} (`{experiment.name}`)", experiment.claim, *state]
    for table in findings.tables:
        parts += [f"## {table.title}", table.markdown()]
    parts += [f"![{one.title}]({label}-{one.name}.svg)" for one in findings.figures]
    if findings.notes:
        parts.append("\n".join(f"- {note}" for note in findings.notes))
    recipes = f"Every cell's recipe, machine and version: [{label}.json]({label}.json)."
    return "\n\n".join([*parts, recipes]) + "\n"
