"""Modules without weights that bring channels to where tiled layers need them."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn


class SplitConcat(nn.Module):
    """Runs every layer on its own run of channels and joins what they give.

    `dims` spatial axes follow the channels, here and in `ChannelPermutation`; a batch may precede
    them.
    """

    def __init__(self, layers: Sequence[nn.Module], channels: Sequence[int], dims: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.channels = list(channels)
        self.axis = -1 - dims

    def forward(self, x: Tensor) -> Tensor:  # (…, Σ channels, *size) → (…, Σ outputs, *size′)
        """Run the layers."""
        parts = x.split(self.channels, dim=self.axis)
        # By index: torch.fx cannot iterate over what it traces.
        outputs = [layer(parts[index]) for index, layer in enumerate(self.layers)]
        return torch.cat(outputs, self.axis)


class ChannelPermutation(nn.Module):
    """Puts channels in another order: output channel j is input channel order[j]."""

    order: Tensor

    def __init__(self, order: Tensor, dims: int):  # order: (channels,)
        super().__init__()
        self.register_buffer("order", order, persistent=False)  # follows from the geometry
        self.axis = -1 - dims

    def forward(self, x: Tensor) -> Tensor:  # (…, c, *size) → (…, c, *size)
        """Reorder the channels."""
        return x.index_select(self.axis, self.order)


def permutation(order: Tensor, dims: int) -> ChannelPermutation | None:  # order: (channels,)
    """Return the module for this order of channels; `None` where it changes nothing."""
    identity = torch.arange(len(order))
    return None if torch.equal(order, identity) else ChannelPermutation(order, dims)


class PointwiseOnLastDim(nn.Sequential):
    """Runs pointwise 1-D convolutions over the last axis, where a linear layer's features are."""

    def forward(self, x: Tensor) -> Tensor:  # (…, in_features) → (…, out_features)
        """Run the convolutions over the features."""
        rows = x.unsqueeze(0).flatten(0, -2)  # (Π leading, in_features)
        y: Tensor = super().forward(rows.unsqueeze(-1))  # type: ignore[no-untyped-call]
        return y.reshape(x.shape[:-1] + y.shape[1:2])


@torch.no_grad()
def set_outputs(
    stages: Iterable[nn.Module],
    scale: Tensor | None = None,  # (out_channels,)
    bias: Tensor | None = None,  # (out_channels,)
) -> None:
    """Scale what modules one after the other put out, their bias aside, and set the bias."""
    *before, last = stages
    if isinstance(last, ChannelPermutation):
        order = last.order.argsort()
        scale, bias = (None if x is None else x[order] for x in (scale, bias))
        return set_outputs(before, scale, bias)
    if isinstance(last, PointwiseOnLastDim):
        return set_outputs(last, scale, bias)
    layers = [*last.layers] if isinstance(last, SplitConcat) else [last]
    start = 0
    for layer in cast(list[nn.Conv2d | nn.Linear], layers):  # all have what is used here
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        own = slice(start, start := start + outputs)
        weight = layer.weight
        if scale is not None and isinstance(layer, nn.modules.conv._ConvTransposeNd):
            by_group = weight.unflatten(0, (layer.groups, -1))  # (g, i, o, *k)
            factors = scale[own].reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
            layer.weight = nn.Parameter((by_group * factors).flatten(0, 1).to(weight.dtype))
        elif scale is not None:
            factors = scale[own].reshape(-1, *[1] * (weight.dim() - 1))
            layer.weight = nn.Parameter((weight * factors).to(weight.dtype))
        if bias is not None:
            layer.bias = nn.Parameter(bias[own].to(weight.dtype))
    return None


def stages_bias(stages: Iterable[nn.Module]) -> Tensor | None:  # (out_channels,)
    """Return what modules one after the other add to each output channel; the last has the bias."""
    bias: Tensor | None = None
    for stage in stages:
        if isinstance(stage, ChannelPermutation):
            bias = None if bias is None else bias[stage.order]
        elif isinstance(stage, SplitConcat):
            biases = [cast(Tensor | None, layer.bias) for layer in stage.layers]
            bias = (
                torch.cat([b for b in biases if b is not None])
                if all(b is not None for b in biases)
                else None
            )
        elif isinstance(stage, PointwiseOnLastDim):
            bias = stages_bias(stage)
        else:
            bias = getattr(stage, "bias", None)
    return bias
