"""The one exception that a user's mistake raises, and what its messages are made of."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Real

# What networks raise where their input, or a module of theirs, is not what they were made for.
FORWARD_ERRORS = AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError


class DeepTwistError(ValueError):
    """A mistake the caller can mend; its message is one line."""


# What values raise, and what reads them, where they are not what they should be.
DATA_ERRORS = DeepTwistError, ArithmeticError, *FORWARD_ERRORS


def unknown_name_error(kind: str, name: str, options: Iterable[str]) -> DeepTwistError:
    """Return the error for a name that is not among `options`, pointing at the nearest one.

    Args:
        kind: what the name should have named, for example ``"model"``.
        name: the name that is unknown.
        options: the valid names.
    """
    valid = sorted(options)
    nearest = get_close_matches(name, valid, n=1, cutoff=0.5)
    if nearest:
        return DeepTwistError(f"unknown {kind} {name!r}: did you mean {nearest[0]!r}?")
    shown = ", ".join(valid[:12]) + (", …" if len(valid) > 12 else "")
    return DeepTwistError(f"unknown {kind} {name!r}: choose from {shown or 'none'}")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, which may have many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def explaining(
    problem: str, advice: str = "", errors: tuple[type[Exception], ...] = FORWARD_ERRORS
) -> Iterator[None]:
    """Turn what is raised inside into one line: the problem, the words of what failed, the advice.

    Raises:
        DeepTwistError: in place of `errors`; one that is raised inside stays as it is, unless it is
            among them.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, DeepTwistError) and DeepTwistError not in errors:
            raise
        words = problem, first_line(error).rstrip(". "), advice
        raise DeepTwistError(": ".join(filter(None, words))) from error


def check_int(name: str, value: object, minimum: int = 1) -> None:
    """Check that a value is an integer of at least `minimum`.

    Raises:
        DeepTwistError: if it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise DeepTwistError(f"{name} {value!r} is not a whole number from {minimum} on")


def check_ratio(ratio: float) -> float:
    """Return a compression ratio.

    Raises:
        DeepTwistError: unless it is a finite number above 1.
    """
    if not (isinstance(ratio, Real) and math.isfinite(ratio) and ratio > 1):
        raise DeepTwistError(f"ratio {ratio!r} compresses nothing: give a number above 1, say 4")
    return ratio


@contextmanager
def require_extra(extra: str = "cli") -> Iterator[None]:
    """Turn the failure of an import inside into an error that says how to install the package.

    Args:
        extra: the extra of deeptwist that brings the package.

    Raises:
        DeepTwistError: in place of `ModuleNotFoundError`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise DeepTwistError(
            f"{error.name} is not installed: pip install '.[{extra}]' in deeptwist's checkout"
        ) from error
