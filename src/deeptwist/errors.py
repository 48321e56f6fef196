"""The one exception that a user's mistake raises."""

from collections.abc import Iterable
from difflib import get_close_matches


class DeepTwistError(ValueError):
    """A mistake the caller can mend; its message is one line."""


def unknown_name_error(kind: str, name: str, options: Iterable[str]) -> DeepTwistError:
    """The error for a name that is not among `options`, pointing at the nearest one.

    Args:
        kind: what the name should have named, for example ``"model"``.
        name: what was written.
        options: the valid names.

    Returns:
        The error, for the caller to raise.
    """
    valid = sorted(options)
    near = get_close_matches(name, valid, n=1, cutoff=0.5)
    if near:
        return DeepTwistError(f"unknown {kind} {name!r}: did you mean {near[0]!r}?")
    shown = ", ".join(valid[:12]) + (", …" if len(valid) > 12 else "")
    return DeepTwistError(f"unknown {kind} {name!r}: choose from {shown or 'none'}")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, which may have many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_int(what: str, value: object, least: int = 1) -> None:
    """Checks that a value is a whole number from `least` on.

    Raises:
        DeepTwistError: if it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DeepTwistError(f"{what} {value!r} is not a whole number from {least} on")
