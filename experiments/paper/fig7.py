"""Figure 7: ResNet-34 on ImageNet, SVD of 64×64 tiles at R = 10 against Tucker fine-tuned.

The convolutions of 128 inputs and more; all others are 1.4 % of the network and stay dense.
Tucker's fraction is the one that leaves it as many weights. Where a kernel has one tap, Tucker is
a plain SVD.
"""

from experiments.paper.fig3 import over_epochs
from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Network, Preset
from experiments.paper.results import (
    Figure,
    Report,
    Results,
    Table,
    count_holds,
    mean_and_deviation,
    number,
)

from deeptwist.app.training.recipe import Recipe

PLACE = "Figure 7"
NETWORK: Network = "resnet34"
CLAIM = "Tiled SVD by DeepTwist is ahead of fine-tuned Tucker throughout."
TILED, TUCKER = "tiled SVD R = 10, DeepTwist", "Tucker R_c = 0.46, conventional"
PAPER = {TILED: "73.00 / 91.12", TUCKER: "72.31 / 90.73"}
PAPER_START = "73.26 / 91.24"
HEADER = ["", "whole network", "top 1, %", "top 5, %", "paper: top 1 / top 5, %"]
FIGURES = {
    "loss": ("train_loss", "training loss, mean over the epoch"),
    "accuracy": ("accuracy", "test accuracy, % (top 1)"),
    "top5": ("top5", "test accuracy, % (top 5)"),
}


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return the two trainings."""
    tiled = preset.compressed("deeptwist", decomposition="tiled_svd", tile=(64, 64), rank=10)
    tucker = preset.compressed("finetune", decomposition="tucker", fraction=0.46)
    return {TILED: tiled, TUCKER: tucker}


def report(results: Results, preset: Preset) -> Report:
    """Return loss and accuracy over epochs, and where they end."""
    runs = [results.course(name) for name in PAPER]
    figures: list[Figure] = []
    for file, (key, title) in FIGURES.items():
        curves = [
            Curve(name, over_epochs(run, key), color, dashed=name == TUCKER)
            for color, (name, run) in enumerate(zip(PAPER, runs, strict=True))
        ]
        figures += draw(file, title, curves, x="epoch", y=title)
    top5 = next((run.summary.top5_before for run in runs if run), None)
    before = number(None if top5 is None else 100 * top5)
    rows = [["before compression", "1.00×", number(results.start()), before, PAPER_START]]
    for name, paper in PAPER.items():
        shares = [run.summary.top5 for run in results.runs.get(name, ())]
        top5_after = mean_and_deviation([100 * share for share in shares if share is not None])
        rows.append([name, results.ratio(name), results.shown(name), top5_after, paper])
    pairs = zip(*(over_epochs(run, "accuracy") for run in runs), strict=False)
    ahead = count_holds(
        "Epochs after which tiled SVD is ahead (weights as training left them)",
        [ours[1] > other[1] for ours, other in pairs],
    )
    return Report([Table("Accuracy", HEADER, rows)], figures, [ahead])
