"""The optional packages that networks, data sets and reports need."""

from collections.abc import Iterator
from contextlib import contextmanager

from deeptwist.errors import DeepTwistError


@contextmanager
def require_extra(extra: str = "cli") -> Iterator[None]:
    """Around an import: a package that is missing becomes an error that says how to get it.

    Args:
        extra: of deeptwist, the one that the package comes with.

    Raises:
        DeepTwistError: in place of ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise DeepTwistError(
            f"{error.name} is not installed: pip install 'deeptwist[{extra}]'"
        ) from None
