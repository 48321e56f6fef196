"""A plan: which layer is held by which decomposition, and why the others are kept."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deeptwist.decompositions import Decomposition
from deeptwist.errors import DATA_ERRORS, DeepTwistError, check_int, explaining
from deeptwist.inspection.run import Argument
from deeptwist.inspection.usage import Layer
from deeptwist.layers.geometry import ConvGeometry, LayerCall
from deeptwist.measure.timing import Comparison
from deeptwist.plan.codec import decode, encode

_FORMAT = 3
_LARGEST_INPUT = 2**31  # numbers


def layer_costs(
    geometry: ConvGeometry, calls: tuple[LayerCall, ...], decomposition: Decomposition | None = None
) -> tuple[int, int]:
    """Return a layer's weights, and the MACs of all its calls, factored or (`None`) dense."""
    if decomposition is None:
        macs = sum(call.count * geometry.macs(call.size) for call in calls)
        return geometry.weight_numel, macs
    macs = sum(call.count * decomposition.macs(geometry, call.size) for call in calls)
    return decomposition.weight_numel(geometry), macs


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

    def macs(self, *, factored: bool) -> int:
        """Return the MACs of all calls on the example input, dense or factored."""
        form = self.decomposition if factored else None
        return layer_costs(self.convolution, self.calls, form)[1]


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

    def macs(self, *, factored: bool) -> int:
        """Return the MACs of all calls on the example input, `factored` or not."""
        return 0 if self.convolution is None else layer_costs(self.convolution, self.calls)[1]


PlannedLayer = CompressedLayer | KeptLayer


