"""What a plan says of a model before it is planned, and the plan of a model that is decomposed."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from deeptwist.decompositions import FactoredLayer
from deeptwist.errors import DeepTwistError
from deeptwist.inspection.run import as_tuple
from deeptwist.inspection.usage import Layer, inspect_model
from deeptwist.plan.plan import Plan
from deeptwist.plan.planned_layer import CompressedLayer, KeptLayer, PlannedLayer


def plan_from_model(
    decomposed: nn.Module, model: nn.Module, example_input: Tensor | tuple[Tensor, ...]
) -> Plan:
    """Return the plan that a decomposed model carries out, read from its factored layers.

    Args:
        decomposed: what `decompose` or `deeptwist.load` returned; `model` itself for a plan that
            compresses nothing but says what the model costs.
        model: the dense network.
        example_input: see `plan`.

    Raises:
        DeepTwistError: if a factored layer has no counterpart in `model`.
    """
    factored = {
        name: module
        for name, module in decomposed.named_modules()
        if isinstance(module, FactoredLayer)
    }
    unplanned, layers = inspect_for_plan(model, as_tuple(example_input))
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


def batch_of(inputs: tuple[Tensor, ...], layers: Sequence[Layer]) -> int | None:
    """Return how many examples the inputs hold; `None` where they have no batch in front."""
    first, x = first_convolution(layers), inputs[0]
    if x.dim() < 2:
        return None
    if first is not None and first.convolution and first.calls and first.calls[0].count == 1:
        # It saw one image: of a batch of one, or (c, h, w) without a batch.
        return 1 if len(x) == 1 and x.dim() != first.convolution.dims + 1 else None
    return len(x)


def inspect_for_plan(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Plan, tuple[Layer, ...]]:
    """Return what a plan says of the model whatever becomes of its layers; and these."""
    inspection = inspect_model(model, inputs)
    counted = sum(layer.weight_numel for layer in inspection.layers)
    examples = batch_of(inputs, inspection.layers) or 1
    plan = Plan(
        (),
        other_parameters=sum(p.numel() for p in model.parameters()) - counted,
        examples=examples,
        inputs=tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs),
        network_macs=None if inspection.macs is None else inspection.macs // examples,
    )
    return plan, inspection.layers
