"""The command line: `main` is the entry point."""

import logging
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deeptwist.errors import DeepTwistError, require_extra

if TYPE_CHECKING:
    from cyclopts import App

_RESUMABLE = ("compress", "train")  # commands


def main(words: Sequence[str] | None = None) -> None:
    """Run a command; bad input ends with one line and exit code 2, never with a traceback.

    Args:
        words: what was written after ``deeptwist``; the process's own arguments if not given.
    """
    try:
        with require_extra("cli"):
            from deeptwist.app.cli.commands import app
        from deeptwist.app.cli.console import SHOWS_ALL
    except DeepTwistError as error:
        sys.exit(_complain(str(error)))
    words = sys.argv[1:] if words is None else words
    SHOWS_ALL.set("--help-all" in words)
    if {"--version", "--verbose"} <= {*words}:
        from deeptwist.measure.machine import describe_environment

        print(describe_environment())
    else:
        run(app, words)


def run(app: "App", words: Sequence[str] | None) -> None:
    """Run a command of an application, with the answers to bad input that `main` gives.

    Args:
        app: its commands.
        words: what was written after its name; the process's own arguments if not given.
    """
    from cyclopts import CycloptsError

    _log_once()
    try:
        app(words, exit_on_error=False, print_error=False)
    except (DeepTwistError, CycloptsError) as error:
        sys.exit(_complain(str(error)))
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        sys.exit(_complain(f"not enough memory: {str(error).strip().splitlines()[0]}"))
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, as 'head' does: nothing to say
    except KeyboardInterrupt:
        _tell_how_to_go_on(sys.argv[1:] if words is None else words)
        sys.exit(130)


def _log_once() -> None:
    """Have every warning, Python's too, said once, in one line, on standard error."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = [*record.getMessage().strip().splitlines(), ""][0]
        if record.name == "py.warnings":  # after the file and the line that it comes from
            message = message.rpartition("Warning: ")[2]
        is_first = message not in said
        said.add(message)
        record.msg, record.args = message, ()
        return is_first

    handler = logging.StreamHandler()
    handler.addFilter(is_new)
    logging.captureWarnings(True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("deeptwist.clock").setLevel(logging.INFO)


def _tell_how_to_go_on(words: Sequence[str]) -> None:
    """Print the command that goes on with what was interrupted, if it can be gone on with."""
    if words and words[0] in _RESUMABLE:
        again = shlex.join(["deeptwist", *words, *([] if "--resume" in words else ["--resume"])])
        print(f"\ninterrupted: go on with\n{again}", file=sys.stderr)


def _complain(message: str) -> int:
    print(f"deeptwist: {' '.join(message.split())}", file=sys.stderr)
    return 2
