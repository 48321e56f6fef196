"""Time functions, networks and layers fairly: in one process, in turn, by medians."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deeptwist.errors import DeepTwistError
from deeptwist.inspection.run import ExampleInput, Inputs
from deeptwist.measure.runtimes import Run, Setting, make_runner

Samples = list[float]  # milliseconds, one number per round

# Returns the milliseconds of modules on the same inputs: `time_modules`, but in tests.
Clock = Callable[[Sequence[nn.Module], Inputs, Setting], Sequence[Samples]]

_WARMUP = 3
_MIN_SECONDS = 0.02  # a sample takes at least this long, so that the clock's grain is nothing


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median and the quartiles of all samples."""

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
        setting: runtime, batch and machine, for the reader; empty where they are said elsewhere.
    """

    dense: Timing
    decomposed: Timing
    speedup: float
    setting: str = ""

    @classmethod
    def of(cls, dense: Samples, decomposed: Samples, setting: str = "") -> "Comparison":
        """Summarize the milliseconds of both sides, one of each per round."""
        ratio = median_ratio(dense, decomposed)
        return cls(summarize(dense), summarize(decomposed), ratio, setting)

    def __str__(self) -> str:
        times = f"{self.dense.median:.2f} → {self.decomposed.median:.2f} ms"
        return f"{times}, {self.speedup:.2f}× as fast ({self.setting})"


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


def time_modules(
    modules: Sequence[nn.Module], inputs: ExampleInput, setting: Setting, *, rounds: int = 15
) -> list[Samples]:
    """Return the milliseconds of modules on the same inputs, timed in turn; see `make_runner`."""
    with setting.applied():
        runs = [make_runner(module, inputs, setting) for module in modules]
        return time_interleaved(runs, rounds=rounds)


def time_models(
    dense: nn.Module,
    decomposed: nn.Module,
    inputs: ExampleInput,
    setting: Setting,
    *,
    rounds: int = 15,
) -> Comparison:
    """Time two models in turn on the same inputs; they stay as they are."""
    first, second = time_modules((dense, decomposed), inputs, setting, rounds=rounds)
    return Comparison.of(first, second)


def time_settings(
    make_runners: Callable[[Setting], Sequence[Run]],
    settings: Iterable[Setting],
    *,
    rounds: int = 15,
    on_round: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Setting, Comparison | str]]:
    """Time two models in one setting after the other.

    Args:
        make_runners: a setting → the functions that run the dense and the decomposed model in it.
        settings: what to run with.
        rounds: samples of each model in each setting, two at least.
        on_round: called after every round.

    Yields:
        Each setting with its times, or with why it is not to be had.
    """
    for setting in settings:
        if setting.runtime == "compile":
            torch.compiler.reset()  # compiled code is bound to the number of threads
        times: Comparison | str
        with setting.applied():
            try:
                runs = make_runners(setting)
            except DeepTwistError as error:
                times = str(error)
            else:
                first, second = time_interleaved(runs, rounds=rounds, on_round=on_round)
                times = Comparison.of(first, second)
        yield setting, times


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
