"""Figure 5: what the size of tiles does to the distribution of weights, at the same ratio.

A Gaussian random matrix of 1024 × 1024 is cut into tiles, and each tile is replaced by its best
approximation of rank R, with R chosen so that all sizes of tiles hold the same number of weights
(4× fewer). Nothing is trained: the result is exact for the seed.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from deeptwist.decompositions import TiledSVD
from experiments.page import Report, Results, Table
from experiments.plots import Curve, Points, draw
from experiments.profiles import Network, Profile, Run

PLACE = "Figure 5"
NETWORK: Network = "resnet32"  # of no matter
CLAIM = (
    "At the same ratio, more tiles leave more weights near zero and more large ones, and the "
    "variance rises."
)
SIZE, RATIO = 1024, 4
TILES = (1024, 64, 32, 16, 8)
SEEDS = (0, 1)
SMALL, LARGE = 0.1, 2.0
_BINS, _REACH = 80, 4.0
Shares = tuple[float, float, float]
TITLE = "Distribution of weights after tiled SVD"
HEADER = ["tile", "R", "tiles", f"|w| < {SMALL:g}", f"|w| > {LARGE:g}", "variance"]


def gaussian(seed: int, size: int = SIZE) -> Tensor:
    """Return a square matrix of standard normal numbers, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, size, generator=generator, dtype=torch.float64)


def approximate(matrix: Tensor, tile: int) -> Tensor:
    """Return the matrix with square tiles of rank tile ÷ 2·ratio, which keeps the ratio exactly."""
    method = TiledSVD(rank=tile // (2 * RATIO), tile=(tile, tile))
    return method.decompose(matrix[None]).reconstruct()[0]


def distribution(weights: Tensor) -> tuple[Shares, Points]:
    """Return shares and variance as in `HEADER`, and (w, density) over the middle of the range."""
    sizes, width = weights.abs(), 2 * _REACH / _BINS
    edges = torch.linspace(-_REACH, _REACH, _BINS + 1, dtype=torch.float64)
    density = torch.histc(weights, _BINS, -_REACH, _REACH) / (weights.numel() * width)
    small, large = (sizes < SMALL).double().mean(), (sizes > LARGE).double().mean()
    points = zip((edges[:-1] + width / 2).tolist(), density.tolist(), strict=True)
    return (float(small), float(large), float(weights.var())), list(points)


def runs(profile: Profile) -> dict[str, Run]:
    """Return none: nothing is trained."""
    return {}


def report(results: Results, profile: Profile) -> Report:
    """Return the distribution for each size of tiles."""
    matrices = [gaussian(seed) for seed in SEEDS]
    shown = {"the matrix itself": [distribution(matrix) for matrix in matrices]}
    rows = [["none", "–", "1", *_means(shown["the matrix itself"])]]
    for tile in TILES:
        each = [distribution(approximate(matrix, tile)) for matrix in matrices]
        shown[f"{tile}×{tile} tiles"] = each
        rank, count = tile // (2 * RATIO), (SIZE // tile) ** 2
        rows.append([f"{tile}×{tile}", str(rank), str(count), *_means(each)])
    curves, tails = [], []
    for index, (name, [(_, points), *_]) in enumerate(shown.items()):
        color = index - 1 if index else None
        curves.append(Curve(name, points, color, dashed=not index, markers=False))
        tails.append(replace(curves[-1], points=[point for point in points if point[1] > 0]))
    figures = draw("density", TITLE, curves, x="weight", y="density")
    figures += draw("tails", f"{TITLE}, its tails", tails, x="weight", y="density", scale="log")
    rising = all(
        finer > coarser
        for coarse, fine in pairwise(list(shown.values())[1:])
        for (before, _), (after, _) in zip(coarse, fine, strict=True)
        for coarser, finer in zip(before, after, strict=True)
    )
    title = f"{SIZE} × {SIZE} standard normal numbers, {RATIO}× fewer weights, mean of seeds "
    notes = [
        "The smaller the tiles, the more weights near zero, the more large ones and the more "
        f"variance: {'holds for every seed' if rising else 'does not hold'}.",
        "The paper prints no numbers of this figure.",
    ]
    return Report([Table(title + ", ".join(map(str, SEEDS)), HEADER, rows)], figures, notes)


def _means(distributions: Sequence[tuple[Shares, Points]]) -> list[str]:
    columns = zip(*(shares for shares, _ in distributions), strict=True)
    return [f"{statistics.fmean(column):.4f}" for column in columns]
