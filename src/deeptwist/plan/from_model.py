"""What a plan says of a model before it is planned, and the plan of a model that is decomposed."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from deeptwist.errors import DeepTwistError
from deeptwist.inspection.run import ExampleInput, Inputs
from deeptwist.inspection.usage import Layer, inspect_model
from deeptwist.layers.factored import factored_layers
from deeptwist.plan.plan import Plan
from deeptwist.plan.planned_layer import CompressedLayer, KeptLayer, PlannedLayer


def plan_from_model(decomposed: nn.Module, model: nn.Module, example_input: ExampleInput) -> Plan:
    """Return the plan that a decomposed model carries out, read from its factored layers.

    Args:
        decomposed: what `decompose` or `deeptwist.load` returned; `model` itself for a plan that
            compresses nothing but says what the model costs.
        model: the dense network.
        example_input: see `plan`.

    Raises:
        DeepTwistError: if a factored layer has no counterpart in `model`.
    """
    factored = factored_layers(decomposed)
    unplanned, layers = inspect_for_plan(model, Inputs.of(example_input))
    planned: list[PlannedLayer] = []
    for layer in layers:
        module = factored.pop(layer.names[0], None)
        if module is None:
            planned.append(KeptLayer.of(layer, layer.reason or "is dense in the decomposed model"))
        elif module.convolution != layer.convolution:
            raise DeepTwistError(
                f"layer {layer.names[0]!r} stands for ({module.convolution}) where the dense "
                f"model has ({layer.convolution})"
            )
        else:
            planned.append(CompressedLayer.of(layer, module.decomposition))
    if factored:
        raise DeepTwistError(f"the dense model has no layer {min(factored)!r}")
    return replace(unplanned, layers=tuple(planned))


def first_convolution(layers: Sequence[Layer]) -> Layer | None:
    """Return the convolution that runs first, linear layers not counted."""
    convolutions = [layer for layer in layers if layer.convolution and layer.convolution.dims]
    return min(convolutions, key=lambda layer: layer.call_order, default=None)


def batch_of(inputs: Inputs, layers: Sequence[Layer]) -> int | None:
    """Return how many examples the inputs hold; `None` where they have no batch in front."""
    first, x = first_convolution(layers), inputs.tensors[0]
    if x.dim() < 2 or not any(x is each for each in (*inputs.args, *inputs.kwargs.values())):
        return None  # a list of images is one example
    if first is not None and first.convolution and first.calls and first.calls[0].count == 1:
        # It saw one image: of a batch of one, or (c, h, w) without a batch.
        return 1 if len(x) == 1 and x.dim() != first.convolution.dims + 1 else None
    return len(x)


def inspect_for_plan(model: nn.Module, inputs: Inputs) -> tuple[Plan, tuple[Layer, ...]]:
    """Return what a plan says of the model whatever becomes of its layers; and these."""
    inspection = inspect_model(model, inputs)
    counted = sum(layer.weight_numel for layer in inspection.layers)
    examples = batch_of(inputs, inspection.layers) or 1
    plan = Plan(
        (),
        other_parameters=sum(p.numel() for p in model.parameters()) - counted,
        examples=examples,
        inputs=inputs.arguments,
        keywords=tuple(inputs.kwargs) if inputs.arguments else (),
        network_macs=None if inspection.macs is None else inspection.macs // examples,
    )
    return plan, inspection.layers
