"""Search the smallest network that keeps a score."""

from collections.abc import Callable, Sequence

RATIOS = tuple(round(1.2 * 1.06**k, 2) for k in range(45))  # up to 15.58, searched among
_DOUBLING = 12  # of them


def search_ratio(
    score: Callable[[float, bool], float], goal: float, *, learns: bool = False
) -> float | None:
    """Return the largest ratio whose network keeps a score; `None` if none does.

    By bisection; where networks learn, from the largest that keeps the score before: doubled as
    long as it is kept, then bisected (Bentley and Yao, 1976). Each learns all that it can: after a
    short while at the full rate some networks are worse than they began.

    Args:
        score: a ratio, and whether its network learns → the network's score.
        goal: the least score.
        learns: whether the one chosen will learn.
    """
    kept = _largest_kept(lambda ratio: score(ratio, False) >= goal, RATIOS)
    larger = [ratio for ratio in RATIOS if learns and (kept is None or ratio > kept)]
    while larger:
        *between, doubled = larger[:_DOUBLING]
        if score(doubled, True) < goal:
            return _largest_kept(lambda ratio: score(ratio, True) >= goal, between) or kept
        kept, larger = doubled, larger[_DOUBLING:]
    return kept


def most_scores(*, learns: bool) -> int:
    """Return how many scores a search asks for, at most."""
    doublings = -(-len(RATIOS) // _DOUBLING)
    return len(RATIOS).bit_length() + learns * (doublings + (_DOUBLING - 1).bit_length())


def _largest_kept(is_kept: Callable[[float], bool], ratios: Sequence[float]) -> float | None:
    """Return the largest of ascending ratios that is kept, as smaller ones mostly are.

    By bisection, which asks for neither end first: a score that the least ratio does not keep may
    be kept by a larger one, whose network learned more than it lost.
    """
    low, high = -1, len(ratios)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_kept(ratios[middle]) else (low, middle)
    return None if low < 0 else ratios[low]
