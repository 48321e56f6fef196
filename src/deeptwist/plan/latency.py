"""Plans by the clock: what the network takes as planned, and which plan is as fast as asked.

How long a layer takes does not depend on its numbers, so layers of random ones are timed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError
from deeptwist.inspection.run import Inputs
from deeptwist.inspection.swap import swap
from deeptwist.inspection.weights import get_weight
from deeptwist.layers.geometry import LayerCall
from deeptwist.measure.layer_clock import at_batch, random_dense, random_factored, random_input
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.runtimes import Runtime, Setting, dtype_name
from deeptwist.measure.timing import Clock, Comparison, time_models, time_modules
from deeptwist.plan.plan import CompressedLayer, Plan, PlannedLayer

_BATCH = 16  # that single layers are timed at
_TRIES = 8
_LARGEST = 0.97  # share of their time that layers are asked to save
_USED = 0.95  # of the time allowed: a plan that takes as much is not improved


@dataclass(frozen=True)
class Latency:
    """A budget of time: what the whole network is to take, measured here.

    Attributes:
        speedup: dense ÷ planned milliseconds, at least.
        ms: milliseconds, at most; in place of `speedup`.
        batch: examples.
        runtime: what runs the network: eager, compile or onnxruntime.
        threads: of the processor; those that PyTorch has without it.

    Raises:
        DeepTwistError: unless one of speedup and ms is given, or if a value makes no sense.
    """

    speedup: float | None = None
    ms: float | None = None
    batch: int = 16
    runtime: Runtime = "eager"
    threads: int | None = None

    def __post_init__(self) -> None:
        if (self.speedup is None) == (self.ms is None):
            raise DeepTwistError("speedup and ms are one budget of latency: give one of them")
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise DeepTwistError(f"a latency speedup of {self.speedup} is not a number above 1")
        if self.ms is not None and not 0 < self.ms < math.inf:
            raise DeepTwistError(f"a latency of {self.ms} ms is not a number above 0")
        self.setting(torch.float32)

    def setting(self, dtype: torch.dtype) -> Setting:
        """Return what a network of this type is measured with."""
        threads = torch.get_num_threads() if self.threads is None else self.threads
        return Setting(self.batch, threads, dtype_name(dtype), self.runtime)

    def __str__(self) -> str:
        return f"{self.ms:g} ms" if self.speedup is None else f"{self.speedup:g}×"


def time_network(
    model: nn.Module, inputs: Inputs, plan: Plan, setting: Setting, clock: Clock = time_modules
) -> Comparison:
    """Time the whole network, and what a plan makes of it with random factors, in turn.

    Args:
        model: the network that was planned.
        inputs: of the setting's batch.
        plan: of the model.
        setting: what they are run with.
        clock: returns the milliseconds of modules on the same inputs.
    """
    factored: dict[str, nn.Module] = {}
    for layer in plan.compressed:
        weight = get_weight(model, layer.name)
        new = random_factored(layer.convolution, layer.decomposition, weight.read())
        if weight.padding is not None:
            new.pad_input(weight.padding)
        factored[layer.name] = new
    dense, planned = clock([model, swap(model, factored)], inputs, setting)
    with setting.applied():
        where = f"{setting.runtime}, batch {setting.batch}, {describe_machine()}"
    return Comparison.of(dense, planned, where)


def search_latency(latency: Latency, attempt: Callable[[float | None], Plan]) -> Plan:
    """Return the plan that compresses least of those whose whole network is as fast as asked.

    What layers save by themselves is not what the network saves: every try corrects the next, by
    the line between the nearest tries that saved too little and enough.

    Args:
        latency: of the whole network.
        attempt: how many times as fast the layers are asked to be, or `None` for as fast as can
            be → a plan with its latency.

    Raises:
        DeepTwistError: if the network is that fast as it is, or if no plan is.
    """
    best: Plan | None = None
    share = 0.5 if latency.speedup is None else 1 - 1 / latency.speedup  # that layers are to save
    low, high = (0.0, 0.0), (math.inf, math.inf)  # the tries, and the shares that networks saved
    for _ in range(_TRIES):
        is_fastest = False
        try:
            plan = attempt(1 / (1 - share))
        except DeepTwistError:  # more than the layers can save, or more than a budget is exceeded
            plan, is_fastest = attempt(None), True
        saved, needed = _saved_and_needed(plan, latency)
        if saved < needed:
            if is_fastest:
                break
            low = share, saved
        else:
            if best is None or saved < _saved_and_needed(best, latency)[0]:
                best = plan
            if saved <= 1 - _USED * (1 - needed):
                return plan
            high = share, saved
        wanted = 1 - (1 + _USED) / 2 * (1 - needed)
        (share, start), (end, top) = low, high if best is not None else (share, saved)
        if best is None:  # on the line from the dense network
            share = min(end * wanted / max(saved, 1e-3), _LARGEST)
        else:
            step = (wanted - start) / max(top - start, 1e-9)
            share += (end - share) * min(max(step, 0.1), 0.9)
    best = best or attempt(None)
    saved, needed = _saved_and_needed(best, latency)
    if saved < needed:
        raise DeepTwistError(
            f"no plan is as fast as asked, {latency}: the fastest takes {best.latency}"
        )
    return best


def _saved_and_needed(plan: Plan, latency: Latency) -> tuple[float, float]:
    """Return the share of the network's time that a plan saves, and that which is asked for."""
    times = plan.latency
    if times is None:
        raise DeepTwistError("a plan that was not timed is no answer to a budget of time")
    dense, planned = times.dense.median, times.decomposed.median
    if latency.speedup is not None:
        return 1 - 1 / times.speedup, 1 - 1 / latency.speedup
    limit = latency.ms or math.inf
    if dense <= limit:
        raise DeepTwistError(f"the network takes {dense:.2f} ms as it is, {limit:g} are allowed")
    return 1 - planned / dense, 1 - limit / dense


