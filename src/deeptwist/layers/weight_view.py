"""What stands for the dense weight of a factored layer: its shape and type, without its numbers.

Networks ask `layer.weight.dtype`, or give `layer.weight` to `F.linear` or torch's attention: all
of it works, and no dense weight is made for it.
"""

import itertools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from torch import nn

# Torch's attention asks at its door for a `__torch_function__` to hand over to; this copy does
# not, and goes on to its linear functions, which do.
_attention = FunctionType(
    functional.multi_head_attention_forward.__code__,
    {**vars(functional), "has_torch_function": lambda _: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)
_OF_FACTORS = "dtype", "device", "requires_grad", "is_cuda", "is_meta"
_OF_SHAPE = "ndim", "dim", "size", "numel", "is_floating_point", "is_complex", "element_size"


class WeightView:
    """Stands for the weight of a factored layer: it has the factors' `dtype`, `device`, ….

    Attributes:
        shape: of the dense weight.
        scale: what each output is multiplied by besides; `None` for nothing.
    """

    def __init__(self, layer: "nn.Module", shape: tuple[int, ...], rows: slice = slice(None)):
        self._layer: Any = layer
        self._rows = rows
        self.shape = torch.Size(shape)
        self.scale: Tensor | None = None

    def __mul__(self, scale: Tensor) -> "WeightView":
        """Return the weight times a number an output, as folding batch norm asks for it."""
        if not isinstance(scale, Tensor) or scale.numel() != self._layer.convolution.out_channels:
            raise self._error("a product")
        view = WeightView(self._layer, self.shape)
        view.scale = scale.flatten() if self.scale is None else self.scale * scale.flatten()
        return view

    def _itself(self, *_: object, **__: object) -> "WeightView":
        return self

    to = detach = requires_grad_ = _itself  # `nn.Parameter(weight * scale)` asks for these

    def split(self, sizes: Sequence[int]) -> "tuple[WeightView, ...]":
        """Return views of so many outputs each; the layer computes all of them for each."""
        stops = [*itertools.accumulate(sizes)]
        return tuple(
            WeightView(self._layer, (size, *self.shape[1:]), slice(stop - size, stop))
            for size, stop in zip(sizes, stops, strict=True)
        )

    def chunk(self, count: int) -> "tuple[WeightView, ...]":
        """Return so many views of as many outputs."""
        return self.split([self.shape[0] // count] * count)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_FACTORS:
            return getattr(next(self._layer.parameters()), name)
        if name in _OF_SHAPE:
            return getattr(torch.empty(self.shape, dtype=self.dtype, device="meta"), name)
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._error(f"weight.{name}")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `F.linear` and attention through the factors; refuse what needs a dense weight."""
        if func is functional.multi_head_attention_forward:
            return _attention(*args, **(kwargs or {}))
        values = [*args, *(kwargs or {}).values()]
        view = next(value for value in values if isinstance(value, cls))
        if func is functional.linear:
            return view._linear(*args, **(kwargs or {}))
        raise view._error(getattr(func, "__name__", str(func)))

    def _linear(self, input: Tensor, weight: object, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self._layer(input)
        own: Tensor | None = getattr(self._layer, "bias", None)
        if bias is own:
            return y[..., self._rows].contiguous()  # attention views it
        if own is not None:
            y = y - own
        y = y[..., self._rows].contiguous()
        return y if bias is None else y + bias

    def _error(self, use: str) -> AttributeError:
        return AttributeError(
            f"{use.strip('_')} needs a dense weight, which a factored layer has not: fold batch "
            "norm with deeptwist.fuse(model), or use other tools before the model is decomposed"
        )
