"""Batch norm folded into the convolutions before it, as a run on an example shows them."""

from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from deeptwist.errors import DeepTwistError, explaining
from deeptwist.inspection.proof import coarsest_eps, example_inputs, run_counted, worst_difference
from deeptwist.inspection.run import ExampleInput, Inputs, output_tensors, preserving_state
from deeptwist.inspection.swap import swap
from deeptwist.inspection.tracing import FunctionWatch
from deeptwist.inspection.weights import Weight, weight_of
from deeptwist.layers.factored import FactoredLayer, factored_layers


class FoldedNorm(nn.Identity):
    """Stands where a norm was folded; to a tool that folds it again, one that does nothing."""

    weight = bias = None
    eps = 0.0

    def __init__(self, norm: _BatchNorm):
        super().__init__()
        mean = cast(Tensor, norm.running_mean)
        self.register_buffer("running_mean", torch.zeros_like(mean), persistent=False)
        self.register_buffer("running_var", torch.ones_like(mean), persistent=False)


def fuse(model: nn.Module, example_input: ExampleInput | None = None) -> nn.Module:
    """Return a copy for inference with batch norm folded into the convolutions before it.

    Which norm follows which convolution, and that nothing else uses what is between them, is seen
    on one run; no tracer is needed.

    Args:
        model: what `decompose`, `DeepTwist.finish` or `load` returned. Save it before: a fused
            network is for export and use, and cannot be saved for `load`.
        example_input: see `plan`; without it, standard normal numbers of the shapes that the
            network was planned on.

    Returns:
        The copy, in evaluation mode; batch norms that are folded are of the class `nn.Identity`.

    Raises:
        DeepTwistError: if the model cannot run on the example, there is none, or the copy computes
            something else on it.
    """
    planned = (layer.planned_call for layer in factored_layers(model).values())
    arguments, keywords = next(filter(any, planned), ((), ()))
    if example_input is None and not arguments:
        raise DeepTwistError(
            f"it is not known what this {type(model).__name__} is called with: give example_input"
        )
    inputs = example_inputs(model, arguments, keywords, example_input)
    with explaining(f"{type(model).__name__} cannot run on {inputs}", "give example_input"):
        expected, pairs = _follow(model, inputs)
    norms = {name: FoldedNorm(cast(_BatchNorm, model.get_submodule(name))) for name in pairs}
    small = swap(model, norms).eval()
    for name, layer_name in pairs.items():
        layer, norm = small.get_submodule(layer_name), cast(_BatchNorm, model.get_submodule(name))
        fold: Any = fuse_conv_bn_weights  # its annotations know of tensors alone
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        is_transposed = isinstance(layer, _ConvTransposeNd)
        layer.weight, layer.bias = fold(layer.weight, layer.bias, *statistics, is_transposed)
    small.requires_grad_(False)
    worst = worst_difference(expected, run_counted(small, inputs)[0])
    # Beside integers, numbers may be in another order: boxes by their scores.
    is_comparable = all(y.is_floating_point() for y in expected) and worst is not None
    if is_comparable and worst > coarsest_eps([*model.parameters(), *expected]) ** 0.5:
        raise DeepTwistError(
            f"{type(model).__name__} uses its layers in ways that a run does not show: with batch "
            f"norm folded its outputs differ by {worst:.1e}"
        )
    return small


def _follow(model: nn.Module, inputs: Inputs) -> tuple[list[Tensor], dict[str, str]]:
    """Run a model; its outputs, and by the name of a norm the convolution that it alone follows."""
    names = {module: name for name, module in model.named_modules()}
    inner = {part for m in factored_layers(model).values() for part in [*m.modules()][1:]}
    layers = [m for m in names if m not in inner and _is_convolution(m)]
    norms = [m for m in names if isinstance(m, _BatchNorm) and _is_foldable(m)]
    calls: list[nn.Module] = []
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # by its id, and who made it; so it is kept
    users: dict[nn.Module, list[nn.Module | None]] = {layer: [] for layer in layers}
    running: list[nn.Module] = []

    def use(tensors: Any) -> None:
        for x in tensors:
            if id(x) in made:
                users[made[id(x)][0]].append(running[-1] if running else None)

    def leave(module: nn.Module, args: object, output: Tensor) -> None:
        calls.append(module)
        made[id(output)] = module, output

    def leave_norm(module: nn.Module, args: object, output: object) -> None:
        calls.append(running.pop())

    with ExitStack() as stack:
        stack.enter_context(preserving_state(model, inputs))
        for layer in layers:
            stack.enter_context(layer.register_forward_hook(leave))
        for norm in norms:
            enter = norm.register_forward_pre_hook(lambda module, _: running.append(module))
            stack.enter_context(enter)
            stack.enter_context(norm.register_forward_hook(leave_norm))
        with FunctionWatch(lambda call: use(call.given)):
            outputs = output_tensors(inputs.run(model))
        use(outputs)
    pairs = {}
    for layer, seen in users.items():
        user = seen[0] if len(seen) == 1 else None
        if user is not None and calls.count(layer) == calls.count(user) == 1:
            pairs[names[user]] = names[layer]
    return outputs, pairs


def _is_convolution(module: nn.Module) -> bool:
    if isinstance(module, FactoredLayer):
        return module.convolution.dims > 0
    weight = weight_of(module)
    if type(weight) is not Weight or weight.has_hooks:
        return False
    geometry = weight.geometry  # torch takes no groups in a transposed one
    return geometry.dims > 0 and not (geometry.transposed and geometry.groups > 1)


def _is_foldable(norm: _BatchNorm) -> bool:
    """Whether a norm is torch's own and nothing more: a subclass may hold an activation."""
    is_plain = type(norm).forward in (_BatchNorm.forward, SyncBatchNorm.forward)
    return is_plain and norm.running_mean is not None and not norm._forward_hooks