@dataclass(frozen=True)
class Plan:
    """Every layer of a model: compressed, or kept with a reason.

    Attributes:
        layers: all layers, in the model's order.
        other_parameters: parameters that are no layer's weight: biases, normalisation.
        examples: how many the example input holds; costs are per example.
        inputs: what the example input calls the model with: of a tensor its shape and type, other
            arguments as they are; empty where JSON cannot hold them.
        keywords: the names of the last of them, which are keyword arguments.
        network_macs: MACs of one example through the whole dense network, attention and other
            products of matrices included; `None` where torch could not count them.
        latency: what a budget of time promises of the whole network; `None` where none was given.

    Raises:
        DeepTwistError: if a count is none, or an input is of an unknown type or larger than any.
    """

    layers: tuple[PlannedLayer, ...]
    other_parameters: int = 0
    examples: int = 1
    inputs: tuple[Argument, ...] = ()
    keywords: tuple[str, ...] = ()
    network_macs: int | None = None
    latency: Comparison | None = None

    def __post_init__(self) -> None:
        check_int("other_parameters", self.other_parameters, 0)
        check_int("examples", self.examples)
        if self.network_macs is not None:
            check_int("network_macs", self.network_macs, 0)
        if len(self.keywords) > len(self.inputs):
            raise DeepTwistError("there are more keywords than inputs")
        for shape, dtype in (x for x in self.inputs if isinstance(x, tuple)):
            for side in shape:
                check_int("a side of an input", side, 0)
            if math.prod(shape) > _LARGEST_INPUT:
                raise DeepTwistError(f"an input of {shape} is larger than any network's")
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise DeepTwistError(f"an input is of unknown type {dtype!r}")

    @property
    def compressed(self) -> tuple[CompressedLayer, ...]:
        """The layers that a decomposition will hold, in the model's order."""
        return tuple(layer for layer in self.layers if isinstance(layer, CompressedLayer))

    @property
    def kept(self) -> tuple[KeptLayer, ...]:
        """The layers that stay dense, in the model's order."""
        return tuple(layer for layer in self.layers if isinstance(layer, KeptLayer))

    @property
    def dense_parameters(self) -> int:
        """All parameters of the model as it is."""
        return self.other_parameters + sum(layer.weight_numel for layer in self.layers)

    @property
    def parameters(self) -> int:
        """All parameters of the decomposed model."""
        return self.other_parameters + sum(layer.compressed_numel for layer in self.layers)

    @property
    def compression_ratio(self) -> float:
        """Dense ÷ decomposed parameters, of the whole model."""
        return self.dense_parameters / self.parameters

    @property
    def dense_macs(self) -> int:
        """MACs of one example through the model as it is."""
        return sum(layer.macs(factored=False) for layer in self.layers) // self.examples

    @property
    def macs(self) -> int:
        """MACs of one example through the decomposed model."""
        return sum(layer.macs(factored=True) for layer in self.layers) // self.examples

    def layer_macs(self, layer: PlannedLayer, *, factored: bool) -> int:
        """Return the MACs of one example through one layer."""
        return layer.macs(factored=factored) // self.examples

    def to_json(self) -> str:
        """Return the plan as JSON; `from_json` is its inverse."""
        return json.dumps({"format": _FORMAT, **encode(self)}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote.

        Raises:
            DeepTwistError: if the text is not a plan, or one of an unknown format.
        """
        with explaining("not a plan", errors=DATA_ERRORS):
            try:
                values = json.loads(text)
            except RecursionError:
                raise DeepTwistError("nested too deep") from None
            found = values.pop("format", None)
            if found != _FORMAT:
                raise DeepTwistError(f"format {found!r} is unknown: this version reads {_FORMAT}")
            plan: Plan = decode(cls, values)
        return plan

    def __str__(self) -> str:
        rows = [layer_row(layer, self.examples) for layer in self.layers]
        parameters = self.dense_parameters, self.parameters
        total = total_row(parameters, (self.dense_macs, self.macs), self.network_speedup())
        notes = kept_lines(self.kept, parameters[0])
        if self.latency is not None:
            notes.append(f"the whole network: {self.latency}")
        return format_table(rows, total, notes)

    def network_speedup(self) -> float | None:
        """Return dense ÷ decomposed MACs of the whole network; `None` if they are not counted."""
        if not self.network_macs:
            return None
        dense = max(self.network_macs, self.dense_macs)
        return dense / max(1, dense - self.dense_macs + self.macs)


def read_plan(path: Path) -> Plan:
    """Read a plan from a JSON file.

    Raises:
        DeepTwistError: if the file cannot be read, or holds no plan.
    """
    kinds = DeepTwistError, OSError, UnicodeDecodeError
    with explaining(f"cannot read plan {path}", errors=kinds):
        return Plan.from_json(path.read_text(encoding="utf-8"))


Row = tuple[str, ...]
_HEADER: Row = (
    "layer",
    "shape",
    "lowered",
    "decomposition",
    "rank",
    "weights",
    "MACs",
    "relative error",
)


def layer_row(layer: PlannedLayer, examples: int = 1) -> Row:
    """Return the cells of one layer: its shape, its decomposition, and its costs before → after.

    MACs are of one of so many examples that its calls were recorded on.
    """
    dense_macs, macs = (layer.macs(factored=factored) // examples for factored in (False, True))
    geometry = str(layer.convolution) if layer.convolution else layer.kind
    if isinstance(layer, KeptLayer):
        costs = f"{layer.weight_numel:,}", f"{dense_macs:,}"
        return (layer.name, geometry, "", "", "", *costs, f"kept: {layer.reason}")
    lowered = layer.decomposition.lowered_shape(layer.convolution)
    tile, rank = (getattr(layer.decomposition, name, None) for name in ("tile", "rank"))
    return (
        layer.name,
        geometry,
        "" if lowered is None else "×".join(map(str, lowered)),
        layer.decomposition.method + (f" {tile[0]}×{tile[1]}" if tile else ""),
        "×".join(map(str, rank)) if isinstance(rank, tuple) else str(rank),
        f"{layer.weight_numel:,} → {layer.compressed_numel:,}",
        f"{dense_macs:,} → {macs:,}",
        "" if layer.relative_error is None else f"{layer.relative_error:.3f}",
    )


def total_row(
    parameters: tuple[int, int], macs: tuple[int, int], network_speedup: float | None
) -> Row:
    """Return the cells of the whole model, of (dense, decomposed) counts."""
    fewer = f"{macs[0] / max(1, macs[1]):.2f}× fewer MACs"
    if network_speedup is not None:
        fewer += f" in layers, {network_speedup:.2f}× in the whole network"
    return (
        "all parameters",
        *[""] * 4,
        f"{parameters[0]:,} → {parameters[1]:,}",
        f"{macs[0]:,} → {macs[1]:,}",
        f"{parameters[0] / parameters[1]:.2f}× smaller, {fewer}",
    )


def format_table(rows: Sequence[Row], total: Row, notes: Sequence[str] = ()) -> str:
    """Align the cells in columns; below a rule come the notes and the total."""
    lines = [_HEADER, *rows, total]
    # The last column holds reasons, whose length must not push the others apart.
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER) - 1)]
    header, *body, last = ("  ".join([*map(str.ljust, line, widths), line[-1]]) for line in lines)
    rule = "─" * len(header)
    return "\n".join([header, rule, *body, rule, *notes, last])


def kept_lines(kept: Sequence[KeptLayer], parameters: int) -> list[str]:
    """Return a line for every reason, of how many layers and parameters it keeps dense."""
    reasons: dict[str, list[KeptLayer]] = {}
    for layer in kept:
        reasons.setdefault(layer.reason.partition(":")[0], []).append(layer)
    lines = []
    for reason, layers in reasons.items():
        count = sum(layer.weight_numel for layer in layers)
        lines.append(
            f"kept, {len(layers)} layers, {count:,} parameters ({count / parameters:.1%}): {reason}"
        )
    return lines
