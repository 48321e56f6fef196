"""deeptwist: make a trained CNN smaller and faster by learning its low-rank approximation.

After 'Learning Low-Rank Approximation for CNNs' (Lee, Kwon, Kim, Wei; arXiv 1905.10145).
"""

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

# The public names stand once, in the stub that type checkers and editors read. Each is imported on
# first use: `deeptwist --help` must not wait for torch.
_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_MODULES = {name: module for module, name in re.findall(r"from (\S+) import (\w+)", _STUB)}
__all__ = [*_MODULES]


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # The import system sets submodules on the package. `plan` and `decompose` are modules and
        # functions: the function keeps the name.
        if not (isinstance(value, ModuleType) and name in _MODULES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'deeptwist' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_MODULES)
