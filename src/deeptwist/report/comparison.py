"""Runs that may be compared, and the sentence that they come to."""

from collections.abc import Sequence
from dataclasses import dataclass

from deeptwist.report.formatting import METHOD_MODES, fewer, method_name, mode_name, percent
from deeptwist.training.metrics import Run, Summary


@dataclass(frozen=True)
class Case:
    """All runs of one network on one data set: accuracies are comparable only within it.

    Attributes:
        model: the network's name.
        data: the data set's name.
        runs: those of one decomposition sit together; within it, and otherwise, as given.
    """

    model: str
    data: str
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The network and the data set."""
        return f"{self.model} on {self.data}"

    @property
    def compressed(self) -> tuple[Run, ...]:
        """The runs that ended with a decomposed network."""
        return tuple(run for run in self.runs if run.summary.mode != "dense")

    @property
    def dense(self) -> Run | None:
        """The most accurate dense run: the hardest one to come near."""
        runs = [run for run in self.runs if run.summary.mode == "dense"]
        return max(runs, key=lambda run: run.summary.accuracy, default=None)

    @property
    def best(self) -> Run | None:
        """The most accurate compressed run; the smaller one of two that are equal."""
        return max(
            self.compressed,
            key=lambda run: (run.summary.accuracy, -run.summary.parameters),
            default=None,
        )

    @property
    def dense_accuracy(self) -> float | None:
        """Of the dense run; without one, of the network that the best run started from."""
        if self.dense is not None:
            return self.dense.summary.accuracy
        return None if self.best is None else self.best.summary.accuracy_before


def cases_of(runs: Sequence[Run]) -> list[Case]:
    """The cases in the order of their first runs."""
    groups: dict[tuple[str, str], dict[str | None, list[Run]]] = {}
    for run in runs:
        summary = run.summary
        decompositions = groups.setdefault((summary.model, summary.data), {})
        decompositions.setdefault(summary.decomposition, []).append(run)
    return [
        Case(model, data, tuple(run for group in decompositions.values() for run in group))
        for (model, data), decompositions in groups.items()
    ]


def verdict(case: Case) -> str:
    """What the case came to, in one sentence."""
    if case.best is None:
        assert case.dense is not None
        accuracy = case.dense.summary.accuracy
        return f"The dense network has {percent(accuracy)}; none is compressed yet."
    best = case.best.summary
    parameters = fewer(best.parameters_before, best.parameters, 1)
    macs = fewer(best.macs_before, best.macs, 1)
    size = f"{parameters} parameters" + (f" and {macs} MACs" if macs else "")
    if case.dense is not None:
        dense, accuracy = "the dense network", case.dense.summary.accuracy
    else:
        dense, accuracy = "the dense network that it started from", best.accuracy_before
    rival = _rival(case, best)
    others = f"{dense} has {percent(accuracy)}"
    if rival is not None:
        others = (
            f"{mode_name(rival)} at the same ratio has {percent(rival.accuracy)}, "
            f"{dense} {percent(accuracy)}"
        )
    method = method_name(best)
    return f"{method[:1].upper()}{method[1:]}: {percent(best.accuracy)} at {size}; {others}."


def _rival(case: Case, best: Summary) -> Summary | None:
    """The best run, controls aside, of another mode and the same decomposition, ratio, steps."""
    rivals = [
        run.summary
        for run in case.compressed
        if run.summary.mode in METHOD_MODES
        and run.summary.mode != best.mode
        and (run.summary.decomposition, run.summary.ratio, run.summary.steps)
        == (best.decomposition, best.ratio, best.steps)
    ]
    return max(rivals, key=lambda summary: summary.accuracy, default=None)
