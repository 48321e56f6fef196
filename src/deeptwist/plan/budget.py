"""Budgets of all layers together: the ways to hold each, what they lose, and which lose least.

A multiple-choice knapsack, by Lagrange multipliers (Shoham and Gersho, 1988) and a local search
for what they leave of the budgets.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import product

import numpy
from numpy.typing import NDArray
from torch import Tensor

from deeptwist.decompositions import CannotDecomposeError, Decomposition
from deeptwist.decompositions.linalg import relative_error
from deeptwist.errors import DeepTwistError, check_ratio
from deeptwist.inspection.usage import Layer
from deeptwist.layers.geometry import ConvGeometry, LayerCall, weight_to_kernel
from deeptwist.layers.moments import SecondMoment
from deeptwist.measure.layer_clock import LayerClock
from deeptwist.plan.plan import layer_costs

_STEPS = 16  # of the weighings of budgets against each other that are tried
_BISECTIONS = 40
_IMPROVED = 24  # of the choices that the multipliers give, the best are improved
_PAIRED = 1500  # changes up to which pairs of them are tried: with more, the gap is small
_EPSILON = 1e-12

Floats = NDArray[numpy.float64]
Choice = NDArray[numpy.int64]  # (layers,), of candidates


@dataclass(frozen=True)
class Candidate:
    """One way to hold a layer.

    Attributes:
        costs: weights, MACs and milliseconds, or one for each budget.
        error: the relative squared error.
        decomposition: with every rank set; `None` for the dense layer.
    """

    costs: tuple[float, ...]
    error: float
    decomposition: Decomposition | None = None


def allocate(layers: Sequence[Sequence[Candidate]], limits: Sequence[float]) -> list[int]:
    """Return the index of every layer's candidate, whose costs together keep all limits.

    Args:
        layers: every layer's candidates.
        limits: the most that the chosen costs may sum up to, one for each budget.

    Raises:
        DeepTwistError: if not even the smallest candidates keep them.
    """
    shape = len(layers), max(map(len, layers), default=1)
    # Padded to one number of candidates a layer by ones that no layer takes.
    costs, errors = numpy.zeros((*shape, len(limits))), numpy.full(shape, numpy.inf)
    for row, candidates in enumerate(layers):
        for column, candidate in enumerate(candidates):
            costs[row, column] = numpy.divide(candidate.costs, limits)
            errors[row, column] = candidate.error
    relaxed = [_relax(costs @ mix, costs, errors) for mix in _mixes(len(limits))]
    choices = {tuple(choice): choice for choice in relaxed if choice is not None}
    if not choices:
        raise DeepTwistError("no ranks meet the budgets: ask for less, or compress more layers")
    best = sorted(choices.values(), key=lambda choice: _sum(errors, choice))[:_IMPROVED]
    improved = [_improve(costs, errors, choice) for choice in best]
    choice = min(improved, key=lambda choice: float(_sum(errors, choice)))
    return [int(index) for index in choice]


def _sum(values: Floats, choice: Choice) -> Floats:
    """Add up what all layers' candidates cost or lose."""
    total: Floats = values[numpy.arange(len(choice)), choice].sum(0)
    return total


def _mixes(count: int) -> list[Floats]:
    """Return weighings of the budgets against each other, each of sum 1."""
    if count == 0:
        return [numpy.zeros(0)]
    steps = product(range(_STEPS + 1), repeat=count - 1)
    parts = [[*part, _STEPS - sum(part)] for part in steps if sum(part) <= _STEPS]
    return [numpy.array(part) / _STEPS for part in parts]


def _relax(prices: Floats, costs: Floats, errors: Floats) -> Choice | None:
    """Return the choice of the least multiplier of the prices that keeps the limits, if any."""

    def choose(multiplier: float) -> tuple[Choice, bool]:
        choice: Choice = (errors + multiplier * prices).argmin(1)
        return choice, bool((_sum(costs, choice) <= 1 + _EPSILON).all())

    low, high = 0.0, 1.0
    while not choose(high)[1]:
        high *= 4
        if high > 1e12:
            return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if choose(middle)[1] else (middle, high)
    return choose(high)[0]


