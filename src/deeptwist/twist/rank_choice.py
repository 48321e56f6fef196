"""Ranks chosen anew on the way, by the weights as training has made them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from deeptwist.decompose import get_planned_module
from deeptwist.decompositions import from_dict
from deeptwist.inspect.layers import Layer
from deeptwist.plan.allocation import Candidate, allocate
from deeptwist.plan.budget import layer_costs, smaller_forms
from deeptwist.plan.layer_errors import LayerErrors
from deeptwist.plan.plan import Plan
from deeptwist.plan.planned_layer import CompressedLayer


def choose_ranks_anew(model: nn.Module, plan: Plan) -> Plan:
    """Return a plan with the ranks that lose least by the model's weights as they are now.

    The sum of the layers' relative squared errors is made least under two budgets: the layers
    together hold no more weights and do no more MACs than planned. Which layers are compressed,
    and by which methods, stays.

    Raises:
        DeepTwistError: if a weight is not finite, naming the layer.
    """
    options = [_options(model, layer) for layer in plan.compressed]
    costs = [
        [layer_costs(o.convolution, o.calls, o.decomposition) for o in layer] for layer in options
    ]
    limits = [sum(kind) for kind in zip(*(layer[0] for layer in costs), strict=True)]
    candidates = [
        [Candidate(cost, (o.relative_error or 0.0) ** 2) for o, cost in zip(*pair, strict=True)]
        for pair in zip(options, costs, strict=True)
    ]
    chosen = allocate(candidates, limits)
    layers = {o[index].name: o[index] for o, index in zip(options, chosen, strict=True)}
    return plan.with_layers(layers.get(layer.name, layer) for layer in plan.layers)


def with_decompositions(plan: Plan, decompositions: Mapping[str, dict[str, Any]]) -> Plan:
    """Return a plan with these decompositions, by layer, as `Decomposition.to_dict` wrote them."""
    layers = {
        layer.name: replace(layer, decomposition=from_dict(decompositions[layer.name]))
        for layer in plan.compressed
    }
    return plan.with_layers(layers.get(layer.name, layer) for layer in plan.layers)


def _options(model: nn.Module, layer: CompressedLayer) -> list[CompressedLayer]:
    """Return a layer at its own ranks, and at many others."""
    module = get_planned_module(model, layer)
    names = (layer.name, *layer.aliases)
    read = Layer(module, names, layer.weight_numel, layer.convolution, layer.calls, 0, None)
    errors = LayerErrors(read, None)
    method = layer.decomposition.without_rank()
    forms = [
        layer.decomposition,
        *smaller_forms(layer.convolution, layer.calls, method, rank_multiple=1),
    ]
    return [
        replace(
            layer,
            decomposition=form,
            relative_error=errors.error(layer.convolution, form),
            implementation=layer.implementation if form == layer.decomposition else None,
        )
        for form in forms
    ]
