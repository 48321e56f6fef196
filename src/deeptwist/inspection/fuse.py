"""Batch norm folded into the factored layer before it."""

from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from deeptwist.errors import DeepTwistError, first_line
from deeptwist.inspection.swap import swap
from deeptwist.layers.factored import FactoredLayer
from deeptwist.layers.routing import ChannelPermutation, SplitConcat


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FactoredLayer) or super().is_leaf_module(m, module_qualified_name)


def fuse(model: nn.Module) -> nn.Module:
    """Return a copy for inference with batch norm folded into the last factors before it.

    Args:
        model: what `decompose`, `DeepTwist.finish` or `load` returned. Save it before: a fused
            network is for export and use, and cannot be saved for `load`.

    Returns:
        The copy, in evaluation mode; batch norms that are folded are `nn.Identity` in it. Dense
        convolutions keep theirs.

    Raises:
        DeepTwistError: if torch.fx cannot trace the model.
    """
    small = swap(model, {}).eval().requires_grad_(False)
    try:
        graph = _Tracer().trace(small)
    except Exception as error:  # a forward may fail to be traced in any way
        raise DeepTwistError(
            f"torch.fx cannot trace {type(model).__name__}: {first_line(error)}"
        ) from error
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [small.get_submodule(str(node.target)) for node in calls]
    for node, norm in zip(calls, targets, strict=True):
        source = node.args[0]
        if not isinstance(norm, _BatchNorm) or not isinstance(source, fx.Node):
            continue
        if source.op != "call_module" or len(source.users) > 1 or norm.running_mean is None:
            continue
        layer = small.get_submodule(str(source.target))
        is_used_once = targets.count(layer) == 1 and targets.count(norm) == 1
        if isinstance(layer, FactoredLayer) and layer.convolution.dims and is_used_once:
            _fold(list(layer), norm)
            parent, _, name = str(node.target).rpartition(".")
            setattr(small.get_submodule(parent), name, nn.Identity())
    return small


def _fold(stages: list[nn.Module], norm: _BatchNorm) -> None:
    """Fold a batch norm over the output channels into the last module with weights."""
    statistics = [
        cast(Tensor | None, getattr(norm, name))
        for name in ("running_mean", "running_var", "weight", "bias")
    ]
    while isinstance(stages[-1], ChannelPermutation):
        order = cast(ChannelPermutation, stages.pop()).order.argsort()
        statistics = [None if x is None else x[order] for x in statistics]
    layers = [*stages[-1].layers] if isinstance(stages[-1], SplitConcat) else [stages[-1]]
    start = 0
    for layer in map(_as_convolution, layers):
        own = slice(start, start + layer.out_channels)
        start = own.stop
        mean, variance, weight, bias = [None if x is None else x[own] for x in statistics]
        assert mean is not None
        assert variance is not None
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        if transposed and layer.groups > 1:
            raise DeepTwistError("a grouped transposed convolution cannot take batch norm's scale")
        with torch.no_grad():
            layer.weight, layer.bias = fuse_conv_bn_weights(
                layer.weight, layer.bias, mean, variance, norm.eps, weight, bias, transposed
            )


def _as_convolution(module: nn.Module) -> nn.Conv2d:
    return cast(nn.Conv2d, module)  # all of torch's have what is used here
