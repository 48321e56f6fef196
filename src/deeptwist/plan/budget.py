"""Budgets of all layers together: which ways there are to hold each, and which lose least."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from deeptwist.decompositions import CannotDecomposeError, Decomposition
from deeptwist.errors import DeepTwistError, check_ratio
from deeptwist.layers.geometry import ConvGeometry, LayerCall
from deeptwist.measure.layer_clock import LayerClock
from deeptwist.plan.allocation import Candidate, allocate
from deeptwist.plan.layer_errors import LayerErrors

_RATIOS = tuple(1.1 * 1.155**step for step in range(24))  # tried by layer: 1.1 to 30
_MILLISECONDS = 2  # their place among a candidate's costs


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
        """The three, in the order of `Candidate.costs`."""
        return self.weights, self.macs, self.milliseconds


def layer_costs(
    geometry: ConvGeometry, calls: tuple[LayerCall, ...], decomposition: Decomposition | None
) -> tuple[int, int]:
    """Return a layer's weights, and the MACs of all its calls, factored or (`None`) dense."""
    if decomposition is None:
        macs = sum(call.count * geometry.macs(call.size) for call in calls)
        return geometry.weight_numel, macs
    macs = sum(call.count * decomposition.macs(geometry, call.size) for call in calls)
    return decomposition.weight_numel(geometry), macs


@lru_cache(maxsize=4096)
def candidate_ranks(
    geometry: ConvGeometry,
    calls: tuple[LayerCall, ...],
    decomposition: Decomposition,
    rank_multiple: int,
) -> dict[Decomposition, tuple[int, int]]:
    """Return a decomposition of a layer at many ranks, with the weights and MACs.

    Those that are not smaller, or are more work, are left out.
    """
    dense = layer_costs(geometry, calls, None)
    costs = {}
    for ratio in _RATIOS:
        try:
            resolved = decomposition.resolve(geometry, ratio).round_ranks(rank_multiple)
        except CannotDecomposeError:
            continue
        if resolved not in costs:
            costs[resolved] = layer_costs(geometry, calls, resolved)
    return {form: x for form, x in costs.items() if x[0] < dense[0] and x[1] < dense[1]}


def layer_candidates(
    errors: LayerErrors,
    geometry: ConvGeometry,
    decompositions: Sequence[Decomposition],
    rank_multiple: int,
    clock: LayerClock | None = None,
) -> list[Candidate]:
    """Return the ways to hold a layer, the dense one first; none where there is no other.

    Raises:
        DeepTwistError: if the layer's weights are not there, or not finite.
    """
    calls = errors.layer.calls
    costs = {
        form: cost
        for decomposition in decompositions
        for form, cost in candidate_ranks(geometry, calls, decomposition, rank_multiple).items()
    }
    if not costs:
        return []
    dense_ms, times = 0.0, [0.0] * len(costs)
    if clock is not None:
        dense_ms, times = clock.times(geometry, calls, [*costs])
    candidates = [Candidate((*layer_costs(geometry, calls, None), dense_ms), 0.0)]
    for (form, cost), milliseconds in zip(costs.items(), times, strict=True):
        error = errors.error(geometry, form)
        if error is None:
            raise DeepTwistError("a budget is shared by errors: load weights, not on meta")
        candidates.append(Candidate((*cost, milliseconds), error**2, form))
    return candidates


def share_budgets(
    layers: Sequence[Sequence[Candidate]], budgets: Budgets, *, fastest: bool = False
) -> list[Candidate]:
    """Return every layer's candidate, which together keep all budgets and lose least.

    Args:
        layers: every layer's candidates, the dense one first.
        budgets: of these layers together.
        fastest: whether to take those that take least time instead.

    Raises:
        DeepTwistError: if not even the smallest candidates keep them.
    """
    limits = {
        kind: sum(candidates[0].costs[kind] for candidates in layers) / factor
        for kind, factor in enumerate(budgets.factors)
        if factor is not None
    }

    def relevant(candidate: Candidate) -> Candidate:
        lost = candidate.costs[_MILLISECONDS] if fastest else candidate.error
        return Candidate(tuple(candidate.costs[kind] for kind in limits), lost)

    choice = allocate([[*map(relevant, own)] for own in layers], [*limits.values()])
    return [own[index] for own, index in zip(layers, choice, strict=True)]
