"""Folders to work in: what another job or run left there is never mixed into."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deeptwist.errors import DeepTwistError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the failure to write a file or a folder into one line that names it."""
    try:
        yield
    except OSError as error:
        raise DeepTwistError(f"cannot write {path}: {error.strerror}") from error


def check_folder(
    folder: Path,
    kind: str,
    known: Mapping[str, Any] | None,
    asked: Mapping[str, Any],
    *,
    resume: bool,
) -> None:
    """Check that a folder is free, or holds what is to be gone on with.

    Args:
        folder: where the work goes.
        kind: of work: a job or a run.
        known: what was asked for in the work that the folder holds; `None` where it holds none.
        asked: what is asked for now, of which every value must be the same.
        resume: whether that work is to be gone on with.

    Raises:
        DeepTwistError: if it holds work and `resume` is not given, or other work than this.
    """
    if known is None:
        return
    if not resume:
        raise DeepTwistError(
            f"{folder} holds a {kind}: go on with it (--resume), choose another folder or remove it"
        )
    changed = [key for key, value in asked.items() if known.get(key) != value]
    if changed:
        raise DeepTwistError(
            f"{folder} holds another {kind} ({', '.join(changed)} differ): choose another folder"
        )
