"""The layer that stands in for a decomposed one."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from deeptwist.layers.geometry import ConvGeometry
from deeptwist.layers.routing import set_outputs, stages_bias
from deeptwist.layers.weight_view import WeightView


class FactoredLayer(nn.Sequential):
    """A convolution or linear layer held as factors: plain torch layers, one after the other.

    The geometry of the layer it stands in for stays readable (``in_channels``, ``stride``, …;
    ``in_features`` and ``out_features`` for a linear layer). So do ``weight``'s shape, type and
    device, and the bias.

    Attributes:
        convolution: the geometry of the layer that it stands in for.
        decomposition: the `deeptwist.Decomposition` whose factors it holds (a later room's type).
        planned_call: what the network was planned on, as a plan's `inputs` and `keywords`.
    """

    planned_call: tuple[tuple[Any, ...], tuple[str, ...]] = ((), ())

    def __init__(self, modules: Sequence[nn.Module], convolution: ConvGeometry, decomposition: Any):
        super().__init__(*modules)
        self.convolution = convolution
        self.decomposition = decomposition
        if convolution.dims == 0:
            self.in_features, self.out_features = convolution.in_channels, convolution.out_channels
        else:
            for field in fields(convolution):
                setattr(self, field.name, getattr(convolution, field.name))

    __jit_unused_properties__ = ("weight", "bias")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a bias, or the weight times a number an output: what tools fold batch norm by."""
        if name == "weight" and isinstance(value, WeightView):
            set_outputs(self, scale=value.scale)
        elif name == "bias" and isinstance(value, Tensor):
            set_outputs(self, bias=value)
        else:
            super().__setattr__(name, value)

    @property
    def weight(self) -> WeightView:
        """Return what stands for the dense weight; it takes no memory. It can be set, scaled."""
        return WeightView(self, self.convolution.weight_shape)

    @property
    def bias(self) -> Tensor | None:  # (out_channels,)
        """Return the bias, if there is one."""
        return stages_bias(self)

    def pad_input(self, padding: nn.Module) -> None:
        """Put a module that pads the input in front of the factors."""
        factors = dict(self.named_children())
        for name in factors:
            delattr(self, name)
        for name, module in {"pad": padding, **factors}.items():
            self.add_module(name, module)

    def _get_name(self) -> str:
        return f"FactoredLayer[{self.decomposition}, {self.convolution}]"
