"""The whole job as one function: calibrate, plan, decompose, train if asked, evaluate."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from deeptwist.decompose import decompose
from deeptwist.decompositions import SpatialSVD
from deeptwist.errors import DeepTwistError
from deeptwist.plan.calibration import Inputs, calibrate, first_element, recalibrate_batch_norm
from deeptwist.plan.plan import Plan
from deeptwist.plan.planner import plan

RATIOS = (1.2, 16.0)  # that a goal is searched between
BISECTIONS = 6  # to a factor of 1.04


@dataclass(frozen=True)
class Compressed:
    """A network made smaller.

    Attributes:
        model: the small one.
        plan: what was done to each layer.
        before: what `eval_fn` said of the dense network.
        after: what it says of the small one.
    """

    model: nn.Module
    plan: Plan
    before: float
    after: float


def compress(
    model: nn.Module,
    train_loader: Iterable[Any],
    eval_fn: Callable[[nn.Module], float],
    *,
    goal: float | None = None,
    train_fn: Callable[[nn.Module], object] | None = None,
    calibration_batches: int = 8,
    inputs: Callable[[Any], Inputs] | None = None,
    **options: Any,
) -> Compressed:
    """Make a trained network smaller and tell what it cost; the network itself stays as it is.

    Args:
        model: any trained network, for any task.
        train_loader: batches to calibrate on, and to take batch norm's statistics from.
        eval_fn: a network → its score, the higher the better.
        goal: the least score, instead of a ratio: the largest ratio that keeps it is searched.
        train_fn: trains the decomposed network in place, in your own loop; none for no training.
        calibration_batches: that many of the loader's.
        inputs: a batch → the network's positional inputs, see `deeptwist.calibrate`.
        options: of `deeptwist.plan`: `decomposition` (`SpatialSVD` without it), `ratio`, `macs`, …

    Raises:
        DeepTwistError: if the goal cannot be kept, or one of the steps fails.
    """
    before, batches = eval_fn(model), [*islice(train_loader, calibration_batches)]
    moments = calibrate(model, batches, inputs=inputs)
    options = {"decomposition": SpatialSVD(), "calibration": moments, **options}
    device = next(model.parameters()).device
    options["example_input"] = tuple(x.to(device) for x in (inputs or first_element)(batches[0]))

    def smaller(ratio: float | None) -> tuple[Plan, nn.Module]:
        made = plan(model, **options | ({} if ratio is None else {"ratio": ratio}))
        small = decompose(model, made, calibration=moments)
        return made, recalibrate_batch_norm(small, batches, inputs=inputs)

    ratio = None
    if goal is not None:
        ratio = largest_ratio(lambda ratio: eval_fn(smaller(ratio)[1]), goal)
        if ratio is None:
            raise DeepTwistError(f"no ratio from {RATIOS[0]} on keeps the score at {goal}")
    made, small = smaller(ratio)
    if train_fn is not None:
        train_fn(small)
    return Compressed(small, made, before, eval_fn(small))


def largest_ratio(score: Callable[[float], float], goal: float) -> float | None:
    """Return the largest ratio whose network keeps a score, by bisection; `None` if none does.

    Args:
        score: a ratio → the score of the network compressed by it, which falls with the ratio.
        goal: the least score.
    """
    low, high = RATIOS
    if score(low) < goal:
        return None
    if score(high) >= goal:
        return high
    for _ in range(BISECTIONS):
        middle = round((low * high) ** 0.5, 2)
        low, high = (middle, high) if score(middle) >= goal else (low, middle)
    return low
