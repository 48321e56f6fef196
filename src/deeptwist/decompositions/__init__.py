"""The decompositions, by name.

`METHODS` is where a name in a call, in JSON or on the command line is looked up: a method of one's
own joins it by ``METHODS[Mine.method] = Mine``.
"""

from deeptwist.decompositions.base import CannotDecomposeError, Decomposition, Factors
from deeptwist.decompositions.cp import CP
from deeptwist.decompositions.svd import SVD, SpatialSVD
from deeptwist.decompositions.tiled_svd import TiledSVD
from deeptwist.decompositions.tucker import Tucker
from deeptwist.errors import unknown_name_error
from deeptwist.layers.factored import FactoredLayer

__all__ = [
    "CP",
    "METHODS",
    "SVD",
    "CannotDecomposeError",
    "Decomposition",
    "FactoredLayer",
    "Factors",
    "SpatialSVD",
    "TiledSVD",
    "Tucker",
    "find_method",
]

METHODS: dict[str, type[Decomposition]] = {
    kind.method: kind for kind in (SVD, TiledSVD, SpatialSVD, Tucker, CP)
}


def find_method(name: str) -> type[Decomposition]:
    """Return the class of a method's name: ``"svd"``, ``"tiled_svd"``, …, or ``"tiled-svd"``.

    Raises:
        DeepTwistError: if there is none.
    """
    if (method := name.replace("-", "_")) not in METHODS:
        raise unknown_name_error("decomposition", name, METHODS)
    return METHODS[method]
