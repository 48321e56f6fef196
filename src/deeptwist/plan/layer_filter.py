"""Which layers to compress: the paper's rules, name patterns and overrides."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from deeptwist.decompositions import Decomposition
from deeptwist.errors import DeepTwistError, unknown_name_error
from deeptwist.layers.geometry import ConvGeometry

Override = Decomposition | float | None  # another decomposition, another ratio, or keep


def matches(pattern: str, name: str) -> bool:
    """Whether a module name matches: exactly, as a glob, or as a regular expression after ``re:``.

    Raises:
        DeepTwistError: for an expression that is none.
    """
    if not pattern.startswith("re:"):
        return pattern == name or fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise DeepTwistError(f"pattern {pattern!r} is no regular expression: {error}") from None


@dataclass(frozen=True)
class LayerFilter:
    """Which layers to compress; see `deeptwist.plan` for the fields."""

    skip_first_conv: bool = False
    min_in_channels: int = 1
    linear: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, Override] = field(default_factory=dict)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Refuses patterns that match no layer: they are mistyped.

        Raises:
            DeepTwistError: naming the pattern and the nearest layer.
        """
        names = list(names)
        for pattern in (*self.include, *self.exclude, *self.overrides):
            if pattern != "*" and not any(matches(pattern, name) for name in names):
                raise unknown_name_error("layer", pattern, names)

    def skip_reason(
        self, names: Iterable[str], convolution: ConvGeometry, *, is_first: bool
    ) -> str | None:
        """Why a layer is to be kept; none where it is to be compressed."""
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
        """The last override that matches, with its pattern."""
        last = None
        for pattern, choice in self.overrides.items():
            if any(matches(pattern, name) for name in names):
                last = pattern, choice
        return last
