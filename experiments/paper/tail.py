"""Beyond Section 4.1: fine-tuning what the paper held to be impossible to fine-tune.

SVD of the lowered kernel, spatial SVD and aligned tiles run as plain convolutions, so their
factors can be trained. Each is fine-tuned the conventional way, learnt by DeepTwist, and learnt
by DeepTwist for most of the epochs and fine-tuned in decomposed form for the rest: the tail. All
take the same number of epochs.
"""

from dataclasses import replace

from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Level, Preset
from experiments.paper.results import Report, Results, Table, count_holds, is_higher

from deeptwist.training.recipe import Mode, Recipe, TailRecipe

PLACE, NETWORK = "Beyond Section 4.1", "resnet32"
CLAIM = (
    "Open: the paper held that SVD of the lowered kernel cannot be fine-tuned. Which split of the "
    "epochs between DeepTwist and fine-tuning is best?"
)
ALIGNED = (64, 72)  # a multiple of the nine taps: whole input channels
METHODS = {"spatial SVD": "spatial_svd", "SVD": "svd", "aligned tiles": "tiled_svd"}
MODES: dict[str, Mode] = {"conventional": "finetune", "DeepTwist": "deeptwist"}


def whole(method: str, level: Level, mode: str) -> str:
    """Return the name of a run without a tail."""
    return f"{method} {level}, {mode}"


def split(method: str, level: Level, epochs: int) -> str:
    """Return the name of a run that ends with a tail."""
    return f"{method} {level}, tail of {epochs}"


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return, by size, then by method, both ways and each split."""
    trainings = {}
    for level in preset.levels:
        for label, method in METHODS.items():
            options = level.of(method, **({"tile": ALIGNED} if method == "tiled_svd" else {}))
            for way, mode in MODES.items():
                trainings[whole(label, level, way)] = preset.compressed(mode, **options)
            learnt = preset.compressed("deeptwist", **options)
            for epochs in preset.tails:
                shorter = replace(learnt.schedule, epochs=learnt.schedule.epochs - epochs)
                tail = TailRecipe(epochs=epochs, lr=0.01)
                recipe = replace(learnt, schedule=shorter, tail=tail)
                trainings[split(label, level, epochs)] = recipe
    return trainings


def report(results: Results, preset: Preset) -> Report:
    """Return accuracy by size, method and split."""
    rows, learnt_higher, tail_higher = [], [], []
    for level in preset.sorted_levels:
        for label in METHODS:
            ways = [whole(label, level, way) for way in MODES]
            splits = [split(label, level, epochs) for epochs in sorted(preset.tails)]
            shown = [results.shown(name) for name in ways]
            shown += [results.shown(name, "tail") for name in splits]
            rows.append((f"{label} {level}", results.ratio(ways[0]), *shown))
            tuned, learnt = (results.accuracy(name) for name in ways)
            learnt_higher.append(is_higher(learnt, tuned))
            tail_higher += [is_higher(results.accuracy(name, "tail"), tuned) for name in splits]
    tails = [f"tail of {epochs} epoch{'s' * (epochs > 1)}" for epochs in sorted(preset.tails)]
    figures = draw(
        "splits",
        f"Accuracy over the split of the epochs, {preset.reference_level}",
        [
            Curve(label, _by_split(results, preset, label), color)
            for color, label in enumerate(METHODS)
        ],
        x="epochs of fine-tuning at the end (0: DeepTwist)",
        y="test accuracy, %",
    )
    notes = (
        count_holds("DeepTwist is higher than conventional fine-tuning", learnt_higher),
        count_holds("DeepTwist with a tail is higher than conventional", tail_higher),
        "Not in the paper.",
    )
    title = f"Test accuracy, %, after {preset.recipe.schedule.epochs} epochs in all"
    return Report((Table(title, ("", "whole network", *MODES, *tails), rows),), figures, notes)


def _by_split(results: Results, preset: Preset, label: str) -> list[tuple[float, float | None]]:
    """Return (epochs of fine-tuning, accuracy in percent) at the reference size."""
    level = preset.reference_level
    tuned, learnt = (results.accuracy(whole(label, level, way)) for way in MODES)
    points = {
        epochs: results.accuracy(split(label, level, epochs), "tail")
        for epochs in sorted(preset.tails)
    }
    return list(({0: learnt} | points | {preset.recipe.schedule.epochs: tuned}).items())
