"""Section 4, with the training that the paper gives it: 100 epochs from a high learning rate.

``results/long`` holds the runs on images of half size, ``results/long-32`` those on whole ones.
Whatever is there is read, whoever ran it. Runs whose recipes differ in the seed alone are one row;
DeepTwist, conventional fine-tuning and the dense network are compared where images, schedule,
decomposition and size are the same.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Preset
from experiments.paper.results import Figure, Report, Results, Table, mean_and_deviation
from experiments.paper.runs import read_runs

from deeptwist.training.metrics import Run
from deeptwist.training.recipe import Mode, Recipe

PLACE, NETWORK = "A long training", "resnet32"
CLAIM = "Trained as the paper trains, DeepTwist ends above fine-tuning of the same size."
NOTE = (
    "Accuracies are those of the last epoch, deployed, with the deviation over seeds. Differences "
    "in points are between runs of equal seeds; accuracies after each epoch are of the weights as "
    "training left them, before the next distortion."
)
METHODS = {"Tucker": "tucker", "tiled SVD": "tiled_svd", "spatial SVD": "spatial_svd"}
MODES: dict[str, Mode] = {"DeepTwist": "deeptwist", "conventional": "finetune"}
DENSE = "dense"
FOLDERS = ("long", "long-32")
_COLUMNS = re.compile(r"mode|data\.|schedule\.|optimizer\.(lr|weight_decay)|compression\.ratio")
HEADER = (
    *("", "test accuracy, %", "− conventional", "epochs ahead of it", "− dense", "seeds"),
    *("weights", "MACs", "epochs", "lr", "weight decay"),
)


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, that of seed 0, by seed."""

    recipe: Recipe
    runs: Mapping[int, Run]

    @property
    def accuracies(self) -> dict[int, float]:
        """Return deployed test accuracies in percent, by seed."""
        return {seed: 100 * run.summary.accuracy for seed, run in self.runs.items()}

    @property
    def curves(self) -> list[tuple[float, ...]]:
        """Return the test accuracies in percent of all seeds, for each epoch."""
        epochs = zip(*(run.epochs for run in self.runs.values()), strict=False)
        return [tuple(100 * epoch["test"]["accuracy"] for epoch in seeds) for seeds in epochs]


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return the dense network, and both ways for each size and method."""
    return {DENSE: preset.dense} | {
        f"{label} {level}, {way}": preset.compressed(mode, **level.of(method))
        for level in preset.levels
        for label, method in METHODS.items()
        for way, mode in MODES.items()
    }


def report(results: Results, preset: Preset) -> Report:
    """Return accuracies by mode, decomposition and ratio, what DeepTwist gains, and the curves."""
    by_recipe: dict[Recipe, dict[int, Run]] = {}
    for folder in FOLDERS:
        for recipe, run in read_runs(results.out / folder).items():
            by_recipe.setdefault(replace(recipe, seed=0), {})[recipe.seed] = run
    regimes: dict[str, list[Group]] = {}
    for recipe in sorted(by_recipe, key=lambda recipe: (recipe.mode, str(recipe))):
        group = Group(recipe, dict(sorted(by_recipe[recipe].items())))
        regimes.setdefault(_regime(recipe), []).append(group)
    reports = [_compare(regime, groups) for regime, groups in sorted(regimes.items())]
    tables = tuple(table for each in reports for table in each.tables)
    return Report(tables, tuple(figure for each in reports for figure in each.figures), (NOTE,))


def _compare(regime: str, groups: Sequence[Group]) -> Report:
    """Return a regime's table, and figures of its comparisons."""
    dense = [group for group in groups if group.recipe.mode == "dense"]
    compared: dict[str, list[Group]] = {}
    for group in groups:
        if group.recipe.mode != "dense":
            compared.setdefault(_size(group.recipe), list(dense)).append(group)
    compared = dict(sorted(compared.items()))
    figures = _overview(regime, compared)
    rows = [_row(label, group, ()) for label, group in _label(dense).items()]
    for size, members in compared.items():
        labels = _label(members)
        rows += [
            _row(f"{size}, {label}", group, members)
            for label, group in labels.items()
            if group.recipe.mode != "dense"
        ]
        figures += _curves(regime, size, labels)
    return Report((Table(regime, HEADER, rows),), figures)


def _size(recipe: Recipe) -> str:
    """Return the decomposition and its size, such as "Tucker 4×"."""
    name = recipe.compression.label.removesuffix("()")
    name = name.replace("TiledSVD", "tiled SVD").replace("SpatialSVD", "spatial SVD")
    return name if recipe.compression.ratio is None else f"{name} {recipe.compression.ratio:g}×"


def _regime(recipe: Recipe) -> str:
    """Return what a comparison leaves as it is: images, schedule, learning rate and decay."""
    optimizer, size = recipe.optimizer, recipe.data.image_size or 32
    return (
        f"{recipe.data.source} at {size}×{size}, {recipe.schedule.epochs} epochs from "
        f"{optimizer.lr:g}, weight decay {optimizer.weight_decay:g}"
    )


