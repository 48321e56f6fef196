"""What a person sees: tables on standard output, progress on standard error."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# A pipe has no width to fit: a table there keeps its lines whole.
_WIDE = None if sys.stdout.isatty() else 200


def speaks_for_all() -> bool:
    """Whether this is the only process, or the first of those that ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, the first column to the left and the others to the right."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=_WIDE).print(table)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, if that is a terminal; gives the call that moves it."""
    console = Console(stderr=True, quiet=not speaks_for_all())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)
