"""Two models, or single layers, dense and small: timed in turn."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deeptwist.errors import DeepTwistError
from deeptwist.inspection.run import ExampleInput, Inputs
from deeptwist.measure.runtimes import Run, Setting, make_runner
from deeptwist.measure.timing import Samples, Timing, median_ratio, summarize, time_interleaved

# Returns the milliseconds of modules on the same inputs: `time_modules`, but in tests.
Clock = Callable[[Sequence[nn.Module], Inputs, Setting], Sequence[Samples]]


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


def time_modules(
    modules: Sequence[nn.Module],
    inputs: ExampleInput,
    setting: Setting,
    *,
    rounds: int = 15,
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
