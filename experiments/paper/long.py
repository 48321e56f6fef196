"""Section 4, with the training that the paper gives it: 100 epochs from a high learning rate.

``results/long`` holds the runs on images of half size, ``results/long-32`` those on whole ones,
``results/long-cut`` some that were not finished. Whatever is there is read, whoever ran it. Runs
whose recipes differ in the seed alone are one row; DeepTwist, conventional fine-tuning and the
dense network are compared where images, schedule, decomposition and size are the same.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, TypeVar

from experiments.paper.fig2 import RATIO
from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Network, Preset
from experiments.paper.results import Figure, Report, Results, Table, mean_and_deviation, signed
from experiments.paper.runs import read_cut_runs, read_runs

from deeptwist.app.training.metrics import Summary
from deeptwist.app.training.recipe import Recipe

PLACE = "A long training"
NETWORK: Network = "resnet32"
CLAIM = "Trained as the paper trains, DeepTwist ends above fine-tuning of the same size."
NOTE = (
    "Accuracies are those of the last epoch, deployed, with the deviation over seeds. Differences "
    "in points are between runs of equal seeds; accuracies after each epoch are of the weights as "
    "training left them, before the next distortion."
)
FOLDERS, CUT = ("long", "long-32"), "long-cut"
METHODS = {"Tucker": "tucker", "tiled SVD": "tiled_svd", "spatial SVD": "spatial_svd"}
HEADER = ["", "test accuracy, %", "− conventional", "epochs ahead of it", "− dense", "seeds"]
HEADER += ["weights", "MACs", "epochs", "lr", "weight decay"]
_COLUMNS = re.compile(r"mode|data\.|schedule\.|optimizer\.(lr|weight_decay)|compression\.ratio")


T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, by seed.

    Attributes:
        recipe: of seed 0.
        accuracies: deployed test accuracies in percent; of runs that were cut, their means over
            epochs that all of them reached.
        epochs: see `Run.epochs`.
        summary: of one of them; `None` where they were cut.
        ending: after the regime's name.
    """

    recipe: Recipe
    accuracies: dict[int, float]
    epochs: dict[int, list[dict[str, Any]]]
    summary: Summary | None = None
    ending: str = ""

    @property
    def curve(self) -> list[tuple[int, float, float, float]]:
        """Return, for each epoch, the mean, lowest and highest test accuracy over seeds."""
        epochs = zip(*self.epochs.values(), strict=False)
        values = [[_accuracy(epoch) for epoch in seeds] for seeds in epochs]
        return [(epoch, fmean(each), min(each), max(each)) for epoch, each in enumerate(values, 1)]

    @property
    def size(self) -> str:
        """Return the decomposition and its size, such as "Tucker 4×"; empty for a dense network."""
        compression = self.recipe.compression
        if not self.recipe.training_mode.compresses:
            return ""
        name = compression.label.removesuffix("()")
        name = name.replace("TiledSVD", "tiled SVD").replace("SpatialSVD", "spatial SVD")
        return name if compression.ratio is None else f"{name} {compression.ratio:g}×"

    @property
    def regime(self) -> str:
        """Return what a comparison leaves as it is: images, schedule, learning rate and decay."""
        recipe, optimizer = self.recipe, self.recipe.optimizer
        return (
            f"{recipe.data.source} at {_pixels(recipe)}×{_pixels(recipe)}, "
            f"{recipe.schedule.epochs} epochs from {optimizer.lr:g}, weight decay "
            f"{optimizer.weight_decay:g}{self.ending}"
        )


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return the dense network, and both ways for each size and method."""
    trainings = {"dense": preset.dense}
    for level in preset.levels:
        for label, method in METHODS.items():
            options = level.of(method)
            trainings[f"{label} {level}, DeepTwist"] = preset.compressed("deeptwist", **options)
            trainings[f"{label} {level}, conventional"] = preset.compressed("finetune", **options)
    return trainings


def report(results: Results, preset: Preset) -> Report:
    """Return accuracies by mode, decomposition and ratio, what DeepTwist gains, and the curves."""
    finished = [run for name in FOLDERS for run in read_runs(results.out / name).items()]
    groups = [
        Group(
            recipe,
            {seed: 100 * run.summary.accuracy for seed, run in runs.items()},
            {seed: run.epochs for seed, run in runs.items()},
            next(iter(runs.values())).summary,
        )
        for recipe, runs in _by_recipe(finished).items()
    ]
    cut = _by_recipe(read_cut_runs(results.out / CUT).items())
    unfinished = [Group(recipe, {}, runs) for recipe, runs in cut.items()]
    by_regime = _gather(groups, "regime")
    for regime, members in _gather(unfinished, "regime").items():
        groups += _cut(members, by_regime.get(regime, []))
    groups.sort(key=lambda group: (group.regime, group.size, group.recipe.mode, str(group.recipe)))
    tables, figures = [], []
    for regime, members in _gather(groups, "regime").items():
        by_size = _gather(members, "size")
        dense = by_size.pop("", [])
        rows = [_row(label, group, []) for label, group in _label(dense).items()]
        figures += _overview(regime, dense, by_size)
        for size, each in by_size.items():
            labels = _label(each + dense)
            rows += [_row(f"{size}, {x}", g, each + dense) for x, g in labels.items() if g.size]
            figures += _curves(size, labels)
        tables.append(Table(regime, HEADER, rows))
    return Report(tables, figures, [NOTE])


def _cut(unfinished: Sequence[Group], finished: Sequence[Group]) -> list[Group]:
    """Return unfinished runs, and finished ones to compare with, over epochs that all reached."""
    sizes = {"", *(group.size for group in unfinished)}  # a dense network's is empty
    members = [*unfinished, *(group for group in finished if group.size in sizes)]
    reached = min(len(epochs) for group in members for epochs in group.epochs.values())
    first = max(reached - 9, 1)
    ending = f": cut, means over epochs {first} to {reached}"
    groups = []
    for group in members:
        epochs = {seed: each[:reached] for seed, each in group.epochs.items()}
        means = {seed: fmean(map(_accuracy, each[first - 1 :])) for seed, each in epochs.items()}
        groups.append(Group(group.recipe, means, epochs, ending=ending))
    return groups


def _by_recipe(runs: Iterable[tuple[Recipe, T]]) -> dict[Recipe, dict[int, T]]:
    """Gather runs that differ in the seed alone, by seed."""
    seeds: dict[Recipe, dict[int, T]] = {}
    for recipe, run in sorted(runs, key=lambda item: item[0].seed):
        seeds.setdefault(replace(recipe, seed=0), {})[recipe.seed] = run
    return seeds


def _accuracy(epoch: Mapping[str, Any]) -> float:
    return 100 * float(epoch["test"]["accuracy"])


def _gather(groups: Sequence[Group], key: str) -> dict[str, list[Group]]:
    """Return groups by an attribute."""
    gathered: dict[str, list[Group]] = {}
    for group in groups:
        gathered.setdefault(getattr(group, key), []).append(group)
    return gathered


def _label(members: Sequence[Group]) -> dict[str, Group]:
    """Return groups by their mode, and by the settings in which groups of a mode differ."""
    labels = {}
    for group in members:
        values = _flatten(group.recipe.to_dict())
        peers = [_flatten(each.recipe.to_dict()) for each in members]
        settings = [
            f"{key.rpartition('.')[2].replace('_', ' ')} {value}"
            for key, value in values.items()
            if not _COLUMNS.match(key)
            and any(each.get(key) != value for each in peers if each["mode"] == values["mode"])
        ]
        labels[", ".join([group.recipe.training_mode.label, *settings])] = group
    return labels


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _row(label: str, group: Group, members: Sequence[Group]) -> list[str]:
    recipe, summary = group.recipe, group.summary
    tuned, dense = (
        next((other for other in members if other.recipe.mode == mode), group)
        for mode in ("finetune", "dense")
    )
    pairs = list(zip(group.curve, tuned.curve, strict=False))
    ahead = sum(ours[1] > other[1] for ours, other in pairs)
    return [
        label,
        mean_and_deviation(list(group.accuracies.values())),
        _distance(group, tuned),
        "" if tuned is group else f"{ahead} of {len(pairs)}",
        _distance(group, dense),
        " ".join(map(str, group.epochs)),
        f"{summary.parameters_before / summary.parameters:.2f}×" if summary else "",
        f"{summary.macs_before / summary.macs:.2f}×" if summary else "",
        str(recipe.schedule.epochs),
        f"{recipe.optimizer.lr:g}",
        f"{recipe.optimizer.weight_decay:g}",
    ]


def _distance(group: Group, other: Group) -> str:
    """Return the mean of the differences of equal seeds, and their deviation."""
    reference = {} if other is group else other.accuracies
    points = [y - reference[seed] for seed, y in group.accuracies.items() if seed in reference]
    if not points:
        return ""
    return signed(fmean(points)) + (f" ± {stdev(points):.2f}" if len(points) > 1 else "")


def _curves(size: str, groups: Mapping[str, Group]) -> list[Figure]:
    """Return the course of test accuracy: means over seeds, and from the lowest to the highest."""
    curves = []
    for color, (label, group) in enumerate(groups.items()):
        means = [(epoch, mean) for epoch, mean, _, _ in group.curve]
        band = [(epoch, lowest, highest) for epoch, _, lowest, highest in group.curve]
        curve = Curve(label, means, color if group.size else None, markers=False)
        dashed = group.recipe.mode != "deeptwist"
        curves.append(replace(curve, dashed=dashed, band=band if len(group.epochs) > 1 else ()))
    group = next(iter(groups.values()))
    title, y = f"{size}: {group.regime}", f"{size}: test accuracy, %"
    length = max(len(each.curve) for each in groups.values())
    marks = [epoch for epoch in group.recipe.schedule.milestones if epoch <= length]
    return draw(_file_name(size, group), title, curves, x="epoch", y=y, marks=marks)


def _overview(
    regime: str, dense: Sequence[Group], by_size: Mapping[str, Sequence[Group]]
) -> list[Figure]:
    """Return accuracy over the ratio by decomposition, where there are several ratios."""
    points: dict[tuple[str, str], dict[float, float]] = {}
    for size, members in by_size.items():
        for label, group in _label(members).items():
            ratio, mean = group.recipe.compression.ratio, fmean(group.accuracies.values())
            if ratio is not None:
                points.setdefault((size.rpartition(" ")[0], label), {})[ratio] = mean
    if len({ratio for heights in points.values() for ratio in heights}) < 2:
        return []
    methods = list(dict.fromkeys(method for method, _ in points))
    curves = []
    for (method, label), heights in points.items():
        curve = Curve(f"{method}, {label}", sorted(heights.items()), methods.index(method))
        curves.append(replace(curve, dashed=not label.startswith("DeepTwist")))
    level = ("dense, trained as long", fmean(dense[0].accuracies.values())) if dense else None
    group = next(iter(by_size.values()))[0]
    title, y = f"Accuracy over the ratio: {regime}", "test accuracy, %"
    name = _file_name("ratios", group)
    return draw(name, title, curves, x=RATIO, y=y, level=level, log_x=True)


def _pixels(recipe: Recipe) -> int:
    return recipe.data.image_size or 32


def _file_name(title: str, group: Group) -> str:
    recipe, optimizer = group.recipe, group.recipe.optimizer
    words = f"{title} {_pixels(recipe)}px {recipe.schedule.epochs} epochs"
    words += f" lr{optimizer.lr:g} wd{optimizer.weight_decay:g}{' cut' if group.ending else ''}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower().replace("×", "x"))
