"""What help shows of a command with many options: the common ones, or all with --help-all."""

import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from cyclopts.help import DefaultFormatter, HelpPanel

SHOWS_ALL: ContextVar[bool] = ContextVar("shows_all", default=False)


class CommonOptions(DefaultFormatter):
    """Panels of the options that are common, until all are asked for.

    Attributes:
        common: their names, apart by spaces.
        defaults: of the command, where they are other than those of the recipe that it reads.
    """

    def __init__(self, common: str, defaults: Mapping[str, Any] | None = None):
        super().__init__()
        self.common, self.defaults = {*common.split()}, defaults or {}

    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        """Print a panel, if anything is left in it."""
        is_common = [SHOWS_ALL.get() or bool(self.common & {*e.names}) for e in panel.entries]
        entries = [
            entry.copy(default=default_of(entry.names, entry.default, self.defaults))
            for entry, is_shown in zip(panel.entries, is_common, strict=True)
            if is_shown
        ]
        if entries:
            super().__call__(console, options, panel.copy(entries=entries))


def default_of(names: tuple[str, ...], default: Any, defaults: Mapping[str, Any]) -> Any:
    """Return an option's default: one of the command's, nested as in a recipe, or else its own."""
    for name in names:
        value: Any = defaults
        for key in name.removeprefix("--").replace("-", "_").split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and not isinstance(value, Mapping):
            return str(value)
    plain = re.sub(r"[(),']", "", str(default))  # a tuple as it is typed
    return None if plain in ("", "False", "None") else plain
