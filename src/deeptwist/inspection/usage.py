"""What a model is made of: its layers, how an example uses them, and which are safe to touch."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from deeptwist.errors import FORWARD_ERRORS, DeepTwistError, explaining
from deeptwist.inspection.run import Inputs, check_unwrapped, preserving_state
from deeptwist.inspection.tracing import FunctionCall, FunctionWatch, has_compiled_forward
from deeptwist.inspection.weights import Kept, Weight, named_layers, weight_of
from deeptwist.layers.factored import factored_layers
from deeptwist.layers.geometry import ConvGeometry, LayerCall


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
        weight: what it computes with; `None` where it must be kept.
        reason: why it must be kept; `None` where it can be decomposed.
    """

    module: nn.Module
    names: tuple[str, ...]
    weight_numel: int
    convolution: ConvGeometry | None
    calls: tuple[LayerCall, ...]
    call_order: int
    weight: Weight | None
    reason: str | None


def inspect_model(model: nn.Module, inputs: Inputs) -> tuple[tuple[Layer, ...], int | None]:
    """Find a model's layers and how an example input uses them.

    Args:
        model: any network; run once on `inputs`, in evaluation mode, and left as it was.
        inputs: what the model is called with.

    Returns:
        Every module that holds weights itself, in the model's order; and the multiply-accumulates
        of the whole network on all examples, attention and other products of matrices included;
        `None` where torch could not count them.

    Raises:
        DeepTwistError: if the model wraps another one, has layers to initialise, or cannot run on
            the inputs.
    """
    check_unwrapped(model)
    names, weights = _find_weights(model)
    holders: dict[Tensor, list[nn.Module]] = {}
    for module, weight in weights.items():
        for parameter in weight.parameters:
            holders.setdefault(parameter, []).append(module)
    usage, macs = _trace_usage(model, inputs, lambda: _Usage(weights, holders))
    order = [*usage.calls, *(module for module in weights if module not in usage.calls)]
    call_order = {module: number for number, module in enumerate(order)}
    factored = {part for layer in factored_layers(model).values() for part in layer.modules()}

    def inspect_layer(module: nn.Module, weight: Weight | Kept) -> Layer:
        reason = _reason(weight)
        if module in factored:
            reason = "is part of a factored layer"
        sharing = [x for p in weight.parameters for x in holders[p] if x is not module]
        if sharing and not reason:
            reason = f"shares its weight with {names[sharing[0]][0]!r}"
        reason = reason or usage.unsupported.get(module)
        if not usage.calls.get(module):
            reason = reason or "is not called on the example input"
        weight_numel = sum(p.numel() for p in weight.parameters if holders[p][0] is module)
        if weight.geometry and not reason:  # what weight norm holds besides is no weight
            weight_numel = min(weight_numel, weight.geometry.weight_numel)
        return Layer(
            module=module,
            names=tuple(names[module]),
            weight_numel=weight_numel,
            convolution=weight.geometry,
            calls=tuple(usage.calls.get(module, [])),
            call_order=call_order[module],
            weight=None if reason or isinstance(weight, Kept) else weight,
            reason=reason,
        )

    return tuple(inspect_layer(module, weight) for module, weight in weights.items()), macs


def _find_weights(
    model: nn.Module,
) -> tuple[dict[nn.Module, list[str]], dict[nn.Module, Weight | Kept]]:
    """The names and the weight of every module that holds weights itself, in the model's order."""
    names: dict[nn.Module, list[str]] = {}
    weights: dict[nn.Module, Weight | Kept] = {}
    for name, module in named_layers(model):
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise DeepTwistError(f"layer {name!r} is not initialised: run the model once first")
        # The weights in a parametrization count as those of the module that has it.
        if module not in names and not isinstance(module, parametrize.ParametrizationList):
            weight = weight_of(module)
            if weight.parameters:
                weights[module] = weight
        if module in weights:
            names.setdefault(module, []).append(name)
    return names, weights


def _reason(weight: Weight | Kept) -> str | None:
    """Why a module must be kept, whatever the model does with it."""
    if isinstance(weight, Kept):
        return weight.reason
    if "forward" in vars(weight.module) and not has_compiled_forward(weight.module):
        return "has a forward of its own, stored on the module"
    if weight.has_hooks:
        return "has hooks (pruning, …), which a factored layer would lose"
    return None


