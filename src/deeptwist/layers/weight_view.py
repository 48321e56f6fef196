"""What stands for the dense weight of a factored layer: its shape and type, without its numbers.

Networks ask `layer.weight.dtype`, or give `layer.weight` to `F.linear`: both work, and no dense
weight is made for it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from torch import nn


class WeightView:
    """Stands for the weight of a factored layer.

    Attributes:
        shape: of the dense weight.
        dtype: of the factors.
        device: of the factors.
        requires_grad: whether the factors train.
    """

    def __init__(self, layer: "nn.Module", shape: tuple[int, ...]):
        parameter = next(layer.parameters())
        self._layer = layer
        self.shape = torch.Size(shape)
        self.dtype, self.device = parameter.dtype, parameter.device
        self.requires_grad = parameter.requires_grad
        self.is_cuda, self.is_meta = parameter.is_cuda, parameter.is_meta

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def dim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def size(self, axis: int | None = None) -> torch.Size | int:
        """Return the shape, or the length of one axis."""
        return self.shape if axis is None else self.shape[axis]

    def numel(self) -> int:
        """Return how many numbers the dense weight holds."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Whether the factors are real numbers."""
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        """Whether the factors are complex numbers."""
        return self.dtype.is_complex

    def element_size(self) -> int:
        """Return the bytes of one number."""
        return self.dtype.itemsize

    def __getattr__(self, name: str) -> Any:
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
        """Run `F.linear` through the factors; refuse what needs the dense weight."""
        values = [*args, *(kwargs or {}).values()]
        view = next(value for value in values if isinstance(value, cls))
        if func is functional.linear:
            return view._linear(*args, **(kwargs or {}))
        raise view._error(getattr(func, "__name__", str(func)))

    def _linear(self, input: Tensor, weight: object, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self._layer(input)
        own: Tensor | None = getattr(self._layer, "bias", None)
        if bias is own:
            return y
        if own is not None:
            y = y - own
        return y if bias is None else y + bias

    def _error(self, use: str) -> AttributeError:
        return AttributeError(
            f"{use.strip('_')} needs a dense weight, which a factored layer has not: fold batch "
            "norm with deeptwist.fuse(model), or use other tools before the model is decomposed"
        )
