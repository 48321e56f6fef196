"""What an experiment's cells came to, and the tables and figures that show it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deeptwist.training.metrics import Run

NOT_RUN = "not run"


@dataclass(frozen=True)
class Table:
    """A table in the paper's form.

    Attributes:
        title: above it.
        header: of the columns.
        rows: of as many words as the header.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, the first column to the left, the others to the right."""
        rule = [":--", *["--:"] * (len(self.header) - 1)]
        lines = [[word.replace("|", "\\|") for word in line] for line in (self.header, *self.rows)]
        lines.insert(1, rule)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Figure:
    """A drawing.

    Attributes:
        name: of its file, without the profile.
        title: what it shows.
        svg: a whole file.
    """

    name: str
    title: str
    svg: str


@dataclass(frozen=True)
class Findings:
    """What is shown of an experiment.

    Attributes:
        tables: with the paper's numbers beside ours.
        figures: none where nothing has been run yet.
        notes: what the numbers say of the claim, in sentences.
    """

    tables: tuple[Table, ...]
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The runs of an experiment's cells that are finished.

    Attributes:
        runs: by the cell's name, one for each seed.
    """

    runs: Mapping[str, Sequence[Run]]

    def first(self, name: str) -> Run | None:
        """The run of a cell's first seed that is finished."""
        return next(iter(self.runs.get(name, ())), None)

    def accuracy(self, name: str, *, variant: str | None = None) -> float | None:
        """Mean test accuracy in percent over seeds; none where the cell has not been run."""
        found = self._accuracies(name, variant)
        return statistics.fmean(found) if found else None

    def shown(self, name: str, *, variant: str | None = None) -> str:
        """The same for a table, with the deviation over seeds."""
        return mean_and_deviation(self._accuracies(name, variant))

    def top5(self, name: str) -> str:
        """As `shown`, of the five first guesses."""
        shares = [run.summary.top5 for run in self.runs.get(name, ())]
        return mean_and_deviation([100 * share for share in shares if share is not None])

    def ratio(self, name: str) -> str:
        """Dense ÷ decomposed parameters of the whole network."""
        run = self.first(name)
        if run is None:
            return NOT_RUN
        return f"{run.summary.parameters_before / run.summary.parameters:.2f}×"

    def start(self) -> float | None:
        """Accuracy in percent of the dense network that compressed runs start from."""
        for runs in self.runs.values():
            for run in runs:
                return 100 * run.summary.accuracy_before
        return None

    def _accuracies(self, name: str, variant: str | None) -> list[float]:
        summaries = [run.summary for run in self.runs.get(name, ())]
        if variant is None:
            return [100 * summary.accuracy for summary in summaries]
        return [
            100 * one.accuracy
            for summary in summaries
            for one in summary.variants
            if one.name == variant
        ]


def mean_and_deviation(values: Sequence[float]) -> str:
    """For a table, with the deviation where there are several."""
    if not values:
        return NOT_RUN
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def number(value: float | None, digits: int = 2) -> str:
    """A number of ours, which may be missing; with a true minus."""
    if value is None:
        return NOT_RUN
    rounded = round(value, digits) + 0.0  # no negative zero
    return f"{rounded:.{digits}f}".replace("-", "−")


def printed(value: float | None, digits: int = 2) -> str:
    """A number of the paper's, which it may not print."""
    return "–" if value is None else f"{value:.{digits}f}"


def difference(one: float | None, other: float | None) -> str:
    """In points, signed, with a true minus."""
    if one is None or other is None:
        return NOT_RUN
    return f"{one - other:+.2f}".replace("-", "−")


def count_note(what: str, outcomes: Sequence[bool | None]) -> str:
    """How often something came out, of the comparisons that have been run."""
    known = [outcome for outcome in outcomes if outcome is not None]
    if not known:
        return f"{what}: {NOT_RUN}."
    left = len(outcomes) - len(known)
    rest = f" ({left} not run)" if left else ""
    return f"{what}: {sum(known)} of {len(known)}{rest}."


def above(one: float | None, other: float | None) -> bool | None:
    """Whether one number is above the other; none where one is missing."""
    return None if one is None or other is None else one > other
