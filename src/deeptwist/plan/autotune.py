"""Layers built for the clock alone, and the choice among a layer's exact forms by it.

How long a layer takes does not depend on its numbers, so they are drawn here.
"""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from deeptwist.decompositions import Decomposition
from deeptwist.layers.cost import LayerCall
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.plan.plan import Plan, PlannedLayer
from deeptwist.plan.timing import time_interleaved

_ROUNDS = 9


def tune(model: nn.Module, plan: Plan) -> Plan:
    """Return the plan with every layer in the implementation that is fastest by the clock.

    Args:
        model: the network that was planned; its device and type are those that are timed.
        plan: see `deeptwist.plan`.
    """
    like = next(model.parameters())
    fastest: dict[object, str] = {}
    layers = []
    for layer in plan.layers:
        implementations = layer.implementations
        if len(implementations) > 1:
            key = layer.convolution, layer.decomposition, layer.calls
            if key not in fastest:
                times = time_implementations(layer, like)
                fastest[key] = min(times, key=lambda name: times[name])
            layer = replace(layer, implementation=fastest[key])
        layers.append(layer)
    return replace(plan, layers=tuple(layers))


def time_implementations(layer: PlannedLayer, like: Tensor) -> Mapping[str, float]:
    """Milliseconds of a planned layer in each of its exact forms, at its most costly use.

    Args:
        layer: one with a decomposition.
        like: gives the device and the type.
    """
    assert layer.convolution is not None
    assert layer.decomposition is not None
    x = random_input(layer.convolution, most_expensive_call(layer), like)
    forms = {
        name: random_factored(layer.convolution, layer.decomposition, like, name)
        for name in layer.implementations
    }
    with torch.inference_mode():
        samples = time_interleaved([partial(form, x) for form in forms.values()], rounds=_ROUNDS)
    return {name: statistics.median(own) for name, own in zip(forms, samples, strict=True)}


def most_expensive_call(layer: PlannedLayer) -> LayerCall:
    """The layer's use that takes the most MACs."""
    convolution = layer.convolution
    assert convolution is not None
    return max(layer.calls, key=lambda call: call.count * convolution.macs(call.size))


def random_input(convolution: ConvGeometry, call: LayerCall, like: Tensor) -> Tensor:
    """Standard normal numbers as one use gives them to the layer; images in channels_last."""
    x = torch.randn(call.count, convolution.in_channels, *call.size).to(like)
    return x.to(memory_format=torch.channels_last) if convolution.dims == 2 else x


def random_dense(convolution: ConvGeometry, like: Tensor) -> nn.Module:
    """The layer of this geometry with numbers drawn, ready to be timed."""
    kernel = torch.randn(convolution.kernel_shape).to(like)
    return _ready(
        convolution.make_module(kernel, like.new_zeros(convolution.out_channels)), convolution
    )


def random_factored(
    convolution: ConvGeometry,
    decomposition: Decomposition,
    like: Tensor,
    implementation: str | None,
) -> nn.Module:
    """The factored layer in one of its forms with numbers drawn, ready to be timed."""
    parts = [part for level in decomposition.convolutions(convolution) for part in level]
    kernels = [torch.randn(part.kernel_shape).to(like) for part in parts]
    bias = like.new_zeros(convolution.out_channels)
    return _ready(decomposition.make_layer(convolution, kernels, bias, implementation), convolution)


def _ready(layer: nn.Module, convolution: ConvGeometry) -> nn.Module:
    layer = layer.eval().requires_grad_(False)
    return layer.to(memory_format=torch.channels_last) if convolution.dims == 2 else layer
