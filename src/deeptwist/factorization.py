"""From weights to factors to the decomposed model: the swap of every planned layer."""

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from deeptwist.convolution import READABLE, Convolution, kernel_of
from deeptwist.decompositions import FactoredLayer, Factors
from deeptwist.errors import DeepTwistError
from deeptwist.planning import Plan, PlannedLayer

Dense = nn.Conv2d | nn.Linear  # what every layer that can be planned looks like: weight and bias


def planned_module(model: nn.Module, layer: PlannedLayer) -> Dense:
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
    if type(module) not in READABLE or Convolution.of(module) != layer.convolution:
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
    weights = {layer.name: planned_module(model, layer).weight for layer in plan.compressed}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise DeepTwistError(f"layer {name!r} has weights that are NaN or infinite")
    factors = {}
    for layer in plan.compressed:
        assert layer.convolution is not None
        assert layer.decomposition is not None
        kernel = kernel_of(weights[layer.name], layer.convolution)
        # A loop that runs under autocast must not have its factors computed in bf16.
        with torch.autocast(kernel.device.type, enabled=False):
            factors[layer.name] = layer.decomposition.decompose(kernel)
    return factors


def decompose(model: nn.Module, plan: Plan) -> nn.Module:
    """The decomposed model: a copy in which every planned layer is held by its factors.

    The factors start from the weights as they are now. The copy shares nothing with `model`,
    has no bias where the source layer had none, and can be trained on: conventional fine-tuning.

    Args:
        model: the network that was planned.
        plan: see `deeptwist.plan`.

    Raises:
        DeepTwistError: if a weight is not finite, or if the plan is for another model.
    """
    return swap(model, plan, {n: f.kernels() for n, f in factorize(model, plan).items()})


def swap(model: nn.Module, plan: Plan, kernels: Mapping[str, list[Tensor]]) -> nn.Module:
    """A copy of the model with a factored layer, holding these kernels, for every planned one."""
    replaced: dict[int, object] = {}
    for layer in plan.compressed:
        module = planned_module(model, layer)
        replaced[id(module)] = _factored(module, layer, kernels[layer.name])
    # Seeded with the new layers, deepcopy never copies the weights that they replace, and puts
    # one factored layer wherever one dense layer was used.
    return copy.deepcopy(model, replaced)


def _factored(module: Dense, layer: PlannedLayer, kernels: list[Tensor]) -> FactoredLayer:
    assert layer.convolution is not None
    assert layer.decomposition is not None
    weight, bias = module.weight, module.bias
    factored = layer.decomposition.layer(
        layer.convolution,
        [kernel.to(weight.dtype) for kernel in kernels],
        None if bias is None else bias.detach(),
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


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """‖y − y′‖ / ‖y‖ over all outputs."""
    norm = torch.linalg.vector_norm(expected.double())
    difference = torch.linalg.vector_norm(expected.double() - found.double())
    return float(difference / norm) if norm > 0 else float(difference)
