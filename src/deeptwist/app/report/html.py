"""The page: words, tables and charts are made first, the template only lays them out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from deeptwist.app.report.charts import detail_charts, gain_charts
from deeptwist.app.report.comparison import RunGroup, group_runs, summary_sentence
from deeptwist.app.report.config_table import config_table
from deeptwist.app.report.plotting import render
from deeptwist.app.report.tables import layer_tables, results_table, training_table
from deeptwist.app.training.metrics import Run
from deeptwist.errors import DeepTwistError
from deeptwist.files import write_text


def write_report(runs: Sequence[Run], path: Path, *, title: str) -> Path:
    """Write finished runs as one HTML file that needs nothing else, not even a network.

    Args:
        runs: from `metrics.read_run`; runs of several networks or data sets get a part each.
        path: the file to write; an old one is replaced.
        title: of the page.

    Returns:
        The path.

    Raises:
        DeepTwistError: if there is no run, or the file cannot be written.
    """
    if not runs:
        raise DeepTwistError("there is no run to report on")
    groups = group_runs(runs)
    ordered = [run for group in groups for run in group.runs]
    write_page(
        "template.html.j2",
        path,
        title=title,
        parts=[_part(group, f"group {number}") for number, group in enumerate(groups)],
        layers=layer_tables(ordered),
        config=config_table(ordered),
        modes={run.summary.mode for run in runs},
        variants={variant.name for run in runs for variant in run.summary.variants},
    )
    return path


def _part(group: RunGroup, prefix: str) -> dict[str, Any]:
    """Return what the template shows of a group."""
    gains, details = gain_charts(group), detail_charts(group)
    return {
        "name": group.name,
        "summary": summary_sentence(group),
        "results": results_table(group),
        "training": training_table(group),
        "gains": [(chart, render(chart, name=f"{prefix}-{chart.title}")) for chart in gains],
        "plots": [(chart, render(chart, name=f"{prefix}-{chart.title}")) for chart in details],
    }


def write_page(template: str, path: Path, **values: Any) -> None:
    """Lay values out by a template, and write the page.

    Raises:
        DeepTwistError: if the file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("deeptwist.app", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    try:
        # A name read from JSON may hold half a surrogate pair, which UTF-8 cannot.
        write_text(path, page.encode(errors="replace").decode())
    except OSError as error:
        raise DeepTwistError(f"cannot write {path}: {error.strerror}") from error
