"""Section 4, with the training that the paper gives it: 100 epochs from a high learning rate.

``results/long`` holds the runs on images of half size, ``results/long-32`` those on whole ones, a
folder each with ``run.json``, ``metrics.jsonl`` and ``recipe.yaml``. Whatever is there is read.
Runs whose recipes differ in the seed alone are one row; DeepTwist, conventional fine-tuning and
the dense network are compared where images, schedule, decomposition and size are the same.
"""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.paper.drawing import Curve, chart
from experiments.paper.findings import Figure, Findings, Table, difference, mean_and_deviation

from deeptwist.errors import DeepTwistError
from deeptwist.serialization import write_text
from deeptwist.training.metrics import RECIPE, SUMMARY, Run, read_run
from deeptwist.training.recipe import Recipe, read_recipe

FOLDERS = ("long", "long-32")
CLAIM = (
    "Trained as the paper trains, DeepTwist ends above fine-tuning of the same size.\n\n"
    "Accuracies are those of the last epoch, deployed, with the deviation over seeds. Differences "
    "in points are between runs of equal seeds; accuracies after each epoch are of the weights as "
    "training left them, before the next distortion."
)
HEADER = (
    "",
    "test accuracy, %",
    "− conventional",
    "epochs ahead of it",
    "− dense",
    "seeds",
    "weights",
    "MACs",
    "epochs",
    "lr",
    "weight decay",
)
_FULL_SIZE = 32
_COLUMNS = re.compile(r"mode|data\.|schedule\.|optimizer\.(lr|weight_decay)|compression\.ratio")


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, one for each seed.

    Attributes:
        recipe: without seed, paths and what decides no outcome.
        runs: by seed.
    """

    recipe: Recipe
    runs: Mapping[int, Run]

    @property
    def accuracies(self) -> dict[int, float]:
        """Return deployed test accuracies in percent, by seed."""
        return {seed: 100 * run.summary.accuracy for seed, run in self.runs.items()}

    @property
    def curves(self) -> list[tuple[float, ...]]:
        """Return the test accuracies in percent of all seeds, for each epoch."""
        seeds = [
            [100 * epoch["test"]["accuracy"] for epoch in r.epochs] for r in self.runs.values()
        ]
        return list(zip(*seeds, strict=True))


def read_groups(folders: Iterable[Path]) -> list[Group]:
    """Read the finished runs in folders, and gather those that differ in the seed alone.

    Raises:
        DeepTwistError: if a run is damaged.
    """
    groups: dict[Recipe, dict[int, Run]] = {}
    for path in sorted(path for folder in folders for path in folder.glob(f"*/{SUMMARY}")):
        recipe = read_recipe(path.parent / RECIPE)
        groups.setdefault(_outcome(recipe), {})[recipe.seed] = read_run(path.parent)
    ordered = sorted(groups, key=lambda recipe: (_size(recipe), _name(recipe), str(recipe)))
    return [Group(recipe, dict(sorted(groups[recipe].items()))) for recipe in ordered]


def _outcome(recipe: Recipe) -> Recipe:
    """Return what decides a run's outcome, but for the seed and the weights it starts from."""
    mode, plain = recipe.training_mode, Recipe(model=recipe.model)
    return replace(
        recipe,
        seed=0,
        weights=None,
        records=plain.records,
        interval=recipe.interval if mode.at_intervals else plain.interval,
        compression=recipe.compression if mode.compresses else plain.compression,
        data=replace(recipe.data, source=Path(recipe.data.source).name),
    )


def _size(recipe: Recipe) -> int:
    return recipe.data.image_size or _FULL_SIZE


def _name(recipe: Recipe) -> str:
    """Return the decomposition and its size, such as "Tucker 4×"."""
    name = recipe.compression.label.removesuffix("()")
    name = name.replace("TiledSVD", "tiled SVD").replace("SpatialSVD", "spatial SVD")
    return name if recipe.compression.ratio is None else f"{name} {recipe.compression.ratio:g}×"


