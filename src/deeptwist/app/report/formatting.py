"""Numbers and names as the page writes them."""

from collections.abc import Sequence

from deeptwist.app.training.metrics import Summary
from deeptwist.app.training.modes import find_mode
from deeptwist.decompositions import METHODS

NBSP = "\N{NO-BREAK SPACE}"
NONE = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def mode_name(summary: Summary) -> str:
    """Return the mode as readers know it."""
    return find_mode(summary.mode).label


def decomposition_name(summary: Summary) -> str:
    """Return the decomposition as it was asked for."""
    name = summary.decomposition
    if name is None:
        return NONE
    return METHODS[name].__name__ if name in METHODS else name.removesuffix("()")


def method_name(summary: Summary) -> str:
    """Return mode and decomposition: ``"DeepTwist, Tucker"``."""
    if summary.decomposition is None:
        return mode_name(summary)
    return f"{mode_name(summary)}, {decomposition_name(summary)}"


def format_percent(share: float) -> str:
    """Return a share from 0 to 1 as ``"86.4 %"``."""
    return f"{share * 100:.1f}{NBSP}%"


def format_points(difference: float) -> str:
    """Return a difference of two shares in percentage points, signed with a true minus."""
    number = f"{difference * 100:+.2f}"
    return number[1:] if float(number) == 0 else number.replace("-", "−")


def format_ratio(before: int, after: int, digits: int = 2) -> str:
    """Return ``"4.15× fewer"``, or "more" where there are more; empty where one is zero."""
    if not before or not after:
        return ""
    if before == after:
        return "as many"
    ratio, word = (before / after, "fewer") if before > after else (after / before, "more")
    return f"{ratio:.{digits}f}×{NBSP}{word}"


def format_speedup(speedup: float) -> str:
    """Return a speed-up with its meaning in a word, so that one under 1 cannot be misread."""
    number = f"{speedup:.2f}×"
    if number == "1.00×":
        return number
    return f"{number}{NBSP}({'faster' if speedup > 1 else 'slower'})"


def format_bytes(count: int) -> str:
    """Return a file size in decimal units."""
    return f"{count / 1e6:.2f}{NBSP}MB" if count >= 1e6 else f"{count / 1e3:.0f}{NBSP}kB"


def format_milliseconds(value: float) -> str:
    """Return milliseconds with three significant digits, without the unit."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def power_of_ten(value: float) -> str:
    """Return ``"2·10⁻⁵"``, for axes."""
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    return power if mantissa == "1" else f"{mantissa}·{power}"


def join_words(words: Sequence[str], last: str = "and") -> str:
    """Return ``"a, b and c"``."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def sanitize(text: str, length: int = 48) -> str:
    """Return text for a drawing: of this length at most, and without what XML cannot hold."""
    text = text if len(text) <= length else text[: length - 1] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
