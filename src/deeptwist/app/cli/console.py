"""Tables on standard output, progress on standard error, files that cannot be written."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from deeptwist.errors import DeepTwistError

# A pipe has no width to fit: a table there keeps its lines whole.
_WIDE = None if sys.stdout.isatty() else 200


def is_main_process() -> bool:
    """Return whether this is the only process, or the first of those that ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column to the left and the others to the right."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=_WIDE).print(table)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Show progress on standard error, if that is a terminal; give the call that moves it."""
    console = Console(stderr=True, quiet=not is_main_process())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the failure to write a file into one line that names it."""
    try:
        yield
    except OSError as error:
        raise DeepTwistError(f"cannot write {path}: {error.strerror}") from error
