"""Runs that may be compared, and the sentence that sums them up."""

from collections.abc import Sequence
from dataclasses import dataclass

from deeptwist.app.report.formatting import (
    format_percent,
    format_ratio,
    method_name,
    mode_name,
)
from deeptwist.app.training.metrics import Run, Summary
from deeptwist.app.training.modes import find_mode


@dataclass(frozen=True)
class RunGroup:
    """All runs of one network on one data set: accuracies are comparable only within it.

    Attributes:
        model: the network's name.
        data: the data set's name.
        runs: those of one decomposition side by side; otherwise in the order of the call.
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
        return tuple(run for run in self.runs if find_mode(run.summary.mode).compresses)

    @property
    def dense(self) -> Run | None:
        """The most accurate dense run: the hardest one to come near."""
        runs = [run for run in self.runs if not find_mode(run.summary.mode).compresses]
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


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Group runs by network and data set, in the order of their first runs."""
    groups: dict[tuple[str, str], dict[str | None, list[Run]]] = {}
    for run in runs:
        summary = run.summary
        decompositions = groups.setdefault((summary.model, summary.data), {})
        decompositions.setdefault(summary.decomposition, []).append(run)
    return [
        RunGroup(model, data, tuple(run for group in decompositions.values() for run in group))
        for (model, data), decompositions in groups.items()
    ]


def summary_sentence(group: RunGroup) -> str:
    """Return one sentence: the best compressed network beside its rival and the dense one."""
    if group.best is None:
        return f"The dense network has {_accuracy(group)}; none is compressed yet."
    best = group.best.summary
    parameters = format_ratio(best.parameters_before, best.parameters, 1)
    macs = format_ratio(best.macs_before, best.macs, 1)
    size = f"{parameters} parameters" + (f" and {macs} MACs" if macs else "")
    dense = "the dense network" + ("" if group.dense else " that it started from")
    rival = _best_alternative(group, best)
    others = f"{dense} has {_accuracy(group)}"
    if rival is not None:
        others = (
            f"{mode_name(rival)} at the same ratio has {format_percent(rival.accuracy)}, "
            f"{dense} {_accuracy(group)}"
        )
    method = method_name(best)
    return f"{method[:1].upper()}{method[1:]}: {format_percent(best.accuracy)} at {size}; {others}."


def _accuracy(group: RunGroup) -> str:
    return format_percent(group.dense_accuracy or 0)


def _best_alternative(group: RunGroup, best: Summary) -> Summary | None:
    """Return the best run of another mode with the same decomposition, ratio and steps."""
    rivals = [
        run.summary
        for run in group.compressed
        if not find_mode(run.summary.mode).is_ablation
        and run.summary.mode != best.mode
        and (run.summary.decomposition, run.summary.ratio, run.summary.steps)
        == (best.decomposition, best.ratio, best.steps)
    ]
    return max(rivals, key=lambda summary: summary.accuracy, default=None)
