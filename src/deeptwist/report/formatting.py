"""How the page writes numbers and names."""

import re
from collections.abc import Sequence

from deeptwist.decompositions import METHODS
from deeptwist.training.metrics import Summary
from deeptwist.training.modes import find_mode

NBSP = "\N{NO-BREAK SPACE}"
NONE = "–"
METHOD_MODES = ("deeptwist", "finetune")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def mode_name(summary: Summary) -> str:
    """The mode as readers know it."""
    return find_mode(summary.mode).label


def decomposition_name(summary: Summary) -> str:
    """The decomposition as it was asked for, with fewer brackets."""
    asked = summary.decomposition
    if asked is None:
        return NONE
    if asked in METHODS:
        return METHODS[asked].__name__
    return re.sub(r"\(tile=\((\d+), (\d+)\)\)$", r" \1×\2", asked.removesuffix("()"))


def method_name(summary: Summary) -> str:
    """Mode and decomposition: ``"DeepTwist, Tucker"``."""
    if summary.decomposition is None:
        return mode_name(summary)
    return f"{mode_name(summary)}, {decomposition_name(summary)}"


def refinement(summary: Summary, name: str) -> str:
    """What was done besides to a run's network, from what its recipe says of it."""
    recipe = summary.recipe
    epochs = (recipe.get("tail") or {}).get("epochs")
    images = recipe.get("data", {}).get("validation")
    said = {
        "recalibrated": f"batch norm's statistics taken anew on {recipe.get('recalibration')} "
        "training batches",
        "moving average": f"of the weights while training, decay {recipe.get('ema')}",
        "best on validation": f"chosen while training on {images} images held out",
        "tail": f"{epochs} more epoch{'' if epochs == 1 else 's'}, of the factors",
    }
    return said.get(name, "")


def percent(share: float) -> str:
    """A share from 0 to 1 as ``"86.4 %"``."""
    return f"{share * 100:.1f}{NBSP}%"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, signed with a true minus."""
    number = f"{difference * 100:+.2f}"
    return number[1:] if float(number) == 0 else number.replace("-", "−")


def fewer(before: int, after: int, digits: int = 2) -> str:
    """``"4.15× fewer"``, or in so many words that there are more; empty where one is zero."""
    if not before or not after:
        return ""
    if before == after:
        return "as many"
    ratio, word = (before / after, "fewer") if before > after else (after / before, "more")
    return f"{ratio:.{digits}f}×{NBSP}{word}"


def speed(speedup: float) -> str:
    """A speed-up with its meaning in a word, so that one under 1 cannot be misread."""
    shown = f"{speedup:.2f}×"
    if shown == "1.00×":
        return shown
    return f"{shown}{NBSP}({'faster' if speedup > 1 else 'slower'})"


def file_size(count: int) -> str:
    """A file size in decimal units."""
    return f"{count / 1e6:.2f}{NBSP}MB" if count >= 1e6 else f"{count / 1e3:.0f}{NBSP}kB"


def milliseconds(value: float) -> str:
    """Milliseconds with three significant digits, without the unit."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def power_of_ten(value: float) -> str:
    """``"2·10⁻⁵"``, for axes."""
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    return power if mantissa == "1" else f"{mantissa}·{power}"


def listed(items: Sequence[str], last: str = "and") -> str:
    """``"a, b and c"``."""
    return f" {last} ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def printable(text: str, most: int) -> str:
    """Text for a drawing: at most so long, and without what XML cannot hold."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
