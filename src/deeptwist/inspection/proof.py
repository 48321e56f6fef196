"""The proof that a copy with factored layers runs, and computes what the dense network does."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeptwist.decompositions.linalg import relative_error
from deeptwist.errors import DeepTwistError, explaining
from deeptwist.inspection.run import (
    Argument,
    ExampleInput,
    Inputs,
    output_tensors,
    preserving_state,
)
from deeptwist.inspection.weights import get_layer

logger = logging.getLogger("deeptwist")

_TF32 = 2.0**-10  # the precision that cuDNN computes fp32 in, unless told otherwise
_STORED = (
    "if a function stored on the model (a wrapped forward, a lambda, a dispatch table) refers to "
    "the dense layer, store it after the model is decomposed; else exclude the layer"
)


def run_counted(
    model: nn.Module,
    inputs: Inputs,
    modules: Iterable[nn.Module] = (),
    see: Callable[[nn.Module, Any], None] = lambda module, x: None,
) -> tuple[list[Tensor], Counter[nn.Module]]:
    """Run a model in evaluation mode and count how often each of these modules runs in it.

    Args:
        model: any network; left as it was.
        inputs: what it is called with.
        modules: of this model or of another one.
        see: called with each of them, before it runs, and its first argument.

    Returns:
        All tensors of the output, and the number of calls by module.
    """
    counts: Counter[nn.Module] = Counter()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts[module] += 1
        see(module, next(iter((*args, *kwargs.values())), None))

    with ExitStack() as stack:
        stack.enter_context(preserving_state(model, inputs))
        for module in modules:
            stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        return output_tensors(inputs.run(model)), counts


def check_runs(
    model: nn.Module, small: nn.Module, calls: Mapping[str, int | None], inputs: Inputs
) -> None:
    """Prove that a decomposed model runs its factored layers, and no dense original.

    Args:
        model: the dense network; not run.
        small: the decomposed one.
        calls: by the name of a factored layer, how often it should run; at least once if `None`.
        inputs: what the models are called with.

    Raises:
        DeepTwistError: if a factored layer does not run as often, a dense original runs, or the
            decomposed model cannot run.
    """
    dense = {name: get_layer(model, name) for name in calls}
    _, counts = _run_factored(small, dense, inputs)
    _check_counts(counts, {name: None if n is None else {n} - {0} for name, n in calls.items()})


def check_equivalent(
    model: nn.Module, small: nn.Module, calls: Mapping[str, int], inputs: Inputs
) -> float | None:
    """Prove that a decomposed model computes what the distorted one does.

    Args:
        model: the dense network, which holds the approximations as its weights.
        small: the decomposed one.
        calls: by the name of a factored layer, how often the plan says that it runs.
        inputs: what the models are called with.

    Returns:
        The largest ‖y − y′‖ / ‖y‖ of any output; where outputs cannot be compared number by
        number, because they are sorted, filtered or integers, or do not depend on the layers, of
        any factored layer's own output.
        `None` where no layer is factored.

    Raises:
        DeepTwistError: if it is above the square root of the precision of the coarsest type that
            is computed in, if a factored layer does not run, or if a model cannot run.
    """
    dense = {name: get_layer(model, name) for name in calls}
    with explaining("the model cannot run on the example input"):
        expected, dense_counts = run_counted(model, inputs, dense.values())
    outputs, counts = _run_factored(small, dense, inputs)
    limit = coarsest_eps([*model.parameters(), *expected]) ** 0.5
    worst = worst_difference(expected, outputs)
    if any(y.is_floating_point() and y.isnan().any() for y in (*expected, *outputs)):
        raise DeepTwistError("the outputs on the example input are NaN: nothing can be compared")
    is_met = worst is not None and worst <= limit
    right = {name: {planned, dense_counts[dense[name]]} - {0} for name, planned in calls.items()}
    # Where the outputs' number depends on numbers, so may the calls'.
    _check_counts(counts, {name: n if is_met or not n else None for name, n in right.items()})
    # Equal to the last bit, outputs do not depend on the layers: a detector that detects nothing,
    # a head that is zero before it is trained.
    if is_met and worst != 0:
        return worst
    layer, worst = _worst_layer(model, small, dense, inputs)
    if not worst <= limit:
        raise DeepTwistError(
            f"layer {layer!r} computes more than its weight says: factored, its output differs "
            f"by {worst:.1e} (at most {limit:.1e}); exclude it"
        )
    logger.info("the outputs prove nothing; each factored layer's own differ by %.1e", worst)
    return worst


def _run_factored(
    small: nn.Module, dense: Mapping[str, nn.Module], inputs: Inputs
) -> tuple[list[Tensor], Mapping[str, int]]:
    """Run a decomposed model; its outputs, and the number of calls of each factored layer."""
    factored = {name: small.get_submodule(name) for name in dense}
    with explaining(
        "the decomposed model cannot run",
        "exclude the layer that this names, if it is used in other ways than calling it, or give "
        "another example input",
    ):
        outputs, counts = run_counted(small, inputs, [*factored.values(), *dense.values()])
    for name, original in dense.items():
        if counts[original]:
            raise DeepTwistError(
                f"the decomposed {type(small).__name__} still runs the dense layer {name!r}: "
                f"{_STORED}"
            )
    return outputs, {name: counts[module] for name, module in factored.items()}


def _check_counts(counts: Mapping[str, int], right: Mapping[str, set[int] | None]) -> None:
    """Check that layers ran a right number of times: `None` is once at least, none are any."""
    for name, numbers in right.items():
        is_right = counts[name] > 0 if numbers is None else not numbers or counts[name] in numbers
        if not is_right:
            often = "once at least" if numbers is None else f"{numbers} times"
            raise DeepTwistError(
                f"the factored layer {name!r} runs {counts[name]} times on the example input, "
                f"not {often}: {_STORED}"
            )


def worst_difference(expected: Sequence[Tensor], outputs: Sequence[Tensor]) -> float | None:
    """Return the largest relative difference of any output; `None` if they are not comparable."""
    if [y.shape for y in expected] != [y.shape for y in outputs]:
        return None
    differences = [
        relative_error(y, output)
        for y, output in zip(expected, outputs, strict=True)
        if y.is_floating_point() or y.is_complex()
    ]
    # NaN is no number to compare with: it must count as the worst.
    return max((math.inf if math.isnan(d) else d for d in differences), default=None)


def _worst_layer(
    model: nn.Module, small: nn.Module, dense: Mapping[str, nn.Module], inputs: Inputs
) -> tuple[str, float]:
    """The layer whose factors give the most different output, on random inputs of its own shape."""
    seen: dict[nn.Module, Tensor] = {}
    run_counted(model, inputs, dense.values(), seen.__setitem__)
    differences: dict[str, float] = {}
    with preserving_state(model), preserving_state(small):
        for name, module in dense.items():
            # Not the layer's own input: where that has all but vanished, it is rounding alone.
            # A linear layer whose weight is read, not called, has none. Of the weight's type: what
            # was seen may be autocast's.
            weight = cast(Tensor, module.weight)
            x = torch.randn_like(seen.get(module, weight), dtype=weight.dtype)
            difference = relative_error(module(x), small.get_submodule(name)(x))
            differences[name] = math.inf if math.isnan(difference) else difference
    return max(differences.items(), key=lambda item: item[1], default=("", 0.0))


def coarsest_eps(tensors: Sequence[Tensor]) -> float:
    """Return the relative precision that a network of these tensors may be computed in."""
    floats = [x for x in tensors if x.is_floating_point()]
    devices = {x.device.type for x in floats}
    types = {x.dtype for x in floats}
    types |= {torch.get_autocast_dtype(kind) for kind in devices if torch.is_autocast_enabled(kind)}
    precisions = [torch.finfo(dtype).eps for dtype in types]
    if "cuda" in devices and torch.float32 in types:
        precisions.append(_TF32)
    return max(precisions)


def example_inputs(
    model: nn.Module,
    arguments: Sequence[Argument],
    keywords: Sequence[str] = (),
    example_input: ExampleInput | None = None,
) -> Inputs:
    """Return inputs on the model's device: those given, or standard normal numbers, or zeros.

    Args:
        model: one that is of one floating-point type as a whole gets it in place of another.
        arguments: what it is called with; of a tensor, its shape and the name of its type.
        keywords: the names of the last of them, which are keyword arguments.
        example_input: what is taken instead, if given.
    """
    device = next(model.parameters()).device
    if example_input is not None:
        return Inputs.of(example_input).to(device)
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    generator = torch.Generator().manual_seed(0)
    given: list[Any] = []
    for argument in arguments:
        if not isinstance(argument, tuple):
            given.append(argument)
            continue
        shape, dtype = argument[0], cast(torch.dtype, getattr(torch, argument[1]))
        if dtype.is_floating_point and len(types) == 1:
            (dtype,) = types
        x = torch.zeros(shape)
        if dtype.is_floating_point or dtype.is_complex:
            x = torch.randn(shape, generator=generator, device="cpu")
        given.append(x.to(device, dtype))
    count = len(given) - len(keywords)
    return Inputs(tuple(given[:count]), dict(zip(keywords, given[count:], strict=True)))
