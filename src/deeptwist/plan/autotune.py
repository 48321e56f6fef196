"""Choices by the clock: which layers are worth factoring.

How long a layer takes does not depend on its numbers, so layers of random ones are timed.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError
from deeptwist.layers.geometry import LayerCall
from deeptwist.measure.random_layers import at_batch, random_dense, random_factored, random_input
from deeptwist.measure.timing import Samples, median_ratio, time_interleaved
from deeptwist.plan.plan import Plan
from deeptwist.plan.planned_layer import CompressedLayer, PlannedLayer


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
    times = time_layers(plan, next(model.parameters()))
    speedups = {name: median_ratio(dense, factored) for name, (dense, factored) in times.items()}
    return apply_timings(plan, speedups, min_speedup)


def time_layers(
    plan: Plan,
    reference: Tensor,
    *,
    batch: int = 16,
    rounds: int = 15,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, tuple[Samples, Samples]]:
    """Time every compressed layer dense and factored, in turn; equal layers are timed once.

    Args:
        plan: see `deeptwist.plan`.
        reference: a tensor of the device and the dtype to measure in.
        batch: examples in the network's batch.
        rounds: samples of each side, two at least.
        on_layer: called after every layer.

    Returns:
        By layer name, the milliseconds of the dense and of the factored layer, one per round.
    """
    measured: dict[object, tuple[Samples, Samples]] = {}
    times = {}
    for layer in plan.compressed:
        call = at_batch(most_expensive_call(layer), plan.examples, batch)
        key = layer.convolution, layer.decomposition, call
        if key not in measured:
            x = random_input(layer.convolution, call, reference)
            dense = random_dense(layer.convolution, reference)
            factored = random_factored(layer.convolution, layer.decomposition, reference)
            with torch.inference_mode():
                first, second = time_interleaved(
                    [partial(dense, x), partial(factored, x)], rounds=rounds
                )
            measured[key] = first, second
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
    return plan.with_layers(layers)


def most_expensive_call(layer: CompressedLayer) -> LayerCall:
    """Return the layer's use that takes the most MACs."""
    return max(layer.calls, key=lambda call: call.count * layer.convolution.macs(call.size))