def _improve(costs: Floats, errors: Floats, choice: Choice) -> Choice:
    """Change one layer, or two, as long as the error falls and the limits are kept."""
    choice, layers = choice.copy(), numpy.arange(len(choice))
    while True:
        changes = numpy.isfinite(errors)
        changes[layers, choice] = False
        rows, columns = changes.nonzero()
        gains = errors[rows, columns] - errors[rows, choice[rows]]
        added = costs[rows, columns] - costs[rows, choice[rows]]
        slack = 1 - _sum(costs, choice) + _EPSILON
        alone = numpy.where((added <= slack).all(1), gains, 0.0)
        best = alone.min(initial=0.0)
        moves = [int(alone.argmin())] if best < -_EPSILON else []
        if len(rows) <= _PAIRED:
            better = (gains < 0).nonzero()[0]
            fits = (added[better, None] + added[None] <= slack).all(2)
            allowed = fits & (rows[better, None] != rows[None])
            together = numpy.where(allowed, gains[better, None] + gains[None], 0.0)
            if together.min(initial=0.0) < min(best, -_EPSILON):
                first, second = numpy.unravel_index(together.argmin(), together.shape)
                moves = [int(better[first]), int(second)]
        if not moves:
            return choice
        choice[rows[moves]] = columns[moves]


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
        for factor in astuple(self):
            if factor is not None:
                check_ratio(factor)


class LayerErrors:
    """The relative errors of one layer's approximations.

    Attributes:
        layer: see `Layer`.
    """

    def __init__(self, layer: Layer, moment: SecondMoment | None) -> None:
        """Read nothing yet; `moment` is that of the layer's inputs."""
        self.layer = layer
        self._moment = moment
        self._spectra: dict[Decomposition, Tensor | None] = {}

    def error(self, decomposition: Decomposition) -> float | None:
        """Return ‖W − W′‖_F / ‖W‖_F, or the outputs' where there is a moment.

        Args:
            decomposition: with its rank set; every method's spectrum is taken once.

        Returns:
            The error, as `Decomposition.errors_at_all_ranks` tells it; `None` on the meta device.

        Raises:
            DeepTwistError: if a weight is not finite, naming the layer.
        """
        method, rank = decomposition.without_rank(), decomposition.rank
        if method not in self._spectra:
            kernel = self._kernel()
            if kernel.is_meta:
                return None
            if not kernel.isfinite().all():
                name = self.layer.names[0]
                raise DeepTwistError(f"layer {name!r} has weights that are NaN or infinite")
            if self._moment is not None:
                self._moment = self._moment.to(kernel.device)
            spectrum = method.errors_at_all_ranks(kernel, self._moment)
            self._spectra[method] = None if spectrum is None else spectrum.cpu()
        errors = self._spectra[method]
        if errors is None or rank is None:  # a method without a spectrum
            kernel = self._kernel()
            factors = decomposition.decompose(kernel, second_moment=self._moment)
            return relative_error(kernel, factors.reconstruct(), self._moment)
        ranks = rank if isinstance(rank, tuple) else (rank,)
        return float(errors[tuple(r - 1 for r in ranks)])

    def _kernel(self) -> Tensor:
        weight = self.layer.weight
        assert weight is not None, f"layer {self.layer.names[0]!r} {self.layer.reason}"
        return weight_to_kernel(weight.read(), weight.geometry)


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
    dense = layer_costs(geometry, calls)
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
    candidates = [Candidate((*layer_costs(geometry, calls), dense_ms), 0.0)]
    for (form, cost), milliseconds in zip(costs.items(), times, strict=True):
        error = errors.error(form)
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
        for kind, factor in enumerate(astuple(budgets))  # as `Candidate.costs`
        if factor is not None
    }

    def relevant(candidate: Candidate) -> Candidate:
        lost = candidate.costs[_MILLISECONDS] if fastest else candidate.error
        return Candidate(tuple(candidate.costs[kind] for kind in limits), lost)

    choice = allocate([[*map(relevant, own)] for own in layers], [*limits.values()])
    return [own[index] for own, index in zip(layers, choice, strict=True)]
