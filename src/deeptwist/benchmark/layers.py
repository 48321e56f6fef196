"""Every layer by itself: does its factored form keep what its MAC count promises?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from deeptwist.benchmark.comparison import Comparison, compare
from deeptwist.layers.cost import LayerCall
from deeptwist.plan.autotune import most_expensive_call, random_dense, random_factored, random_input
from deeptwist.plan.plan import Plan, PlannedLayer


@dataclass(frozen=True)
class LayerComparison:
    """One layer, dense and factored, on random numbers of the sizes that the network gives it.

    Attributes:
        name: the layer's.
        macs_ratio: dense ÷ factored MACs: the speed-up that the count promises.
        times: measured, in turn.
    """

    name: str
    macs_ratio: float
    times: Comparison

    @property
    def efficiency(self) -> float:
        """The share of the promise that is kept: speed-up ÷ MAC ratio."""
        return self.times.speedup / self.macs_ratio

    @property
    def is_worth_it(self) -> bool:
        """Whether the factored form is faster at all."""
        return self.times.speedup > 1


def compare_layers(
    plan: Plan,
    like: Tensor,
    *,
    batch: int = 16,
    rounds: int = 15,
    on_layer: Callable[[], None] = lambda: None,
) -> list[LayerComparison]:
    """Times every compressed layer dense and factored; equal layers are timed once.

    Args:
        plan: see `deeptwist.plan`.
        like: a tensor of the device and the type to measure in.
        batch: examples in the network's batch.
        rounds: samples of each side, two at least.
        on_layer: called after every layer.
    """
    measured: dict[object, Comparison] = {}
    found = []
    for layer in plan.compressed:
        assert layer.convolution is not None
        assert layer.decomposition is not None
        call = _at_batch(most_expensive_call(layer), plan.examples, batch)
        key = layer.convolution, layer.decomposition, layer.implementation, call
        if key not in measured:
            measured[key] = compare(
                random_dense(layer.convolution, like),
                random_factored(layer.convolution, layer.decomposition, like, layer.implementation),
                random_input(layer.convolution, call, like),
                rounds=rounds,
            )
        found.append(LayerComparison(layer.name, _macs_ratio(layer, call), measured[key]))
        on_layer()
    return found


def keep_slow_layers(plan: Plan, measured: list[LayerComparison], min_speedup: float) -> Plan:
    """The plan without the layers that did not get this much faster: they are kept, with reasons.

    Args:
        plan: what was measured.
        measured: see `compare_layers`.
        min_speedup: dense ÷ factored time from which on a layer is compressed.
    """
    speedups: Mapping[str, float] = {one.name: one.times.speedup for one in measured}
    return replace(
        plan, layers=tuple(_kept_if_slow(la, speedups, min_speedup) for la in plan.layers)
    )


def _kept_if_slow(
    layer: PlannedLayer, speedups: Mapping[str, float], min_speedup: float
) -> PlannedLayer:
    speedup = speedups.get(layer.name)
    if speedup is None or speedup >= min_speedup:
        return layer
    return replace(
        layer,
        decomposition=None,
        implementation=None,
        relative_error=None,
        reason=f"not worth it: measured {speedup:.2f}× as fast, below {min_speedup:g}×",
    )


def _at_batch(call: LayerCall, examples: int, batch: int) -> LayerCall:
    return LayerCall(max(1, call.count * batch // examples), call.size)


def _macs_ratio(layer: PlannedLayer, call: LayerCall) -> float:
    assert layer.convolution is not None
    assert layer.decomposition is not None
    factored = layer.decomposition.macs(layer.convolution, call.size)
    return layer.convolution.macs(call.size) / factored
