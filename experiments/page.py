"""What an experiment's runs amount to, and the page that shows it beside the paper's numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from deeptwist.errors import DeepTwistError
from experiments.profiles import Run
from experiments.runs import FINISHED, read_table

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
    """A drawing: its file's name without the experiment's, what it shows, and the file."""

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
    """The finished runs of an experiment.

    Attributes:
        runs: by what the experiment calls them.
        seeds: of each.
        folder: of the tables.
        table: of the runs.
    """

    runs: Mapping[str, Run] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    folder: Path = Path("results")
    table: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["state"]))

    @property
    def finished(self) -> pd.DataFrame:
        """Return the rows of all that is finished, seed by seed."""
        names = [f"{run.name}-s{seed}" for seed in self.seeds for run in self.runs.values()]
        table = self.table[self.table["state"] == FINISHED]
        return table.loc[[name for name in names if name in table.index]]

    def of(self, label: str) -> pd.DataFrame:
        """Return a run's rows, one for each seed."""
        names = [f"{self.runs[label].name}-s{seed}" for seed in self.seeds if label in self.runs]
        return self.finished.loc[[name for name in names if name in self.finished.index]]

    def missing(self) -> dict[str, str]:
        """Return what is not finished: its row's name, by what a page calls it."""
        seed_of = ", seed {}" if len(self.seeds) > 1 else ""
        names = {
            label + seed_of.format(seed): f"{run.name}-s{seed}"
            for seed in self.seeds
            for label, run in self.runs.items()
        }
        finished = self.finished.index
        return {label: name for label, name in names.items() if name not in finished}

    def accuracies(self, label: str, column: str = "accuracy") -> pd.Series:
        """Return deployed test accuracies in percent, or those of another column."""
        return 100 * self.of(label).get(column, pd.Series(dtype=float)).dropna()

    def accuracy(self, label: str, column: str = "accuracy") -> float | None:
        """Return the mean of `accuracies`; `None` where there is no run."""
        accuracies = self.accuracies(label, column)
        return float(accuracies.mean()) if len(accuracies) else None

    def shown(self, label: str, column: str = "accuracy") -> str:
        """Return the mean of `accuracies` for a table, with the deviation over seeds."""
        return mean_and_deviation(self.accuracies(label, column))

    def difference(self, label: str, other: str) -> str:
        """Return the difference of two accuracies in points, signed."""
        ours, reference = self.accuracy(label), self.accuracy(other)
        return NOT_RUN if ours is None or reference is None else signed(ours - reference)

    def is_higher(self, label: str, other: str | None, column: str = "accuracy") -> bool | None:
        """Tell whether an accuracy is above another run's; above the start's without one."""
        reference = self.start() if other is None else self.accuracy(other)
        return is_higher(self.accuracy(label, column), reference)

    def start(self, what: str = "accuracy_before") -> float | None:
        """Return the accuracy in percent of the dense network that runs start from."""
        known = self.finished.get(what, pd.Series(dtype=float)).dropna()
        return 100 * float(known.iloc[0]) if len(known) else None

    def ratio(self, label: str) -> str:
        """Return dense ÷ decomposed parameters of the whole network."""
        rows = self.of(label)
        if not len(rows):
            return NOT_RUN
        return f"{rows['parameters_before'].iloc[0] / rows['parameters'].iloc[0]:.2f}×"

    def course(self, label: str, kind: str = "epochs") -> pd.DataFrame:
        """Return the epochs, or distortions, of the run of the first seed; none if it has not run.

        Raises:
            DeepTwistError: if they were not kept, as of runs before there was a place for them.
        """
        rows = self.of(label)
        if not len(rows):
            return pd.DataFrame(columns=["accuracy", "epoch", "lr", "step", "train_loss"])
        name = rows.index[0]
        if name not in read_table(self.folder, "epochs").index:
            raise DeepTwistError(
                f"the epochs of {name} ({label}) were not kept in {self.folder}: its curves cannot "
                "be drawn again; train it anew with another --out"
            )
        return read_table(self.folder, kind).loc[[name]]


def page(name: str, title: str, claim: str, about: Sequence[str], report: Report) -> str:
    """Return a page in Markdown: what was claimed, how it was run, and what it came to."""
    parts = [f"# {title} (`{name}`)", claim, *about]
    for table in report.tables:
        parts += [f"## {table.title}", table.markdown()]
    parts += [f"![{figure.title}]({name}-{figure.name}.svg)" for figure in report.figures]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in report.notes)])


def mean_and_deviation(values: Sequence[float] | pd.Series) -> str:
    """Return the mean for a table, with the deviation where there are several values."""
    values = pd.Series(values, dtype=float)
    if values.empty:
        return NOT_RUN
    mean = f"{values.mean():.2f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.2f}"


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
