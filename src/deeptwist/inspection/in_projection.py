"""The projection inside torch's attention, as a layer with a name of its own.

Torch's attention holds the weight of queries, keys and values itself, and no module calls it.
"""

from collections.abc import Iterator
from typing import cast

from torch import nn

from deeptwist.inspection.tracing import computing_class


class InProjection(nn.Linear):
    """The projection of queries, keys and values in one, which torch's attention holds itself.

    It has the attention's own parameter; `swap` puts its factors into the copy as a submodule of
    this name.
    """

    NAME = "in_proj"

    def __init__(self, attention: nn.MultiheadAttention):
        outputs, inputs = attention.in_proj_weight.shape
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.weight = attention.in_proj_weight
        self.train(attention.training)


def has_in_projection(module: nn.Module) -> bool:
    """Whether a module is torch's attention, its forward its own, with one weight for all three."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and computing_class(module) is nn.MultiheadAttention
        and module._parameters.get("in_proj_weight") is not None
    )


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module that a layer's name in a plan stands for.

    Raises:
        AttributeError: if there is none.
    """
    owner, _, last = name.rpartition(".")
    if last == InProjection.NAME and has_in_projection(model.get_submodule(owner)):
        return InProjection(cast(nn.MultiheadAttention, model.get_submodule(owner)))
    return model.get_submodule(name)


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules of a model, as `named_modules` with duplicates, and these projections."""
    projections: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        yield name, module
        if has_in_projection(module):
            if module not in projections:
                projections[module] = InProjection(cast(nn.MultiheadAttention, module))
            yield f"{name}.{InProjection.NAME}".lstrip("."), projections[module]
