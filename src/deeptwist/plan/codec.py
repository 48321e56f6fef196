"""Frozen dataclasses as JSON and back: plans, their layers, geometries, decompositions.

The types that a class declares for its fields say what is read; what a value must be beside its
type, the class checks itself.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from deeptwist.decompositions import Decomposition, find_method
from deeptwist.errors import DATA_ERRORS, DeepTwistError, explaining, unknown_name_error


def encode(value: object) -> Any:
    """Return plain values, ready for JSON, of dataclasses, tuples, dicts and numbers in each other.

    A decomposition's method, which is its class, is written as one field more.
    """
    if is_dataclass(value):
        kind = {"method": value.method} if isinstance(value, Decomposition) else {}
        return {**kind, **{f.name: encode(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, dict):
        return {name: encode(entry) for name, entry in value.items()}
    return [*map(encode, value)] if isinstance(value, tuple) else value


def decode(kind: Any, value: Any) -> Any:
    """Return what `encode` wrote, of this type: a dataclass, or whatever a field is declared with.

    Raises:
        DeepTwistError: if a field is missing, unknown, of another type, or of a value that its
            class refuses.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if not _fits(kind, value):
        name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
        raise DeepTwistError(f"{value!r} is not a {name}")
    if origin in (Union, UnionType):
        fitting = [part for part in parts if _fits(part, value)]
        whole = [part for part in fitting if not (is_dataclass(part) and _missing(part, value))]
        return decode((whole or fitting)[0], value)
    if origin is tuple:
        kinds = [parts[0]] * len(value) if parts[-1] is ... else parts
        return tuple(map(decode, kinds, value))
    if origin is dict:
        return {name: _decode_entry(name, parts[1], entry) for name, entry in value.items()}
    return _decode_fields(kind, value) if is_dataclass(kind) else value


def _decode_entry(name: str, kind: Any, value: Any) -> Any:
    """Read an entry of a dict; what is wrong with it is said with its name."""
    with explaining(repr(name), errors=DATA_ERRORS):
        return decode(kind, value)


def _decode_fields(kind: Any, values: Mapping[str, Any]) -> Any:
    """Read a dataclass."""
    if kind is Decomposition:
        method = values.get("method")
        if not isinstance(method, str):
            raise DeepTwistError(f"{values!r} is not a Decomposition: it names no method")
        kind, values = find_method(method), {k: v for k, v in values.items() if k != "method"}
    types = _field_types(kind)
    for name in values:
        if name not in types:
            raise unknown_name_error(f"{kind.__name__} option", name, types)
    if missing := _missing(kind, values):
        raise DeepTwistError(f"a {kind.__name__} without {missing[0]!r}")
    return kind(**{name: decode(types[name], value) for name, value in values.items()})


def _fits(kind: Any, value: object) -> bool:
    """Whether a value has the JSON type of this one."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(part, value) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is tuple:
        ends = parts[-1] is not ...
        return isinstance(value, list | tuple) and not (ends and len(parts) != len(value))
    if origin is dict or is_dataclass(kind):
        return isinstance(value, dict)
    return kind is Any or type(value) in ((int, float) if kind is float else (kind,))


def _missing(kind: Any, values: Mapping[str, Any]) -> list[str]:
    """Return the fields that have no default and are not given."""
    required = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    return [name for name in required if name not in values]


@cache
def _field_types(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}