def _regime(recipe: Recipe) -> str:
    """Return what a comparison leaves as it is, in words."""
    optimizer, size = recipe.optimizer, _size(recipe)
    return (
        f"{recipe.data.source} at {size}×{size}, {recipe.schedule.epochs} epochs from "
        f"{optimizer.lr:g}, weight decay {optimizer.weight_decay:g}"
    )


def by_regime(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return groups by regime, the dense ones first."""
    regimes: dict[str, list[Group]] = {}
    for group in sorted(groups, key=lambda group: group.recipe.mode != "dense"):
        regimes.setdefault(_regime(group.recipe), []).append(group)
    return dict(sorted(regimes.items()))


def comparisons(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return groups of a regime by decomposition and size, each time with the dense ones."""
    dense = [group for group in groups if group.recipe.mode == "dense"]
    compared: dict[str, list[Group]] = {}
    for group in sorted(groups[len(dense) :], key=lambda group: group.recipe.mode):
        compared.setdefault(_name(group.recipe), list(dense)).append(group)
    return dict(sorted(compared.items()))


def names(members: Sequence[Group]) -> list[str]:
    """Return the modes of a comparison, with the settings in which groups of a mode differ."""
    flat = [_flatten(group.recipe.to_dict()) for group in members]
    modes = [group.recipe.mode for group in members]
    labels = []
    for group, values in zip(members, flat, strict=True):
        peers = [other for other, mode in zip(flat, modes, strict=True) if mode == values["mode"]]
        own = [
            f"{key.rpartition('.')[2].replace('_', ' ')} {value}"
            for key, value in values.items()
            if not _COLUMNS.match(key) and any(peer.get(key) != value for peer in peers)
        ]
        labels.append(", ".join([group.recipe.training_mode.label, *own]))
    return labels


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def report(groups: Sequence[Group]) -> Findings:
    """Return accuracies by mode, decomposition and ratio, what DeepTwist gains, and the curves."""
    tables, figures = [], []
    for regime, members in by_regime(groups).items():
        dense = [group for group in members if group.recipe.mode == "dense"]
        rows = [_row(label, group, ()) for label, group in zip(names(dense), dense, strict=True)]
        compared = comparisons(members)
        figures += _overview(regime, compared)
        for name, beside in compared.items():
            labels = names(beside)
            rows += [
                _row(f"{name}, {label}", group, beside)
                for label, group in zip(labels, beside, strict=True)
                if group.recipe.mode != "dense"
            ]
            figures += _figure(regime, name, dict(zip(labels, beside, strict=True)))
        tables.append(Table(regime, HEADER, tuple(rows)))
    return Findings(tuple(tables), tuple(figures))


def _row(label: str, group: Group, members: Sequence[Group]) -> tuple[str, ...]:
    recipe, summary = group.recipe, next(iter(group.runs.values())).summary
    tuned, dense = (
        next((other for other in members if other.recipe.mode == mode), None)
        for mode in ("finetune", "dense")
    )
    return (
        label,
        mean_and_deviation(list(group.accuracies.values())),
        _distance(group, tuned),
        _epochs_ahead(group, tuned),
        _distance(group, dense),
        " ".join(map(str, group.runs)),
        f"{summary.parameters_before / summary.parameters:.2f}×",
        f"{summary.macs_before / summary.macs:.2f}×",
        str(recipe.schedule.epochs),
        f"{recipe.optimizer.lr:g}",
        f"{recipe.optimizer.weight_decay:g}",
    )


def _epochs_ahead(group: Group, other: Group | None) -> str:
    """Return after how many epochs the mean accuracy is higher."""
    if other is None or other is group:
        return ""
    pairs = list(zip(group.curves, other.curves, strict=False))
    ahead = sum(statistics.fmean(ours) > statistics.fmean(its) for ours, its in pairs)
    return f"{ahead} of {len(pairs)}"


def _distance(group: Group, other: Group | None) -> str:
    """Return the mean of the differences of equal seeds, and their deviation."""
    values = {} if other is None or other is group else other.accuracies
    points = [ours - values[seed] for seed, ours in group.accuracies.items() if seed in values]
    if not points:
        return ""
    deviation = f" ± {statistics.stdev(points):.2f}" if len(points) > 1 else ""
    return difference(statistics.fmean(points), 0) + deviation


def _figure(regime: str, name: str, groups: Mapping[str, Group]) -> list[Figure]:
    """Return the course of test accuracy: means over seeds, and from the lowest to the highest."""
    curves = []
    for color, (label, group) in enumerate(groups.items()):
        epochs = list(enumerate(group.curves, 1))
        recipe = group.recipe
        mean = tuple((epoch, statistics.fmean(values)) for epoch, values in epochs)
        band = tuple((epoch, min(values), max(values)) for epoch, values in epochs)
        curves.append(
            Curve(
                label,
                mean,
                None if recipe.mode == "dense" else color,
                dashed=recipe.mode != "deeptwist",
                markers=False,
                band=band if len(group.runs) > 1 else (),
            )
        )
    figure = chart(
        _file_name(name, next(iter(groups.values())).recipe),
        f"{name}: {regime}",
        curves,
        x="epoch",
        y=f"{name}: test accuracy, %",
        marks=next(iter(groups.values())).recipe.schedule.milestones,
    )
    return [] if figure is None else [figure]


def _file_name(name: str, recipe: Recipe) -> str:
    optimizer = recipe.optimizer
    words = f"{name} {_size(recipe)}px {recipe.schedule.epochs} epochs"
    words += f" lr{optimizer.lr:g} wd{optimizer.weight_decay:g}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower().replace("×", "x"))


def _overview(regime: str, compared: Mapping[str, Sequence[Group]]) -> list[Figure]:
    """Return accuracy over the ratio by decomposition, where there are several ratios."""
    points: dict[tuple[str, str], dict[float, float]] = {}
    dense = None
    for members in compared.values():
        for label, group in zip(names(members), members, strict=True):
            mean = statistics.fmean(group.accuracies.values())
            compression = group.recipe.compression
            if group.recipe.mode == "dense":
                dense = dense or ("dense, trained as long", mean)
            elif compression.ratio is not None:
                method = _name(replace(group.recipe, compression=replace(compression, ratio=None)))
                points.setdefault((method, label), {})[compression.ratio] = mean
    methods = list(dict.fromkeys(method for method, _ in points))
    curves = [
        Curve(
            f"{method}, {label}",
            tuple(sorted(heights.items())),
            methods.index(method),
            dashed=not label.startswith("DeepTwist"),
        )
        for (method, label), heights in points.items()
    ]
    if len({ratio for heights in points.values() for ratio in heights}) < 2:
        return []
    recipe = next(iter(compared.values()))[0].recipe
    figure = chart(
        _file_name("ratios", recipe),
        f"Accuracy over the ratio: {regime}",
        curves,
        x="compression ratio of every layer",
        y="deployed test accuracy, %",
        level=dense,
        log_x=True,
    )
    return [] if figure is None else [figure]


def show(out: Path) -> Path:
    """Write ``long/long.md`` and its figures from the runs in an output folder; return its path.

    Raises:
        DeepTwistError: if there is no finished run, a run is damaged, or nothing can be written.
    """
    groups = read_groups(out / name for name in FOLDERS)
    if not groups:
        places = " or ".join(str(out / name / "*" / SUMMARY) for name in FOLDERS)
        raise DeepTwistError(f"there is no finished run: no {places}")
    findings = report(groups)
    page = out / FOLDERS[0] / "long.md"
    summaries = [run.summary for group in groups for run in group.runs.values()]
    made = {f"Run with deeptwist {each.version}, {each.machine}." for each in summaries}
    parts = ["# A long training (`long`)", CLAIM, *sorted(made)]
    for table in findings.tables:
        parts += [f"## {table.title}", table.markdown()]
    try:
        for figure in findings.figures:
            write_text(page.parent / f"{figure.name}.svg", figure.svg)
            parts.append(f"![{figure.title}]({figure.name}.svg)")
        write_text(page, "\n\n".join(parts) + "\n")
    except OSError as error:
        raise DeepTwistError(f"cannot write {page.parent}: {error.strerror}") from error
    return page
