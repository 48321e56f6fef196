"""Beyond Section 4.1: fine-tuning what the paper held to be impossible to fine-tune.

SVD of the lowered kernel, spatial SVD and aligned tiles run as plain convolutions, so their
factors can be trained. Each is fine-tuned the conventional way, learnt by DeepTwist, and learnt
by DeepTwist for most of the epochs and fine-tuned in decomposed form for the rest: the tail. All
take the same number of epochs.
"""

from dataclasses import replace
from typing import Any

from experiments.paper.fig2 import ACCURACY
from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Network, Preset
from experiments.paper.results import Report, Results, Table, count_holds

from deeptwist.app.training.recipe import Recipe, TailRecipe

PLACE = "Beyond Section 4.1"
NETWORK: Network = "resnet32"
CLAIM = (
    "Open: the paper held that SVD of the lowered kernel cannot be fine-tuned. Which split of the "
    "epochs between DeepTwist and fine-tuning is best?"
)
METHODS: dict[str, dict[str, Any]] = {
    "spatial SVD": {"decomposition": "spatial_svd"},
    "SVD": {"decomposition": "svd"},
    # A multiple of the nine taps: whole input channels.
    "aligned tiles": {"decomposition": "tiled_svd", "tile": (64, 72)},
}


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return, by size, then by method, both ways and each split."""
    trainings = {}
    for level in preset.levels:
        for label, method in METHODS.items():
            options = {"ratio": level.ratio, **method}
            learnt = preset.compressed("deeptwist", **options)
            trainings[f"{label} {level}, conventional"] = preset.compressed("finetune", **options)
            trainings[f"{label} {level}, DeepTwist"] = learnt
            for epochs in preset.tails:
                shorter = replace(learnt.schedule, epochs=learnt.schedule.epochs - epochs)
                tail = TailRecipe(epochs=epochs, lr=0.01)
                recipe = replace(learnt, schedule=shorter, tail=tail)
                trainings[f"{label} {level}, tail of {epochs}"] = recipe
    return trainings


def report(results: Results, preset: Preset) -> Report:
    """Return accuracy by size, method and split."""
    epochs, tails = preset.recipe.schedule.epochs, sorted(preset.tails)
    rows, learnt_higher, tail_higher, curves = [], [], [], []
    for level in preset.sorted_levels:
        for color, label in enumerate(METHODS):
            name = f"{label} {level}"
            tuned, learnt = f"{name}, conventional", f"{name}, DeepTwist"
            splits = [f"{name}, tail of {tail}" for tail in tails]
            shown = [results.shown(tuned), results.shown(learnt)]
            shown += [results.shown(split, "tail") for split in splits]
            rows.append([name, results.ratio(tuned), *shown])
            learnt_higher.append(results.is_higher(learnt, tuned))
            tail_higher += [results.is_higher(split, tuned, "tail") for split in splits]
            if level == preset.reference_level:
                ends = [results.accuracy(split, "tail") for split in splits]
                heights = [results.accuracy(learnt), *ends, results.accuracy(tuned)]
                points = list(zip((0, *tails, epochs), heights, strict=True))
                curves.append(Curve(label, points, color))
    title = f"Accuracy over the split of the epochs, {preset.reference_level}"
    x = "epochs of fine-tuning at the end (0: DeepTwist)"
    figures = draw("splits", title, curves, x=x, y=ACCURACY)
    notes = [
        count_holds("DeepTwist is higher than conventional fine-tuning", learnt_higher),
        count_holds("DeepTwist with a tail is higher than conventional", tail_higher),
        "Not in the paper.",
    ]
    header = ["", "whole network", "conventional", "DeepTwist"]
    header += [f"tail of {tail} epoch{'s' * (tail > 1)}" for tail in tails]
    title = f"Test accuracy, %, after {epochs} epochs in all"
    return Report([Table(title, header, rows)], figures, notes)
