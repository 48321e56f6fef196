"""How a network is run for a look at it: in evaluation mode, uncompiled, and left as it was."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # what the exporters themselves flatten outputs with

from deeptwist.errors import DeepTwistError, first_line

# What networks raise where their input, or a module of theirs, is not what they were made for.
FORWARD_ERRORS = (
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def explaining(problem: str, advice: str = "") -> Iterator[None]:
    """Turn what a network raises inside into one line: the problem, torch's words, the advice.

    Raises:
        DeepTwistError: in place of `FORWARD_ERRORS`.
    """
    try:
        yield
    except DeepTwistError:
        raise
    except FORWARD_ERRORS as error:
        words = [problem, first_line(error), *([advice] if advice else [])]
        raise DeepTwistError(": ".join(words)) from error


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


def as_tuple(example_input: object) -> tuple[Tensor, ...]:
    """Return a model's positional inputs, given one tensor or a tuple of them.

    Raises:
        DeepTwistError: if it is neither.
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


@contextmanager
def preserving_state(model: nn.Module, inputs: tuple[Tensor, ...] = ()) -> Iterator[None]:
    """Run what is inside in evaluation mode, without gradients or compilation.

    Buffers, the modules' attributes and modes, and the random number generators are put back;
    random numbers are the same every time.
    """
    # Outputs that a module keeps for a loss belong to the caller's run, not to this one; so do
    # hooks that it registers on its first run, in dictionaries of its own.
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    dictionaries = [
        (value, dict(value))
        for _, own in attributes
        for value in own.values()
        if type(value) in (dict, OrderedDict)
    ]
    # An expanded buffer cannot be written to.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if 0 not in buffer.stride()]
    gpus = {x.device for x in (*inputs, *model.parameters()) if x.is_cuda}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(gpus)))
        # Compiled functions run as they were written: hooks then see every call.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
            for module, own in attributes:
                vars(module).clear()
                vars(module).update(own)
            for dictionary, entries in dictionaries:
                dictionary.clear()
                dictionary.update(entries)
