"""What a model is made of: layers with weights, how they are used, and which are safe to touch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree  # what the exporters themselves flatten outputs with

from deeptwist.decompositions import FactoredLayer
from deeptwist.errors import DeepTwistError, first_line
from deeptwist.layers.cost import LayerCall
from deeptwist.layers.geometry import SUPPORTED_MODULES, ConvGeometry

# What networks raise where they are given what they are not made for.
FORWARD_ERRORS = (
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layer:
    """One module with weights.

    Attributes:
        module: the module.
        names: its names in the model; more than one where the model uses it more than once.
        weight_numel: its weights, bias not counted; those of an earlier layer count there.
        convolution: its geometry; none where it cannot be read.
        calls: how the example input used it, in order.
        turn: when the example input first reached it: 0, 1, …; after all others if never.
        reason: why it must be kept; none where it can be decomposed.
    """

    module: nn.Module
    names: tuple[str, ...]
    weight_numel: int
    convolution: ConvGeometry | None
    calls: tuple[LayerCall, ...]
    turn: int
    reason: str | None


def layers_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Layer]:
    """Every module that holds weights itself, in the model's order.

    Args:
        model: any network; run once on `inputs`, in evaluation mode, and left as it was.
        inputs: the model's positional inputs.

    Raises:
        DeepTwistError: if the model has layers to initialise, or cannot run on the inputs.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise DeepTwistError(f"layer {name!r} is not initialised: run the model once first")
        if _weights(module):
            names.setdefault(module, []).append(name)
    holders: dict[Tensor, list[str]] = {}
    for module, (name, *_) in names.items():
        for parameter in _weights(module):
            holders.setdefault(parameter, []).append(name)
    factored = _inside(model, FactoredLayer)
    read = _inside(model, nn.MultiheadAttention, nn.TransformerEncoderLayer)
    calls, surprises = _record_calls(model, inputs, list(names))
    turns = {module: turn for turn, module in enumerate(calls)}
    layers = []
    for module, found in names.items():
        own = [p for p in _weights(module) if holders[p][0] == found[0]]
        sharing = [name for p in _weights(module) for name in holders[p] if name != found[0]]
        convolution, misfit = _geometry(module)
        reason = (
            ("is part of a factored layer" if module in factored else None)
            or ("has a weight that torch's attention reads directly" if module in read else None)
            or _unreadable(module)
            or misfit
            or (f"shares its weight with {sharing[0]!r}" if sharing else None)
            or surprises.get(module)
            or (None if calls[module] else "is not called on the example input")
        )
        layers.append(
            Layer(
                module=module,
                names=tuple(found),
                weight_numel=sum(p.numel() for p in own),
                convolution=convolution,
                calls=tuple(calls[module]),
                turn=turns[module],
                reason=reason,
            )
        )
    return layers


def _inside(model: nn.Module, *kinds: type[nn.Module]) -> set[nn.Module]:
    """All modules within those of some kinds, these included."""
    return {
        part for module in model.modules() if isinstance(module, kinds) for part in module.modules()
    }


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """The module's own parameters that are a matrix at least."""
    weights = []
    for parameter in module.parameters(recurse=False):
        if sum(side > 1 for side in parameter.shape) > 1 or _is_kernel(module, parameter):
            weights.append(parameter)
    if parametrize.is_parametrized(module):
        weights += [*module.get_submodule("parametrizations").parameters()]
    return weights


def _is_kernel(module: nn.Module, parameter: nn.Parameter) -> bool:
    return isinstance(module, SUPPORTED_MODULES) and parameter is getattr(module, "weight", None)


def _geometry(module: nn.Module) -> tuple[ConvGeometry | None, str | None]:
    if not isinstance(module, SUPPORTED_MODULES):
        return None, None
    try:
        return ConvGeometry.from_module(module), None
    except DeepTwistError as error:
        return None, f"has an unusual geometry: {error}"


def _unreadable(module: nn.Module) -> str | None:
    """Why the module's computation is not known to be that of its plain weight."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "has a parametrized weight: torch.nn.utils.parametrize.remove_parametrizations first"
    if kind not in SUPPORTED_MODULES:
        known = isinstance(module, SUPPORTED_MODULES)
        return f"is a {kind.__name__}, " + (
            "a subclass that may compute something else" if known else "not a convolution"
        )
    if "forward" in vars(module):
        return "has a forward of its own"
    if has_hooks(module):
        return "carries hooks (weight_norm, pruning, …), which a factored layer would lose"
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return "has a weight that is not a plain parameter"
    if weight.dtype not in _FLOATS:
        return f"has weights of type {weight.dtype}".replace("torch.", "")
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    return bool(any(hooks) or module._backward_pre_hooks)


def as_tuple(example_input: object) -> tuple[Tensor, ...]:
    """A model's positional inputs, of the one or the tuple that was given.

    Raises:
        DeepTwistError: if it is neither a tensor nor a tuple of tensors.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        kinds = ", ".join(type(x).__name__ for x in inputs)
        raise DeepTwistError(
            f"the example input ({kinds}) is neither a tensor nor a tuple of tensors"
        )
    return inputs


def output_tensors(output: object) -> list[Tensor]:
    """Return all tensors of a model's output: nested containers, dataclasses, plain objects."""
    return _tensors_in(output, set())


def _tensors_in(output: object, visited: set[int]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif id(leaf) not in visited and not isinstance(leaf, type | ModuleType | nn.Module):
            visited.add(id(leaf))  # an object may hold itself
            tensors += _tensors_in(dict(getattr(leaf, "__dict__", {})), visited)
    return tensors


def _record_calls(
    model: nn.Module, inputs: tuple[Tensor, ...], modules: list[nn.Module]
) -> tuple[dict[nn.Module, list[LayerCall]], dict[nn.Module, str]]:
    """How the inputs use each module, in order of first use, and the uses that no factors serve."""
    calls: dict[nn.Module, list[LayerCall]] = {}
    surprises: dict[nn.Module, str] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        given = [*args, *kwargs.values()]
        if len(given) != 1 or not isinstance(given[0], Tensor):
            surprises[module] = "is called with more than its input"
            return
        calls.setdefault(module, []).append(_call(module, given[0]))

    readable = [module for module in modules if isinstance(module, SUPPORTED_MODULES)]
    # One that is expanded cannot be written to.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if 0 not in buffer.stride()]
    handles = [module.register_forward_hook(record, with_kwargs=True) for module in readable]
    try:
        with eval_mode(model), torch.no_grad():
            model(*inputs)
    except FORWARD_ERRORS as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise DeepTwistError(
            f"{type(model).__name__} cannot run on the example input {shapes}: {first_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    for module in modules:
        calls.setdefault(module, [])
    return calls, surprises


def _call(module: nn.Module, x: Tensor) -> LayerCall:
    if isinstance(module, nn.Linear):
        return LayerCall(x.shape[:-1].numel(), ())
    dims = len(ConvGeometry.from_module(module).kernel_size)
    return LayerCall(x.shape[0] if x.dim() == dims + 2 else 1, tuple(x.shape[-dims:]))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode and every module back to what it was afterwards."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
