"""Time every layer by itself: does its factored form keep what its MAC count promises?"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from deeptwist.measure.comparison import Comparison
from deeptwist.plan.autotune import most_expensive_call, time_layers
from deeptwist.plan.plan import Plan


@dataclass(frozen=True)
class LayerComparison:
    """One layer, dense and factored, on random numbers of the sizes that the network gives it.

    Attributes:
        name: of the layer.
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
    reference: Tensor,
    *,
    batch: int = 16,
    rounds: int = 15,
    on_layer: Callable[[], None] = lambda: None,
) -> list[LayerComparison]:
    """Compare every compressed layer dense and factored; see `time_layers` for the arguments."""
    times = time_layers(plan, reference, batch=batch, rounds=rounds, on_layer=on_layer)
    comparisons = []
    for layer in plan.compressed:
        size = most_expensive_call(layer).size
        macs_ratio = layer.convolution.macs(size) / layer.decomposition.macs(
            layer.convolution, size
        )
        comparison = Comparison.of_samples(*times[layer.name])
        comparisons.append(LayerComparison(layer.name, macs_ratio, comparison))
    return comparisons
