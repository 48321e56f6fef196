"""A layer's own choice as text, as recipes and the command line write it."""

from deeptwist.decompositions import Decomposition
from deeptwist.errors import DeepTwistError
from deeptwist.plan.codec import decode
from deeptwist.plan.layers import Override


def parse_override(text: str) -> tuple[str, Override]:
    """Read ``PATTERN=keep``, ``PATTERN=2.5`` (a ratio) or ``PATTERN=tucker:rank=24x24``.

    Raises:
        DeepTwistError: if it is none of these, or the decomposition or an option is unknown.
    """
    pattern, equals, choice = text.partition("=")
    if not equals or not pattern or not choice:
        raise DeepTwistError(
            f"cannot read override {text!r}: write 'PATTERN=keep', 'PATTERN=2.5' or "
            "'PATTERN=tucker:rank=24x24'"
        )
    if choice == "keep":
        return pattern, None
    try:
        return pattern, float(choice)
    except ValueError:
        method, _, options = choice.partition(":")
    values: dict[str, object] = {"method": method.replace("-", "_")}
    for option in filter(None, options.split(",")):
        name, _, value = option.partition("=")
        values[name] = _number(value, f"{name} in override {text!r}")
    return pattern, decode(Decomposition, values)


def _number(text: str, what: str) -> int | float | tuple[int, ...]:
    """Read ``8``, ``0.5`` or ``24x24``."""
    sizes = text.lower().replace("×", "x").split("x")
    try:
        if len(sizes) > 1:
            return tuple(int(size) for size in sizes)
        return int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise DeepTwistError(f"cannot read {what}: {text!r} is not a number") from error