def exclude_slow_layers(model: nn.Module, plan: Plan, min_speedup: float) -> Plan:
    """Return the plan without the layers that are not this much faster factored, timed here.

    Args:
        model: the network that was planned; its device and dtype are those that are timed.
        plan: of the model.
        min_speedup: dense ÷ factored milliseconds from which on a layer is compressed.

    Raises:
        DeepTwistError: if `min_speedup` is not above 0.
    """
    if not min_speedup > 0:
        raise DeepTwistError(f"min_speedup {min_speedup} is not above 0")
    reference = next(model.parameters())
    setting = Setting(_BATCH, torch.get_num_threads(), dtype_name(reference.dtype))
    times = time_plan(plan, reference, setting)
    return apply_timings(plan, {name: each.speedup for name, each in times.items()}, min_speedup)


def time_plan(
    plan: Plan,
    reference: Tensor,
    setting: Setting,
    *,
    rounds: int = 15,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, Comparison]:
    """Time every compressed layer by itself, at its most expensive call; equal ones once.

    Args:
        plan: see `deeptwist.plan`.
        reference: a tensor of the device to measure on.
        setting: what they are run with.
        rounds: samples of each side, two at least.
        on_layer: called after every layer.

    Returns:
        The milliseconds by layer name.
    """
    measured: dict[object, Comparison] = {}
    times = {}
    for layer in plan.compressed:
        geometry, form = layer.convolution, layer.decomposition
        call = at_batch(most_expensive_call(layer), plan.examples, setting.batch)
        if (key := (geometry, form, call)) not in measured:
            pair = random_dense(geometry, reference), random_factored(geometry, form, reference)
            x = random_input(geometry, call, reference)
            measured[key] = time_models(*pair, x, setting, rounds=rounds)
        times[layer.name] = measured[key]
        on_layer()
    return times


def apply_timings(plan: Plan, speedups: Mapping[str, float], min_speedup: float) -> Plan:
    """Return the plan without the layers that are not this much faster factored.

    Args:
        plan: the one that was measured.
        speedups: dense ÷ factored time by layer name.
        min_speedup: from which on a layer is compressed.
    """
    layers: list[PlannedLayer] = []
    for layer in plan.layers:
        speedup = speedups.get(layer.name, min_speedup)
        if isinstance(layer, CompressedLayer) and speedup < min_speedup:
            reason = f"not worth it: measured {speedup:.2f}× as fast, below {min_speedup:g}×"
            layer = layer.kept(reason)
        layers.append(layer)
    return replace(plan, layers=tuple(layers))


def most_expensive_call(layer: CompressedLayer) -> LayerCall:
    """Return the layer's use that takes the most MACs."""
    return max(layer.calls, key=lambda call: call.count * layer.convolution.macs(call.size))
