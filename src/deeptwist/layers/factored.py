"""The layer that stands in for a decomposed one."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from deeptwist.layers.geometry import ConvGeometry


class FactoredLayer(nn.Sequential):
    """A convolution or linear layer held as factors: plain torch layers, one after the other.

    The geometry of the layer it stands in for stays readable (``in_channels``, ``stride``, …;
    ``in_features`` and ``out_features`` for a linear layer).

    Attributes:
        convolution: the geometry of the layer that it stands in for.
        decomposition: the `deeptwist.Decomposition` whose factors it holds (a later room's type).
        implementation: which of the decomposition's exact forms it is.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        convolution: ConvGeometry,
        decomposition: Any,
        implementation: str,
    ):
        super().__init__(*modules)
        self.convolution = convolution
        self.decomposition = decomposition
        self.implementation = implementation
        if convolution.dims == 0:
            self.in_features, self.out_features = convolution.in_channels, convolution.out_channels
        else:
            for field in fields(convolution):
                setattr(self, field.name, getattr(convolution, field.name))

    def _get_name(self) -> str:
        return f"FactoredLayer[{self.decomposition}, {self.convolution}]"
