"""When weights are distorted, and at which ranks: schedules of the interval and of the rank."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from deeptwist.decompositions import CannotDecomposeError, Decomposition
from deeptwist.errors import DeepTwistError, check_int
from deeptwist.plan.planned_layer import CompressedLayer

Interval = int | Sequence[tuple[int, int]]
Schedule = tuple[tuple[int, int], ...]

_ALMOST_NONE = 1 + 1e-9  # the ratio of a layer that is hardly smaller than dense


def check_interval(interval: Interval) -> int | Schedule:
    """Return an interval, or a schedule of (from step, every) with its pairs as tuples.

    Raises:
        DeepTwistError: if it is neither, an interval is not positive, or steps do not ascend.
    """
    if not isinstance(interval, list | tuple):
        check_int("interval", interval)
        return interval  # type: ignore[return-value]
    for pair in interval:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DeepTwistError(f"interval {pair!r} is not a pair (from step, every)")
        check_int("the step of an interval", pair[0], 0)
        check_int("interval", pair[1])
    starts = [start for start, _ in interval]
    if not starts or any(a >= b for a, b in pairwise(starts)):
        raise DeepTwistError(f"the steps of intervals must ascend, not {starts}")
    return tuple((start, every) for start, every in interval)


def is_due(interval: int | Schedule, step: int) -> bool:
    """Return whether weights are distorted after so many optimizer steps.

    Of the entries (from step, every), the last that begins before `step` counts.
    """
    schedule = ((0, interval),) if isinstance(interval, int) else interval
    index = bisect_left(schedule, (step,)) - 1
    return index >= 0 and (step - schedule[index][0]) % schedule[index][1] == 0


def follow_learning_rate(
    interval: int, lr_factor: Callable[[int], float], steps: int, power: float = 1.0
) -> Schedule:
    """Return a schedule of intervals that grow as the learning rate falls.

    Weights are distorted whenever the sum of the rate's share^power has grown by `interval`: at a
    constant rate every interval / share^power steps.

    Args:
        interval: in steps at the highest rate.
        lr_factor: the share of the highest learning rate that a step has, counted from 0.
        steps: optimizer steps in all.
        power: 1 for an interval in inverse proportion to the rate, 0.5 for its root.
    """
    schedule: list[tuple[int, int]] = []
    total, last = 0.0, 0
    for step in range(1, steps + 1):
        total += lr_factor(step - 1) ** power
        if total >= interval:
            total -= interval
            if not schedule or schedule[-1][1] != step - last:
                schedule.append((last, step - last))
            last = step
    return (*schedule, (last, steps + 1))  # none after the last but that of `finish`


def largest_useful(layer: CompressedLayer) -> Decomposition:
    """Return a layer's decomposition at the largest rank that is smaller than dense.

    Never below the planned one.
    """
    planned = layer.decomposition
    try:
        largest = planned.without_rank().resolve(layer.convolution, _ALMOST_NONE)
    except CannotDecomposeError:
        return planned
    return _with_ranks(planned, map(max, zip(_ranks(largest), _ranks(planned), strict=True)))


def between(largest: Decomposition, planned: Decomposition, progress: float) -> Decomposition:
    """Return a decomposition at the ranks that a share of a ramp has reached.

    The cubic of gradual pruning (Zhu and Gupta, "To prune, or not to prune", 2017): fast while
    there is much to spare, slow towards the end.

    Args:
        largest: at progress 0.
        planned: at progress 1 and beyond.
        progress: from 0.
    """
    left = max(0.0, 1 - progress) ** 3
    pairs = zip(_ranks(largest), _ranks(planned), strict=True)
    return _with_ranks(planned, (end + int((start - end) * left) for start, end in pairs))


def _ranks(decomposition: Decomposition) -> tuple[int, ...]:
    rank = decomposition.rank
    assert rank is not None
    return rank if isinstance(rank, tuple) else (rank,)


def _with_ranks(decomposition: Decomposition, ranks: Iterable[int]) -> Decomposition:
    values = tuple(ranks)
    return replace(
        decomposition, rank=values if isinstance(decomposition.rank, tuple) else values[0]
    )
