"""What becomes of an optimizer's momentum where a weight is distorted."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from deeptwist.decompositions import Factors
from deeptwist.errors import DeepTwistError
from deeptwist.inspection.weights import as_weight, computes_weight, get_layer
from deeptwist.layers.geometry import kernel_to_weight, weight_to_kernel
from deeptwist.plan.plan import Plan
from deeptwist.twist.config import Momentum, check_momentum_name

_FIRST_MOMENTS = ("momentum_buffer", "exp_avg")  # of SGD and its kin, of Adam and its kin


def check_momentum(
    momentum: Momentum, optimizer: torch.optim.Optimizer | None, model: nn.Module, plan: Plan
) -> None:
    """Check that the momentum of every compressed layer's weight can be changed as asked.

    Raises:
        DeepTwistError: if there is no optimizer, it has no momentum or does not hold a weight, a
            weight is computed, or a decomposition has no tangent space to project on.
    """
    check_momentum_name(momentum)
    if momentum == "keep":
        return
    if optimizer is None:
        raise DeepTwistError(
            f"momentum={momentum!r} needs the optimizer: give DeepTwist optimizer="
        )
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for layer in plan.compressed:
        module = get_layer(model, layer.name)
        if computes_weight(module):
            raise DeepTwistError(
                f"layer {layer.name!r} computes its weight: momentum can only keep"
            )
        group = held.get(id(module.weight))
        if group is None:
            raise DeepTwistError(f"the optimizer does not hold the weight of layer {layer.name!r}")
        if not group.get("momentum") and "betas" not in group:
            raise DeepTwistError(
                f"{type(optimizer).__name__} has no momentum to {momentum}: keep it"
            )
        if momentum == "project" and not layer.decomposition.has_tangent_space:
            raise DeepTwistError(
                f"layer {layer.name!r} is held by {layer.decomposition}, on whose tangent space "
                "momentum cannot be projected: keep or reset it"
            )


@torch.no_grad()
def change_momentum(
    momentum: Momentum,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    plan: Plan,
    factors: Mapping[str, Factors],
) -> None:
    """Reset or project the first moments of all compressed layers' weights, in place.

    Args:
        momentum: not ``"keep"``.
        optimizer: see `check_momentum`.
        model: whose weights are at the factors.
        plan: of the model.
        factors: by layer.
    """
    for layer in plan.compressed:
        module = get_layer(model, layer.name)
        state = optimizer.state.get(cast(Tensor, module.weight), {})
        for buffer in (state.get(name) for name in _FIRST_MOMENTS):
            if not isinstance(buffer, Tensor):
                continue  # before the first step there is none
            if momentum == "reset":
                buffer.zero_()
                continue
            weight = as_weight(module, buffer)
            kernel = weight_to_kernel(weight, layer.convolution)
            projected = factors[layer.name].project_on_tangent(kernel)
            weight.copy_(kernel_to_weight(projected, layer.convolution).reshape(weight.shape))
