"""From weights to factors to the decomposed model: the swap of every planned layer."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from deeptwist.decompositions import FactoredLayer, Factors
from deeptwist.errors import DeepTwistError, first_line
from deeptwist.inspection.modes import FORWARD_ERRORS, as_tuple
from deeptwist.inspection.swap import swap
from deeptwist.inspection.verify import check_runs, run_counted
from deeptwist.inspection.weights import (
    class_reason,
    get_layer,
    has_hooks,
    input_padding,
    layer_geometry,
    read_weight,
    weight_parameters,
)
from deeptwist.layers.geometry import ConvGeometry, compute_dtype, weight_to_kernel
from deeptwist.plan.calibration import Calibration, to_device
from deeptwist.plan.plan import Plan
from deeptwist.plan.planned_layer import CompressedLayer

logger = logging.getLogger("deeptwist")

Inputs = Tensor | tuple[Tensor, ...]
Dense = nn.Conv2d | nn.Linear  # what every layer that can be planned looks like: weight and bias


def get_planned_module(model: nn.Module, layer: CompressedLayer) -> Dense:
    """Return the model's module that a planned layer names.

    Raises:
        DeepTwistError: if the model has no such module, or one of another geometry.
    """
    try:
        module = get_layer(model, layer.name)
    except AttributeError as error:
        raise DeepTwistError(
            f"the plan is for another model: this {type(model).__name__} has no {layer.name!r}"
        ) from error
    if isinstance(module, FactoredLayer):
        raise DeepTwistError(f"layer {layer.name!r} is decomposed already")
    reason = class_reason(module)
    if reason is None and layer_geometry(module) != layer.convolution:
        reason = f"is {type(module).__name__}({getattr(module, 'extra_repr', str)()})"
    if reason is not None:
        raise DeepTwistError(
            f"the plan is for another model: layer {layer.name!r} was ({layer.convolution}), "
            f"here it {reason}"
        )
    return cast(Dense, module)


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Check that a plan is for this model.

    Raises:
        DeepTwistError: if a layer is missing, different or planned twice, or a count is wrong.
    """
    names = [layer.name for layer in plan.layers]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DeepTwistError(f"the plan has layer {min(twice)!r} twice")
    for layer in plan.compressed:
        get_planned_module(model, layer)
    parameters = sum(p.numel() for p in model.parameters())
    if plan.inputs and plan.dense_parameters != parameters:
        raise DeepTwistError(
            f"the plan is for another model: it counts {plan.dense_parameters:,} parameters, this "
            f"{type(model).__name__} has {parameters:,}"
        )


@torch.no_grad()
def factorize(
    model: nn.Module, plan: Plan, calibration: Calibration | None = None
) -> dict[str, Factors]:
    """The factors of every compressed layer's weight as it is now; the model is not touched.

    Raises:
        DeepTwistError: if a weight is not finite, naming the layer; or if the plan is for
            another model.
    """
    weights = {
        layer.name: read_weight(get_planned_module(model, layer)) for layer in plan.compressed
    }
    check_finite(weights)
    moments = calibration.moments if calibration else {}
    factors = {}
    for layer in plan.compressed:
        kernel = weight_to_kernel(weights[layer.name], layer.convolution)
        # A loop that runs under autocast must not have its factors computed in bf16.
        with torch.autocast(kernel.device.type, enabled=False):
            factors[layer.name] = layer.decomposition.decompose(
                kernel, second_moment=to_device(moments.get(layer.name), kernel)
            )
    return factors


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Checks that no weight is NaN or infinite.

    Raises:
        DeepTwistError: if one is, naming its layer.
    """
    # By their norms first, asked for together: to ask every number takes longer than a distortion,
    # and an accelerator is waited for once.
    for (name, weight), norm in zip(weights.items(), norms(weights.values()), strict=True):
        if not math.isfinite(norm) and not weight.isfinite().all():
            raise DeepTwistError(f"layer {name!r} has weights that are NaN or infinite")


def norms(weights: Iterable[Tensor]) -> list[float]:
    """‖W‖_F of every weight; infinite where its square is beyond the computing type."""
    return numbers([torch.linalg.vector_norm(w, dtype=compute_dtype(w.dtype)) for w in weights])


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Scalars, on any devices, as numbers; an accelerator is waited for once."""
    return torch.stack([x.to(scalars[0].device) for x in scalars]).tolist() if scalars else []


def decompose(
    model: nn.Module,
    plan: Plan,
    *,
    calibration: Calibration | None = None,
) -> nn.Module:
    """The decomposed model: a copy in which every planned layer is held by its factors.

    The factors start from the weights as they are now. The copy shares nothing with `model`,
    has no bias where the source layer had none, and can be trained on: conventional fine-tuning.

    Args:
        model: the network that was planned.
        plan: see `deeptwist.plan`.
        calibration: what `calibrate` returned; factors then lose least of the layers' outputs,
            in place of the weights, in every layer that it holds.

    Raises:
        DeepTwistError: if a weight is not finite, or if the plan is for another model.
    """
    check_plan(model, plan)
    kernels = {
        name: factors.kernels() for name, factors in factorize(model, plan, calibration).items()
    }
    small = replace_layers(model, plan, kernels)
    if plan.inputs:
        _check_decomposed(model, small, plan)
    return small


