"""Table 1: the size of tiles, on ResNet-32's nine layers of 64 inputs and 64 outputs.

Tiled SVD with tiles 64×64, 32×32, 16×16 and 8×8 of the lowered kernel 64×576, each at the ranks
that halve and quarter the weights of these layers, learnt by DeepTwist.
"""

from experiments.paper.cells import Cell
from experiments.paper.drawing import Curve, chart, known
from experiments.paper.experiment import Experiment
from experiments.paper.experiments.fig2 import PAPER_START
from experiments.paper.findings import (
    Findings,
    Finished,
    Table,
    above,
    count_note,
    number,
    printed,
)
from experiments.paper.profiles import Setting

TILES = (64, 32, 16, 8)
PAPER = {2: (93.34, 93.11, 93.01, 93.23), 4: (92.94, 92.97, 93.00, 92.81)}


def name_of(tile: int, ratio: int) -> str:
    """A cell's name."""
    return f"tiles {tile}×{tile}, {ratio}×"


def cells(setting: Setting) -> list[Cell]:
    """The quartered networks first: there the tiles have more to differ in."""
    return [
        Cell(
            name_of(tile, ratio),
            setting.compressed(
                "deeptwist",
                decomposition="tiled_svd",
                tile=(tile, tile),
                rank=tile // (2 * ratio),
                skip_first_conv=False,
                min_in_channels=64,
            ),
        )
        for ratio in (4, 2)
        for tile in TILES
    ]


def show(finished: Finished, setting: Setting) -> Findings:
    """Accuracy by tile and ratio."""
    start = finished.start()
    rows = [
        (
            f"{tile}×{tile}",
            str(tile // (2 * ratio)),
            f"{ratio}×",
            finished.ratio(name_of(tile, ratio)),
            finished.shown(name_of(tile, ratio)),
            printed(theirs),
        )
        for ratio, printed_ones in PAPER.items()
        for tile, theirs in zip(TILES, printed_ones, strict=True)
    ]
    rows.append(("start", "", "1×", "1.00×", number(start), printed(PAPER_START)))
    found = [finished.accuracy(name_of(tile, ratio)) for ratio in PAPER for tile in TILES]
    curves = {
        ratio: known((tile, finished.accuracy(name_of(tile, ratio))) for tile in TILES)
        for ratio in PAPER
    }
    figure = chart(
        "accuracy",
        "Accuracy over the side of the tiles",
        [
            Curve(f"{ratio}×, DeepTwist", curve, color)
            for color, (ratio, curve) in enumerate(curves.items())
        ],
        x="rows and columns of a tile",
        y="test accuracy, %",
        level=None if start is None else ("before compression", start),
        log_x=True,
    )
    spreads = []
    for ratio, curve in curves.items():
        reached = [value for _, value in curve]
        if len(reached) > 1:
            theirs = max(PAPER[ratio]) - min(PAPER[ratio])
            spreads.append(
                f"Between tiles at {ratio}× there are {max(reached) - min(reached):.2f} points "
                f"(paper: {theirs:.2f})."
            )
    return Findings(
        (
            Table(
                "Test accuracy, %",
                ("tile", "R", "ratio of the layers", "whole network", "DeepTwist", "paper"),
                tuple(rows),
            ),
        ),
        () if figure is None else (figure,),
        (
            count_note(
                "Above the network before compression", [above(value, start) for value in found]
            ),
            *spreads,
        ),
    )


EXPERIMENT = Experiment(
    name="table1",
    place="Table 1",
    claim="All networks are at or above the accuracy before compression, and the size of the "
    "tiles hardly matters.",
    network="resnet32",
    cells=cells,
    show=show,
)
