"""Table 1: the size of tiles, on ResNet-32's nine layers of 64 inputs and 64 outputs.

Tiled SVD with tiles 64×64, 32×32, 16×16 and 8×8 of the lowered kernel 64×576, each at the ranks
that halve and quarter the weights of these layers, by DeepTwist.
"""

from experiments.paper.fig2 import PAPER_START
from experiments.paper.plotting import Curve, draw, known
from experiments.paper.presets import Preset
from experiments.paper.results import (
    Report,
    Results,
    Table,
    count_holds,
    is_higher,
    number,
    printed,
)

from deeptwist.training.recipe import Recipe

PLACE, NETWORK = "Table 1", "resnet32"
CLAIM = (
    "All networks are at or above the accuracy before compression, and the size of the tiles "
    "hardly matters."
)
TILES = (64, 32, 16, 8)
PAPER = {2: (93.34, 93.11, 93.01, 93.23), 4: (92.94, 92.97, 93.00, 92.81)}
HEADER = ("tile", "R", "ratio of the layers", "whole network", "DeepTwist", "paper")


def run_name(tile: int, ratio: int) -> str:
    """Return a run's name."""
    return f"tiles {tile}×{tile}, {ratio}×"


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return the quartered networks first: there the tiles have more to differ in."""
    return {
        run_name(tile, ratio): preset.compressed(
            "deeptwist",
            decomposition="tiled_svd",
            tile=(tile, tile),
            rank=tile // (2 * ratio),
            skip_first_conv=False,
            min_in_channels=64,
        )
        for ratio in (4, 2)
        for tile in TILES
    }


def report(results: Results, preset: Preset) -> Report:
    """Return accuracy by tile and ratio."""
    start = results.start()
    rows, curves, heights, spreads = [], [], [], []
    for color, (ratio, paper) in enumerate(PAPER.items()):
        points = known((tile, results.accuracy(run_name(tile, ratio))) for tile in TILES)
        curves.append(Curve(f"{ratio}×, DeepTwist", points, color))
        for tile, accuracy in zip(TILES, paper, strict=True):
            name, rank = run_name(tile, ratio), str(tile // (2 * ratio))
            measured = results.ratio(name), results.shown(name)
            rows.append((f"{tile}×{tile}", rank, f"{ratio}×", *measured, printed(accuracy)))
            heights.append(results.accuracy(name))
        if len(points) > 1:
            spread = max(y for _, y in points) - min(y for _, y in points)
            spreads.append(
                f"Between tiles at {ratio}× there are {spread:.2f} points "
                f"(paper: {max(paper) - min(paper):.2f})."
            )
    rows.append(("start", "", "1×", "1.00×", number(start), printed(PAPER_START)))
    figures = draw(
        "accuracy",
        "Accuracy over the side of the tiles",
        curves,
        x="rows and columns of a tile",
        y="test accuracy, %",
        start=start,
        log_x=True,
    )
    above = [is_higher(height, start) for height in heights]
    notes = (count_holds("Above the network before compression", above), *spreads)
    return Report((Table("Test accuracy, %", HEADER, rows),), figures, notes)
