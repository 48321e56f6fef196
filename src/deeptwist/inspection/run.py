"""How a network is called, and run for a look at it: uncompiled, and left as it was."""

import copy
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # what the exporters themselves flatten outputs with

from deeptwist.errors import DeepTwistError
from deeptwist.inspection.tracing import class_name


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and every module back to its own mode afterwards."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


Argument = tuple[tuple[int, ...], str] | float | bool | str | None  # a tensor's shape and type
_LABELS = "label", "labels"


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a network is called with: ``network(*args, **kwargs)``.

    Attributes:
        args: positional arguments: tensors, lists and dicts of them, and anything else.
        kwargs: the same by keyword.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example_input: "ExampleInput") -> "Inputs":
        """Return the call that a tensor, a tuple of arguments or a dict of keyword arguments makes.

        Raises:
            DeepTwistError: if it is none of these, or holds no tensor.
        """
        if isinstance(example_input, Mapping):
            inputs = cls(kwargs=dict(example_input))
        elif isinstance(example_input, Inputs):
            inputs = example_input
        else:
            inputs = cls(example_input if isinstance(example_input, tuple) else (example_input,))
        if isinstance(example_input, list) or not inputs.tensors:
            given = (*inputs.args, *inputs.kwargs.values())
            raise DeepTwistError(
                f"the example input ({', '.join(type(x).__name__ for x in given)}) is neither a "
                "tensor, nor a tuple of arguments or a dict of keyword arguments with a tensor"
            )
        return inputs

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors in the arguments, in order."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """Return what JSON can say of the arguments, keyword arguments last; none of no others."""
        given = [*self.args, *self.kwargs.values()]
        if not all(isinstance(x, Tensor | float | int | str | None) for x in given):
            return ()
        return tuple(
            (tuple(x.shape), str(x.dtype).removeprefix("torch.")) if isinstance(x, Tensor) else x
            for x in given
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """Return the call with every tensor changed."""
        changed = pytree.tree_map_only(Tensor, change, (self.args, dict(self.kwargs)))
        return Inputs(*changed)

    def to(self, device: torch.device | str) -> "Inputs":
        """Return the call with its tensors on a device."""
        return self.map(lambda x: x.to(device))

    def run(self, model: Callable[..., Any]) -> Any:
        """Call a network."""
        return model(*self.args, **self.kwargs)

    def __str__(self) -> str:
        return ", ".join(str(tuple(x.shape)) for x in self.tensors)


ExampleInput = Tensor | tuple[Any, ...] | Mapping[str, Any] | Inputs


def read_batches(
    batches: Iterable[Any],
    inputs: Callable[[Any], ExampleInput] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Inputs]:
    """Yield what a network is called with for each batch; see `deeptwist.calibrate`.

    Raises:
        DeepTwistError: if a batch cannot be read, or if there is none.
    """
    batch = None
    for batch in batches:
        yield Inputs.of((inputs or _first_input)(batch)).to(device)
    if batch is None:
        raise DeepTwistError(
            "there is no batch: the loader is empty, or a generator that an earlier call used up "
            "(give a list or a loader)"
        )


def _first_input(batch: Any) -> ExampleInput:
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(x, Mapping):
        return {name: value for name, value in x.items() if name not in _LABELS}
    if not isinstance(x, Tensor | Inputs):
        raise DeepTwistError(
            f"a batch is a {type(batch).__name__} without a tensor or a dict first: say with "
            "inputs= how to read it"
        )
    return x


class TensorCall(nn.Module):
    """A network as a function of the tensors with a batch that it is called with.

    Whatever else it is called with is fixed.
    """

    def __init__(self, model: nn.Module, inputs: Inputs):
        super().__init__()
        self.model = model
        self._leaves, self._spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors to call it with."""
        return tuple(x for x in self._leaves if _has_batch(x))

    def forward(self, *tensors: Tensor) -> Any:
        """Call the network."""
        values = iter(tensors)
        leaves = [next(values) if _has_batch(x) else x for x in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return self.model(*args, **kwargs)


def _has_batch(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def of_tensors(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a network of positional tensors alone, and these: itself, where it is one."""
    if not inputs.kwargs and all(map(_has_batch, inputs.args)):
        return model, inputs.args
    call = TensorCall(model, inputs)
    call.training = model.training
    return call, call.tensors


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


@contextmanager
def preserving_state(model: nn.Module, inputs: Inputs | None = None) -> Iterator[None]:
    """Run what is inside in evaluation mode, without gradients or compilation.

    Buffers, the modules' attributes and modes, what lists, dicts and tensors among these hold, and
    the random number generators are put back; random numbers are the same every time.
    """
    containers, tensors = _state_of(model)
    used = [*(inputs.tensors if inputs else ()), *model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng({x.device for x in used if x.is_cuda}))
        # Compiled functions run as they were written: hooks then see every call.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        try:
            yield
        finally:
            for container, before in containers:
                container.clear()
                is_list = isinstance(container, list | deque)
                (container.extend if is_list else container.update)(before)
            for tensor, values in tensors:
                if not torch.equal(tensor, values):  # a copy would end a graph that it is part of
                    tensor.copy_(values)


def _state_of(model: nn.Module) -> tuple[list[tuple[Any, Any]], list[tuple[Tensor, Tensor]]]:
    """Return what a run may change: containers and tensors that modules hold, each with a copy.

    Outputs that a module keeps for a loss belong to the caller's run, not to this one; so do a
    neuron's potential, and hooks that it registers on its first run. No run writes parameters.
    """
    containers, tensors, visited = [], [], set()
    waiting: list[Any] = [vars(module) for module in model.modules()]
    while waiting:
        value = waiting.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if type(value) in (dict, OrderedDict, list, deque, set):
            containers.append((value, copy.copy(value)))
        if type(value) in (dict, OrderedDict):
            waiting += value.values()
        elif type(value) in (list, deque, tuple):
            waiting += value
        elif type(value) is Tensor and _is_writable(value):
            tensors.append((value, value.detach().clone()))
    return containers, tensors


def _is_writable(x: Tensor) -> bool:
    """Whether a tensor has numbers of its own that can be put back: what is expanded has not."""
    is_plain = x.layout is torch.strided and not x.is_meta
    return is_plain and not x.is_inference() and 0 not in x.stride()


_WRAPPERS = {  # the attribute that holds the network
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "ultralytics.engine.model.Model": "model",
}
_COMPILED = "_orig_mod"  # what a network's own class never calls a module


def check_unwrapped(model: nn.Module) -> None:
    """Check that a network is itself, whole, and not what wraps or shards it.

    Raises:
        DeepTwistError: naming the attribute to give in its place.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise DeepTwistError(f"a {kind} is no network: give the nn.Module, its weights in it")
    for name, module in model.named_modules():
        kinds = map(class_name, type(module).__mro__)
        inside = next((_WRAPPERS[kind] for kind in kinds if kind in _WRAPPERS), None)
        what = f"{name!r} in this {type(model).__name__}" if name else "this"
        if inside is not None and (not name or inside == _COMPILED):
            raise DeepTwistError(
                f"{what} is a {type(module).__name__} around the network: give its .{inside}"
            )
        own = module.parameters(recurse=False)
        if type(module).__name__ == "FullyShardedDataParallel" or any(map(_is_sharded, own)):
            raise DeepTwistError(
                f"{what} is a {type(module).__name__} whose weights are sharded among processes: "
                "plan and decompose the network before it is (FSDP), or gather it first"
            )


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "device_mesh")  # a DTensor, whose import takes a second