def _trace_usage(
    model: nn.Module, inputs: Inputs, usage: Callable[[], "_Usage"]
) -> tuple["_Usage", int | None]:
    """Run a model once; what it does with its layers, and all its MACs, where they can be counted.

    Raises:
        DeepTwistError: if the model cannot run on the inputs.
    """
    counter = FlopCounterMode(display=False)
    try:
        return usage().follow(model, inputs, counter), int(counter.get_total_flops()) // 2
    except FORWARD_ERRORS:
        # Either the model or the counter failed.
        with explaining(f"{type(model).__name__} cannot run on the example input {inputs}"):
            return usage().follow(model, inputs, nullcontext()), None


class _Usage:
    """Follows layers' calls by hooks, and reads of their weights through torch's functions.

    Attributes:
        calls: by layer, in order of first use: every use, `F.linear` on its weight included.
        unsupported: by layer, a use that no factored layer serves.
    """

    def __init__(
        self, weights: Mapping[nn.Module, Weight | Kept], holders: Mapping[Tensor, list[nn.Module]]
    ):
        self.calls: dict[nn.Module, list[LayerCall]] = {}
        self.unsupported: dict[nn.Module, str] = {}
        self._layers = {m: (x.geometry.dims, x.padding) for m, x in weights.items() if x.geometry}
        # By the id of a weight's parameter.
        self._owners = {id(p): m[0] for p, m in holders.items() if m[0] in self._layers}
        self._running: list[nn.Module] = []

    def follow(
        self, model: nn.Module, inputs: Inputs, counter: AbstractContextManager[object]
    ) -> "_Usage":
        """Run a model, and return this."""
        with ExitStack() as stack:
            stack.enter_context(preserving_state(model, inputs))
            for module in self._layers:
                options = {"with_kwargs": True, "prepend": True}
                stack.enter_context(module.register_forward_pre_hook(self._enter, **options))
                stack.enter_context(module.register_forward_hook(self._leave, always_call=True))
            # The counter knows not every fused attention, the processor's for one.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(counter)
            stack.enter_context(FunctionWatch(self._see))
            inputs.run(model)
        return self

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(module)
        arguments, (dims, padding) = [*args, *kwargs.values()], self._layers[module]
        if len(arguments) != 1 or not isinstance(x := arguments[0], Tensor):
            self.unsupported[module] = "is called with more than its input"
        elif kwargs and "input" not in kwargs:
            self.unsupported[module] = f"is called with a keyword of its own ({min(kwargs)}=)"
        elif dims == 0:
            self._add_call(module, x.shape[:-1].numel())
        else:
            size = x.shape[-dims:]
            if padding is not None:
                size = padding(torch.empty(1, *size, device="meta")).shape[-dims:]
            self._add_call(module, x.shape[0] if x.dim() == dims + 2 else 1, tuple(size))

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self._running.pop()

    def _add_call(self, module: nn.Module, count: int, size: tuple[int, ...] = ()) -> None:
        self.calls.setdefault(module, []).append(LayerCall(count, size))

    def _see(self, call: FunctionCall) -> None:
        for argument in call.given:
            module = self._owners.get(id(argument))
            if module is not None and module not in self._running:
                self._read(module, call)

    def _read(self, module: nn.Module, call: FunctionCall) -> None:
        """Note that a function is given a layer's weight by another module."""
        func, values = call.func, call.named("input", "weight", "bias")
        name, is_linear = getattr(func, "__name__", str(func)), isinstance(module, nn.Linear)
        if name == "linear" and is_linear and id(values["weight"]) in self._owners:
            self._add_call(module, values["input"].shape[:-1].numel())
            return
        if func is functional.multi_head_attention_forward and is_linear:
            given = inspect.signature(func).bind(*call.args, **call.kwargs).arguments
            role = next(key for key, value in given.items() if value is module.weight)
            if role != "in_proj_weight" or given["query"] is given["key"] is given["value"]:
                self._add_call(module, given[_PROJECTED.get(role, "query")].shape[:-1].numel())
                return
            self.unsupported[module] = "projects keys or values of other inputs than queries"
        self.unsupported.setdefault(
            module, f"has a weight that its owner reads ({name.strip('_')})"
        )


_PROJECTED = {"k_proj_weight": "key", "v_proj_weight": "value"}  # the others: the query
