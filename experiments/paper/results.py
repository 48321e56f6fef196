"""What the runs of an experiment amount to, and the tables and figures that show it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deeptwist.app.training.metrics import METRICS, Run
from deeptwist.errors import DeepTwistError

NOT_RUN = "not run"


@dataclass(frozen=True)
class Table:
    """A table in the paper's form; rows have as many words as the header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table in Markdown, the first column to the left, the others to the right."""
        rule = [":--", *["--:"] * (len(self.header) - 1)]
        lines = [[word.replace("|", "\\|") for word in line] for line in (self.header, *self.rows)]
        lines.insert(1, rule)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Figure:
    """A drawing: its file's name without profile and suffix, what it shows, and the file."""

    name: str
    title: str
    svg: str


@dataclass(frozen=True)
class Report:
    """Tables with the paper's numbers beside ours, figures, and what they say of the claim."""

    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Results:
    """The finished runs of an experiment: by name, one for each seed; and the results' folder."""

    runs: Mapping[str, Sequence[Run]]
    out: Path = Path("results")

    def accuracies(self, name: str, variant: str | None = None) -> list[float]:
        """Return deployed test accuracies in percent, of a variant of the networks if named."""
        summaries = [run.summary for run in self.runs.get(name, ())]
        if variant is None:
            return [100 * summary.accuracy for summary in summaries]
        variants = [each for summary in summaries for each in summary.variants]
        return [100 * each.accuracy for each in variants if each.name == variant]

    def accuracy(self, name: str, variant: str | None = None) -> float | None:
        """Return the mean of `accuracies`; `None` where there is no run."""
        accuracies = self.accuracies(name, variant)
        return statistics.fmean(accuracies) if accuracies else None

    def shown(self, name: str, variant: str | None = None) -> str:
        """Return the mean of `accuracies` for a table, with the deviation over seeds."""
        return mean_and_deviation(self.accuracies(name, variant))

    def difference(self, name: str, other: str) -> str:
        """Return the difference of two accuracies in points, signed."""
        ours, reference = self.accuracy(name), self.accuracy(other)
        return NOT_RUN if ours is None or reference is None else signed(ours - reference)

    def is_higher(self, name: str, other: str | None, variant: str | None = None) -> bool | None:
        """Tell whether an accuracy is above another run's; above the start's without one."""
        return is_higher(
            self.accuracy(name, variant), self.start() if other is None else self.accuracy(other)
        )

    def start(self) -> float | None:
        """Return the accuracy in percent of the dense network that runs start from."""
        runs = [run for each in self.runs.values() for run in each]
        return 100 * runs[0].summary.accuracy_before if runs else None

    def ratio(self, name: str) -> str:
        """Return dense ÷ decomposed parameters of the whole network."""
        run = self.first(name)
        if run is None:
            return NOT_RUN
        return f"{run.summary.parameters_before / run.summary.parameters:.2f}×"

    def first(self, name: str) -> Run | None:
        """Return the run of the first seed."""
        return next(iter(self.runs.get(name, ())), None)

    def course(self, name: str) -> Run | None:
        """Return the run of the first seed, with its epochs and distortions.

        Raises:
            DeepTwistError: if they were not kept, as of runs before there was a place for them.
        """
        run = self.first(name)
        if run is not None and not run.epochs:
            raise DeepTwistError(
                f"the epochs of {run.summary.name} ({name}) were not kept, its {METRICS} is empty: "
                "its curves cannot be drawn again; train it anew with another --out"
            )
        return run


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return the mean for a table, with the deviation where there are several values."""
    if not values:
        return NOT_RUN
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def signed(points: float) -> str:
    """Return a difference with its sign, a true minus."""
    return f"{points:+.2f}".replace("-", "−")


def number(value: float | None, digits: int = 2) -> str:
    """Return a number of ours, which may be missing; with a true minus."""
    if value is None:
        return NOT_RUN
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # no negative zero


def is_higher(value: float | None, other: float | None) -> bool | None:
    """Tell whether a number is above another; `None` where one is missing."""
    return None if value is None or other is None else value > other


def count_holds(what: str, outcomes: Sequence[bool | None]) -> str:
    """Return how often something came out, of the comparisons that have been run."""
    known = [outcome for outcome in outcomes if outcome is not None]
    if not known:
        return f"{what}: {NOT_RUN}."
    left = len(outcomes) - len(known)
    return f"{what}: {sum(known)} of {len(known)}{f' ({left} not run)' if left else ''}."
