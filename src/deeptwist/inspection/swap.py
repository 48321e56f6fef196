"""A copy of a model in which some modules are others."""

import copy
import gc
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType, FunctionType, ModuleType, TracebackType
from typing import Any

from torch import Tensor, nn

from deeptwist.errors import explaining
from deeptwist.inspection.run import check_unwrapped
from deeptwist.inspection.tracing import has_compiled_forward
from deeptwist.inspection.weights import InProjection, get_layer

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
    # What a class does in __deepcopy__ is its own.
    with explaining(f"{type(model).__name__} cannot be copied", errors=(Exception,)):
        small = copy.deepcopy(model, memo)
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
