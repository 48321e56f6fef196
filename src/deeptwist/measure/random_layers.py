"""Layers of random numbers, to be timed: how long one takes does not depend on its numbers."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from deeptwist.decompositions import Decomposition, FactoredLayer
from deeptwist.layers.geometry import ConvGeometry, LayerCall

Layer = TypeVar("Layer", bound=nn.Module)


def at_batch(call: LayerCall, examples: int, batch: int) -> LayerCall:
    """Return a call recorded on so many examples as a batch makes it."""
    return LayerCall(max(1, call.count * batch // examples), call.size)


def random_input(convolution: ConvGeometry, call: LayerCall, reference: Tensor) -> Tensor:
    """Return standard normal numbers of a call's shape; images in channels_last."""
    x = torch.randn(call.count, convolution.in_channels, *call.size).to(reference)
    return x.to(memory_format=torch.channels_last) if convolution.dims == 2 else x


def random_dense(convolution: ConvGeometry, reference: Tensor) -> nn.Module:
    """Return the layer of this geometry with random weights, ready to be timed."""
    kernel = torch.randn(convolution.kernel_shape).to(reference)
    bias = reference.new_zeros(convolution.out_channels)
    return _for_inference(convolution.make_module(kernel, bias), convolution)


def random_kernels(
    convolution: ConvGeometry, decomposition: Decomposition, reference: Tensor
) -> list[Tensor]:
    """Return random kernels of a factored layer, in the reference's type and place."""
    # Scaled so that a whole network of such layers neither overflows nor vanishes.
    return [
        (torch.randn(part.kernel_shape) * math.prod(part.kernel_shape[2:]) ** -0.5).to(reference)
        for part in decomposition.parts(convolution)
    ]


def random_factored(
    convolution: ConvGeometry, decomposition: Decomposition, reference: Tensor
) -> FactoredLayer:
    """Return the factored layer with random weights, ready to be timed."""
    kernels = random_kernels(convolution, decomposition, reference)
    bias = reference.new_zeros(convolution.out_channels)
    return _for_inference(decomposition.make_layer(convolution, kernels, bias), convolution)


def _for_inference(layer: Layer, convolution: ConvGeometry) -> Layer:
    layer = layer.eval().requires_grad_(False)
    return layer.to(memory_format=torch.channels_last) if convolution.dims == 2 else layer
