"""Figure 7: ResNet-34 on ImageNet, SVD of 64×64 tiles at R = 10 against Tucker fine-tuned.

The convolutions of 128 inputs and more; all others are 1.4 % of the network and stay dense.
Tucker's fraction is the one that leaves it as many weights. Where a kernel has one tap, Tucker is
a plain SVD.
"""

from experiments.fig3 import points
from experiments.page import (
    Figure,
    Report,
    Results,
    Table,
    count_holds,
    number,
)
from experiments.plots import Curve, draw
from experiments.profiles import Network, Profile, Run

PLACE = "Figure 7"
NETWORK: Network = "resnet34"
NEEDS_EPOCHS = True
CLAIM = "Tiled SVD by DeepTwist is ahead of fine-tuned Tucker throughout."
TILED, TUCKER = "tiled SVD R = 10, DeepTwist", "Tucker R_c = 0.46, conventional"
PAPER = {TILED: "73.00 / 91.12", TUCKER: "72.31 / 90.73"}
PAPER_START = "73.26 / 91.24"
HEADER = ["", "whole network", "top 1, %", "top 5, %", "paper: top 1 / top 5, %"]
FIGURES = {
    "loss": ("train_loss", "training loss, mean over the epoch", 1),
    "accuracy": ("accuracy", "test accuracy, % (top 1)", 100),
    "top5": ("top5", "test accuracy, % (top 5)", 100),
}


def runs(profile: Profile) -> dict[str, Run]:
    """Return the two trainings."""
    tiled = profile.run("deeptwist", "tiled_svd", "--rank 10", tile="64x64")
    tucker = profile.run("finetune", "tucker", "--fraction 0.46")
    return {TILED: tiled, TUCKER: tucker}


def report(results: Results, profile: Profile) -> Report:
    """Return loss and accuracy over epochs, and where they end."""
    courses = [results.course(name) for name in PAPER]
    figures: list[Figure] = []
    for file, (key, title, factor) in FIGURES.items():
        curves = [
            Curve(name, points(course, key, factor), color, dashed=name == TUCKER)
            for color, (name, course) in enumerate(zip(PAPER, courses, strict=True))
        ]
        figures += draw(file, title, curves, x="epoch", y=title)
    starts = [number(results.start(f"{what}_before")) for what in ("accuracy", "top5")]
    rows = [["before compression", "1.00×", *starts, PAPER_START]]
    for name, paper in PAPER.items():
        shown = [results.shown(name, what) for what in ("accuracy", "top5")]
        rows.append([name, results.ratio(name), *shown, paper])
    pairs = zip(*(points(course, "accuracy") for course in courses), strict=False)
    ahead = count_holds(
        "Epochs after which tiled SVD is ahead (weights as training left them)",
        [ours[1] > other[1] for ours, other in pairs],
    )
    return Report([Table("Accuracy", HEADER, rows)], figures, [ahead])
