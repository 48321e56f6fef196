"""Figure 6: SVD, tiled SVD and Tucker by DeepTwist, and Tucker fine-tuned, over ratios.

All convolutions but the first; tiles are 64×64. SVD and tiled SVD of the lowered kernel were held
to be impossible to fine-tune, so that DeepTwist is what makes them usable.
"""

from experiments.paper.cells import Cell
from experiments.paper.drawing import Curve, chart, known
from experiments.paper.experiment import Experiment
from experiments.paper.experiments.fig2 import conventional, deeptwist, pair
from experiments.paper.findings import Findings, Finished, Table, above, count_note
from experiments.paper.profiles import Point, Setting

TILE = (64, 64)


def svd(point: Point) -> str:
    """The name of plain SVD's cell."""
    return f"SVD {point}, DeepTwist"


def tiled(point: Point) -> str:
    """The name of tiled SVD's cell."""
    return f"tiled SVD {point}, DeepTwist"


CURVES = (
    ("tiled SVD, DeepTwist", tiled, 0, False),
    ("SVD, DeepTwist", svd, 1, False),
    ("Tucker, DeepTwist", deeptwist, 2, False),
    ("Tucker, conventional", conventional, 2, True),
)


def cells(setting: Setting) -> list[Cell]:
    """Four trainings for each size."""
    found = []
    for point in setting.points:
        found += [
            Cell(tiled(point), setting.compressed("deeptwist", **point.of("tiled_svd", tile=TILE))),
            Cell(svd(point), setting.compressed("deeptwist", **point.of("svd"))),
            *pair(setting, point),
        ]
    return found


def show(finished: Finished, setting: Setting) -> Findings:
    """Accuracy over the ratio, by method."""
    points = sorted(setting.points, key=lambda point: point.ratio)
    curves = [
        Curve(
            name,
            known((point.ratio, finished.accuracy(cell(point))) for point in points),
            color,
            dashed=dashed,
        )
        for name, cell, color, dashed in CURVES
    ]
    start = finished.start()
    figure = chart(
        "accuracy",
        "Accuracy over the compression ratio, by method",
        curves,
        x="compression ratio of every layer",
        y="test accuracy, %",
        level=None if start is None else ("before compression", start),
        log_x=True,
    )
    rows = tuple(
        (str(point), *(finished.shown(cell(point)) for _, cell, *_ in CURVES)) for point in points
    )
    best = [
        above(finished.accuracy(tiled(point)), finished.accuracy(cell(point)))
        for point in points
        for _, cell, *_ in CURVES[1:]
    ]
    return Findings(
        (Table("Test accuracy, %", ("ratio", *(name for name, *_ in CURVES)), rows),),
        () if figure is None else (figure,),
        (
            count_note("Tiled SVD is higher than another method at its ratio", best),
            "The paper prints no numbers of this figure.",
        ),
    )


EXPERIMENT = Experiment(
    name="fig6",
    place="Figure 6",
    claim="Tiled SVD is the most accurate; plain SVD keeps up at small ratios and falls off at "
    "large ones.",
    network="resnet32",
    cells=cells,
    show=show,
)
