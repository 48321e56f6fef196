"""Dense and decomposed, timed side by side: in one process, in turn, by medians."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deeptwist.inspection import evaluating

_WARMUP = 3
_LEAST_SECONDS = 0.02  # a sample takes at least this long, so that the clock's grain is nothing


@dataclass(frozen=True)
class Timing:
    """Milliseconds for one forward pass: the median and the quartiles of all samples."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Comparison:
    """Two models on one input, timed in turn.

    Attributes:
        dense: of the model as it was.
        decomposed: of its decomposed form.
        speedup: the median over rounds of dense ÷ decomposed, so that drift cancels.
    """

    dense: Timing
    decomposed: Timing
    speedup: float


def compare(
    dense: nn.Module,
    decomposed: nn.Module,
    example_input: Tensor,
    *,
    rounds: int = 15,
    on_round: Callable[[], None] = lambda: None,
) -> Comparison:
    """Times two models in turn on the same input, in evaluation mode without gradients.

    Args:
        dense: one model.
        decomposed: the other, on the same device.
        example_input: the input of both, in the memory format to measure.
        rounds: how many samples are taken of each.
        on_round: called after every round.
    """
    with evaluating(dense), evaluating(decomposed), torch.inference_mode():
        runs = [_repeats(model, example_input) for model in (dense, decomposed)]
        samples: list[tuple[float, float]] = []
        for _ in range(rounds):
            first, second = (
                _milliseconds(model, example_input, repeats)
                for model, repeats in zip((dense, decomposed), runs, strict=True)
            )
            samples.append((first, second))
            on_round()
    return Comparison(
        dense=_timing([first for first, _ in samples]),
        decomposed=_timing([second for _, second in samples]),
        speedup=statistics.median(first / second for first, second in samples),
    )


def _repeats(model: nn.Module, x: Tensor) -> int:
    for _ in range(_WARMUP):
        model(x)
    return max(1, round(_LEAST_SECONDS * 1000 / max(1e-6, _milliseconds(model, x, 1))))


def _milliseconds(model: nn.Module, x: Tensor, repeats: int) -> float:
    _synchronize(x)
    started = time.perf_counter()
    for _ in range(repeats):
        model(x)
    _synchronize(x)
    return (time.perf_counter() - started) * 1000 / repeats


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _timing(samples: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Timing(median, lower, upper)
