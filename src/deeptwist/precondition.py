"""Train factors as the dense form trains: their gradients, preconditioned.

A factor's gradient is scaled by the other factors, so that one learning rate is too high for some
directions of the product and too low for others. Each is multiplied by the inverse Gram matrices of
what comes before and after it, r × r (Tong et al., "Accelerating Ill-Conditioned Low-Rank Matrix
Estimation via Scaled Gradient Descent", 2021; Zhang and Pilanci, "Riemannian Preconditioned LoRA",
2024), and what several factors could move is shared among them: the product then moves, to first
order, by the projection of the dense gradient, see `deeptwist.Decomposition.tangent`.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from deeptwist.errors import DeepTwistError, explaining
from deeptwist.layers.factored import FactoredLayer, factored_layers
from deeptwist.layers.geometry import compute_dtype, kernel_to_weight, weight_to_kernel


def precondition(
    model: nn.Module, optimizer: Optimizer, *, damping: float = 1e-4
) -> RemovableHandle:
    """Have an optimizer step every factored layer's product as it would step the dense weight.

    Gradients are replaced just before each of its steps, in place; there is no state to save, and
    momentum is the optimizer's own. Learning rates of the dense network then suit the factors. It
    is meant for SGD: Adam undoes most of it. Layers whose factors have no gradient are left alone.

    Args:
        model: the decomposed network, or one with factored layers in it.
        optimizer: of its parameters.
        damping: share of a Gram matrix's mean eigenvalue that is added to all of them.

    Returns:
        The handle whose ``remove()`` ends it.

    Raises:
        DeepTwistError: if the optimizer holds no factored layer's weights, or those of a
            decomposition for which there is no closed form (CP).
    """
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    factored = factored_layers(model).items()
    layers = {name: layer for name, layer in factored if held.issuperset(map(id, _factors(layer)))}
    if not layers:
        raise DeepTwistError(
            f"the optimizer holds no factored layer of this {type(model).__name__}: decompose it, "
            "then make the optimizer"
        )
    for name, layer in layers.items():
        with explaining(f"layer {name!r}", errors=(DeepTwistError,)):
            _tensors(layer, _factors(layer))

    @torch.no_grad()
    def hook(*_: Any) -> None:
        alike: dict[Hashable, list[FactoredLayer]] = {}
        for layer in layers.values():
            weights = _factors(layer)
            if all(weight.grad is not None for weight in weights):
                kind = weights[0].dtype, weights[0].device
                key = layer.decomposition, layer.convolution.kernel_shape, *kind
                alike.setdefault(key, []).append(layer)
        for group in alike.values():
            _precondition_together(group, damping)

    return optimizer.register_step_pre_hook(hook)


def _precondition_together(layers: list[FactoredLayer], damping: float) -> None:
    """Replace the gradients of layers of one kind, as groups of one kernel: fewer small steps."""
    decomposition, shape = layers[0].decomposition, layers[0].convolution.kernel_shape
    weights = [_factors(layer) for layer in layers]
    gradients = [[w.grad for w in of_layer if w.grad is not None] for of_layer in weights]

    def stack(values: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        each = [_tensors(layer, of_layer) for layer, of_layer in zip(layers, values, strict=True)]
        return tuple(map(torch.cat, zip(*each, strict=True)))

    with torch.autocast(weights[0][0].device.type, enabled=False):
        steps = decomposition.tangent(stack(weights), stack(gradients), damping)
    chunks = zip(*(step.chunk(len(layers)) for step in steps), strict=True)
    for layer, of_layer, tensors in zip(layers, gradients, chunks, strict=True):
        kernels = decomposition.kernels(tensors, shape)
        parts = decomposition.parts(layer.convolution)
        for gradient, kernel, part in zip(of_layer, kernels, parts, strict=True):
            gradient.copy_(kernel_to_weight(kernel, part).reshape(gradient.shape))


def _tensors(layer: FactoredLayer, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return numbers, one for each of a layer's weights, as its decomposition's factors."""
    parts = layer.decomposition.parts(layer.convolution)
    kernels = [
        weight_to_kernel(x.to(compute_dtype(x.dtype)).reshape(part.weight_shape), part)
        for x, part in zip(values, parts, strict=True)
    ]
    shape = layer.convolution.kernel_shape
    return tuple(layer.decomposition.tensors(kernels, shape))


def _factors(layer: FactoredLayer) -> list[nn.Parameter]:
    """Return the parameters that hold the factors' numbers, in the order of their convolutions."""
    return [weight for name, weight in layer.named_parameters() if not name.endswith("bias")]
