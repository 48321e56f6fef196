"""Figure 7: ResNet-34 on ImageNet, SVD of 64×64 tiles at R = 10 against Tucker fine-tuned.

The convolutions of 128 inputs and more; all others are 1.4 % of the network and stay dense.
Tucker's fraction is the one that leaves it as many weights. Where a kernel has one tap, Tucker is
a plain SVD.
"""

from experiments.paper.cells import Cell
from experiments.paper.drawing import Curve, chart
from experiments.paper.experiment import Experiment
from experiments.paper.experiments.fig3 import accuracy_over_epochs, loss_over_epochs
from experiments.paper.findings import (
    Findings,
    Finished,
    Table,
    above,
    count_note,
    number,
)
from experiments.paper.profiles import Setting

from deeptwist.training.metrics import Run

TILED, TUCKER = "tiled SVD R = 10, DeepTwist", "Tucker R_c = 0.46, conventional"
PAPER = {TILED: "73.00 / 91.12", TUCKER: "72.31 / 90.73"}
PAPER_START = "73.26 / 91.24"


def cells(setting: Setting) -> list[Cell]:
    """The two trainings."""
    tiled = setting.compressed("deeptwist", decomposition="tiled_svd", tile=(64, 64), rank=10)
    tucker = setting.compressed("finetune", decomposition="tucker", fraction=0.46)
    return [Cell(TILED, tiled), Cell(TUCKER, tucker)]


def show(finished: Finished, setting: Setting) -> Findings:
    """Loss and accuracy over epochs, and where they end."""
    runs = {name: finished.first(name) for name in (TILED, TUCKER)}
    figures = [
        chart(
            name,
            title,
            [
                Curve(label, points(run), place, dashed=label == TUCKER)
                for place, (label, run) in enumerate(runs.items())
            ],
            x="epoch",
            y=title,
        )
        for name, title, points in (
            ("loss", "training loss, mean over the epoch", loss_over_epochs),
            ("accuracy", "test accuracy, % (top 1)", accuracy_over_epochs),
            ("top5", "test accuracy, % (top 5)", top5_over_epochs),
        )
    ]
    start = next((run for run in runs.values() if run), None)
    share = None if start is None else start.summary.top5_before
    before = number(None if share is None else 100 * share)
    rows = [("before compression", "1.00×", number(finished.start()), before, PAPER_START)]
    rows += [
        (name, finished.ratio(name), finished.shown(name), finished.top5(name), PAPER[name])
        for name in runs
    ]
    curves = [accuracy_over_epochs(run) for run in runs.values()]
    ahead = [above(one[1], other[1]) for one, other in zip(*curves, strict=False)]
    return Findings(
        (
            Table(
                "Accuracy",
                ("", "whole network", "top 1, %", "top 5, %", "paper: top 1 / top 5, %"),
                tuple(rows),
            ),
        ),
        tuple(figure for figure in figures if figure is not None),
        (
            count_note(
                "Epochs after which tiled SVD is ahead (weights as training left them)", ahead
            ),
        ),
    )


def top5_over_epochs(run: Run | None) -> tuple[tuple[float, float], ...]:
    """(epoch, test accuracy of five guesses in percent) of a run."""
    return tuple(
        (one["epoch"], 100 * one["test"]["top5"])
        for one in (run.epochs if run else ())
        if one["test"].get("top5") is not None
    )


EXPERIMENT = Experiment(
    name="fig7",
    place="Figure 7",
    claim="Tiled SVD by DeepTwist is ahead of fine-tuned Tucker throughout.",
    network="resnet34",
    cells=cells,
    show=show,
)
