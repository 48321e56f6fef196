"""Share budgets among layers so that the sum of their errors is least.

A multiple-choice knapsack, by Lagrange multipliers (Shoham and Gersho, 1988) and a local search
for what they leave of the budgets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy
from numpy.typing import NDArray

from deeptwist.decompositions import Decomposition
from deeptwist.errors import DeepTwistError

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
        costs: one for each budget; in `budget.py` weights, MACs and milliseconds.
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
