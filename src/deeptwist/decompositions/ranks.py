"""The rank that a compression ratio or a fraction of the channels stands for."""

import math
from collections.abc import Callable
from fractions import Fraction

from deeptwist.errors import DeepTwistError


def largest_rank(weight_numel: Callable[[int], int], maximum: int, budget: float) -> int:
    """The largest rank from 1 to `maximum` whose weights fit the budget; 0 where none does.

    Ranks round down, so that a compression ratio is a promise.

    Args:
        weight_numel: the number of weights at a rank, never falling with it.
        maximum: the full rank.
        budget: the most weights allowed.
    """
    low, high = 0, maximum
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if weight_numel(middle) <= budget else (low, middle - 1)
    return low


def floor_fraction(channels: int, fraction: float) -> int:
    """⌊fraction · channels⌋, the paper's rank for Tucker (section 4).

    The fraction is read as the decimal that was written: 0.29 · 100 is 29, not 28.
    """
    return math.floor(Fraction(str(float(fraction))) * channels)


def round_down(rank: int, multiple: int) -> int:
    """The largest multiple up to a rank; the rank itself where it is smaller than one."""
    return rank // multiple * multiple or rank


def check_ratio(ratio: float) -> float:
    """A usable compression ratio.

    Raises:
        DeepTwistError: unless it is a finite number above 1.
    """
    if not (math.isfinite(ratio) and ratio > 1):
        raise DeepTwistError(f"ratio {ratio} compresses nothing: give a number above 1, such as 4")
    return ratio
