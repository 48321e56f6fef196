"""Figure 2: ResNet-32 by Tucker at several ratios, learnt by DeepTwist or fine-tuned afterwards.

All convolutions but the first are held by Tucker with R_s = R_c·S and R_t = R_c·T. For each size
the network is trained twice from the same weights, for the same steps: by DeepTwist, and as the
decomposed network (conventional fine-tuning). The dense network trained on as long says what the
schedule alone brings.
"""

from experiments.paper.cells import Cell
from experiments.paper.drawing import Curve, chart, known
from experiments.paper.experiment import Experiment
from experiments.paper.findings import (
    Findings,
    Finished,
    Table,
    above,
    count_note,
    difference,
    number,
    printed,
)
from experiments.paper.profiles import Point, Setting

# Accuracy by ratio, DeepTwist and conventional; read off the paper's plot.
PAPER = {
    1.57: (92.92, 92.20),
    2.06: (92.62, 92.09),
    2.80: (92.43, 91.75),
    4.28: (91.49, 90.96),
    6.71: (90.43, 89.77),
}
PAPER_START = 92.63
_NEAR = 0.1  # relative distance up to which the paper's ratio is shown beside ours
DENSE = "dense, trained as long"


def deeptwist(point: Point) -> str:
    """The name of DeepTwist's cell."""
    return f"Tucker {point}, DeepTwist"


def conventional(point: Point) -> str:
    """The name of the fine-tuned cell."""
    return f"Tucker {point}, conventional"


def pair(setting: Setting, point: Point) -> list[Cell]:
    """Both trainings at one size."""
    tucker = point.of("tucker")
    return [
        Cell(deeptwist(point), setting.compressed("deeptwist", **tucker)),
        Cell(conventional(point), setting.compressed("finetune", **tucker)),
    ]


def cells(setting: Setting) -> list[Cell]:
    """Two trainings for each size, and the dense network's."""
    found = [cell for point in setting.points for cell in pair(setting, point)]
    return [*found, Cell(DENSE, setting.dense)]


def show(finished: Finished, setting: Setting) -> Findings:
    """Accuracy over the ratio."""
    points = sorted(setting.points, key=lambda point: point.ratio)
    ratios = [point.ratio for point in points]
    learnt = [finished.accuracy(deeptwist(point)) for point in points]
    tuned = [finished.accuracy(conventional(point)) for point in points]
    start = finished.start()
    rows = []
    for point, one, other in zip(points, learnt, tuned, strict=True):
        theirs = nearest(point)
        printed_pair = PAPER.get(theirs or 0, (None, None))
        rows.append(
            (
                str(point),
                finished.ratio(deeptwist(point)),
                finished.shown(deeptwist(point)),
                finished.shown(conventional(point)),
                difference(one, other),
                "–" if theirs is None else f"{theirs:.2f}×",
                *(printed(value) for value in printed_pair),
            )
        )
    rows.append(("start", "", number(start), "", "", "", printed(PAPER_START), ""))
    rows.append((DENSE, "", finished.shown(DENSE), "", "", "", "–", ""))
    figure = chart(
        "accuracy",
        "Accuracy over the compression ratio",
        [
            Curve("DeepTwist", known(zip(ratios, learnt, strict=True)), 0),
            Curve(
                "conventional fine-tuning", known(zip(ratios, tuned, strict=True)), 0, dashed=True
            ),
            *(
                Curve(name, tuple((x, pair[side]) for x, pair in PAPER.items()), 1, dashed=dashed)
                for side, (name, dashed) in enumerate(
                    (("paper: DeepTwist", False), ("paper: conventional", True))
                )
                if setting.profile == "paper"
            ),
        ],
        x="compression ratio of every layer",
        y="test accuracy, %",
        level=None if start is None else ("before compression", start),
        log_x=True,
    )
    higher = [above(one, other) for one, other in zip(learnt, tuned, strict=True)]
    return Findings(
        (
            Table(
                "Test accuracy, %",
                (
                    "ratio",
                    "whole network",
                    "DeepTwist",
                    "conventional",
                    "difference",
                    "paper's ratio",
                    "paper: DeepTwist",
                    "paper: conventional",
                ),
                tuple(rows),
            ),
        ),
        () if figure is None else (figure,),
        (
            count_note("DeepTwist is higher than conventional fine-tuning", higher),
            count_note(
                "At the smallest ratio DeepTwist is above the network before compression",
                [above(learnt[0], start)],
            ),
        ),
    )


def nearest(point: Point) -> float | None:
    """The paper's ratio that a size may be held against."""
    theirs = min(PAPER, key=lambda ratio: abs(ratio - point.ratio))
    return theirs if abs(theirs / point.ratio - 1) < _NEAR else None


EXPERIMENT = Experiment(
    name="fig2",
    place="Figure 2",
    claim="DeepTwist is more accurate than conventional fine-tuning at every ratio, and at the "
    "smallest above the network before compression.",
    network="resnet32",
    cells=cells,
    show=show,
)
