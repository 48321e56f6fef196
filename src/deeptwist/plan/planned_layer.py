"""The entries of a plan: a layer that is compressed, or one that is kept and why."""

from dataclasses import dataclass
from typing import Any

from deeptwist.decompositions import Decomposition, from_dict
from deeptwist.errors import DeepTwistError, check_int
from deeptwist.layers.geometry import ConvGeometry, LayerCall

# Each convolution of a layer with the size and the number of examples that it is given.
CountedWorkload = list[tuple[ConvGeometry, tuple[int, ...], int]]


@dataclass(frozen=True)
class CompressedLayer:
    """A layer that its decomposition will hold.

    Attributes:
        name: the module's name in the model.
        kind: the module's class.
        convolution: the geometry.
        decomposition: with every rank set.
        aliases: other names, where the model uses the module more than once.
        calls: how the example input used the layer.
        relative_error: ‖W − W′‖_F / ‖W‖_F at planning time, or the outputs' where there is a
            calibration: exact for SVDs, a bound for Tucker, an estimate for CP; `None` where the
            weights are unknown, on the meta device for example.

    Raises:
        DeepTwistError: if the layer cannot hold the decomposition.
    """

    name: str
    kind: str
    convolution: ConvGeometry
    decomposition: Decomposition
    aliases: tuple[str, ...] = ()
    calls: tuple[LayerCall, ...] = ()
    relative_error: float | None = None

    def __post_init__(self) -> None:
        # A rank that the layer cannot hold would ask for memory without bound.
        if self.decomposition.resolve(self.convolution, None) != self.decomposition:
            raise DeepTwistError(f"layer {self.name!r} cannot hold {self.decomposition}")

    @property
    def weight_numel(self) -> int:
        """The dense weights, the bias not counted."""
        return self.convolution.weight_numel

    @property
    def compressed_numel(self) -> int:
        """The weights after decomposition, the bias not counted."""
        return self.decomposition.weight_numel(self.convolution)

    def kept(self, reason: str) -> "KeptLayer":
        """Return this layer as one that stays dense."""
        return KeptLayer(
            name=self.name,
            kind=self.kind,
            weight_numel=self.weight_numel,
            reason=reason,
            convolution=self.convolution,
            aliases=self.aliases,
            calls=self.calls,
        )

    def workload(self, *, factored: bool) -> CountedWorkload:
        """Return every convolution that the example input needs here, dense or factored."""
        if not factored:
            return [(self.convolution, call.size, call.count) for call in self.calls]
        return [
            (part, size, call.count)
            for call in self.calls
            for part, size in self.decomposition.workload(self.convolution, call.size)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `layer_from_dict` is its inverse."""
        return {
            **_common_fields(self),
            "decomposition": self.decomposition.to_dict(),
            "relative_error": self.relative_error,
        }


@dataclass(frozen=True)
class KeptLayer:
    """A layer that stays dense.

    Attributes:
        name: the module's name in the model.
        kind: the module's class.
        weight_numel: the dense weights, the bias not counted; 0 where another layer counts them.
        reason: why the layer stays, for the reader of the plan.
        convolution: the geometry; `None` where the module is no supported layer.
        aliases: other names, where the model uses the module more than once.
        calls: how the example input used the layer.
    """

    name: str
    kind: str
    weight_numel: int
    reason: str
    convolution: ConvGeometry | None = None
    aliases: tuple[str, ...] = ()
    calls: tuple[LayerCall, ...] = ()

    @property
    def compressed_numel(self) -> int:
        """The weights, which stay as many."""
        return self.weight_numel

    def workload(self, *, factored: bool) -> CountedWorkload:
        """Return the convolution as the example input needs it, `factored` or not."""
        if self.convolution is None:
            return []
        return [(self.convolution, call.size, call.count) for call in self.calls]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `layer_from_dict` is its inverse."""
        return {**_common_fields(self), "reason": self.reason}


PlannedLayer = CompressedLayer | KeptLayer


def layer_from_dict(values: dict[str, Any]) -> PlannedLayer:
    """Read what `to_dict` of either kind of layer wrote.

    Raises:
        DeepTwistError: if a field has a value of the wrong type or one that makes no sense.
        KeyError, TypeError, ValueError: if a field is missing, unknown or of another shape.
    """
    types = {"name": str, "kind": str, "aliases": list, "calls": list}
    for key, expected in types.items():
        if not isinstance(values[key], expected):
            raise DeepTwistError(f"{key} of a layer is {values[key]!r}, not a {expected.__name__}")
    check_int("weight_numel", values["weight_numel"], 0)
    for number in (number for call in values["calls"] for number in call):
        check_int("a size of a call", number, 0)
    convolution = values["convolution"]
    fields: dict[str, Any] = {
        **values,
        "aliases": tuple(str(alias) for alias in values["aliases"]),
        "calls": tuple(LayerCall(count, tuple(size)) for count, *size in values["calls"]),
        "convolution": None if convolution is None else ConvGeometry.from_dict(convolution),
    }
    if "reason" in values:
        if not isinstance(values["reason"], str):
            raise DeepTwistError(f"layer {values['name']!r} has no reason to be kept")
        return KeptLayer(**fields)
    error = values["relative_error"]
    if not isinstance(error, float | int | None):
        raise DeepTwistError(f"layer {values['name']!r} has error {error!r}")
    if convolution is None:
        raise DeepTwistError(f"layer {values['name']!r} has a decomposition without a geometry")
    fields["decomposition"] = from_dict(values["decomposition"])
    del fields["weight_numel"]  # written for the reader; the geometry says it
    return CompressedLayer(**fields)


def _common_fields(layer: PlannedLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "weight_numel": layer.weight_numel,
        "aliases": list(layer.aliases),
        "convolution": None if layer.convolution is None else layer.convolution.to_dict(),
        "calls": [[call.count, *call.size] for call in layer.calls],
    }
