"""How long the whole network takes as planned, and the plan that takes no longer than asked."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError
from deeptwist.inspection.swap import swap
from deeptwist.inspection.weights import get_weight
from deeptwist.measure.latency import Latency, LatencySetting, NetworkTimes
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.random_layers import random_factored
from deeptwist.measure.timing import time_interleaved
from deeptwist.plan.plan import Plan

_TRIES = 6
_LARGEST = 30.0  # times as fast that layers are asked to be
_USED = 0.95  # of the milliseconds allowed: a plan that takes as many is not improved


def time_network(
    model: nn.Module, inputs: tuple[Tensor, ...], plan: Plan, setting: LatencySetting
) -> NetworkTimes | None:
    """Return the milliseconds of a network and of what a plan makes of it; `None` if it cannot.

    Networks of one input with a batch in front are timed.

    Args:
        model: the network that was planned.
        inputs: see `deeptwist.plan`.
        plan: of the model.
        setting: see `LatencySetting`.
    """
    x = inputs[0]
    if len(inputs) > 1 or len(x) != plan.examples:
        return None
    x = x[torch.arange(setting.batch, device=x.device) % len(x)]
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    factored: dict[str, nn.Module] = {}
    for layer in plan.compressed:
        weight = get_weight(model, layer.name)
        new = random_factored(layer.convolution, layer.decomposition, weight.read())
        if weight.padding is not None:
            new.pad_input(weight.padding)
        factored[layer.name] = new
    with setting.applied():
        runs = [setting.prepare(network, x) for network in (model, swap(model, factored))]
        dense, planned = map(statistics.median, time_interleaved(runs))
        return NetworkTimes(dense, planned, f"{setting}, {describe_machine()}")


def search_latency(latency: Latency, attempt: Callable[[float], Plan]) -> Plan:
    """Return the plan that compresses least of those whose network is as fast as asked.

    What layers save by themselves is not what the network saves: every try corrects the next.

    Args:
        latency: of the whole network.
        attempt: how many times as fast the layers are asked to be → a plan with its latency.

    Raises:
        DeepTwistError: if the network is that fast as it is, no plan is, or it cannot be timed.
    """
    factor, best, best_ms, least = 2.0, None, 0.0, float("inf")
    for _ in range(_TRIES):
        try:
            plan = attempt(factor)
        except DeepTwistError:
            if least == float("inf"):
                raise
            break
        if plan.latency is None:
            raise DeepTwistError("latency takes a network of one input, with a batch in front")
        dense, planned = plan.latency.dense, plan.latency.planned
        limit = latency.ms or dense / (latency.speedup or 1)
        if dense <= limit:
            raise DeepTwistError(
                f"the network takes {dense:.2f} ms as it is, {limit:g} are allowed"
            )
        least = min(least, planned)
        if best_ms < planned <= limit:
            best, best_ms = plan, planned
        if _USED * limit <= planned <= limit:
            break
        saved = (dense - planned) / (1 - 1 / factor)  # with all of the layers' time
        share = 1 - (dense - (1 + _USED) / 2 * limit) / saved if saved > 0 else 0.0
        factor = max(1.01, 1 / max(share, 1 / _LARGEST))
    if best is None:
        raise DeepTwistError(f"no plan takes {limit:g} ms: the fastest tried takes {least:.2f}")
    return best
