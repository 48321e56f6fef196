"""The layer that stands in for a decomposed one, and the paddings that it may begin with."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

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


def factored_layers(model: nn.Module) -> dict[str, FactoredLayer]:
    """Return a model's factored layers by name, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FactoredLayer)}


class ConstantPad(nn.Module):
    """Pads by fixed margins, as causal convolutions do themselves; `margins` are `F.pad`'s."""

    def __init__(self, margins: Sequence[int], mode: str = "constant"):
        super().__init__()
        self.margins, self.mode = tuple(margins), mode

    def forward(self, x: Tensor) -> Tensor:  # (…, c, *size) → (…, c, *padded size)
        """Pad the input."""
        return functional.pad(x, self.margins, self.mode)


class SamePad(nn.Module):
    """Pads as TensorFlow's 'SAME' does: as little as gives ⌈size / stride⌉ outputs."""

    def __init__(self, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]):
        super().__init__()
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self.dilation = tuple(dilation)

    def margins(self, size: Sequence[int]) -> list[int]:
        """Return the margins of a spatial size, the last axis first, as `F.pad` takes them."""
        margins = []
        options = zip(size, self.kernel_size, self.stride, self.dilation, strict=True)
        for length, kernel, step, spacing in reversed([*options]):
            reach = (math.ceil(length / step) - 1) * step + (kernel - 1) * spacing + 1
            total = max(reach - length, 0)
            margins += [total // 2, total - total // 2]
        return margins

    def forward(self, x: Tensor) -> Tensor:  # (…, c, *size) → (…, c, *padded size)
        """Pad the input."""
        return functional.pad(x, self.margins(x.shape[-len(self.stride) :]))
