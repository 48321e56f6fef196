"""From weights to factors to the decomposed model: the swap of every planned layer."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deeptwist.decompositions import Factors
from deeptwist.errors import FORWARD_ERRORS, DeepTwistError, explaining
from deeptwist.inspection.proof import check_runs, example_inputs, run_counted
from deeptwist.inspection.run import ExampleInput, Inputs, read_batches
from deeptwist.inspection.swap import swap
from deeptwist.inspection.weights import Kept, Weight, get_layer, get_weight, weight_of
from deeptwist.layers.factored import FactoredLayer, factored_layers
from deeptwist.layers.geometry import compute_dtype, weight_to_kernel
from deeptwist.measure.layer_clock import random_kernels
from deeptwist.plan.calibration import Calibration
from deeptwist.plan.codec import encode
from deeptwist.plan.plan import CompressedLayer, Plan

logger = logging.getLogger("deeptwist")


def planned_weight(model: nn.Module, layer: CompressedLayer) -> Weight:
    """Return the weight of the model's layer that a planned layer names.

    Raises:
        DeepTwistError: if the model has no such layer, or one of another geometry.
    """
    try:
        module = get_layer(model, layer.name)
    except AttributeError as error:
        raise DeepTwistError(
            f"the plan is for another model: this {type(model).__name__} has no {layer.name!r}"
        ) from error
    if isinstance(module, FactoredLayer):
        raise DeepTwistError(f"layer {layer.name!r} is decomposed already")
    weight = weight_of(module)
    if isinstance(weight, Weight) and weight.geometry == layer.convolution:
        return weight
    kind = f"is {type(module).__name__}({module.extra_repr()})"
    raise DeepTwistError(
        f"the plan is for another model: layer {layer.name!r} was ({layer.convolution}), "
        f"here it {weight.reason if isinstance(weight, Kept) else kind}"
    )


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
        planned_weight(model, layer)
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
    weights = {layer.name: planned_weight(model, layer).read() for layer in plan.compressed}
    check_finite(weights)
    moments = calibration.moments if calibration else {}
    return {
        layer.name: layer.decomposition.decompose(
            weight_to_kernel(weights[layer.name], layer.convolution),
            second_moment=moments.get(layer.name),
        )
        for layer in plan.compressed
    }


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Checks that no weight is NaN or infinite.

    Raises:
        DeepTwistError: if one is, naming its layer.
    """
    # By their norms first, asked for together: to ask every number takes longer than a distortion,
    # and an accelerator is waited for once.
    norms = frobenius_norms(weights.values())
    for (name, weight), norm in zip(weights.items(), norms, strict=True):
        if not math.isfinite(norm) and not weight.isfinite().all():
            raise DeepTwistError(f"layer {name!r} has weights that are NaN or infinite")


def frobenius_norms(weights: Iterable[Tensor]) -> list[float]:
    """Return ‖W‖_F of every weight; infinite where its square is beyond the computing type."""
    return to_floats([torch.linalg.vector_norm(w, dtype=compute_dtype(w.dtype)) for w in weights])


def to_floats(scalars: Sequence[Tensor]) -> list[float]:
    """Return tensors of one number, on any devices; an accelerator is waited for once."""
    return torch.stack([x.to(scalars[0].device) for x in scalars]).tolist() if scalars else []


def decompose(model: nn.Module, plan: Plan, *, calibration: Calibration | None = None) -> nn.Module:
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
    factors = factorize(model, plan, calibration)
    small = replace_layers(model, plan, {name: f.kernels() for name, f in factors.items()})
    if not plan.inputs or not plan.compressed:
        return small
    inputs = example_inputs(model, plan.inputs, plan.keywords)
    prefer_channels_last(small, inputs)
    try:
        check_runs(model, small, {x.name: len(x.calls) for x in plan.compressed}, inputs)
    except DeepTwistError:
        try:
            run_counted(model, inputs)
        except FORWARD_ERRORS:  # random numbers are no input for this network
            logger.warning("%s cannot run on random inputs: unchecked", type(model).__name__)
        else:
            raise
    return small


def prefer_channels_last(model: nn.Module, inputs: Inputs) -> None:
    """Hold 2-D convolutions' weights in channels_last, in place, unless the network cannot run so.

    What such a convolution puts out is in channels_last too, whatever its input: a network that
    goes on with a `view` of it may depend on the other format.
    """
    before = {p: p.data for p in convolution_weights(model)}
    set_channels_last(model)
    try:
        run_counted(model, inputs)
    except FORWARD_ERRORS:
        for parameter, data in before.items():
            parameter.data = data


def set_channels_last(model: nn.Module) -> None:
    """Hold 2-D convolutions' weights in channels_last; the parameters stay the same objects."""
    for parameter in convolution_weights(model):
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def is_channels_last(model: nn.Module) -> bool:
    """Whether any 2-D convolution's weight is held in channels_last, and not in both formats."""
    return any(
        weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        for weight in convolution_weights(model)
    )


