"""What is written on the command line, as values."""

from typing import TYPE_CHECKING

from deeptwist.errors import DeepTwistError, unknown_name_error

if TYPE_CHECKING:
    from deeptwist.decompositions import Decomposition
    from deeptwist.plan.layer_filter import Override


def parse_sizes(text: str, example: str) -> tuple[int, ...]:
    """Sizes joined by ``x``: ``"64x72"`` → (64, 72).

    Args:
        text: what was written.
        example: shown where it cannot be read.

    Raises:
        DeepTwistError: if it is not positive whole numbers joined by ``x``.
    """
    parts = text.lower().replace("×", "x").split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise DeepTwistError(f"cannot read sizes {text!r}: write them like {example}")
    return tuple(int(part) for part in parts)


def parse_rank(text: str) -> int | tuple[int, ...]:
    """One rank, or several joined by ``x``.

    Raises:
        DeepTwistError: if it is neither.
    """
    ranks = parse_sizes(text, "8, or 24x24 for Tucker")
    return ranks if len(ranks) > 1 else ranks[0]


def parse_tile(text: str) -> tuple[int, ...]:
    """Rows and columns joined by ``x``.

    Raises:
        DeepTwistError: if it is something else.
    """
    return parse_sizes(text, "64x72")


def make_decomposition(
    method: str,
    *,
    tile: str | None = None,
    rank: str | None = None,
    fraction: float | None = None,
) -> "Decomposition":
    """A decomposition from its name (``tiled-svd``) and options.

    Raises:
        DeepTwistError: for an unknown name, or an option that the method does not take.
    """
    from deeptwist.decompositions import METHODS, from_dict

    name = method.replace("-", "_")
    if name not in METHODS:
        raise unknown_name_error(
            "decomposition", method, [known.replace("_", "-") for known in METHODS]
        )
    values: dict[str, object] = {"method": name}
    if tile is not None:
        values["tile"] = parse_tile(tile)
    if rank is not None:
        values["rank"] = parse_rank(rank)
    if fraction is not None:
        values["fraction"] = fraction
    return from_dict(values)


def parse_override(text: str) -> "tuple[str, Override]":
    """A layer's own choice: ``PATTERN=keep``, ``PATTERN=2.5`` (a ratio) or ``PATTERN=svd:rank=8``.

    Raises:
        DeepTwistError: if it is none of these.
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
        pass
    method, _, written = choice.partition(":")
    options = dict(option.partition("=")[::2] for option in written.split(",") if option)
    for option in options:
        if option not in ("tile", "rank", "fraction"):
            raise unknown_name_error("decomposition option", option, ["tile", "rank", "fraction"])
    fraction = options.pop("fraction", None)
    try:
        number = None if fraction is None else float(fraction)
    except ValueError:
        raise DeepTwistError(f"cannot read fraction {fraction!r} in override {text!r}") from None
    return pattern, make_decomposition(method, fraction=number, **options)
