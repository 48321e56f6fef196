"""From weights to factors to the decomposed model: the swap of every planned layer."""

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from deeptwist.decompositions import FactoredLayer, Factors
from deeptwist.errors import DeepTwistError, first_line, unknown_name_error
from deeptwist.inspect.layers import has_hooks
from deeptwist.layers.geometry import (
    SUPPORTED_MODULES,
    ConvGeometry,
    compute_dtype,
    weight_to_kernel,
)
from deeptwist.plan.autotune import tune_implementations
from deeptwist.plan.plan import Plan
from deeptwist.plan.planned_layer import CompressedLayer

logger = logging.getLogger("deeptwist")

Inputs = Tensor | tuple[Tensor, ...]
Dense = nn.Conv2d | nn.Linear  # what every layer that can be planned looks like: weight and bias


def get_planned_module(model: nn.Module, layer: CompressedLayer) -> Dense:
    """The model's module that a planned layer speaks of.

    Raises:
        DeepTwistError: if the model has no such module, or one of another geometry.
    """
    try:
        module = model.get_submodule(layer.name)
    except AttributeError:
        raise DeepTwistError(
            f"the plan is for another model: this {type(model).__name__} has no {layer.name!r}"
        ) from None
    if isinstance(module, FactoredLayer):
        raise DeepTwistError(f"layer {layer.name!r} is decomposed already")
    if (
        type(module) not in SUPPORTED_MODULES
        or ConvGeometry.from_module(module) != layer.convolution
    ):
        raise DeepTwistError(
            f"the plan is for another model: layer {layer.name!r} was ({layer.convolution}), "
            f"here it is {type(module).__name__}({getattr(module, 'extra_repr', str)()})"
        )
    return cast(Dense, module)


@torch.no_grad()
def factorize(model: nn.Module, plan: Plan) -> dict[str, Factors]:
    """The factors of every compressed layer's weight as it is now; the model is not touched.

    Raises:
        DeepTwistError: if a weight is not finite, naming the layer; or if the plan is for
            another model.
    """
    weights = {layer.name: get_planned_module(model, layer).weight for layer in plan.compressed}
    check_finite(weights)
    factors = {}
    for layer in plan.compressed:
        kernel = weight_to_kernel(weights[layer.name], layer.convolution)
        # A loop that runs under autocast must not have its factors computed in bf16.
        with torch.autocast(kernel.device.type, enabled=False):
            factors[layer.name] = layer.decomposition.decompose(kernel)
    return factors


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Checks that no weight is NaN or infinite.

    Raises:
        DeepTwistError: if one is, naming its layer.
    """
    # By their norms first, asked for together: to ask every number takes longer than a distortion,
    # and an accelerator is waited for once.
    for (name, weight), norm in zip(weights.items(), norms(weights.values()), strict=True):
        if not math.isfinite(norm) and not weight.isfinite().all():
            raise DeepTwistError(f"layer {name!r} has weights that are NaN or infinite")


def norms(weights: Iterable[Tensor]) -> list[float]:
    """‖W‖_F of every weight; infinite where its square is beyond the computing type."""
    return numbers([torch.linalg.vector_norm(w, dtype=compute_dtype(w.dtype)) for w in weights])


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Scalars, on any devices, as numbers; an accelerator is waited for once."""
    return torch.stack([x.to(scalars[0].device) for x in scalars]).tolist() if scalars else []


def decompose(
    model: nn.Module, plan: Plan, *, implementation: str | None = None, tune: bool = False
) -> nn.Module:
    """The decomposed model: a copy in which every planned layer is held by its factors.

    The factors start from the weights as they are now. The copy shares nothing with `model`,
    has no bias where the source layer had none, and can be trained on: conventional fine-tuning.

    Args:
        model: the network that was planned.
        plan: see `deeptwist.plan`.
        implementation: the exact form of every layer that has one of this name (``"im2col"``: the
            paper's), in place of the plan's.
        tune: whether each layer takes the form that is fastest here, by the clock.

    Raises:
        DeepTwistError: if a weight is not finite, if the plan is for another model, or if no
            layer has such an implementation.
    """
    if tune:
        plan = tune_implementations(model, plan)
    if implementation is not None:
        plan = with_implementation(plan, implementation)
    return replace_layers(model, plan, {n: f.kernels() for n, f in factorize(model, plan).items()})


def with_implementation(plan: Plan, implementation: str) -> Plan:
    """The plan with this implementation wherever a layer has it.

    Raises:
        DeepTwistError: if no layer has it.
    """
    known = {name for layer in plan.compressed for name in layer.implementations}
    if implementation not in known:
        raise unknown_name_error("implementation", implementation, known)
    compressed = tuple(
        replace(layer, implementation=implementation)
        if implementation in layer.implementations
        else layer
        for layer in plan.compressed
    )
    return replace(plan, compressed=compressed)


def replace_layers(model: nn.Module, plan: Plan, kernels: Mapping[str, list[Tensor]]) -> nn.Module:
    """A copy of the model with a factored layer, holding these kernels, for every planned one."""
    replaced: dict[int, object] = {}
    for layer in plan.compressed:
        module = get_planned_module(model, layer)
        if has_hooks(module):
            logger.warning("layer %r carries hooks, which its factors will not", layer.name)
        replaced[id(module)] = _factored(module, layer, kernels[layer.name])
    # An output that a module keeps for a loss is part of a graph, which deepcopy refuses.
    for owner in model.modules():
        for value in vars(owner).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                replaced[id(value)] = value.detach().clone()
    # Seeded with the new layers, deepcopy never copies the weights that they replace, and puts
    # one factored layer wherever one dense layer was used.
    try:
        return copy.deepcopy(model, replaced)
    except (RuntimeError, TypeError) as error:
        raise DeepTwistError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}"
        ) from error


def _factored(module: Dense, layer: CompressedLayer, kernels: list[Tensor]) -> FactoredLayer:
    weight, bias = module.weight, module.bias
    factored = layer.decomposition.make_layer(
        layer.convolution,
        [kernel.to(weight.dtype) for kernel in kernels],
        None if bias is None else bias.detach(),
        layer.implementation,
    )
    if weight.dim() == 4 and _is_channels_last(weight):
        factored = factored.to(memory_format=torch.channels_last)
    factored.train(module.training)
    for parameter in factored.parameters():
        parameter.requires_grad_(weight.requires_grad)
    if bias is not None:
        biases = [p for n, p in factored.named_parameters() if n.endswith("bias")]
        for parameter in biases:
            parameter.requires_grad_(bias.requires_grad)
    return factored


def _is_channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
