"""The optional packages that data sets and reports need."""

from collections.abc import Iterator
from contextlib import contextmanager

from deeptwist.errors import DeepTwistError


@contextmanager
def needs_extra() -> Iterator[None]:
    """Around an import: a package that is missing becomes an error that says how to get it.

    Raises:
        DeepTwistError: in place of ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise DeepTwistError(
            f"{error.name} is not installed: pip install 'deeptwist[cli]'"
        ) from None