def _check_decomposed(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Prove, on inputs of the planned shapes, that the factored layers run in a decomposed model.

    Raises:
        DeepTwistError: if one does not run, a dense original does, or the model cannot run.
    """
    inputs = example_inputs(model, plan)
    dense = {layer.name: get_layer(model, layer.name) for layer in plan.compressed}
    try:
        check_runs(small, dense, inputs, {x.name: len(x.calls) for x in plan.compressed})
    except DeepTwistError:
        raise
    except FORWARD_ERRORS as error:
        try:
            run_counted(model, inputs, {})
        except FORWARD_ERRORS:  # random numbers are no input for this network
            logger.warning("%s cannot run on random inputs: unchecked", type(model).__name__)
            return
        raise DeepTwistError(f"the decomposed model cannot run: {first_line(error)}") from error


def dry_run(model: nn.Module, plan: Plan, example_input: Inputs | None = None) -> None:
    """Run a copy of a model with factored layers of random numbers, and throw it away.

    What can fail because of the model fails here, before the training and not after it.

    Raises:
        DeepTwistError: if the model cannot be copied, or cannot run with factored layers.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def random_kernel(part: ConvGeometry, device: torch.device) -> Tensor:
        kernel = torch.empty(part.kernel_shape, device=device)
        if not kernel.is_meta:
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
            kernel.normal_(0, math.prod(part.kernel_shape[2:]) ** -0.5, generator=generator)
        return kernel

    kernels = {}
    for layer in plan.compressed:
        device = read_weight(get_planned_module(model, layer)).device
        parts = layer.decomposition.parts(layer.convolution)
        kernels[layer.name] = [random_kernel(part, device) for part in parts]
    small = replace_layers(model, plan, kernels)
    inputs = example_inputs(model, plan, example_input)
    dense = {layer.name: get_layer(model, layer.name) for layer in plan.compressed}
    advice = "exclude the layer that it names, or pass another example_input"
    try:
        check_runs(small, dense, inputs)
    except DeepTwistError:
        raise
    except FORWARD_ERRORS as error:
        raise DeepTwistError(
            f"{type(model).__name__} cannot run with factored layers: {first_line(error)}: {advice}"
        ) from error


def example_inputs(
    model: nn.Module, plan: Plan, example_input: Inputs | None = None
) -> tuple[Tensor, ...]:
    """Return inputs on the model's device: those given, or random ones of the planned shapes.

    Random ones have the planned types; a model that was planned in one floating-point type and is
    another as a whole gets its own.
    """
    device = next(model.parameters()).device
    if example_input is not None:
        return tuple(x.to(device) for x in as_tuple(example_input))
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for shape, name in plan.inputs:
        dtype: torch.dtype = getattr(torch, name)
        if dtype.is_floating_point and len(types) == 1:
            (dtype,) = types
        is_number = dtype.is_floating_point or dtype.is_complex
        x = torch.zeros(shape, dtype=dtype)
        inputs.append(
            (
                torch.randn(shape, generator=generator, device="cpu").to(dtype) if is_number else x
            ).to(device)
        )
    return tuple(inputs)


def keep_frozen(model: nn.Module, plan: Plan) -> Plan:
    """Return the plan with layers that do not train kept dense, and name them in one warning.

    Where none of the planned layers trains, all are to be compressed as they are.
    """

    def is_frozen(layer: CompressedLayer) -> bool:
        parameters = weight_parameters(get_layer(model, layer.name))
        return not any(parameter.requires_grad for parameter in parameters)

    frozen = [layer for layer in plan.compressed if is_frozen(layer)]
    if not frozen or len(frozen) == len(plan.compressed):
        return plan
    names = ", ".join(repr(layer.name) for layer in frozen)
    logger.warning("kept dense, because their weights do not train (requires_grad): %s", names)
    kept = {layer.name: layer.kept("is frozen (requires_grad=False)") for layer in frozen}
    return plan.with_layers(kept.get(layer.name, layer) for layer in plan.layers)


def with_plain_weights(model: nn.Module, plan: Plan, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy in which layers that compute their weight hold these; the model if none do."""
    plain: dict[str, nn.Module] = {}
    for layer in plan.compressed:
        if layer.name not in weights:
            continue
        module = get_planned_module(model, layer)
        kernel = weight_to_kernel(weights[layer.name], layer.convolution)
        bias = None if module.bias is None else module.bias.detach()
        dense, padding = layer.convolution.make_module(kernel, bias), input_padding(module)
        plain[layer.name] = dense if padding is None else nn.Sequential(padding, dense)
    return swap(model, plain) if plain else model


def replace_layers(model: nn.Module, plan: Plan, kernels: Mapping[str, list[Tensor]]) -> nn.Module:
    """Return a copy of the model with a factored layer, of these kernels, for every planned one."""
    factored: dict[str, nn.Module] = {}
    for layer in plan.compressed:
        module = get_planned_module(model, layer)
        if has_hooks(module):
            logger.warning("layer %r carries hooks, which its factors will not", layer.name)
        factored[layer.name] = _factored(module, layer, kernels[layer.name])
    return swap(model, factored)


def _factored(module: Dense, layer: CompressedLayer, kernels: list[Tensor]) -> FactoredLayer:
    weight, bias = read_weight(module), module.bias
    factored = layer.decomposition.make_layer(
        layer.convolution,
        [kernel.to(weight.dtype) for kernel in kernels],
        None if bias is None else bias.detach(),
    )
    padding = input_padding(module)
    if padding is not None:
        factored.pad_input(padding)
    is_channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    if weight.dim() == 4 and is_channels_last and not weight.is_contiguous():
        factored = factored.to(memory_format=torch.channels_last)
    factored.train(module.training)
    is_trained = any(parameter.requires_grad for parameter in weight_parameters(module))
    factored.requires_grad_(is_trained)
    if bias is not None:
        for name, parameter in factored.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(bias.requires_grad)
    return factored
