"""Studies beyond the paper: tables of runs over seeds, however they were trained.

A study's list of commands is its own table: what was cut there is what is left to train.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from experiments.page import Report, Table, mean_and_deviation, number
from experiments.runs import CUT, FINISHED, Job


@dataclass(frozen=True)
class Study:
    """Runs in ``results/NAME`` that answer a question.

    Attributes:
        title: of its page.
        question: that it asks.
        answer: that its runs gave.
        same: what all runs have in common.
    """

    title: str
    question: str
    answer: str
    same: str


_REST = (
    "Rows that end in `choosing` are tested on the first 3,000 test images of a fixed shuffle, "
    "those of 16 pixels (`16px`) on all, the others on the remaining 7,000, which the commands do "
    "not say: `python -m experiments ten-epochs` trains what was cut so."
)
STUDIES = {
    "ten-epochs": Study(
        "Ten epochs",
        "Which learning rate, and which way of training, is best in ten epochs?",
        "DeepTwist bears higher rates than the factors do; at each way's best rate it is a quarter "
        "of a point ahead with spatial SVD.",
        "ResNet-32 on `cifar10-jpeg`, SGD with Nesterov and cosine decay, weight decay 5e-4, batch "
        "128, bf16-mixed, S_D = 200, all convolutions but the first; from 0.05 unless a name says "
        f"another rate. {_REST}",
    ),
    "thirty-epochs": Study(
        "Thirty epochs",
        "Does the order of ten epochs hold in thirty?",
        "At 2× DeepTwist is 0.15 ± 0.05 points ahead, at 4× there is no difference.",
        "As `ten-epochs` but for the length, compiled with CUDA graphs; tested on 7,000 of the "
        "test images.",
    ),
    "budgets": Study(
        "Budgets",
        "What is a budget of weights or of MACs worth over one ratio for all layers?",
        "Far from home, six points at equal weights; from a network at home it costs.",
        "ResNet-32 on `cifar10-jpeg` at 16×16, from the public weights, spatial SVD fine-tuned for "
        "three epochs from 0.025, batch 64, fp32; the row of 32 pixels as in `ten-epochs`.",
    ),
    "imagenette": Study(
        "Imagenette",
        "Do the recipes of Imagenette run, on a busy processor?",
        "They do; they are not trained to their end.",
        "`recipes/*-imagenette-short.yaml`, one seed; EfficientNet-Lite0 on a tenth of the images.",
    ),
}


def unfinished(table: pd.DataFrame) -> list[Job]:
    """Return the runs that were cut, but for those that need an earlier version."""
    cut = table[table["state"] == CUT]
    prefix = "deeptwist train "
    return [
        Job(name, command.removeprefix(prefix), "all" if pd.isna(images) else images)
        for name, command, images in zip(
            cut.index, cut["command"], cut.get("test_images", [pd.NA] * len(cut)), strict=True
        )
        if command.startswith(prefix)
    ]


def report(table: pd.DataFrame, epochs: pd.DataFrame) -> Report:
    """Return deployed accuracies by run and seed, sizes and costs."""
    last = epochs.groupby(level="name").last().reindex(table.index)
    table = table.assign(
        run=table.index.str.replace(r"-s\d+$", "", regex=True), train_loss=last["train_loss"]
    )
    variants = [column for column in map(str, table) if column.startswith("accuracy_")]
    variants = [each for each in variants if each not in ("accuracy_before", "accuracy_untrained")]
    seeds = sorted(table["seed"].unique())
    compared = [key for key in ("model", "lr", "image_size", "test_images") if key in table]
    table["setting"] = [str(tuple(row)) for row in table[compared].to_numpy()]
    dense = table[(table["mode"] == "dense") & (table["state"] == FINISHED)]
    rows = []
    for run, group in ((str(run), group) for run, group in table.groupby("run", sort=True)):
        alike = dense["setting"] == group["setting"].iloc[0]
        for column in ("accuracy", *variants):
            if column == "accuracy" or group[column].notna().any():
                label = run + column.removeprefix("accuracy").replace("_", " ")
                rows.append([label, *_row(group, column, seeds, last, dense[alike])])
    header = ["", *(f"seed {seed}" for seed in seeds), "mean", "− dense", "untrained"]
    header += ["weights", "MACs", "training loss", "hours"]
    notes = [
        "Deployed test accuracies in percent; of a run that was cut, that of its last epoch, as "
        "training left the weights, and how many it had. Weights and MACs: times fewer of the "
        "whole network. Training loss: of the last epoch, a mean over seeds. Hours: of a processor "
        "or a GPU, as runs.csv says of each.",
    ]
    return Report([Table("Test accuracy, %", header, rows)], notes=notes)


def _row(
    group: pd.DataFrame, column: str, seeds: list[int], last: pd.DataFrame, dense: pd.DataFrame
) -> list[str]:
    shown: Mapping[int, str] = {
        row["seed"]: f"{100 * row[column]:.2f}"
        if row["state"] == FINISHED
        else f"{100 * last['accuracy'][name]:.2f} (after {last['epoch'][name]})"
        for name, row in zip(group.index.astype(str), group.to_dict("records"), strict=True)
        if not (row["state"] == FINISHED and pd.isna(row[column]))
    }
    finished = group[group["state"] == FINISHED]
    if finished.empty:
        return [*(shown.get(seed, "") for seed in seeds), *7 * [""]]
    values, first = 100 * finished[column].dropna(), finished.iloc[0]
    compressed = first["mode"] != "dense"
    minus = values.mean() - 100 * dense["accuracy"].mean() if compressed and len(dense) else None
    fewer = [first[f"{what}_before"] / first[what] for what in ("parameters", "macs")]
    untrained = 100 * first["accuracy_untrained"] if compressed else None
    return [
        *(shown.get(seed, "") for seed in seeds),
        mean_and_deviation(values),
        "" if minus is None else number(minus),
        "" if untrained is None else number(untrained),
        *(f"{each:.2f}×" if compressed else "" for each in fewer),
        f"{finished['train_loss'].mean():.3f}",
        f"{(finished['seconds'] * finished['processes']).sum() / 3600:.1f}",
    ]
