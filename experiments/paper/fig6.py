"""Figure 6: SVD, tiled SVD and Tucker by DeepTwist, and Tucker fine-tuned, over ratios.

All convolutions but the first; tiles are 64×64. SVD and tiled SVD of the lowered kernel were held
to be impossible to fine-tune, so that DeepTwist is what makes them usable.
"""

from experiments.paper.fig2 import ACCURACY, RATIO, pair
from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Network, Preset
from experiments.paper.results import Report, Results, Table, count_holds

from deeptwist.app.training.recipe import Recipe

PLACE = "Figure 6"
NETWORK: Network = "resnet32"
CLAIM = (
    "Tiled SVD is the most accurate; plain SVD keeps up at small ratios and falls off at large "
    "ones."
)
CURVES = {  # by method and mode: colour
    ("tiled SVD", "DeepTwist"): 0,
    ("SVD", "DeepTwist"): 1,
    ("Tucker", "DeepTwist"): 2,
    ("Tucker", "conventional"): 2,
}


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return four trainings for each size."""
    trainings: dict[str, Recipe] = {}
    for level in preset.levels:
        tiles, svd = level.of("tiled_svd", tile=(64, 64)), level.of("svd")
        trainings[f"tiled SVD {level}, DeepTwist"] = preset.compressed("deeptwist", **tiles)
        trainings[f"SVD {level}, DeepTwist"] = preset.compressed("deeptwist", **svd)
        trainings |= pair(preset, level)
    return trainings


def report(results: Results, preset: Preset) -> Report:
    """Return accuracy over the ratio, by method."""
    names = {
        level: [f"{method} {level}, {mode}" for method, mode in CURVES]
        for level in preset.sorted_levels
    }
    curves = []
    for index, ((method, mode), color) in enumerate(CURVES.items()):
        points = [(level.ratio, results.accuracy(each[index])) for level, each in names.items()]
        curves.append(Curve(f"{method}, {mode}", points, color, dashed=mode == "conventional"))
    title = "Accuracy over the compression ratio, by method"
    figures = draw("accuracy", title, curves, results.start(), x=RATIO, y=ACCURACY, log_x=True)
    rows = [[str(level), *map(results.shown, each)] for level, each in names.items()]
    best = [results.is_higher(tiled, other) for tiled, *rest in names.values() for other in rest]
    notes = [
        count_holds("Tiled SVD is higher than another method at its ratio", best),
        "The paper prints no numbers of this figure.",
    ]
    header = ["ratio", *(curve.name for curve in curves)]
    return Report([Table("Test accuracy, %", header, rows)], figures, notes)
