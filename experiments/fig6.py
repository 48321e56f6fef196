"""Figure 6: SVD, tiled SVD and Tucker by DeepTwist, and Tucker fine-tuned, over ratios.

All convolutions but the first; tiles are 64×64. SVD and tiled SVD of the lowered kernel were held
to be impossible to fine-tune, so that DeepTwist is what makes them usable.
"""

from experiments.fig2 import ACCURACY, BEFORE, RATIO, pair
from experiments.page import Report, Results, Table, count_holds
from experiments.plots import Curve, draw
from experiments.profiles import Network, Profile, Run

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


def runs(profile: Profile) -> dict[str, Run]:
    """Return four trainings for each size."""
    trainings: dict[str, Run] = {}
    for size in profile.sizes:
        tiles = profile.run("deeptwist", "tiled_svd", size, tile="64x64")
        trainings[f"tiled SVD {size}, DeepTwist"] = tiles
        trainings[f"SVD {size}, DeepTwist"] = profile.run("deeptwist", "svd", size)
        trainings |= pair(profile, size)
    return trainings


def report(results: Results, profile: Profile) -> Report:
    """Return accuracy over the ratio, by method."""
    names = {
        size: [f"{method} {size}, {mode}" for method, mode in CURVES]
        for size in profile.sorted_sizes
    }
    curves = []
    for index, ((method, mode), color) in enumerate(CURVES.items()):
        points = [(size.ratio, results.accuracy(each[index])) for size, each in names.items()]
        curves.append(Curve(f"{method}, {mode}", points, color, dashed=mode == "conventional"))
    title = "Accuracy over the compression ratio, by method"
    figures = draw(
        "accuracy", title, curves, (BEFORE, results.start()), x=RATIO, y=ACCURACY, log_x=True
    )
    rows = [[str(size), *map(results.shown, each)] for size, each in names.items()]
    best = [results.is_higher(tiled, other) for tiled, *rest in names.values() for other in rest]
    notes = [
        count_holds("Tiled SVD is higher than another method at its ratio", best),
        "The paper prints no numbers of this figure.",
    ]
    header = ["ratio", *(curve.name for curve in curves)]
    return Report([Table("Test accuracy, %", header, rows)], figures, notes)
