"""Table 1: the size of tiles, on ResNet-32's nine layers of 64 inputs and 64 outputs.

Tiled SVD with tiles 64×64, 32×32, 16×16 and 8×8 of the lowered kernel 64×576, each at the ranks
that halve and quarter the weights of these layers, by DeepTwist.
"""

from experiments.fig2 import ACCURACY, BEFORE, PAPER_START
from experiments.page import Report, Results, Table, count_holds, number
from experiments.plots import Curve, draw, known
from experiments.profiles import Network, Profile, Run

PLACE = "Table 1"
NETWORK: Network = "resnet32"
CLAIM = (
    "All networks are at or above the accuracy before compression, and the size of the tiles "
    "hardly matters."
)
TILES = (64, 32, 16, 8)
PAPER = {2: (93.34, 93.11, 93.01, 93.23), 4: (92.94, 92.97, 93.00, 92.81)}
HEADER = ["tile", "R", "ratio of the layers", "whole network", "DeepTwist", "paper"]


def runs(profile: Profile) -> dict[str, Run]:
    """Return the quartered networks first: there the tiles have more to differ in."""
    trainings = {}
    for ratio in (4, 2):
        for tile in TILES:
            trainings[f"tiles {tile}×{tile}, {ratio}×"] = profile.run(
                "deeptwist",
                "tiled_svd",
                f"--rank {tile // (2 * ratio)}",
                tile=f"{tile}x{tile}",
                layers="--no-skip-first-conv --min-in-channels 64",
            )
    return trainings


def report(results: Results, profile: Profile) -> Report:
    """Return accuracy by tile and ratio."""
    start = results.start()
    rows, curves, above, spreads = [], [], [], []
    for color, (ratio, paper) in enumerate(PAPER.items()):
        names = [f"tiles {tile}×{tile}, {ratio}×" for tile in TILES]
        points = known(zip(TILES, map(results.accuracy, names), strict=True))
        curves.append(Curve(f"{ratio}×, DeepTwist", points, color))
        for tile, name, accuracy in zip(TILES, names, paper, strict=True):
            sizes = [f"{tile}×{tile}", str(tile // (2 * ratio)), f"{ratio}×", results.ratio(name)]
            rows.append([*sizes, results.shown(name), f"{accuracy:.2f}"])
            above.append(results.is_higher(name, None))
        if len(points) > 1:
            spread = max(y for _, y in points) - min(y for _, y in points)
            printed = f"(paper: {max(paper) - min(paper):.2f})"
            spreads.append(f"Between tiles at {ratio}× there are {spread:.2f} points {printed}.")
    rows.append(["start", "", "1×", "1.00×", number(start), f"{PAPER_START:.2f}"])
    title, x = "Accuracy over the side of the tiles", "rows and columns of a tile"
    figures = draw("accuracy", title, curves, (BEFORE, start), x=x, y=ACCURACY, log_x=True)
    notes = [count_holds("Above the network before compression", above), *spreads]
    return Report([Table("Test accuracy, %", HEADER, rows)], figures, notes)
