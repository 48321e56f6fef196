"""Figure 6: SVD, tiled SVD and Tucker by DeepTwist, and Tucker fine-tuned, over ratios.

All convolutions but the first; tiles are 64×64. SVD and tiled SVD of the lowered kernel were held
to be impossible to fine-tune, so that DeepTwist is what makes them usable.
"""

from experiments.paper.fig2 import conventional, deeptwist, pair
from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Level, Preset
from experiments.paper.results import Report, Results, Table, count_holds, is_higher

from deeptwist.training.recipe import Recipe

PLACE, NETWORK = "Figure 6", "resnet32"
CLAIM = (
    "Tiled SVD is the most accurate; plain SVD keeps up at small ratios and falls off at large "
    "ones."
)
TILE = (64, 64)


def svd(level: Level) -> str:
    """Return the name of plain SVD's run."""
    return f"SVD {level}, DeepTwist"


def tiled(level: Level) -> str:
    """Return the name of tiled SVD's run."""
    return f"tiled SVD {level}, DeepTwist"


CURVES = {
    "tiled SVD, DeepTwist": (tiled, 0, False),
    "SVD, DeepTwist": (svd, 1, False),
    "Tucker, DeepTwist": (deeptwist, 2, False),
    "Tucker, conventional": (conventional, 2, True),
}


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return four trainings for each size."""
    trainings: dict[str, Recipe] = {}
    for level in preset.levels:
        tiles = level.of("tiled_svd", tile=TILE)
        trainings[tiled(level)] = preset.compressed("deeptwist", **tiles)
        trainings[svd(level)] = preset.compressed("deeptwist", **level.of("svd"))
        trainings |= pair(preset, level)
    return trainings


def report(results: Results, preset: Preset) -> Report:
    """Return accuracy over the ratio, by method."""
    levels = preset.sorted_levels
    figures = draw(
        "accuracy",
        "Accuracy over the compression ratio, by method",
        [
            Curve(
                label,
                [(level.ratio, results.accuracy(name(level))) for level in levels],
                color,
                dashed=dashed,
            )
            for label, (name, color, dashed) in CURVES.items()
        ],
        x="compression ratio of every layer",
        y="test accuracy, %",
        start=results.start(),
        log_x=True,
    )
    names = [[name(level) for name, _, _ in CURVES.values()] for level in levels]
    rows = [
        (str(level), *(results.shown(name) for name in each))
        for level, each in zip(levels, names, strict=True)
    ]
    best = [
        is_higher(results.accuracy(each[0]), results.accuracy(other))
        for each in names
        for other in each[1:]
    ]
    notes = (
        count_holds("Tiled SVD is higher than another method at its ratio", best),
        "The paper prints no numbers of this figure.",
    )
    return Report((Table("Test accuracy, %", ("ratio", *CURVES), rows),), figures, notes)
