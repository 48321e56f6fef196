"""The proof that a copy with factored layers computes what the dense network does."""

import logging
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deeptwist.decompositions.linalg import relative_error
from deeptwist.errors import DeepTwistError, first_line
from deeptwist.inspection.modes import FORWARD_ERRORS, output_tensors, undisturbed
from deeptwist.inspection.weights import get_layer, read_weight

logger = logging.getLogger("deeptwist")

Key = TypeVar("Key", bound=Hashable)

_TF32 = 2.0**-10  # the precision that cuDNN computes fp32 in, unless told otherwise


def run_counted(
    model: nn.Module, inputs: tuple[Tensor, ...], modules: Mapping[Key, nn.Module]
) -> tuple[list[Tensor], Counter[Key]]:
    """Run a model in evaluation mode and count how often each of these modules runs in it.

    Args:
        model: any network; left as it was.
        inputs: its positional inputs.
        modules: by name, of this model or of another one.

    Returns:
        All tensors of the output, and the number of calls by name.
    """
    counts: Counter[Key] = Counter()
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, inputs))
        for name, module in modules.items():

            def count(*_: Any, name: Key = name) -> None:
                counts[name] += 1

            stack.callback(module.register_forward_pre_hook(count).remove)
        return output_tensors(model(*inputs)), counts


def check_runs(
    small: nn.Module,
    dense: Mapping[str, nn.Module],
    inputs: tuple[Tensor, ...],
    expected: Mapping[str, int] | None = None,
) -> list[Tensor]:
    """Run a decomposed model and prove that its factored layers run, and no dense original.

    Args:
        small: the model with factored layers.
        dense: by name, the originals of its factored layers.
        inputs: its positional inputs.
        expected: by name, how often each layer should run; at least once if not given.

    Returns:
        All tensors of the output.

    Raises:
        DeepTwistError: if a factored layer does not run as often, or a dense original runs.
        Exception: whatever the model raises.
    """
    outputs, counts = _run_both(small, dense, inputs)
    for name in dense:
        times = 1 if expected is None else expected[name]
        if counts[name] < times or (expected is not None and counts[name] > times > 0):
            raise DeepTwistError(
                f"the factored layer {name!r} runs {counts[name]} times on the example input, "
                f"not {times}: {_STORED}"
            )
    return outputs


_STORED = (
    "if a function stored on the model (a wrapped forward, a lambda, a dispatch table) refers to "
    "the dense layer, store it after the model is decomposed; else exclude the layer"
)


def _run_both(
    small: nn.Module, dense: Mapping[str, nn.Module], inputs: tuple[Tensor, ...]
) -> tuple[list[Tensor], Counter[str]]:
    """Run a decomposed model; its outputs, and the number of calls of each factored layer.

    Raises:
        DeepTwistError: if a dense original runs.
    """
    factored = {("factored", name): small.get_submodule(name) for name in dense}
    originals = {("dense", name): module for name, module in dense.items()}
    outputs, counts = run_counted(small, inputs, {**factored, **originals})
    for name in dense:
        if counts["dense", name]:
            raise DeepTwistError(
                f"the decomposed {type(small).__name__} still runs the dense layer {name!r}: "
                f"{_STORED}"
            )
    return outputs, Counter({name: counts["factored", name] for name in dense})


def compare(
    model: nn.Module,
    small: nn.Module,
    calls: Mapping[str, int],
    inputs: tuple[Tensor, ...],
) -> float | None:
    """Prove that a decomposed model computes what the distorted one does.

    Args:
        model: the dense network, which holds the approximations as its weights.
        small: the decomposed one.
        calls: by the name of a factored layer, how often the plan says that it runs.
        inputs: the models' positional inputs.

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
    try:
        expected, dense_counts = run_counted(model, inputs, dense)
    except FORWARD_ERRORS as error:
        raise DeepTwistError(
            f"the model cannot run on the example input: {first_line(error)}"
        ) from error
    try:
        outputs, counts = _run_both(small, dense, inputs)
    except DeepTwistError:
        raise
    except FORWARD_ERRORS as error:
        raise DeepTwistError(
            f"the decomposed model cannot run: {first_line(error)}: a layer is used in other "
            "ways than calling it; exclude it"
        ) from error
    limit = coarsest_eps([*model.parameters(), *expected]) ** 0.5
    worst = _worst_difference(expected, outputs)
    if any(y.is_floating_point() and y.isnan().any() for y in (*expected, *outputs)):
        raise DeepTwistError("the outputs on the example input are NaN: nothing can be compared")
    is_met = worst is not None and worst <= limit
    # Equal to the last bit, outputs do not depend on the layers: a detector that detects nothing,
    # a head that is zero before it is trained.
    is_proof = is_met and worst != 0
    _check_counts(calls, dense_counts, counts, is_met)
    if is_proof:
        return worst
    layer, worst = _worst_layer(model, small, dense, inputs)
    if not worst <= limit:
        raise DeepTwistError(
            f"layer {layer!r} computes more than its weight says: factored, its output differs "
            f"by {worst:.1e} (at most {limit:.1e}); exclude it"
        )
    logger.info("the outputs prove nothing; each factored layer's own differ by %.1e", worst)
    return worst


def _check_counts(
    calls: Mapping[str, int],
    dense_counts: Mapping[str, int],
    counts: Mapping[str, int],
    is_met: bool,
) -> None:
    """Check that every factored layer ran as often as planned, or as its dense one did."""
    for name, planned in calls.items():
        # Where the outputs' number depends on numbers, so may the calls'.
        right = {planned, dense_counts[name]} - {0} if is_met else range(1, 2**31)
        if (planned or dense_counts[name]) and counts[name] not in right:
            raise DeepTwistError(
                f"the factored layer {name!r} runs {counts[name]} times, the dense one "
                f"{dense_counts[name] or planned}: {_STORED}"
            )


def _worst_difference(expected: Sequence[Tensor], outputs: Sequence[Tensor]) -> float | None:
    """Return the largest relative difference of any output; `None` if they are not comparable."""
    if [y.shape for y in expected] != [y.shape for y in outputs]:
        return None
    pairs = [
        (y, output)
        for y, output in zip(expected, outputs, strict=True)
        if y.is_floating_point() or y.is_complex()
    ]
    if not pairs:
        return None
    differences = [relative_error(y, output) for y, output in pairs]
    # NaN is no number to compare with: it must count as the worst.
    return max(math.inf if math.isnan(d) else d for d in differences)


def _worst_layer(
    model: nn.Module,
    small: nn.Module,
    dense: Mapping[str, nn.Module],
    inputs: tuple[Tensor, ...],
) -> tuple[str, float]:
    """The layer whose factors give the most different output, on random inputs of its own shape."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, inputs))
        stack.enter_context(undisturbed(small, inputs))
        for name, module in dense.items():

            def see(
                _: nn.Module, args: tuple[Any], kwargs: dict[str, Any], name: str = name
            ) -> None:
                seen[name] = [*args, *kwargs.values()][0]

            handle = module.register_forward_pre_hook(see, with_kwargs=True)
            stack.callback(handle.remove)
        model(*inputs)
    differences: dict[str, float] = {}
    with undisturbed(model), undisturbed(small):
        for name, module in dense.items():
            # Not the layer's own input: where that has all but vanished, it is rounding alone.
            # A layer whose weight is read, not called, has none.
            x = torch.randn_like(seen[name] if name in seen else read_weight(module))
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
