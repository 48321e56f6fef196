"""Search the largest ratio at which a network keeps a score."""

from collections.abc import Callable
from functools import partial

RATIOS = (1.2, 16.0)  # that are searched between
_BISECTIONS = 6  # to a factor of 1.04
_SHARES, _REFINEMENTS = (0.1, 0.3), 3  # of what there is to learn; to a factor of 1.09
_STEPS = (1.4, 2.0, 2.8)  # of the least ratio, tried where it does not keep the score itself
ROUNDS = 2 + len(_STEPS) + _BISECTIONS  # scores that a search asks for, at most
LEARNING_ROUNDS = ROUNDS + 2 + len(_STEPS) + _REFINEMENTS


def search_ratio(
    score: Callable[[float, float], float], goal: float, *, learns: bool = False
) -> float | None:
    """Return the largest ratio whose network keeps a score; `None` if none does.

    A network that will learn is judged after a tenth of that; then those of up to twice the ratio
    so found after three tenths, as in successive halving (Jamieson and Talwalkar, 2016).

    Args:
        score: the share of what there is to learn, and a ratio → the network's score.
        goal: the least score.
        learns: whether networks learn at all; without it the share is 0.
    """
    first, second = _SHARES if learns else (0.0, None)
    ratio = largest_ratio(partial(score, first), goal)
    if second is not None and ratio != RATIOS[1]:
        low = ratio or RATIOS[0]
        bounds = low, min(2 * low, RATIOS[1])
        ratio = largest_ratio(partial(score, second), goal, bounds, _REFINEMENTS) or ratio
    return ratio


def largest_ratio(
    score: Callable[[float], float],
    goal: float,
    bounds: tuple[float, float] = RATIOS,
    bisections: int = _BISECTIONS,
) -> float | None:
    """Return the largest ratio whose network keeps a score, by bisection; `None` if none does.

    Args:
        score: a ratio → the score of the network compressed by it, which mostly falls with it.
        goal: the least score.
        bounds: the least and the largest ratio.
        bisections: scores that are asked for between them.
    """
    low, high = bounds
    if score(low) < goal:
        # A network near its teacher may learn nothing, and one that is farther more than it lost.
        steps = (low * step for step in _STEPS if low * step < high)
        nearest = next((ratio for ratio in steps if score(ratio) >= goal), None)
        if nearest is None:
            return None
        low = nearest
    if score(high) >= goal:
        return high
    for _ in range(bisections):
        middle = round((low * high) ** 0.5, 2)
        low, high = (middle, high) if score(middle) >= goal else (low, middle)
    return low
