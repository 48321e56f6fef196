"""Time several functions fairly: in one process, in turn, by medians."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Samples = list[float]  # milliseconds, one number per round
_WARMUP = 3
_MIN_SECONDS = 0.02  # a sample takes at least this long, so that the clock's grain is nothing


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median and the quartiles of all samples."""

    median: float
    lower: float
    upper: float


def time_interleaved(
    functions: Sequence[Callable[[], object]],
    *,
    rounds: int = 15,
    on_round: Callable[[], None] = lambda: None,
) -> list[Samples]:
    """Time functions in turn, so that the machine's drift meets all alike.

    Args:
        functions: work that they leave to an accelerator is waited for.
        rounds: how many samples are taken of each.
        on_round: called after every round.

    Returns:
        For each function its samples in milliseconds, one per round.
    """
    repeats = [_calibrate_repeats(function) for function in functions]
    samples: list[Samples] = [[] for _ in functions]
    for _ in range(rounds):
        for function, count, times in zip(functions, repeats, samples, strict=True):
            times.append(_milliseconds(function, count))
        on_round()
    return samples


def summarize(samples: Sequence[float]) -> Timing:
    """Return the median and quartiles of two samples or more."""
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Timing(median, min(lower, median), max(upper, median))  # they are rounded apart


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the median over rounds of first ÷ second, in which drift cancels."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def _calibrate_repeats(function: Callable[[], object]) -> int:
    for _ in range(_WARMUP):
        function()
    return max(1, round(_MIN_SECONDS * 1000 / max(1e-6, _milliseconds(function, 1))))


def _milliseconds(function: Callable[[], object], repeats: int) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    _synchronize()
    return (time.perf_counter() - started) * 1000 / repeats


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
