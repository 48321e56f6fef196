"""Table 2: VGG19 on CIFAR-10, Tucker fine-tuned against tiled SVD by DeepTwist, by size.

The fully-connected layers are compressed first and fixed. Then the thirteen convolutions of 128
inputs and more are held by Tucker, of fractions from 0.6 to 0.4, and fine-tuned the conventional
way; or by SVD of 64×64 tiles, of ranks from 16 to 8, and learnt by DeepTwist. Sizes and FLOPs are
of these convolutions alone, counted as the paper counts them, in units of 2²⁰: they are exact.
"""

from collections.abc import Mapping
from functools import cache

import torch
from experiments.paper.cells import Cell
from experiments.paper.drawing import Curve, chart, known
from experiments.paper.experiment import Experiment
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

from deeptwist.decompositions import Decomposition, TiledSVD, Tucker
from deeptwist.layers.cost import MEGA
from deeptwist.models import build_model
from deeptwist.plan.planner import plan

TILE = (64, 64)
Row = tuple[float, float, float]  # weights and FLOPs in units of 2²⁰, accuracy in percent
PAPER_DENSE: Row = (18.98, 647.87, 92.37)
PAPER_TUCKER: dict[float, Row] = {
    0.6: (9.14, 319.99, 91.97),
    0.5: (6.71, 235.74, 91.79),
    0.45: (5.49, 191.77, 91.36),
    0.4: (4.61, 161.60, 91.11),
}
PAPER_TILED: dict[int, Row] = {
    16: (9.49, 316.28, 92.42),
    11: (6.52, 214.25, 92.33),
    10: (5.93, 193.85, 92.23),
    9: (5.55, 173.44, 92.22),
    8: (4.74, 153.04, 92.07),
}
# The pairs of about one size.
PAIRS = ((0.6, 16), (0.5, 11), (0.45, 10), (0.4, 8))


def tucker(fraction: float) -> str:
    """The name of a fine-tuned cell."""
    return f"Tucker R_c = {fraction:g}"


def tiled(rank: int) -> str:
    """The name of DeepTwist's cell."""
    return f"tiled SVD R = {rank}"


def cells(setting: Setting) -> list[Cell]:
    """The pairs of about one size first, the smallest networks before the larger."""
    made = {
        **{
            tucker(fraction): setting.compressed(
                "finetune", decomposition="tucker", fraction=fraction
            )
            for fraction in PAPER_TUCKER
        },
        **{
            tiled(rank): setting.compressed(
                "deeptwist", decomposition="tiled_svd", tile=TILE, rank=rank
            )
            for rank in PAPER_TILED
        },
    }
    paired = [name for one, other in reversed(PAIRS) for name in (tucker(one), tiled(other))]
    rest = [name for name in made if name not in paired]
    return [Cell(name, made[name]) for name in (*paired, *rest)]


@cache
def sizes(decomposition: Decomposition) -> tuple[float, float]:
    """Weights and FLOPs of VGG19's compressed convolutions, in units of 2²⁰."""
    with torch.device("meta"):
        model = build_model("vgg19")
        image = torch.empty(1, 3, 32, 32)
    made = plan(model, decomposition, example_input=image, min_in_channels=128, linear=False)
    weights = sum(layer.compressed_numel for layer in made.compressed)
    return weights / MEGA, made.paper_flops(factored=True) / MEGA


@cache
def dense_sizes() -> tuple[float, float]:
    """The same of the convolutions as they are."""
    with torch.device("meta"):
        model = build_model("vgg19")
        image = torch.empty(1, 3, 32, 32)
    made = plan(model, Tucker(fraction=0.5), example_input=image, min_in_channels=128, linear=False)
    weights = sum(layer.weight_numel for layer in made.compressed)
    return weights / MEGA, made.paper_flops(factored=False) / MEGA


def show(finished: Finished, setting: Setting) -> Findings:
    """Sizes, FLOPs and accuracies beside the paper's."""
    rows = [_row("before compression", dense_sizes(), PAPER_DENSE, number(finished.start()))]
    for fraction, theirs in PAPER_TUCKER.items():
        name = tucker(fraction)
        rows.append(_row(name, sizes(Tucker(fraction=fraction)), theirs, finished.shown(name)))
    for rank, theirs in PAPER_TILED.items():
        name = tiled(rank)
        rows.append(_row(name, sizes(TiledSVD(rank=rank, tile=TILE)), theirs, finished.shown(name)))
    higher = [
        above(finished.accuracy(tiled(rank)), finished.accuracy(tucker(fraction)))
        for fraction, rank in PAIRS
    ]
    figure = chart(
        "accuracy",
        "Accuracy over the size of the convolutions",
        [
            Curve("tiled SVD, DeepTwist", _curve(finished, _tiled_sizes()), 0),
            Curve("Tucker, conventional", _curve(finished, _tucker_sizes()), 1, dashed=True),
        ],
        x="weights of the compressed convolutions, 2²⁰",
        y="test accuracy, %",
    )
    header = (
        "",
        "weights",
        "paper",
        "FLOPs",
        "paper",
        "accuracy, %",
        "paper",
    )
    return Findings(
        (Table("VGG19: convolutions of 128 inputs and more", header, tuple(rows)),),
        () if figure is None else (figure,),
        (
            count_note("Tiled SVD is higher than Tucker of about its size", higher),
            "The paper's weights for R = 9 and FLOPs for R_c = 0.45 do not follow from its own "
            "ranks: misprints. Its Tucker weights are 2 to 5 % below their formula.",
            "Its FLOPs of tiled SVD are 2 to 5 % below ours: they fit 2R − 1 operations for each "
            "row and each column of a tile within 1 %, although the right factor sums 64 products.",
            "Accuracies are of the network that the profile trains; weights and FLOPs are always "
            "of VGG19.",
        ),
    )


def _row(name: str, ours: tuple[float, float], theirs: Row, accuracy: str) -> tuple[str, ...]:
    weights, flops = ours
    return (
        name,
        f"{weights:.2f}",
        printed(theirs[0]),
        f"{flops:.2f}",
        printed(theirs[1]),
        accuracy,
        printed(theirs[2]),
    )


def _tucker_sizes() -> dict[str, float]:
    return {tucker(one): sizes(Tucker(fraction=one))[0] for one in PAPER_TUCKER}


def _tiled_sizes() -> dict[str, float]:
    return {tiled(one): sizes(TiledSVD(rank=one, tile=TILE))[0] for one in PAPER_TILED}


def _curve(finished: Finished, weights: Mapping[str, float]) -> tuple[tuple[float, float], ...]:
    return known((size, finished.accuracy(name)) for name, size in weights.items())


EXPERIMENT = Experiment(
    name="table2",
    place="Table 2",
    claim="Sizes and FLOPs are as printed, and tiled SVD by DeepTwist is more accurate than "
    "fine-tuned Tucker at each size.",
    network="vgg19",
    cells=cells,
    show=show,
)
