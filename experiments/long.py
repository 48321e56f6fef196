"""Section 4, with the training that the paper gives it: 100 epochs from a high learning rate.

``results/long`` holds the runs on images of half size, ``results/long-32`` those on whole ones.
Whatever is there is read, whoever ran it, runs that were cut too. Runs whose names differ in the
seed alone are one row; DeepTwist, conventional fine-tuning and the dense network are compared where
images, schedule, decomposition and size are the same.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from experiments.fig2 import RATIO
from experiments.page import Figure, Report, Results, Table, mean_and_deviation, signed
from experiments.plots import Curve, draw
from experiments.profiles import MODES, Network, Profile, Run
from experiments.runs import CUT, FINISHED, read_table

PLACE = "A long training"
NETWORK: Network = "resnet32"
NEEDS_EPOCHS = True
CLAIM = "Trained as the paper trains, DeepTwist ends above fine-tuning of the same size."
NOTE = (
    "Accuracies are those of the last epoch, deployed, with the deviation over seeds. Differences "
    "in points are between runs of equal seeds; accuracies after each epoch are of the weights as "
    "training left them, before the next distortion."
)
FOLDERS = ("long", "long-32")
METHODS = {"Tucker": "tucker", "tiled SVD": "tiled_svd", "spatial SVD": "spatial_svd"}
REGIME = ["data", "image_size", "epochs", "lr", "weight_decay"]
HEADER = ["", "test accuracy, %", "− conventional", "epochs ahead of it", "− dense", "seeds"]
HEADER += ["weights", "MACs", "epochs", "lr", "weight decay"]


@dataclass(frozen=True)
class Group:
    """The runs that differ in the seed alone.

    Attributes:
        row: of one of them, as in the table.
        size: the decomposition and its size, such as "Tucker 4×"; empty for a dense network.
        accuracies: deployed test accuracies in percent by seed; where runs were cut, means over
            epochs that all of them reached.
        curves: test accuracy in percent after each epoch, a column for each seed.
        cut: whether one of those that they are compared with was.
    """

    row: pd.Series
    size: str
    accuracies: pd.Series
    curves: pd.DataFrame
    cut: bool

    def minus(self, other: "Group") -> str:
        """Return the mean of the differences of equal seeds, and their deviation."""
        points = (self.accuracies - other.accuracies).dropna()
        if other is self or points.empty:
            return ""
        return signed(points.mean()) + (f" ± {points.std():.2f}" if len(points) > 1 else "")


Groups = dict[str, Group]  # by the names of their runs, without the seed


def runs(profile: Profile) -> dict[str, Run]:
    """Return the dense network, and both ways for each size and method."""
    trainings = {"dense": profile.dense}
    for size in profile.sizes:
        for label, method in METHODS.items():
            for mode, ending in (("deeptwist", "DeepTwist"), ("finetune", "conventional")):
                trainings[f"{label} {size}, {ending}"] = profile.run(mode, method, size)
    return trainings


def report(results: Results, profile: Profile) -> Report:
    """Return accuracies by mode, decomposition and ratio, what DeepTwist gains, and the curves."""
    tables, figures = [], []
    for title, groups in _regimes(results):
        dense = {key: group for key, group in groups.items() if not group.size}
        rows = [_row(label, group, {}) for label, group in _label(dense).items()]
        figures += _overview(title, groups)
        for size in sorted({group.size for group in groups.values()} - {""}):
            each = {key: group for key, group in groups.items() if group.size == size} | dense
            labels = _label(each)
            rows += [_row(f"{size}, {x}", g, labels) for x, g in labels.items() if g.size]
            figures += _curves(size, title, labels)
        tables.append(Table(title, HEADER, rows))
    return Report(tables, figures, [NOTE])


def _regimes(results: Results) -> Iterator[tuple[str, Groups]]:
    """Yield runs to compare, and what they have in common; first those that are finished."""
    folders = [results.folder.parent / name for name in FOLDERS]
    table, epochs = (
        pd.concat([read_table(at, kind).rename(f"{at.name}/{{}}".format) for at in folders])
        for kind in ("runs", "epochs")
    )
    table["size"] = [_size(row) for _, row in table.iterrows()]
    table["image_size"] = table.get("image_size", pd.Series(dtype="Int64")).fillna(32)
    curves = 100 * epochs.pivot_table("accuracy", "epoch", "name", sort=False)
    for regime, rows in table.groupby(REGIME):
        data, side, length, lr, weight_decay = regime
        title = (
            f"{data} at {side}×{side}, {length} epochs from {lr:g}, weight decay {weight_decay:g}"
        )
        finished = rows[rows["state"] == FINISHED]
        if len(finished):
            yield title, _groups(finished, 100 * finished["accuracy"], curves)
        cut = rows[rows["state"] == CUT]
        if len(cut):
            members = rows[rows["size"].isin({"", *cut["size"]})]
            reached = int(curves[members.index].count().min())
            first = max(reached - 9, 1)
            means = curves.loc[first:reached, members.index].mean()
            ending = f"{title}: cut, means over epochs {first} to {reached}"
            yield ending, _groups(members, means, curves.loc[:reached], cut=True)


def _groups(
    rows: pd.DataFrame, accuracies: pd.Series, curves: pd.DataFrame, *, cut: bool = False
) -> Groups:
    """Gather runs that differ in the seed alone; in the order of size and mode."""
    rows = rows.sort_values(["size", "mode", "seed"], kind="stable")
    groups = {}
    for name, each in rows.groupby(rows.index.str.replace(r"-s\d+$", "", regex=True), sort=False):
        seeds = pd.Index(each["seed"])
        of_seed = curves[each.index].dropna().set_axis(seeds, axis=1)
        values = accuracies[each.index].set_axis(seeds)
        groups[name] = Group(each.iloc[0], each["size"].iloc[0], values, of_seed, cut)
    return groups


def _size(row: pd.Series) -> str:
    if row["mode"] == "dense":
        return ""
    name = row["decomposition"].removesuffix("()")
    name = name.replace("TiledSVD", "tiled SVD").replace("SpatialSVD", "spatial SVD")
    return name if pd.isna(row["ratio"]) else f"{name} {row['ratio']:g}×"


def _label(groups: Groups) -> Groups:
    """Return groups by their mode, and by their runs' name where several have one mode."""
    modes = [group.row["mode"] for group in groups.values()]
    return {
        MODES[mode] + (f" ({name})" if modes.count(mode) > 1 else ""): group
        for mode, (name, group) in zip(modes, groups.items(), strict=True)
    }