def convolution_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return what 2-D convolutions hold as weights, or compute them from."""
    kinds = nn.Conv2d, nn.ConvTranspose2d
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    return [p for layer in layers for p in layer.parameters() if p.dim() == 4]


def dry_run(model: nn.Module, plan: Plan, example_input: ExampleInput | None = None) -> None:
    """Run a copy of a model with factored layers of random numbers, and throw it away.

    What can fail because of the model fails here, before the training and not after it.

    Raises:
        DeepTwistError: if the model cannot be copied, or cannot run with factored layers.
    """
    kernels = {}
    with torch.random.fork_rng(devices=[]):  # the numbers are the same every time
        torch.default_generator.manual_seed(0)
        for layer in plan.compressed:
            reference = planned_weight(model, layer).parameters[0]
            kernels[layer.name] = random_kernels(layer.convolution, layer.decomposition, reference)
    small = replace_layers(model, plan, kernels)
    inputs = example_inputs(model, plan.inputs, plan.keywords, example_input)
    check_runs(model, small, dict.fromkeys(kernels), inputs)


def keep_frozen(model: nn.Module, plan: Plan) -> Plan:
    """Return the plan with layers that do not train kept dense, and name them in one warning.

    Where none of the planned layers trains, all are to be compressed as they are.
    """

    def is_frozen(layer: CompressedLayer) -> bool:
        return not any(p.requires_grad for p in planned_weight(model, layer).parameters)

    frozen = [layer for layer in plan.compressed if is_frozen(layer)]
    if not frozen or len(frozen) == len(plan.compressed):
        return plan
    names = ", ".join(repr(layer.name) for layer in frozen)
    logger.warning("kept dense, because their weights do not train (requires_grad): %s", names)
    kept = {layer.name: layer.kept("is frozen (requires_grad=False)") for layer in frozen}
    return replace(plan, layers=tuple(kept.get(x.name, x) for x in plan.layers))


def materialize_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy in which plain layers hold these weights, by name; the model without any."""
    plain: dict[str, nn.Module] = {}
    for name, values in weights.items():
        weight = get_weight(model, name)
        bias = None if weight.bias is None else weight.bias.detach()
        dense = weight.geometry.make_module(weight_to_kernel(values, weight.geometry), bias)
        plain[name] = dense if weight.padding is None else nn.Sequential(weight.padding, dense)
    return swap(model, plain) if plain else model


def replace_layers(model: nn.Module, plan: Plan, kernels: Mapping[str, list[Tensor]]) -> nn.Module:
    """Return a copy of the model with a factored layer, of these kernels, for every planned one."""
    factored: dict[str, nn.Module] = {}
    for layer in plan.compressed:
        weight = planned_weight(model, layer)
        if weight.has_hooks:
            logger.warning("layer %r carries hooks, which its factors will not", layer.name)
        factored[layer.name] = new = _make_factored(weight, layer, kernels[layer.name])
        new.planned_call = plan.inputs, plan.keywords
    small = swap(model, factored)
    if is_channels_last(model):
        set_channels_last(small)
    if hasattr(small, "save_pretrained"):
        _mark_pretrained(small)
    return small


def _mark_pretrained(small: nn.Module) -> None:
    """Have transformers' config name the factored layers, for `from_pretrained` to make them.

    It knows them once `deeptwist.integrations.transformers` is imported, and warns until then.
    """
    config: Any = getattr(small, "config", None)
    if not hasattr(config, "to_diff_dict"):  # diffusers', say
        logger.warning(
            "save_pretrained of this %s leaves factored layers that from_pretrained does not make: "
            "use deeptwist.save and deeptwist.load",
            type(small).__name__,
        )
        return
    layers = {
        name: {"convolution": encode(m.convolution), "decomposition": encode(m.decomposition)}
        for name, m in factored_layers(small).items()
    }
    config.quantization_config = {"quant_method": "deeptwist", "layers": layers}


def _make_factored(dense: Weight, layer: CompressedLayer, kernels: list[Tensor]) -> FactoredLayer:
    """Return the factored layer of these kernels, in the dense one's type, mode and place."""
    weight, bias = dense.read(), dense.bias
    factored = layer.decomposition.make_layer(
        layer.convolution,
        [kernel.to(weight.dtype) for kernel in kernels],
        None if bias is None else bias.detach(),
    )
    if dense.padding is not None:
        factored.pad_input(dense.padding)
    factored.train(dense.module.training)
    factored.requires_grad_(any(parameter.requires_grad for parameter in dense.parameters))
    if bias is not None:
        for name, parameter in factored.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(bias.requires_grad)
    return factored


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module, batches: Iterable[Any], *, inputs: Callable[[Any], ExampleInput] | None = None
) -> nn.Module:
    """Return a copy whose batch norms hold the mean statistics of these batches.

    Args:
        model: deployed; left as it is.
        batches: see `deeptwist.calibrate`.
        inputs: see `deeptwist.calibrate`.

    Raises:
        DeepTwistError: if there is no batch, or one that a batch norm sees one number a channel of.
    """
    model = swap(model, {}).eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all that it sees
        norm.train()
    device = next(model.parameters()).device
    problem = f"{type(model).__name__} gives batch norm no statistics on such a batch"
    for x in read_batches(batches, inputs, device):
        with explaining(problem, "give batches of more images"):
            x.run(model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
