"""The entries of a plan: a layer that is compressed, or one that is kept and why."""

from dataclasses import dataclass

from deeptwist.decompositions import Decomposition
from deeptwist.errors import DeepTwistError, check_int
from deeptwist.inspection.usage import Layer
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

    @classmethod
    def of(
        cls, layer: Layer, decomposition: Decomposition, relative_error: float | None = None
    ) -> "CompressedLayer":
        """Return a layer of a model, which has a geometry, in a decomposition."""
        if layer.convolution is None:
            raise DeepTwistError(f"layer {layer.names[0]!r} has no geometry")
        return cls(
            name=layer.names[0],
            kind=type(layer.module).__name__,
            convolution=layer.convolution,
            decomposition=decomposition,
            aliases=layer.names[1:],
            calls=layer.calls,
            relative_error=relative_error,
        )

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

    @classmethod
    def of(cls, layer: Layer, reason: str) -> "KeptLayer":
        """Return a layer of a model that stays as it is."""
        return cls(
            name=layer.names[0],
            kind=type(layer.module).__name__,
            weight_numel=layer.weight_numel,
            reason=reason,
            convolution=layer.convolution,
            aliases=layer.names[1:],
            calls=layer.calls,
        )

    def __post_init__(self) -> None:
        check_int("weight_numel", self.weight_numel, 0)

    @property
    def compressed_numel(self) -> int:
        """The weights, which stay as many."""
        return self.weight_numel

    def workload(self, *, factored: bool) -> CountedWorkload:
        """Return the convolution as the example input needs it, `factored` or not."""
        if self.convolution is None:
            return []
        return [(self.convolution, call.size, call.count) for call in self.calls]


PlannedLayer = CompressedLayer | KeptLayer
