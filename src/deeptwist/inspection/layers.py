"""What a model is made of: its layers, how they are used, and which are safe to touch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from deeptwist.decompositions import FactoredLayer
from deeptwist.errors import DeepTwistError
from deeptwist.inspection.calls import Recording, record
from deeptwist.inspection.weights import (
    InProjection,
    has_in_projection,
    input_padding,
    is_layer,
    layer_geometry,
    read_weight,
    unsupported_reason,
    weight_parameters,
)
from deeptwist.layers.geometry import ConvGeometry, LayerCall

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layer:
    """One module with weights.

    Attributes:
        module: the module.
        names: its names in the model; more than one where the model uses it more than once.
        weight_numel: its weights, bias not counted; those of an earlier layer count there.
        convolution: its geometry; `None` where it cannot be read.
        calls: how the example input used it, in order.
        call_order: when the example input first reached it: 0, 1, …; after all others if never.
        reason: why it must be kept; `None` where it can be decomposed.
    """

    module: nn.Module
    names: tuple[str, ...]
    weight_numel: int
    convolution: ConvGeometry | None
    calls: tuple[LayerCall, ...]
    call_order: int
    reason: str | None


@dataclass(frozen=True)
class Inspection:
    """A model's layers, and what the whole of it does.

    Attributes:
        layers: every module that holds weights itself, in the model's order.
        macs: multiply-accumulates of the whole network on all examples of the input, attention and
            other products of matrices included; `None` where torch could not count them.
    """

    layers: tuple[Layer, ...]
    macs: int | None


def inspect_model(model: nn.Module, inputs: tuple[Tensor, ...]) -> Inspection:
    """Find a model's layers and how an example input uses them.

    Args:
        model: any network; run once on `inputs`, in evaluation mode, and left as it was.
        inputs: the model's positional inputs.

    Raises:
        DeepTwistError: if the model has layers to initialise, or cannot run on the inputs.
    """
    names = _names(model)
    holders: dict[Tensor, list[nn.Module]] = {}
    for module in names:
        for parameter in _weights(module):
            holders.setdefault(parameter, []).append(module)
    # Before the run: an odd layer must be kept for its own reason, not stop the network.
    checked = {module: _check(module) for module in names}
    geometries = {m: convolution for m, (convolution, _) in checked.items() if convolution}
    supported = [m for m, (convolution, reason) in checked.items() if convolution and not reason]
    paddings = {m: padding for m in supported if (padding := input_padding(m)) is not None}
    watched = {p: modules[0] for p, modules in holders.items() if modules[0] in geometries}
    recording = record(model, inputs, geometries, paddings, watched)
    order = [m for m in recording.calls if m in names] + [
        m for m in names if m not in recording.calls
    ]
    call_order = {module: number for number, module in enumerate(order)}
    factored = {
        part
        for module in model.modules()
        if isinstance(module, FactoredLayer)
        for part in module.modules()
    }
    layers = []
    for module, module_names in names.items():
        convolution, reason = checked[module]
        if module in factored:
            reason = "is part of a factored layer"
        reason = reason or _usage_reason(module, names, holders, recording)
        weight_numel = sum(p.numel() for p in _weights(module) if holders[p][0] is module)
        if convolution and not reason:  # what weight norm holds besides is no weight
            weight_numel = min(weight_numel, convolution.weight_numel)
        layers.append(
            Layer(
                module=module,
                names=tuple(module_names),
                weight_numel=weight_numel,
                convolution=convolution,
                calls=tuple(recording.calls.get(module, [])),
                call_order=call_order[module],
                reason=reason,
            )
        )
    return Inspection(tuple(layers), recording.macs)


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module that holds weights itself, with all its names, in the model's order."""
    names: dict[nn.Module, list[str]] = {}
    projections: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise DeepTwistError(f"layer {name!r} is not initialised: run the model once first")
        # The weights in a parametrization count as those of the module that has it.
        if _weights(module) and not isinstance(module, parametrize.ParametrizationList):
            names.setdefault(module, []).append(name)
        if has_in_projection(module):
            if module not in projections:
                projections[module] = InProjection(cast(nn.MultiheadAttention, module))
            full_name = f"{name}.{InProjection.NAME}".lstrip(".")
            names.setdefault(projections[module], []).append(full_name)
    return names


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """The module's own parameters that are a matrix at least."""
    if is_layer(module):
        return weight_parameters(module)
    weights = [
        parameter
        for name, parameter in module.named_parameters(recurse=False)
        if sum(side > 1 for side in parameter.shape) > 1
        and not (name == "in_proj_weight" and has_in_projection(module))
    ]
    if parametrize.is_parametrized(module):
        weights += [*module.get_submodule("parametrizations").parameters()]
    return weights


def _check(module: nn.Module) -> tuple[ConvGeometry | None, str | None]:
    """A module's geometry, if it has one, and why it cannot be decomposed whatever calls it."""
    convolution = None
    if is_layer(module):
        try:
            convolution = layer_geometry(module)
            _check_attributes(module, convolution)
        except (AttributeError, TypeError, DeepTwistError) as error:
            return None, f"has an unusual geometry: {error}"
    reason = unsupported_reason(module)
    if reason is None:
        try:
            input_padding(module)
        except DeepTwistError as error:
            reason = str(error)
    if reason is None:
        weight = read_weight(module)
        if weight.dtype not in _FLOATS:
            reason = f"has weights of type {weight.dtype}".replace("torch.", "")
    return convolution, reason


def _check_attributes(module: nn.Module, convolution: ConvGeometry) -> None:
    """Check that a layer's attributes, which may be set by hand, agree with what it computes."""
    shapes = {tuple(p.shape) for p in weight_parameters(module)}
    expected = convolution.weight_shape
    if expected not in shapes and expected[::-1] not in shapes:
        raise DeepTwistError(f"its weight {shapes} is not of shape {expected}")
    margins = getattr(module, "_reversed_padding_repeated_twice", None)
    if convolution.padding_mode != "zeros" and convolution.padding != "same":
        padding = convolution.padding
        if tuple(margins or ()) != tuple(side for pad in reversed(padding) for side in (pad, pad)):
            raise DeepTwistError(f"its padding {padding} is not the one that it was made with")


def _usage_reason(
    module: nn.Module,
    names: Mapping[nn.Module, list[str]],
    holders: Mapping[Tensor, list[nn.Module]],
    recording: Recording,
) -> str | None:
    """Why a module cannot be decomposed because of how the model uses it."""
    sharing = [other for p in _weights(module) for other in holders[p] if other is not module]
    if sharing:
        return f"shares its weight with {names[sharing[0]][0]!r}"
    if module in recording.surprises:
        return recording.surprises[module]
    return None if recording.calls.get(module) else "is not called on the example input"
