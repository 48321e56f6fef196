"""A plan: which layer is held by which decomposition, and why the others are kept."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deeptwist.errors import DeepTwistError, check_int, first_line
from deeptwist.measure.latency import NetworkTimes
from deeptwist.plan.planned_layer import (
    CompressedLayer,
    KeptLayer,
    PlannedLayer,
    layer_from_dict,
)
from deeptwist.plan.table import format_table, kept_lines, layer_row, total_row

_FORMAT = 2
_LARGEST_INPUT = 2**31  # numbers


@dataclass(frozen=True)
class Plan:
    """Every layer of a model: compressed, or kept with a reason.

    Attributes:
        compressed: the layers that a decomposition will hold, in the model's order.
        kept: the layers that stay dense, in the model's order.
        order: all layers' names in the model's order; by default the compressed ones come first.
        other_parameters: parameters that are no layer's weight: biases, normalisation.
        examples: how many the example input holds; costs are per example.
        inputs: the shape and type of each of the example input's tensors.
        network_macs: MACs of one example through the whole dense network, attention and other
            products of matrices included; `None` where torch could not count them.
        latency: what a budget of milliseconds promises of the whole network.
    """

    compressed: tuple[CompressedLayer, ...]
    kept: tuple[KeptLayer, ...] = ()
    order: tuple[str, ...] = ()
    other_parameters: int = 0
    examples: int = 1
    inputs: tuple[tuple[tuple[int, ...], str], ...] = ()
    network_macs: int | None = None
    latency: NetworkTimes | None = None

    @property
    def layers(self) -> tuple[PlannedLayer, ...]:
        """All layers in the model's order."""
        position = {name: index for index, name in enumerate(self.order)}
        layers: list[PlannedLayer] = [*self.compressed, *self.kept]
        return tuple(sorted(layers, key=lambda layer: position.get(layer.name, len(layers))))

    def with_layers(self, layers: Iterable[PlannedLayer]) -> "Plan":
        """Return this plan with these layers, in this order, in place of its own."""
        layers = tuple(layers)
        return replace(
            self,
            compressed=tuple(layer for layer in layers if isinstance(layer, CompressedLayer)),
            kept=tuple(layer for layer in layers if isinstance(layer, KeptLayer)),
            order=tuple(layer.name for layer in layers),
        )

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
        return self._macs(self.layers, factored=False)

    @property
    def macs(self) -> int:
        """MACs of one example through the decomposed model."""
        return self._macs(self.layers, factored=True)

    def layer_macs(self, layer: PlannedLayer, *, factored: bool) -> int:
        """Return the MACs of one example through one layer."""
        return self._macs([layer], factored=factored)

    def _macs(self, layers: Iterable[PlannedLayer], *, factored: bool) -> int:
        total = sum(
            times * convolution.macs(size)
            for layer in layers
            for convolution, size, times in layer.workload(factored=factored)
        )
        return total // self.examples

    def to_json(self) -> str:
        """Return the plan as JSON; `from_json` is its inverse."""
        return json.dumps(
            {
                "format": _FORMAT,
                "other_parameters": self.other_parameters,
                "examples": self.examples,
                "inputs": self.inputs,
                "network_macs": self.network_macs,
                "latency": None if self.latency is None else asdict(self.latency),
                "layers": [layer.to_dict() for layer in self.layers],
            },
            indent=1,
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote, in this format or an earlier one.

        Raises:
            DeepTwistError: if the text is not a plan, or one of an unknown format.
        """
        try:
            values = json.loads(text)
            if values["format"] not in (1, _FORMAT):
                raise DeepTwistError(
                    f"plan format {values['format']!r} is unknown: this version reads 1 and 2"
                )
            check_int("other_parameters", values["other_parameters"], 0)
            check_int("examples", values["examples"])
            network_macs = values.get("network_macs")  # not in format 1
            if network_macs is not None:
                check_int("network_macs", network_macs, 0)
            latency = values.get("latency")
            for shape, dtype in values["inputs"]:
                for side in shape:
                    check_int("a side of an input", side, 0)
                if math.prod(shape) > _LARGEST_INPUT:
                    raise DeepTwistError(f"an input of {shape} is larger than any network's")
                if not isinstance(getattr(torch, dtype, None), torch.dtype):
                    raise DeepTwistError(f"an input is of unknown type {dtype!r}")
            layers = values["layers"]
            if values["format"] == 1:
                layers = [_upgrade_format_1(layer) for layer in layers]
            plan = cls(
                compressed=(),
                other_parameters=values["other_parameters"],
                examples=values["examples"],
                network_macs=network_macs,
                latency=None if latency is None else _read_latency(latency),
                inputs=tuple((tuple(shape), str(dtype)) for shape, dtype in values["inputs"]),
            )
            return plan.with_layers(layer_from_dict(layer) for layer in layers)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DeepTwistError(f"not a plan: {first_line(error)}") from error
        except RecursionError as error:
            raise DeepTwistError("not a plan: nested too deep") from error

    def __str__(self) -> str:
        rows = [
            layer_row(
                layer,
                self.layer_macs(layer, factored=False),
                self.layer_macs(layer, factored=True),
            )
            for layer in self.layers
        ]
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
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DeepTwistError(f"cannot read plan {path}: {error}") from error


def _read_latency(values: Mapping[str, Any]) -> NetworkTimes:
    dense, planned = float(values["dense"]), float(values["planned"])
    if not (0 < dense < math.inf and 0 < planned < math.inf):
        raise ValueError(f"latencies {dense} and {planned}")
    return NetworkTimes(dense, planned, str(values["where"]))


def _upgrade_format_1(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layer of format 1, whose kind is told by the fields that are not null."""
    names = {"num_weights": "weight_numel"}
    values = {names.get(key, key): value for key, value in layer.items() if key != "executor"}
    other_kind = (
        ("decomposition", "relative_error") if values["decomposition"] is None else ("reason",)
    )
    return {key: value for key, value in values.items() if key not in other_kind}
