"""The decompositions: one method, one file.

`METHODS` is used only where text arrives, in JSON and on the command line.
"""

from dataclasses import fields
from typing import Any

from deeptwist.decompositions.base import CannotDecomposeError, Decomposition, Factors
from deeptwist.decompositions.cp import CP
from deeptwist.decompositions.svd import SVD, SpatialSVD
from deeptwist.decompositions.tiled_svd import TiledSVD
from deeptwist.decompositions.tucker import Tucker
from deeptwist.errors import DeepTwistError, unknown_name_error
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
    "from_dict",
]

METHODS: dict[str, type[Decomposition]] = {
    kind.method: kind for kind in (SVD, TiledSVD, SpatialSVD, Tucker, CP)
}


def from_dict(values: dict[str, Any]) -> Decomposition:
    """The inverse of `Decomposition.to_dict`.

    Raises:
        DeepTwistError: for an unknown method or field, or a value that the method refuses.
    """
    if not isinstance(values, dict) or not isinstance(values.get("method"), str):
        raise DeepTwistError(f"not a decomposition: {values!r}")
    method = values["method"]
    if method not in METHODS:
        raise unknown_name_error("decomposition", method, METHODS)
    kind = METHODS[method]
    known = {field.name for field in fields(kind)}
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if key != "method"
    }
    for key in options:
        if key not in known:
            raise unknown_name_error(f"{kind.__name__} option", key, known)
    return kind(**options)
