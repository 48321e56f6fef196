"""The decompositions, by name.

`METHODS` is where a name in a call, in JSON or on the command line is looked up: a method of one's
own joins it by ``METHODS[Mine.method] = Mine``.
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
    "find_method",
    "from_dict",
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


def from_dict(values: dict[str, Any]) -> Decomposition:
    """Invert `Decomposition.to_dict`.

    Raises:
        DeepTwistError: for an unknown method or field, or a value that the method refuses.
    """
    if not isinstance(values, dict) or not isinstance(values.get("method"), str):
        raise DeepTwistError(f"not a decomposition: {values!r}")
    kind = find_method(values["method"])
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