def _row(label: str, group: Group, members: Mapping[str, Group]) -> list[str]:
    row = group.row
    tuned, dense = (
        next((other for other in members.values() if other.row["mode"] == mode), group)
        for mode in ("finetune", "dense")
    )
    means = pd.concat([each.curves.mean(axis=1) for each in (group, tuned)], axis=1).dropna()
    ahead = f"{(means[0] > means[1]).sum()} of {len(means)}"
    fewer = [
        "" if group.cut else f"{row[f'{what}_before'] / row[what]:.2f}×"
        for what in ("parameters", "macs")
    ]
    return [
        label,
        mean_and_deviation(group.accuracies),
        group.minus(tuned),
        "" if tuned is group else ahead,
        group.minus(dense),
        " ".join(map(str, group.accuracies.index)),
        *fewer,
        str(row["epochs"]),
        f"{row['lr']:g}",
        f"{row['weight_decay']:g}",
    ]


def _curves(size: str, regime: str, groups: Groups) -> list[Figure]:
    """Return the course of test accuracy: means over seeds, and from the lowest to the highest."""
    curves = []
    for color, (label, group) in enumerate(groups.items()):
        table = group.curves
        bounds = pd.concat([table.min(axis=1), table.max(axis=1)], axis=1)
        curve = Curve(
            label,
            list(table.mean(axis=1).items()),
            color if group.size else None,
            dashed=group.row["mode"] != "deeptwist",
            markers=False,
            band=list(bounds.itertuples(name=None)) if table.shape[1] > 1 else (),
        )
        curves.append(curve)
    group = next(iter(groups.values()))
    length = max(len(each.curves) for each in groups.values())
    marks = [epoch for epoch in _milestones(group.row["command"]) if epoch <= length]
    y = f"{size}: test accuracy, %"
    return draw(_file_name(size, group), f"{size}: {regime}", curves, x="epoch", y=y, marks=marks)


def _milestones(command: str) -> list[int]:
    """Return the epochs at which the learning rate falls, of this regime or as a command says."""
    return [int(epoch) for epoch in re.findall(r"milestones (\d+)", command)] or [50, 75]


def _overview(regime: str, groups: Groups) -> list[Figure]:
    """Return accuracy over the ratio by decomposition, where there are several ratios."""
    points: dict[tuple[str, str], dict[float, float]] = {}
    for group in groups.values():
        if group.size and not pd.isna(ratio := group.row["ratio"]):
            key = group.size.rpartition(" ")[0], MODES[group.row["mode"]]
            points.setdefault(key, {})[float(ratio)] = group.accuracies.mean()
    if len({ratio for heights in points.values() for ratio in heights}) < 2:
        return []
    methods = list(dict.fromkeys(method for method, _ in points))
    curves = []
    for (method, mode), heights in points.items():
        at = sorted(heights.items())
        dashed = mode != "DeepTwist"
        curves.append(Curve(f"{method}, {mode}", at, methods.index(method), dashed=dashed))
    dense = [group for group in groups.values() if not group.size]
    level = ("dense, trained as long", dense[0].accuracies.mean()) if dense else ("", None)
    name = _file_name("ratios", next(iter(groups.values())))
    title, y = f"Accuracy over the ratio: {regime}", "test accuracy, %"
    return draw(name, title, curves, level, x=RATIO, y=y, log_x=True)


def _file_name(title: str, group: Group) -> str:
    side, epochs, lr, decay = (group.row[key] for key in REGIME[1:])
    words = f"{title} {side}px {epochs} epochs lr{lr:g} wd{decay:g}{' cut' if group.cut else ''}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower().replace("×", "x"))
