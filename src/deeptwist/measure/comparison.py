"""Compare two models, or two functions, timed in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deeptwist.inspection.run import eval_mode
from deeptwist.measure.timing import Timing, median_ratio, summarize, time_interleaved


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

    @classmethod
    def of_samples(cls, dense: Sequence[float], decomposed: Sequence[float]) -> "Comparison":
        """Summarize the milliseconds of both sides, one of each per round."""
        return cls(summarize(dense), summarize(decomposed), median_ratio(dense, decomposed))


def compare(
    dense: nn.Module,
    decomposed: nn.Module,
    example_input: Tensor,
    *,
    rounds: int = 15,
    on_round: Callable[[], None] = lambda: None,
) -> Comparison:
    """Time two models in turn on the same input, in evaluation mode without gradients.

    Args:
        dense: one model.
        decomposed: the other, on the same device.
        example_input: the input of both, in the memory format to measure.
        rounds: how many samples are taken of each, two at least.
        on_round: called after every round.
    """
    with eval_mode(dense), eval_mode(decomposed), torch.inference_mode():
        return compare_functions(
            lambda: dense(example_input),
            lambda: decomposed(example_input),
            rounds=rounds,
            on_round=on_round,
        )


def compare_functions(
    dense: Callable[[], object],
    decomposed: Callable[[], object],
    *,
    rounds: int = 15,
    on_round: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compare as `compare` does, two functions that each run a model once."""
    samples = time_interleaved([dense, decomposed], rounds=rounds, on_round=on_round)
    return Comparison.of_samples(*samples)
