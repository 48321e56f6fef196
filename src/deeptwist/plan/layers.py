"""Which layers to compress: the paper's rules, name patterns and overrides."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from deeptwist.errors import check_int, explaining, unknown_name_error

if TYPE_CHECKING:  # the command line's help shows these rules, and must not wait for torch
    from deeptwist.decompositions import Decomposition
    from deeptwist.layers.geometry import ConvGeometry

    Override = Decomposition | float | None  # another decomposition, another ratio, or keep
else:  # for who reads the annotation while the program runs, as cyclopts does
    Override = object


def matches(pattern: str, name: str) -> bool:
    """Return whether a name matches: exactly, as a glob, or as an expression after ``re:``.

    Raises:
        DeepTwistError: for an expression that is none.
    """
    if not pattern.startswith("re:"):
        return pattern == name or fnmatchcase(name, pattern)
    with explaining(f"pattern {pattern!r} is no regular expression", errors=(re.error,)):
        return re.fullmatch(pattern[3:], name) is not None


@dataclass(frozen=True)
class Layers:
    """Which layers to compress.

    A name pattern is an exact module name, a glob (``layer3.*``) or, after ``re:``, a regular
    expression that matches the whole name.

    Attributes:
        skip_first_conv: keep the convolution that runs first, as the paper does.
        min_in_channels: keep layers with fewer input channels S (the paper: S ≥ 128).
        linear: whether linear layers are compressed too.
        include: pattern or patterns of the layers to compress.
        exclude: pattern or patterns of the layers to keep.
        overrides: pattern → another decomposition, another ratio, or `None` to keep the layer;
            the last pattern that matches counts, before all rules above.

    Raises:
        DeepTwistError: if `min_in_channels` is no positive integer.
    """

    skip_first_conv: bool = True
    min_in_channels: int = 1
    linear: bool = False
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    overrides: Mapping[str, Override] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_int("min_in_channels", self.min_in_channels)
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
            object.__setattr__(self, name, patterns)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Refuse patterns that match no layer: they are mistyped.

        Raises:
            DeepTwistError: naming the pattern and the nearest layer.
        """
        names = list(names)
        for pattern in (*self.include, *self.exclude, *self.overrides):
            if pattern != "*" and not any(matches(pattern, name) for name in names):
                raise unknown_name_error("layer", pattern, names)

    def skip_reason(
        self, names: Iterable[str], convolution: "ConvGeometry", *, is_first: bool
    ) -> str | None:
        """Return why a layer is kept; `None` where it is to be compressed."""
        if any(matches(pattern, name) for pattern in self.exclude for name in names):
            return "excluded"
        if not any(matches(pattern, name) for pattern in self.include for name in names):
            return "not included"
        if is_first and self.skip_first_conv:
            return "first convolution"
        if convolution.in_channels < self.min_in_channels:
            return f"fewer than {self.min_in_channels} input channels"
        if convolution.dims == 0 and not self.linear:
            return "linear layer"
        return None

    def override(self, names: Iterable[str]) -> tuple[str, Override] | None:
        """Return the last override that matches, with its pattern."""
        last = None
        for pattern, choice in self.overrides.items():
            if any(matches(pattern, name) for name in names):
                last = pattern, choice
        return last
