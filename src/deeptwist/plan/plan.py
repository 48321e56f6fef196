"""The plan: which layer is held by which decomposition, and why the others are kept."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deeptwist.decompositions import CannotDecomposeError, Decomposition, from_dict
from deeptwist.decompositions.linalg import relative_error
from deeptwist.decompositions.ranks import check_ratio
from deeptwist.errors import DeepTwistError, check_int, first_line, unknown_name_error
from deeptwist.inspect.layers import Layer, as_tuple, layers_of
from deeptwist.layers import cost
from deeptwist.layers.cost import LayerCall
from deeptwist.layers.geometry import ConvGeometry, weight_to_kernel
from deeptwist.plan.layer_filter import LayerFilter, Override

_FORMAT = 1


@dataclass(frozen=True)
class PlannedLayer:
    """What happens to one layer: it has either a decomposition or a reason to be kept.

    Attributes:
        name: the module's name in the model.
        aliases: its other names, where the model uses the module more than once.
        kind: the module's class.
        weight_numel: the dense weights, the bias not counted; 0 where another layer counts them.
        convolution: its geometry; none where deeptwist cannot read it.
        calls: how the example input used it.
        decomposition: with every rank set; none where the layer is kept.
        reason: why the layer is kept; none where it is not.
        relative_error: ‖W − W′‖_F / ‖W‖_F of the approximation at planning time.
        implementation: which of its exact forms the factored layer takes; none for the first by rule.
    """

    name: str
    kind: str
    weight_numel: int
    aliases: tuple[str, ...] = ()
    convolution: ConvGeometry | None = None
    calls: tuple[LayerCall, ...] = ()
    decomposition: Decomposition | None = None
    reason: str | None = None
    relative_error: float | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        self._check_fit()
        if self.implementation is not None and self.implementation not in self.implementations:
            raise unknown_name_error(
                f"implementation of layer {self.name!r}", self.implementation, self.implementations
            )

    def _check_fit(self) -> None:
        if self.decomposition is None:
            return
        if self.convolution is None:
            raise DeepTwistError(f"layer {self.name!r} has a decomposition without a geometry")
        # A rank that the layer cannot hold would ask for memory without bound.
        if self.decomposition.resolve(self.convolution, None) != self.decomposition:
            raise DeepTwistError(f"layer {self.name!r} cannot hold {self.decomposition}")

    @property
    def implementations(self) -> tuple[str, ...]:
        """The exact forms of the factored layer, the first by rule before the others."""
        if self.decomposition is None or self.convolution is None:
            return ()
        return self.decomposition.implementations(self.convolution)

    @property
    def compressed_numel(self) -> int:
        """The weights after decomposition; the dense ones where the layer is kept."""
        if self.decomposition is None or self.convolution is None:
            return self.weight_numel
        return self.decomposition.weight_numel(self.convolution)

    def workload(self, *, factored: bool) -> list[tuple[ConvGeometry, tuple[int, ...], int]]:
        """Every (convolution, input size, count) that the example input needs here."""
        if self.convolution is None:
            return []
        decomposition = self.decomposition if factored else None
        work = []
        for call in self.calls:
            if decomposition is None:
                work.append((self.convolution, call.size, call.count))
            else:
                parts = decomposition.workload(self.convolution, call.size)
                work += [(part, size, call.count) for part, size in parts]
        return work

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` is its inverse."""
        return {
            **asdict(self),
            "aliases": list(self.aliases),
            "calls": [[call.count, *call.size] for call in self.calls],
            "convolution": self.convolution.to_dict() if self.convolution else None,
            "decomposition": self.decomposition.to_dict() if self.decomposition else None,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PlannedLayer":
        """The inverse of `to_dict`.

        Raises:
            DeepTwistError: if a field is refused.
            KeyError, TypeError, ValueError: if one is missing, unknown or of another shape.
        """
        kinds = {"name": str, "kind": str, "aliases": list, "calls": list}
        for key, kind in kinds.items():
            if not isinstance(values[key], kind):
                raise DeepTwistError(f"{key} of a layer is {values[key]!r}, not a {kind.__name__}")
        check_int("weight_numel", values["weight_numel"], 0)
        for number in (number for call in values["calls"] for number in call):
            check_int("a size of a call", number, 0)
        error, reason = values["relative_error"], values["reason"]
        if not isinstance(values.get("implementation"), str | None):
            raise DeepTwistError(
                f"implementation of a layer is {values['implementation']!r}, not a name"
            )
        if not isinstance(error, float | int | None) or not isinstance(reason, str | None):
            raise DeepTwistError(f"layer {values['name']!r} has error {error!r}, reason {reason!r}")
        convolution, decomposition = values["convolution"], values["decomposition"]
        fields: dict[str, Any] = {
            **values,
            "aliases": tuple(str(alias) for alias in values["aliases"]),
            "calls": tuple(LayerCall(count, tuple(size)) for count, *size in values["calls"]),
            "convolution": None if convolution is None else ConvGeometry.from_dict(convolution),
            "decomposition": None if decomposition is None else from_dict(decomposition),
        }
        return cls(**fields)


@dataclass(frozen=True)
class Plan:
    """Every layer of a model with its decomposition or the reason why it is kept.

    Attributes:
        layers: in the model's order.
        other_parameters: parameters that are no layer's weight: biases, normalisation.
        examples: how many the example input holds; costs are per example.
        inputs: the shape and type of each of the example input's tensors.
    """

    layers: tuple[PlannedLayer, ...]
    other_parameters: int = 0
    examples: int = 1
    inputs: tuple[tuple[tuple[int, ...], str], ...] = ()

    @property
    def compressed(self) -> tuple[PlannedLayer, ...]:
        """The layers that have a decomposition."""
        return tuple(layer for layer in self.layers if layer.decomposition is not None)

    @property
    def kept(self) -> tuple[PlannedLayer, ...]:
        """The layers that stay as they are."""
        return tuple(layer for layer in self.layers if layer.decomposition is None)

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
        return self._per_example(self.layers, cost.macs, factored=False)

    @property
    def macs(self) -> int:
        """MACs of one example through the decomposed model."""
        return self._per_example(self.layers, cost.macs, factored=True)

    def paper_flops(self, *, factored: bool) -> int:
        """The compressed layers' FLOPs of one example, as the paper counts them (Table 2)."""
        return self._per_example(self.compressed, cost.paper_flops, factored=factored)

    def layer_macs(self, layer: PlannedLayer, *, factored: bool) -> int:
        """MACs of one example through one layer."""
        return self._per_example([layer], cost.macs, factored=factored)

    def _per_example(
        self,
        layers: Iterable[PlannedLayer],
        count: Callable[[cost.Workload], int],
        *,
        factored: bool,
    ) -> int:
        total = sum(
            times * count([(convolution, size)])
            for layer in layers
            for convolution, size, times in layer.workload(factored=factored)
        )
        return total // self.examples

    def to_json(self) -> str:
        """The plan as JSON; `from_json` is its inverse."""
        return json.dumps(
            {
                "format": _FORMAT,
                "other_parameters": self.other_parameters,
                "examples": self.examples,
                "inputs": self.inputs,
                "layers": [layer.to_dict() for layer in self.layers],
            },
            indent=1,
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`.

        Raises:
            DeepTwistError: if the text is no plan, or one of another format.
        """
        try:
            values = json.loads(text)
            if values["format"] != _FORMAT:
                raise DeepTwistError(
                    f"plan format {values['format']!r} is unknown: this version reads {_FORMAT}"
                )
            check_int("other_parameters", values["other_parameters"], 0)
            check_int("examples", values["examples"])
            for shape, dtype in values["inputs"]:
                for side in shape:
                    check_int("a side of an input", side, 0)
                if not isinstance(getattr(torch, dtype, None), torch.dtype):
                    raise DeepTwistError(f"an input is of unknown type {dtype!r}")
            return cls(
                tuple(PlannedLayer.from_dict(layer) for layer in values["layers"]),
                values["other_parameters"],
                values["examples"],
                tuple((tuple(shape), str(dtype)) for shape, dtype in values["inputs"]),
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DeepTwistError(f"not a plan: {first_line(error)}") from None
        except RecursionError:
            raise DeepTwistError("not a plan: nested too deep") from None

    def __str__(self) -> str:
        rows = [_HEADER, *(self._row(layer) for layer in self.layers)]
        rows.append(
            (
                "all parameters",
                *[""] * 4,
                f"{self.dense_parameters:,} → {self.parameters:,}",
                f"{self.dense_macs:,} → {self.macs:,}",
                f"{self.compression_ratio:.2f}× smaller, "
                f"{self.dense_macs / max(1, self.macs):.2f}× fewer MACs",
            )
        )
        return _table(rows)

    def _row(self, layer: PlannedLayer) -> tuple[str, ...]:
        geometry = str(layer.convolution) if layer.convolution else layer.kind
        macs = self.layer_macs(layer, factored=False)
        if layer.decomposition is None or layer.convolution is None:
            dense = f"{layer.weight_numel:,}", f"{macs:,}"
            return (layer.name, geometry, "", "", "", *dense, f"kept: {layer.reason}")
        lowered = layer.decomposition.lowered_shape(layer.convolution)
        tile, rank = (getattr(layer.decomposition, name, None) for name in ("tile", "rank"))
        return (
            layer.name,
            geometry,
            "" if lowered is None else "×".join(map(str, lowered)),
            layer.decomposition.method + (f" {tile[0]}×{tile[1]}" if tile else ""),
            "×".join(map(str, rank)) if isinstance(rank, tuple) else str(rank),
            f"{layer.weight_numel:,} → {layer.compressed_numel:,}",
            f"{macs:,} → {self.layer_macs(layer, factored=True):,}",
            "" if layer.relative_error is None else f"{layer.relative_error:.3f}",
        )


_HEADER = (
    "layer",
    "shape",
    "lowered",
    "decomposition",
    "rank",
    "weights",
    "MACs",
    "relative error",
)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    # The last column holds reasons, whose length must not push the others apart.
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    rule = "─" * max(len(line) for line in lines[:1])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def read_plan(path: Path) -> Plan:
    """Reads a plan from a JSON file.

    Raises:
        DeepTwistError: if it cannot be read, or holds no plan.
    """
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DeepTwistError(f"cannot read plan {path}: {error}") from None


def plan(
    model: nn.Module,
    decomposition: Decomposition,
    *,
    example_input: Tensor | tuple[Tensor, ...],
    ratio: float | None = None,
    skip_first_conv: bool = False,
    min_in_channels: int = 1,
    linear: bool = True,
    rank_multiple: int = 1,
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    overrides: Mapping[str, Override] | None = None,
) -> Plan:
    """Decides for every layer how it is held; the model itself is not touched.

    A name pattern is an exact module name, a glob (``layer3.*``) or, after ``re:``, a regular
    expression that matches the whole name.

    Args:
        model: any network; it is run once on the example input, in evaluation mode.
        decomposition: how layers are held; its rank, if open, is set by `ratio`.
        example_input: one batch, or the tuple of the model's positional inputs.
        ratio: dense ÷ factored weights that every compressed layer keeps at least.
        skip_first_conv: keep the convolution that runs first, as the paper does.
        min_in_channels: keep layers with fewer input channels S (the paper: S ≥ 128).
        linear: whether linear layers are compressed too.
        rank_multiple: ranks that a ratio sets are rounded down to a multiple of this, where they
            are that large: 16 suits AVX-512 processors (``docs/speed.md``).
        include: patterns, or one, of the layers to compress.
        exclude: patterns, or one, of the layers to keep.
        overrides: pattern → another decomposition, another ratio, or none to keep the layer;
            the last pattern that matches counts, before all rules above.

    Returns:
        The plan; every layer that is not compressed is in it with its reason.

    Raises:
        DeepTwistError: if neither rank nor ratio is given, a pattern matches no layer, or an
            override by exact name cannot be met.
    """
    rules = LayerFilter(
        skip_first_conv,
        min_in_channels,
        linear,
        (include,) if isinstance(include, str) else tuple(include),
        (exclude,) if isinstance(exclude, str) else tuple(exclude),
        overrides or {},
    )
    inputs = as_tuple(example_input)
    layers = layers_of(model, inputs)
    rules.check_patterns(name for layer in layers for name in layer.names)
    for chosen in (decomposition, *rules.overrides.values()):
        if isinstance(chosen, Decomposition) and chosen.needs_ratio and ratio is None:
            raise DeepTwistError(f"{chosen} has no rank: give it one, or give a ratio")
    if ratio is not None:
        check_ratio(ratio)
    check_int("rank_multiple", rank_multiple)
    convolutions = [layer for layer in layers if layer.convolution and layer.convolution.dims]
    first = min(convolutions, key=lambda layer: layer.turn, default=None)
    planned = tuple(
        _plan_layer(layer, decomposition, ratio, rules, rank_multiple, is_first=layer is first)
        for layer in layers
    )
    counted = sum(layer.weight_numel for layer in layers)
    total = sum(p.numel() for p in model.parameters())
    # A first convolution that sees one image of (c, h, w) was given no batch, as was one vector.
    batched = inputs[0].dim() > 1 and (first is None or not first.calls or first.calls[0].count > 1)
    return Plan(
        planned,
        total - counted,
        inputs[0].shape[0] if batched else 1,
        tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs),
    )


def _plan_layer(
    layer: Layer,
    decomposition: Decomposition,
    ratio: float | None,
    rules: LayerFilter,
    rank_multiple: int,
    *,
    is_first: bool,
) -> PlannedLayer:
    name, *aliases = layer.names
    kept = PlannedLayer(
        name=name,
        kind=type(layer.module).__name__,
        weight_numel=layer.weight_numel,
        aliases=tuple(aliases),
        convolution=layer.convolution,
        calls=layer.calls,
        reason=layer.reason,
    )
    pattern, choice = rules.override(layer.names) or (None, decomposition)
    if choice is None:
        return replace(kept, reason="by an override")
    if isinstance(choice, Decomposition):
        decomposition = choice
    else:
        ratio, decomposition = check_ratio(choice), decomposition.without_rank()
    reason = layer.reason
    if reason is None and pattern is None and layer.convolution is not None:
        reason = rules.skip_reason(layer.names, layer.convolution, is_first=is_first)
    if reason is None and layer.convolution is not None:
        try:
            resolved = decomposition.resolve(layer.convolution, ratio)
            if decomposition.needs_ratio:
                resolved = resolved.round_ranks(rank_multiple)
            planned = replace(kept, reason=None, decomposition=resolved)
            _check_shrinks(planned)
            return replace(planned, relative_error=_error_today(layer, planned))
        except CannotDecomposeError as error:
            reason = str(error)
    if pattern in layer.names:  # asked for by its exact name: to keep it would be no answer
        raise DeepTwistError(f"layer {name!r} ({layer.convolution or kept.kind}) {reason}")
    return replace(kept, reason=reason)


def _check_shrinks(layer: PlannedLayer) -> None:
    if layer.compressed_numel >= layer.weight_numel:
        raise CannotDecomposeError(
            f"would grow: {layer.compressed_numel:,} weights for {layer.weight_numel:,}"
        )
    before, after = (
        sum(count * conv.macs(size) for conv, size, count in layer.workload(factored=factored))
        for factored in (False, True)
    )
    if after >= before:
        raise CannotDecomposeError(f"would slow down: {after:,} MACs for {before:,}")


def _error_today(layer: Layer, planned: PlannedLayer) -> float | None:
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta or planned.convolution is None or planned.decomposition is None:
        return None
    kernel = weight_to_kernel(weight.detach(), planned.convolution)
    if not kernel.isfinite().all():
        raise DeepTwistError(f"layer {planned.name!r} has weights that are NaN or infinite")
    return relative_error(kernel, planned.decomposition.decompose(kernel).reconstruct())
