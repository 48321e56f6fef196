"""Figure 5: what the size of tiles does to the distribution of weights, at the same ratio.

A Gaussian random matrix of 1024 × 1024 is cut into tiles, and each tile is replaced by its best
approximation of rank R, with R chosen so that all sizes of tiles hold the same number of weights
(4× fewer). Nothing is trained: the result is exact for the seed.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Preset
from experiments.paper.results import Report, Results, Table, printed
from torch import Tensor

from deeptwist.decompositions import TiledSVD
from deeptwist.training.recipe import Recipe

PLACE, NETWORK = "Figure 5", "resnet32"
CLAIM = (
    "At the same ratio, more tiles leave more weights near zero and more large ones, and the "
    "variance rises."
)
SIZE, RATIO = 1024, 4
TILES = (1024, 64, 32, 16, 8)
SEEDS = (0, 1)
SMALL, LARGE = 0.1, 2.0
_BINS, _REACH = 80, 4.0
HEADER = ("tile", "R", "tiles", f"|w| < {SMALL:g}", f"|w| > {LARGE:g}", "variance")


@dataclass(frozen=True)
class Distribution:
    """The weights after an approximation.

    Attributes:
        small: the share with |w| < 0.1.
        large: the share with |w| > 2.
        variance: of all.
        density: (w, density) over the middle of the range.
    """

    small: float
    large: float
    variance: float
    density: tuple[tuple[float, float], ...]


def gaussian(seed: int, size: int = SIZE) -> Tensor:
    """Return a square matrix of standard normal numbers, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, size, generator=generator, dtype=torch.float64)


def approximate(matrix: Tensor, tile: int) -> Tensor:
    """Return the matrix with square tiles of rank tile ÷ 2·ratio, which keeps the ratio exactly."""
    method = TiledSVD(rank=tile // (2 * RATIO), tile=(tile, tile))
    return method.decompose(matrix[None]).reconstruct()[0]


def distribution(weights: Tensor) -> Distribution:
    """Return shares, variance and density of weights."""
    sizes, width = weights.abs(), 2 * _REACH / _BINS
    edges = torch.linspace(-_REACH, _REACH, _BINS + 1, dtype=torch.float64)
    density = torch.histc(weights, _BINS, -_REACH, _REACH) / (weights.numel() * width)
    return Distribution(
        small=float((sizes < SMALL).double().mean()),
        large=float((sizes > LARGE).double().mean()),
        variance=float(weights.var()),
        density=tuple(zip((edges[:-1] + width / 2).tolist(), density.tolist(), strict=True)),
    )


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return none: nothing is trained."""
    return {}


def report(results: Results, preset: Preset) -> Report:
    """Return the distribution for each size of tiles."""
    matrices = [gaussian(seed) for seed in SEEDS]
    by_tile = {tile: [distribution(approximate(m, tile)) for m in matrices] for tile in TILES}
    original = [distribution(matrix) for matrix in matrices]
    rows = [("none", "–", "1", *_means(original))]
    rows += [
        (f"{tile}×{tile}", str(tile // (2 * RATIO)), str((SIZE // tile) ** 2), *_means(each))
        for tile, each in by_tile.items()
    ]
    shown = {"the matrix itself": original} | {f"{t}×{t} tiles": d for t, d in by_tile.items()}
    curves = [
        Curve(name, each[0].density, index - 1 if index else None, dashed=not index, markers=False)
        for index, (name, each) in enumerate(shown.items())
    ]
    positive = [
        Curve(c.name, [p for p in c.points if p[1]], c.color, dashed=c.dashed, markers=False)
        for c in curves
    ]
    title = "Distribution of weights after tiled SVD"
    figures = draw("density", title, curves, x="weight", y="density")
    figures += draw("tails", f"{title}, its tails", positive, x="weight", y="density", scale="log")
    rising = all(
        getattr(fine, what) > getattr(coarse, what)
        for tiles in pairwise(TILES)
        for coarse, fine in zip(*(by_tile[tile] for tile in tiles), strict=True)
        for what in ("small", "large", "variance")
    )
    seeds = ", ".join(map(str, SEEDS))
    title = (
        f"{SIZE} × {SIZE} standard normal numbers, {RATIO}× fewer weights, mean of seeds {seeds}"
    )
    notes = (
        "The smaller the tiles, the more weights near zero, the more large ones and the more "
        f"variance: {'holds for every seed' if rising else 'does not hold'}.",
        "The paper prints no numbers of this figure.",
    )
    return Report((Table(title, HEADER, rows),), figures, notes)


def _means(each: Sequence[Distribution]) -> list[str]:
    columns = ([d.small for d in each], [d.large for d in each], [d.variance for d in each])
    return [printed(statistics.fmean(column), 4) for column in columns]
