"""Figure 5: what the size of tiles does to the distribution of weights, at the same ratio.

A Gaussian random matrix of 1024 × 1024 is cut into tiles, and each tile is replaced by its best
approximation of rank R, with R chosen so that all sizes of tiles hold the same number of weights
(4× fewer). Nothing is trained: what comes out is exact for the seed.
"""

import statistics
from dataclasses import dataclass
from itertools import pairwise

import torch
from experiments.paper.cells import Cell
from experiments.paper.drawing import Curve, chart
from experiments.paper.experiment import Experiment
from experiments.paper.findings import Findings, Finished, Table, printed
from experiments.paper.profiles import Setting
from torch import Tensor

from deeptwist.decompositions import TiledSVD

SIZE, RATIO = 1024, 4
TILES = (1024, 64, 32, 16, 8)
SEEDS = (0, 1)
SMALL, LARGE = 0.1, 2.0
_BINS, _REACH = 80, 4.0


@dataclass(frozen=True)
class Distribution:
    """The weights after an approximation.

    Attributes:
        variance: of all.
        small: the share with |w| < 0.1.
        large: the share with |w| > 2.
        density: (w, density) over the middle of the range.
    """

    variance: float
    small: float
    large: float
    density: tuple[tuple[float, float], ...]


def gaussian(seed: int, size: int = SIZE) -> Tensor:
    """A square matrix of standard normal numbers, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, size, generator=generator, dtype=torch.float64)


def approximated(matrix: Tensor, tile: int, ratio: int = RATIO) -> Tensor:
    """The matrix with square tiles of rank R = tile ÷ 2·ratio, which keeps the ratio exactly."""
    method = TiledSVD(rank=tile // (2 * ratio), tile=(tile, tile))
    return method.decompose(matrix[None]).reconstruct()[0]


def distribution(weights: Tensor) -> Distribution:
    """Variance, shares and density of weights."""
    sizes = weights.abs()
    edges = torch.linspace(-_REACH, _REACH, _BINS + 1, dtype=torch.float64)
    counts = torch.histc(weights, _BINS, -_REACH, _REACH)
    width = 2 * _REACH / _BINS
    centres = (edges[:-1] + width / 2).tolist()
    density = (counts / (weights.numel() * width)).tolist()
    return Distribution(
        variance=float(weights.var()),
        small=float((sizes < SMALL).double().mean()),
        large=float((sizes > LARGE).double().mean()),
        density=tuple(zip(centres, density, strict=True)),
    )


def show(finished: Finished, setting: Setting) -> Findings:
    """The distribution for each size of tiles."""
    found = {
        tile: [distribution(approximated(gaussian(seed), tile)) for seed in SEEDS] for tile in TILES
    }
    original = [distribution(gaussian(seed)) for seed in SEEDS]
    rows = [("none", "–", "1", *_means(original))]
    rows += [
        (f"{tile}×{tile}", str(tile // (2 * RATIO)), str((SIZE // tile) ** 2), *_means(some))
        for tile, some in found.items()
    ]
    curves = [
        Curve(f"{tile}×{tile} tiles", some[0].density, number, markers=False)
        for number, (tile, some) in enumerate(found.items())
    ]
    normal = Curve("the matrix itself", original[0].density, None, dashed=True, markers=False)
    figure = chart(
        "density",
        "Distribution of weights after tiled SVD",
        [normal, *curves],
        x="weight",
        y="density",
    )
    tails = chart(
        "tails",
        "Distribution of weights after tiled SVD, its tails",
        [
            Curve(
                curve.name,
                tuple(point for point in curve.points if point[1] > 0),
                curve.color,
                dashed=curve.dashed,
                markers=False,
            )
            for curve in (normal, *curves)
        ],
        x="weight",
        y="density",
        log_y=True,
    )
    rising = all(
        getattr(found[fine][seed], what) > getattr(found[coarse][seed], what)
        for what in ("small", "large", "variance")
        for coarse, fine in pairwise(TILES)
        for seed in range(len(SEEDS))
    )
    return Findings(
        (
            Table(
                f"{SIZE} × {SIZE} standard normal numbers, {RATIO}× fewer weights, mean of seeds "
                f"{', '.join(map(str, SEEDS))}",
                ("tile", "R", "tiles", "|w| < 0.1", "|w| > 2", "variance"),
                tuple(rows),
            ),
        ),
        tuple(drawn for drawn in (figure, tails) if drawn is not None),
        (
            "The smaller the tiles, the more weights near zero, the more large ones and the more "
            f"variance: {'holds for every seed' if rising else 'does not hold'}.",
            "The paper prints no numbers of this figure.",
        ),
    )


def _means(found: list[Distribution]) -> tuple[str, str, str]:
    return (
        printed(statistics.fmean(one.small for one in found), 4),
        printed(statistics.fmean(one.large for one in found), 4),
        printed(statistics.fmean(one.variance for one in found), 4),
    )


def cells(setting: Setting) -> list[Cell]:
    """None: nothing is trained."""
    return []


EXPERIMENT = Experiment(
    name="fig5",
    place="Figure 5",
    claim="At the same ratio, more tiles leave more weights near zero and more large ones, and "
    "the variance rises.",
    network="resnet32",
    cells=cells,
    show=show,
)
