"""deeptwist: make a trained CNN smaller and faster by learning its low-rank approximation.

After 'Learning Low-Rank Approximation for CNNs' (Lee, Kwon, Kim, Wei; arXiv 1905.10145).
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from deeptwist._version import __version__ as __version__

if TYPE_CHECKING:
    from deeptwist.compress import compress as compress
    from deeptwist.decompose import decompose as decompose
    from deeptwist.decompositions import CP as CP
    from deeptwist.decompositions import SVD as SVD
    from deeptwist.decompositions import Decomposition as Decomposition
    from deeptwist.decompositions import SpatialSVD as SpatialSVD
    from deeptwist.decompositions import TiledSVD as TiledSVD
    from deeptwist.decompositions import Tucker as Tucker
    from deeptwist.errors import DeepTwistError as DeepTwistError
    from deeptwist.inspection.fuse import fuse as fuse
    from deeptwist.plan.calibration import Calibration as Calibration
    from deeptwist.plan.calibration import calibrate as calibrate
    from deeptwist.plan.calibration import recalibrate_batch_norm as recalibrate_batch_norm
    from deeptwist.plan.plan import Plan as Plan
    from deeptwist.plan.planner import plan as plan
    from deeptwist.save import load as load
    from deeptwist.save import save as save
    from deeptwist.twist.distortion import DeepTwist as DeepTwist

# Imported on first use: `deeptwist --help` must not wait for torch.
_MODULES = {
    "CP": "decompositions",
    "SVD": "decompositions",
    "Calibration": "plan.calibration",
    "DeepTwist": "twist.distortion",
    "DeepTwistError": "errors",
    "Decomposition": "decompositions",
    "Plan": "plan.plan",
    "SpatialSVD": "decompositions",
    "TiledSVD": "decompositions",
    "Tucker": "decompositions",
    "calibrate": "plan.calibration",
    "compress": "compress",
    "decompose": "decompose",
    "fuse": "inspection.fuse",
    "load": "save",
    "plan": "plan.planner",
    "recalibrate_batch_norm": "plan.calibration",
    "save": "save",
}
__all__ = ["__version__", *_MODULES]


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
    value = getattr(import_module(f"deeptwist.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
