"""Search the largest ratio at which a network keeps a score."""

from collections.abc import Callable
from functools import partial

RATIOS = tuple(round(1.2 * 1.06**k, 2) for k in range(45))  # up to 15.58, searched among
# A rung: the share of what there is to learn, and how far beyond the last rung's ratio it looks.
Rung = tuple[float, float]
UNTRAINED: tuple[Rung, ...] = ((0.0, RATIOS[-1]),)
LEARNING: tuple[Rung, ...] = (*UNTRAINED, (0.1, 2.0), (0.3, 2.0), (1.0, 1.4))


def search_ratio(
    score: Callable[[float, float], float], goal: float, rungs: tuple[Rung, ...] = UNTRAINED
) -> float | None:
    """Return the largest ratio whose network keeps a score; `None` if none does.

    Networks that will learn are judged in rungs, as in successive halving (Jamieson and Talwalkar,
    2016): many as they are, and of those larger than the last that kept the score then fewer,
    after longer. (A short while at the full rate may cost more than it brings.)

    Args:
        score: the share of what there is to learn, and a ratio → the network's score.
        goal: the least score.
        rungs: `LEARNING`, or `UNTRAINED` for networks that are judged as they are.
    """
    kept = None
    for share, reach in rungs:
        least = kept or RATIOS[0]
        candidates = [r for r in RATIOS if r <= reach * least and (kept is None or r > kept)]
        kept = largest_kept(partial(score, share), goal, candidates) or kept
    return kept


def largest_kept(score: Callable[[float], float], goal: float, ratios: list[float]) -> float | None:
    """Return the largest of ascending ratios that keeps a score, which mostly falls with them.

    By bisection, which asks for neither end first: a score that the least ratio does not keep may
    be kept by a larger one, whose network learned more than it lost.
    """
    low, high = -1, len(ratios)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if score(ratios[middle]) >= goal else (low, middle)
    return None if low < 0 else ratios[low]


def most_scores(rungs: tuple[Rung, ...]) -> int:
    """Return how many scores a search asks for, at most."""
    counts = (sum(ratio <= reach * RATIOS[0] for ratio in RATIOS) for _, reach in rungs)
    return sum(count.bit_length() for count in counts)
