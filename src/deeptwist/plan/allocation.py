"""Share budgets among layers so that the sum of their errors is least.

A multiple-choice knapsack, by Lagrange multipliers (Shoham and Gersho, 1988) and a local search
for what they leave of the budgets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy
from numpy.typing import NDArray

from deeptwist.errors import DeepTwistError

_STEPS = 16  # of the weighings of budgets against each other that are tried
_BISECTIONS = 40
_IMPROVED = 24  # of the choices that the multipliers give, the best are improved
_PAIRED = 1500  # changes up to which pairs of them are tried: with more, the gap is small
_EPSILON = 1e-12

Floats = NDArray[numpy.float64]
Choice = NDArray[numpy.int64]


@dataclass(frozen=True)
class Candidate:
    """One way to hold a layer.

    Attributes:
        costs: one for each budget.
        error: the relative squared error; 0 for the dense layer.
    """

    costs: tuple[float, ...]
    error: float


@dataclass(frozen=True)
class _Problem:
    """All candidates, padded to one number a layer by ones of infinite error.

    Attributes:
        costs: (layers, candidates, budgets), as shares of the budgets.
        errors: (layers, candidates).
    """

    costs: Floats
    errors: Floats

    def at(self, choice: Choice) -> tuple[Floats, Floats]:
        """Return every layer's costs and errors."""
        rows = numpy.arange(len(choice))
        return self.costs[rows, choice], self.errors[rows, choice]

    def fits(self, choice: Choice) -> bool:
        """Return whether the budgets are met."""
        return bool((self.at(choice)[0].sum(0) <= 1 + _EPSILON).all())


def allocate(layers: Sequence[Sequence[Candidate]], budgets: Sequence[float]) -> list[int]:
    """Return the index of every layer's candidate, whose costs together meet all budgets.

    Args:
        layers: every layer's candidates.
        budgets: the most that the chosen costs may sum up to.

    Raises:
        DeepTwistError: if not even the smallest candidates meet them.
    """
    shape = len(layers), max(map(len, layers), default=1)
    problem = _Problem(numpy.zeros((*shape, len(budgets))), numpy.full(shape, numpy.inf))
    for row, candidates in enumerate(layers):
        for column, candidate in enumerate(candidates):
            problem.costs[row, column] = numpy.divide(candidate.costs, budgets)
            problem.errors[row, column] = candidate.error
    relaxed = [_relax(problem, mix) for mix in _mixes(len(budgets))]
    choices = {tuple(choice): choice for choice in relaxed if choice is not None}
    if not choices:
        raise DeepTwistError("no ranks meet the budgets: ask for less, or compress more layers")
    best = sorted(choices.values(), key=lambda choice: problem.at(choice)[1].sum())[:_IMPROVED]
    improved = [_improve(problem, choice) for choice in best]
    choice = min(improved, key=lambda choice: problem.at(choice)[1].sum())
    return [int(index) for index in choice]


def _mixes(count: int) -> list[Floats]:
    """Return weighings of the budgets against each other, each of sum 1."""
    steps = product(range(_STEPS + 1), repeat=count - 1)
    parts = [[*part, _STEPS - sum(part)] for part in steps if sum(part) <= _STEPS]
    return [numpy.array(part) / _STEPS for part in parts]


def _relax(problem: _Problem, mix: Floats) -> Choice | None:
    """Return the choice of the least multiplier that meets the budgets, if one does."""
    prices = problem.costs @ mix

    def choose(multiplier: float) -> Choice:
        choice: Choice = (problem.errors + multiplier * prices).argmin(1)
        return choice

    low, high = 0.0, 1.0
    while not problem.fits(choose(high)):
        high *= 4
        if high > 1e12:
            return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if problem.fits(choose(middle)) else (middle, high)
    return choose(high)


def _improve(problem: _Problem, choice: Choice) -> Choice:
    """Change one layer, or two, as long as the error falls and the budgets are met."""
    choice = choice.copy()
    real = numpy.isfinite(problem.errors)
    while True:
        costs, errors = problem.at(choice)
        changes = real.copy()
        changes[numpy.arange(len(choice)), choice] = False
        rows, columns = changes.nonzero()
        gains = problem.errors[rows, columns] - errors[rows]
        added = problem.costs[rows, columns] - costs[rows]
        slack = 1 - costs.sum(0) + _EPSILON
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
