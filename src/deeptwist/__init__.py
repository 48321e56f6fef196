"""deeptwist: make a trained CNN smaller and faster by learning its low-rank approximation.

After 'Learning Low-Rank Approximation for CNNs' (Lee, Kwon, Kim, Wei; arXiv 1905.10145).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from deeptwist._version import __version__ as __version__

if TYPE_CHECKING:
    from deeptwist.artefact import load as load
    from deeptwist.artefact import save as save
    from deeptwist.decompositions import CP as CP
    from deeptwist.decompositions import SVD as SVD
    from deeptwist.decompositions import Decomposition as Decomposition
    from deeptwist.decompositions import SpatialSVD as SpatialSVD
    from deeptwist.decompositions import TiledSVD as TiledSVD
    from deeptwist.decompositions import Tucker as Tucker
    from deeptwist.distortion import DeepTwist as DeepTwist
    from deeptwist.errors import DeepTwistError as DeepTwistError
    from deeptwist.factorization import decompose as decompose
    from deeptwist.planning import Plan as Plan
    from deeptwist.planning import plan as plan

# Where each public name lives. They are imported on first use: `deeptwist --help` must not
# wait for torch.
_HOMES = {
    "load": "artefact",
    "save": "artefact",
    "CP": "decompositions",
    "SVD": "decompositions",
    "Decomposition": "decompositions",
    "SpatialSVD": "decompositions",
    "TiledSVD": "decompositions",
    "Tucker": "decompositions",
    "DeepTwist": "distortion",
    "DeepTwistError": "errors",
    "decompose": "factorization",
    "Plan": "planning",
    "plan": "planning",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'deeptwist' has no attribute {name!r}")
    value = getattr(import_module(f"deeptwist.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
