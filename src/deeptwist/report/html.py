"""The page: everything is put in words, tables and drawings first, the template only lays out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from deeptwist.errors import DeepTwistError
from deeptwist.report.comparison import cases_of, verdict
from deeptwist.report.drawing import Plot
from deeptwist.report.plots import plots_of
from deeptwist.report.results import results, training
from deeptwist.report.settings import settings
from deeptwist.report.tables import Table, plans
from deeptwist.serialization import write_text
from deeptwist.training.metrics import Run


@dataclass(frozen=True)
class Part:
    """What the page says of a case."""

    name: str
    verdict: str
    results: Table
    training: Table | None
    plots: list[Plot]


def write_report(runs: Sequence[Run], path: Path, *, title: str) -> Path:
    """Writes finished runs as one HTML file that needs nothing else, not even a network.

    Args:
        runs: from `records.read_run`; runs of several networks or data sets get a part each.
        path: the file to write; an old one is replaced.
        title: of the page.

    Returns:
        The path.

    Raises:
        DeepTwistError: if there is no run, or the file cannot be written.
    """
    if not runs:
        raise DeepTwistError("there is no run to report on")
    cases = cases_of(runs)
    ordered = [run for case in cases for run in case.runs]
    environment = Environment(
        loader=PackageLoader("deeptwist", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("template.html.j2").render(
        title=title,
        parts=[
            Part(
                case.name,
                verdict(case),
                results(case),
                training(case),
                plots_of(case, f"plot{number}"),
            )
            for number, case in enumerate(cases)
        ],
        plans=plans(ordered),
        settings=settings(ordered),
        modes={run.summary.mode for run in runs},
        refined={refined.name for run in runs for refined in run.summary.variants},
    )
    try:
        # A name read from JSON may hold half a surrogate pair, which UTF-8 cannot.
        write_text(path, page.encode(errors="replace").decode())
    except OSError as error:
        raise DeepTwistError(f"cannot write {path}: {error.strerror}") from None
    return path