def _label(members: Sequence[Group]) -> dict[str, Group]:
    """Return groups by their mode, and by the settings in which groups of a mode differ."""
    flat = [_flatten(group.recipe.to_dict()) for group in members]
    labels = {}
    for group, values in zip(members, flat, strict=True):
        peers = [other for other in flat if other["mode"] == values["mode"]]
        settings = [
            f"{key.rpartition('.')[2].replace('_', ' ')} {value}"
            for key, value in values.items()
            if not _COLUMNS.match(key) and any(peer.get(key) != value for peer in peers)
        ]
        labels[", ".join([group.recipe.training_mode.label, *settings])] = group
    return labels


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _row(label: str, group: Group, members: Sequence[Group]) -> tuple[str, ...]:
    recipe, summary = group.recipe, next(iter(group.runs.values())).summary
    tuned, dense = (
        next((other for other in members if other.recipe.mode == mode), group)
        for mode in ("finetune", "dense")
    )
    pairs = list(zip(group.curves, tuned.curves, strict=False))
    ahead = sum(statistics.fmean(ours) > statistics.fmean(other) for ours, other in pairs)
    return (
        label,
        mean_and_deviation(list(group.accuracies.values())),
        _distance(group, tuned),
        "" if tuned is group else f"{ahead} of {len(pairs)}",
        _distance(group, dense),
        " ".join(map(str, group.runs)),
        f"{summary.parameters_before / summary.parameters:.2f}×",
        f"{summary.macs_before / summary.macs:.2f}×",
        str(recipe.schedule.epochs),
        f"{recipe.optimizer.lr:g}",
        f"{recipe.optimizer.weight_decay:g}",
    )


def _distance(group: Group, other: Group) -> str:
    """Return the mean of the differences of equal seeds, and their deviation."""
    reference = {} if other is group else other.accuracies
    points = [y - reference[seed] for seed, y in group.accuracies.items() if seed in reference]
    if not points:
        return ""
    deviation = f" ± {statistics.stdev(points):.2f}" if len(points) > 1 else ""
    return f"{statistics.fmean(points):+.2f}{deviation}".replace("-", "−")


def _curves(regime: str, size: str, groups: Mapping[str, Group]) -> tuple[Figure, ...]:
    """Return the course of test accuracy: means over seeds, and from the lowest to the highest."""
    curves = []
    for color, (label, group) in enumerate(groups.items()):
        epochs, mode = list(enumerate(group.curves, 1)), group.recipe.mode
        curves.append(
            Curve(
                label,
                [(epoch, statistics.fmean(values)) for epoch, values in epochs],
                None if mode == "dense" else color,
                dashed=mode != "deeptwist",
                markers=False,
                band=tuple((epoch, min(each), max(each)) for epoch, each in epochs)
                if len(group.runs) > 1
                else (),
            )
        )
    recipe = next(iter(groups.values())).recipe
    return draw(
        _file_name(size, recipe),
        f"{size}: {regime}",
        curves,
        x="epoch",
        y=f"{size}: test accuracy, %",
        marks=recipe.schedule.milestones,
    )


def _overview(regime: str, compared: Mapping[str, Sequence[Group]]) -> tuple[Figure, ...]:
    """Return accuracy over the ratio by decomposition, where there are several ratios."""
    points: dict[tuple[str, str], dict[float, float]] = {}
    start = None
    for size, members in compared.items():
        for label, group in _label(members).items():
            mean, ratio = (
                statistics.fmean(group.accuracies.values()),
                group.recipe.compression.ratio,
            )
            if group.recipe.mode == "dense":
                start = mean
            elif ratio is not None:
                points.setdefault((size.rpartition(" ")[0], label), {})[ratio] = mean
    if len({ratio for heights in points.values() for ratio in heights}) < 2:
        return ()
    methods = list(dict.fromkeys(method for method, _ in points))
    return draw(
        _file_name("ratios", next(iter(compared.values()))[0].recipe),
        f"Accuracy over the ratio: {regime}",
        [
            Curve(
                f"{method}, {label}",
                sorted(heights.items()),
                methods.index(method),
                dashed=not label.startswith("DeepTwist"),
            )
            for (method, label), heights in points.items()
        ],
        x="compression ratio of every layer",
        y="deployed test accuracy, %",
        start=start,
        start_name="dense, trained as long",
        log_x=True,
    )


def _file_name(title: str, recipe: Recipe) -> str:
    optimizer = recipe.optimizer
    words = f"{title} {recipe.data.image_size or 32}px {recipe.schedule.epochs} epochs"
    words += f" lr{optimizer.lr:g} wd{optimizer.weight_decay:g}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower().replace("×", "x"))
