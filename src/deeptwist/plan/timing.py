"""Timing several functions fairly: in one process, in turn, by medians."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_WARMUP = 3
_LEAST_SECONDS = 0.02  # a sample takes at least this long, so that the clock's grain is nothing


@dataclass(frozen=True)
class Timing:
    """Milliseconds for one run: the median and the quartiles of all samples."""

    median: float
    lower: float
    upper: float


def time_interleaved(
    runs: Sequence[Callable[[], object]],
    *,
    rounds: int = 15,
    on_round: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Samples of every function's time, taken in turn so that the machine's drift meets all alike.

    Args:
        runs: the functions; work that they leave to an accelerator is waited for.
        rounds: how many samples are taken of each.
        on_round: called after every round.

    Returns:
        For each function its samples in milliseconds, one per round.
    """
    repeats = [_repeats(run) for run in runs]
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, times, own in zip(runs, repeats, samples, strict=True):
            own.append(_milliseconds(run, times))
        on_round()
    return samples


def timing(samples: Sequence[float]) -> Timing:
    """The median and quartiles of two samples or more."""
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Timing(median, lower, upper)


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median over rounds of first ÷ second, in which drift cancels."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def _repeats(run: Callable[[], object]) -> int:
    for _ in range(_WARMUP):
        run()
    return max(1, round(_LEAST_SECONDS * 1000 / max(1e-6, _milliseconds(run, 1))))


def _milliseconds(run: Callable[[], object], repeats: int) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize()
    return (time.perf_counter() - started) * 1000 / repeats


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
