"""One budget for all layers: which ways there are to hold each, and which lose least together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from deeptwist.decompositions import CannotDecomposeError, Decomposition
from deeptwist.errors import DeepTwistError, check_ratio
from deeptwist.layers.geometry import ConvGeometry, LayerCall
from deeptwist.measure.layer_clock import LayerClock
from deeptwist.plan.allocation import Candidate, allocate
from deeptwist.plan.layer_errors import LayerErrors

_RATIOS = tuple(1.1 * 1.155**step for step in range(24))  # tried by layer: 1.1 to 30


@dataclass(frozen=True)
class Budgets:
    """Dense ÷ factored weights, MACs and milliseconds to keep at least; `None` for no matter.

    Attributes:
        weights: of the layers to compress together, as all budgets.
        macs: multiply-accumulates.
        milliseconds: by the clock.

    Raises:
        DeepTwistError: if one is not a finite number above 1.
    """

    weights: float | None = None
    macs: float | None = None
    milliseconds: float | None = None

    def __post_init__(self) -> None:
        for factor in self.factors:
            if factor is not None:
                check_ratio(factor)

    @property
    def factors(self) -> tuple[float | None, float | None, float | None]:
        """The three, in the order of `Way.costs`."""
        return self.weights, self.macs, self.milliseconds

    @property
    def any_factor(self) -> float | None:
        """The first that is given."""
        return next(filter(None, self.factors), None)


@dataclass(frozen=True)
class Way:
    """One way to hold a layer.

    Attributes:
        decomposition: with every rank set; `None` for the dense layer.
        costs: weights, MACs and milliseconds, the last 0 where nothing is timed.
        error: the relative one.
    """

    decomposition: Decomposition | None
    costs: tuple[float, float, float]
    error: float = 0.0


def layer_costs(
    convolution: ConvGeometry, calls: tuple[LayerCall, ...], decomposition: Decomposition | None
) -> tuple[int, int]:
    """Return a layer's weights, and the MACs of all its calls, factored or (`None`) dense."""
    if decomposition is None:
        macs = sum(call.count * convolution.macs(call.size) for call in calls)
        return convolution.weight_numel, macs
    macs = sum(call.count * decomposition.macs(convolution, call.size) for call in calls)
    return decomposition.weight_numel(convolution), macs


@lru_cache(maxsize=4096)
def smaller_forms(
    convolution: ConvGeometry,
    calls: tuple[LayerCall, ...],
    decomposition: Decomposition,
    rank_multiple: int,
) -> dict[Decomposition, tuple[int, int]]:
    """Return what a decomposition makes of a layer at many ratios, with the weights and MACs.

    Forms that are not smaller, or are more work, are left out.
    """
    dense = layer_costs(convolution, calls, None)
    forms = {}
    for ratio in _RATIOS:
        try:
            resolved = decomposition.resolve(convolution, ratio).round_ranks(rank_multiple)
        except CannotDecomposeError:
            continue
        if resolved not in forms:
            costs = layer_costs(convolution, calls, resolved)
            if costs[0] < dense[0] and costs[1] < dense[1]:
                forms[resolved] = costs
    return forms


def layer_ways(
    errors: LayerErrors,
    convolution: ConvGeometry,
    decompositions: Sequence[Decomposition],
    rank_multiple: int,
    clock: LayerClock | None = None,
) -> list[Way]:
    """Return the ways to hold a layer, the dense one first; none where there is no other.

    Raises:
        DeepTwistError: if the layer's weights are not there, or not finite.
    """
    calls = errors.layer.calls
    costs = {
        form: cost
        for decomposition in decompositions
        for form, cost in smaller_forms(convolution, calls, decomposition, rank_multiple).items()
    }
    if not costs:
        return []
    forms = [*costs]
    dense_ms, times = 0.0, [0.0] * len(forms)
    if clock is not None:
        dense_ms, times = clock.times(convolution, calls, forms)
    ways = [Way(None, (*layer_costs(convolution, calls, None), dense_ms))]
    for form, milliseconds in zip(forms, times, strict=True):
        error = errors.error(convolution, form)
        if error is None:
            raise DeepTwistError("a budget is shared by errors: load weights, not on meta")
        ways.append(Way(form, (*costs[form], milliseconds), error))
    return ways


def share_budgets(layers: Iterable[Sequence[Way]], budgets: Budgets) -> list[Way]:
    """Return every layer's way, which together meet all budgets and lose least.

    Args:
        layers: every layer's ways, the dense one first.
        budgets: of these layers together.

    Raises:
        DeepTwistError: if not even the smallest ways meet them.
    """
    layers = [*layers]
    kinds = [kind for kind, factor in enumerate(budgets.factors) if factor is not None]
    limits = [
        sum(ways[0].costs[kind] for ways in layers) / (budgets.factors[kind] or 1) for kind in kinds
    ]
    candidates = [
        [Candidate(tuple(way.costs[kind] for kind in kinds), way.error**2) for way in ways]
        for ways in layers
    ]
    return [ways[choice] for ways, choice in zip(layers, allocate(candidates, limits), strict=True)]
