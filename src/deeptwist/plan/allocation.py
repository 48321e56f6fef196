"""Share budgets of weights and MACs among layers so that the sum of their errors is least.

A multiple-choice knapsack, by Lagrange multipliers (Shoham and Gersho, 1988) and a local search
for what they leave of the budgets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deeptwist.errors import DeepTwistError

_MIXES = 17  # weighings of two budgets against each other that are tried
_BISECTIONS = 50
_PAIRED = 100  # changes up to which pairs of them are tried: with more, the gap is small


@dataclass(frozen=True)
class Candidate:
    """One way to hold a layer.

    Attributes:
        costs: one for each budget.
        error: the relative squared error; 0 for the dense layer.
    """

    costs: tuple[float, ...]
    error: float


def allocate(layers: Sequence[Sequence[Candidate]], budgets: Sequence[float]) -> list[int]:
    """Return the index of every layer's candidate, whose costs together meet all budgets.

    Args:
        layers: every layer's candidates.
        budgets: the most that the chosen costs may sum up to.

    Raises:
        DeepTwistError: if not even the smallest candidates meet them.
    """
    shares = [
        [
            Candidate(tuple(c / b for c, b in zip(x.costs, budgets, strict=True)), x.error)
            for x in candidates
        ]
        for candidates in layers
    ]
    choices = [
        choice for mix in _mixes(len(budgets)) if (choice := _relax(shares, mix)) is not None
    ]
    if not choices:
        raise DeepTwistError("no ranks meet the budgets: ask for less, or compress more layers")
    improved = [_improve(shares, list(choice)) for choice in dict.fromkeys(map(tuple, choices))]
    return min(improved, key=lambda choice: _total_error(shares, choice))


def _mixes(count: int) -> list[tuple[float, ...]]:
    if count == 1:
        return [(1.0,)]
    steps = [step / (_MIXES - 1) for step in range(_MIXES)]
    return [(step, 1 - step) for step in steps]


def _relax(layers: Sequence[Sequence[Candidate]], mix: tuple[float, ...]) -> list[int] | None:
    """Return the choice of the least multiplier that meets the budgets, if one does."""
    low, high = 0.0, 1.0
    while not _fits(layers, _choose(layers, mix, high)):
        high *= 4
        if high > 1e12:
            return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _fits(layers, _choose(layers, mix, middle)) else (middle, high)
    return _choose(layers, mix, high)


def _choose(
    layers: Sequence[Sequence[Candidate]], mix: tuple[float, ...], multiplier: float
) -> list[int]:
    def price(candidate: Candidate) -> float:
        cost = sum(weight * c for weight, c in zip(mix, candidate.costs, strict=True))
        return candidate.error + multiplier * cost

    return [min(range(len(x)), key=lambda index: price(x[index])) for x in layers]


def _improve(layers: Sequence[Sequence[Candidate]], choice: list[int]) -> list[int]:
    """Change one layer, or two, as long as the error falls and the budgets are met."""
    choice = list(choice)
    while True:
        moves = [
            (candidate.error - layer[current].error, _difference(candidate, layer[current]), i, j)
            for i, (layer, current) in enumerate(zip(layers, choice, strict=True))
            for j, candidate in enumerate(layer)
            if j != current
        ]
        slack = [1 - total for total in _total_costs(layers, choice)]
        better = sorted(move for move in moves if move[0] < -1e-12)
        best: tuple[float, list[tuple[int, int]]] = (-1e-12, [])
        for gain, cost, i, j in better:
            if gain < best[0] and _within(cost, slack):
                best = gain, [(i, j)]
            for loss, saved, k, m in moves if len(moves) <= _PAIRED else ():
                if i != k and gain + loss < best[0]:
                    together = tuple(a + b for a, b in zip(cost, saved, strict=True))
                    if _within(together, slack):
                        best = gain + loss, [(i, j), (k, m)]
        if not best[1]:
            return choice
        for layer, candidate in best[1]:
            choice[layer] = candidate


def _difference(candidate: Candidate, current: Candidate) -> tuple[float, ...]:
    return tuple(a - b for a, b in zip(candidate.costs, current.costs, strict=True))


def _within(costs: Sequence[float], slack: Sequence[float]) -> bool:
    return all(cost <= room + 1e-12 for cost, room in zip(costs, slack, strict=True))


def _total_costs(layers: Sequence[Sequence[Candidate]], choice: Sequence[int]) -> list[float]:
    chosen = [layer[index].costs for layer, index in zip(layers, choice, strict=True)]
    return [sum(costs) for costs in zip(*chosen, strict=True)]


def _total_error(layers: Sequence[Sequence[Candidate]], choice: Sequence[int]) -> float:
    return sum(layer[index].error for layer, index in zip(layers, choice, strict=True))


def _fits(layers: Sequence[Sequence[Candidate]], choice: Sequence[int]) -> bool:
    return all(total <= 1 for total in _total_costs(layers, choice))
