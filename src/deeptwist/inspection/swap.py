"""A copy of a model in which some modules are others, or batch norms folded into factors."""

import copy
import gc
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType, FunctionType, ModuleType, TracebackType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deeptwist.errors import DeepTwistError, first_line
from deeptwist.inspection.run import check_unwrapped
from deeptwist.inspection.tracing import has_compiled_forward
from deeptwist.inspection.weights import InProjection, get_layer
from deeptwist.layers.factored import FactoredLayer
from deeptwist.layers.routing import ChannelPermutation, SplitConcat

_ATOMS = (
    *(str, bytes, int, float, complex, bool, type(None)),
    *(type, ModuleType, CodeType, FrameType, TracebackType),
)


def swap(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of a model with other modules in the places of some of its own.

    The replacements are not copied, the modules that they replace neither. Tensors with a graph
    are detached in the copy; what cannot be copied, as a lock, is shared with it.

    Args:
        model: any network; left as it is.
        replacements: by the name of a module, the one that takes its place wherever it is used.

    Raises:
        DeepTwistError: if the model wraps another one, or cannot be copied.
    """
    check_unwrapped(model)
    # Seeded with the replacements, deepcopy never copies the weights that they replace.
    dense = {name: get_layer(model, name) for name in replacements}
    memo: dict[int, Any] = {id(dense[name]): new for name, new in replacements.items()}
    projections = {n: module for n, module in dense.items() if isinstance(module, InProjection)}
    memo |= {id(module.weight): None for module in projections.values()}
    for value in _referenced(model, frozenset(memo)):
        if isinstance(value, Tensor):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        elif not _is_copyable(value):
            memo[id(value)] = value
    try:
        small = copy.deepcopy(model, memo)
    except Exception as error:  # what a class does in __deepcopy__ is its own
        raise DeepTwistError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}"
        ) from error
    for name in projections:
        attention = small.get_submodule(name.rpartition(".")[0])
        attention.register_module(InProjection.NAME, replacements[name])
        del attention.in_proj_weight
        attention.in_proj_weight = replacements[name].weight  # what stands for one: no parameter
    for module in small.modules():
        # `torch.compile(model.forward)` would go on running the original.
        if has_compiled_forward(module):
            del module.forward
    return small


def stored_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of those modules that functions stored on a model still refer to."""
    wanted = {id(module): name for name, module in modules.items()}
    return [wanted[id(v)] for v in _referenced(model, frozenset()) if id(v) in wanted]


def _referenced(root: object, skipped: frozenset[int]) -> Iterator[object]:
    """Every object that can be reached from one, without what is only code."""
    visited, waiting = set(skipped), [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _ATOMS) or id(value) in visited:
            continue
        visited.add(id(value))
        yield value
        if isinstance(value, FunctionType):
            # Of its globals, only the networks that it names: all else is code.
            named = [value.__globals__.get(name) for name in value.__code__.co_names]
            waiting += [x for x in named if isinstance(x, nn.Module)]
            waiting += [*gc.get_referents(*(value.__closure__ or ())), value.__defaults__]
        elif not isinstance(value, Tensor):
            waiting += gc.get_referents(value)


def _is_copyable(value: object) -> bool:
    """Whether `copy.deepcopy` can take an object: locks, generators and open files it cannot."""
    kind = type(value)
    known = copy._deepcopy_dispatch  # type: ignore[attr-defined]
    if isinstance(value, nn.Module) or hasattr(kind, "__deepcopy__") or kind in known:
        return True
    try:
        value.__reduce_ex__(4)
    except Exception:  # it says so in ways of its own
        return False
    return True


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


@torch.no_grad()
def _fold(stages: list[nn.Module], norm: _BatchNorm) -> None:
    """Fold a batch norm over the output channels into the last module with weights."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    while isinstance(stages[-1], ChannelPermutation):
        order = cast(ChannelPermutation, stages.pop()).order.argsort()
        scale, shift = scale[order], shift[order]
    layers = [*stages[-1].layers] if isinstance(stages[-1], SplitConcat) else [stages[-1]]
    convolutions = [cast(nn.Conv2d, layer) for layer in layers]  # all have what is used here
    sizes = [layer.out_channels for layer in convolutions]
    parts = zip(convolutions, scale.split(sizes), shift.split(sizes), strict=True)
    for layer, factor, bias in parts:
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        if transposed and layer.groups > 1:
            raise DeepTwistError("a grouped transposed convolution cannot take batch norm's scale")
        if layer.bias is not None:
            bias = layer.bias * factor + bias
        shape = (1, -1) if transposed else (-1, 1)
        weight = layer.weight * factor.view(*shape, *[1] * (layer.weight.dim() - 2))
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
