"""Ranks chosen anew on the way, by the weights as training has made them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from deeptwist.decompose import get_planned_module
from deeptwist.decompositions import from_dict
from deeptwist.inspection.layers import Layer
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
    candidates = [
        [Candidate(costs, (option.relative_error or 0.0) ** 2) for option, costs in of_layer]
        for of_layer in options
    ]
    limits = [sum(kind) for kind in zip(*(own.costs for own, *_ in candidates), strict=True)]
    chosen = allocate(candidates, limits)
    compressed = (of_layer[index][0] for of_layer, index in zip(options, chosen, strict=True))
    return replace(plan, compressed=tuple(compressed))


def with_decompositions(plan: Plan, decompositions: Mapping[str, dict[str, Any]]) -> Plan:
    """Return a plan with these decompositions, by layer, as `Decomposition.to_dict` wrote them."""
    compressed = (
        replace(layer, decomposition=from_dict(decompositions[layer.name]))
        for layer in plan.compressed
    )
    return replace(plan, compressed=tuple(compressed))


def _options(
    model: nn.Module, layer: CompressedLayer
) -> list[tuple[CompressedLayer, tuple[int, int]]]:
    """Return a layer at its own ranks, then at many others, each with its weights and MACs."""
    module = get_planned_module(model, layer)
    names = (layer.name, *layer.aliases)
    read = Layer(module, names, layer.weight_numel, layer.convolution, layer.calls, 0, None)
    errors = LayerErrors(read, None)
    method = layer.decomposition.without_rank()
    own = layer.decomposition
    forms = {
        own: layer_costs(layer.convolution, layer.calls, own),
        **smaller_forms(layer.convolution, layer.calls, method, rank_multiple=1),
    }
    return [
        (
            replace(
                layer,
                decomposition=form,
                relative_error=errors.error(layer.convolution, form),
                implementation=layer.implementation if form == own else None,
            ),
            costs,
        )
        for form, costs in forms.items()
    ]
