"""A convolution without its numbers: the geometry that every cost and every layer follows from.

A linear layer is the convolution without spatial axes (``kernel_size == ()``), so that
nothing downstream needs to tell the two apart.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError, check_int, explaining

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SUPPORTED_MODULES: tuple[type[nn.Module], ...] = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)


@dataclass(frozen=True)
class ConvGeometry:
    """The geometry of one convolution or linear layer.

    Attributes:
        in_channels: S in the paper.
        out_channels: T in the paper.
        kernel_size: one size per spatial axis; ``()`` for a linear layer.
        stride: one step per spatial axis.
        padding: one width per spatial axis, or ``"same"``.
        dilation: one spacing per spatial axis.
        groups: channel groups, each an independent convolution.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        transposed: whether it is the transposed convolution.
        output_padding: extra output size per spatial axis, for transposed ones.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | Literal["same"] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "groups"):
            check_int(name, getattr(self, name))
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise DeepTwistError(
                f"groups {self.groups} do not divide {self.in_channels}→{self.out_channels}"
            )
        if not isinstance(self.kernel_size, tuple) or len(self.kernel_size) > 3:
            raise DeepTwistError(f"kernel_size {self.kernel_size!r} is not one to three sizes")
        minima = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0, "output_padding": 0}
        for name, minimum in minima.items():
            values = getattr(self, name)
            if name == "padding" and values == "same":
                continue
            if not isinstance(values, tuple) or len(values) != self.dims:
                raise DeepTwistError(f"{name} {values!r} is not one number per spatial axis")
            for value in values:
                check_int(name, value, minimum)
        if self.padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise DeepTwistError(f"padding_mode {self.padding_mode!r} is not one of torch's")
        if not isinstance(self.transposed, bool):
            raise DeepTwistError(f"transposed {self.transposed!r} is neither true nor false")

    @classmethod
    def from_module(cls, layer: nn.Module) -> "ConvGeometry":
        """Read the geometry of a torch layer.

        Args:
            layer: an `nn.Conv{1,2,3}d`, `nn.ConvTranspose{1,2,3}d` or `nn.Linear`.

        Raises:
            DeepTwistError: for any other module.
        """
        if isinstance(layer, nn.Linear):
            return cls(index(layer.in_features), index(layer.out_features))
        transposed = isinstance(layer, _TRANSPOSED)
        if not (transposed or isinstance(layer, _CONVOLUTIONS)):
            raise DeepTwistError(f"{type(layer).__name__} is not a convolution or linear layer")
        conv = cast(nn.Conv2d, layer)  # all six have these fields
        dims = conv.weight.dim() - 2
        padding = 0 if conv.padding == "valid" else conv.padding
        return cls(
            in_channels=index(conv.in_channels),
            out_channels=index(conv.out_channels),
            kernel_size=_sizes(conv.kernel_size, dims),
            stride=_sizes(conv.stride, dims),
            padding="same" if padding == "same" else _sizes(padding, dims),
            dilation=_sizes(conv.dilation, dims),
            groups=index(conv.groups),
            padding_mode=conv.padding_mode,
            transposed=transposed,
            output_padding=_sizes(conv.output_padding if transposed else 0, dims),
        )

    @property
    def dims(self) -> int:
        """Return the number of spatial axes: 0 for a linear layer."""
        return len(self.kernel_size)

    @property
    def kernel_numel(self) -> int:
        """Return the number of kernel positions, d·d in the paper; 1 for a linear layer."""
        return math.prod(self.kernel_size)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Return the kernel's shape (g, o, i, *k): one independent kernel per group."""
        out, into = self.out_channels // self.groups, self.in_channels // self.groups
        return (self.groups, out, into, *self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Return the shape of torch's weight: (o, i/g, *k), of a transposed layer (i, o/g, *k)."""
        into, out = self.in_channels, self.out_channels
        first, second = (into, out) if self.transposed else (out, into)
        return (first, second // self.groups, *self.kernel_size)

    @property
    def weight_numel(self) -> int:
        """Return how many numbers the kernel holds, the bias not counted."""
        return math.prod(self.kernel_shape)

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Return the spatial size that comes out for a spatial size that goes in."""
        if self.padding == "same":
            return tuple(input_size)
        sizes = []
        for axis, size in enumerate(input_size):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
            step, pad = self.stride[axis], self.padding[axis]
            sizes.append(
                (size - 1) * step - 2 * pad + reach + self.output_padding[axis] + 1
                if self.transposed
                else (size + 2 * pad - reach - 1) // step + 1
            )
        return tuple(sizes)

    def macs(self, input_size: Sequence[int]) -> int:
        """Return the multiply-accumulates (MACs) for one example of this size, without the bias."""
        positions = input_size if self.transposed else self.output_size(input_size)
        return self.weight_numel * math.prod(positions)

    def restricted_to(
        self, axes: Collection[int], in_channels: int, out_channels: int, groups: int
    ) -> "ConvGeometry":
        """Return the convolution that does this one's work on some spatial axes alone.

        It keeps kernel size, stride, padding and dilation on `axes` and is pointwise elsewhere;
        without axes it is the 1×1 convolution.
        """

        def keep(values: Sequence[int], neutral: int) -> tuple[int, ...]:
            return tuple(value if a in axes else neutral for a, value in enumerate(values))

        if not axes:
            return pointwise(self.dims, in_channels, out_channels, groups)
        return replace(
            self,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=keep(self.kernel_size, 1),
            stride=keep(self.stride, 1),
            padding="same" if self.padding == "same" else keep(self.padding, 0),
            dilation=keep(self.dilation, 1),
            groups=groups,
            output_padding=keep(self.output_padding, 0),
        )

    def make_module(
        self,
        kernel: Tensor,  # (g, o, i, *k)
        bias: Tensor | None,  # (out_channels,)
    ) -> nn.Module:
        """Return the plain torch layer of this geometry that holds these numbers.

        It is an `nn.Linear`, `nn.Conv{1,2,3}d` or `nn.ConvTranspose{1,2,3}d`.
        """
        # On 'meta' the layer costs no memory and no random numbers until it gets its own.
        layer: nn.Linear | nn.Conv2d
        if self.dims == 0:
            layer = nn.Linear(self.in_channels, self.out_channels, False, device="meta")
        else:
            kind: Any = (_TRANSPOSED if self.transposed else _CONVOLUTIONS)[self.dims - 1]
            ours = {"transposed"} if self.transposed else {"transposed", "output_padding"}
            options = {name: value for name, value in vars(self).items() if name not in ours}
            layer = kind(**options, bias=False, device="meta")
        # Memory of their own: a slice of a larger tensor would keep, and save, the whole.
        weight = kernel_to_weight(kernel, self).clone(memory_format=torch.contiguous_format)
        layer.weight = nn.Parameter(weight)
        layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone()))
        return layer

    def __str__(self) -> str:
        text = f"{self.in_channels}→{self.out_channels}"
        if self.dims:
            text += ", " + "×".join(map(str, self.kernel_size))
        if self.groups > 1:
            text += f", {self.groups} groups"
        return text + (", transposed" if self.transposed else "")


@dataclass(frozen=True)
class LayerCall:
    """One use of a layer on the example input.

    Attributes:
        count: leading positions: the batch, and for a linear layer also tokens and the like.
        size: the spatial input size; ``()`` for a linear layer.
    """

    count: int
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        for number in (self.count, *self.size):
            check_int("a size of a call", number, 0)


ParallelConvs = tuple[ConvGeometry, ...]  # side by side, each on its part of the channels


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    """Return one number per spatial axis, as torch reads them: one for all, numpy's integers too.

    Raises:
        DeepTwistError: if they are not integers.
    """
    values = tuple(value) if isinstance(value, Iterable) else (value,) * dims
    with explaining(f"{value!r} is not one whole number per spatial axis", errors=(TypeError,)):
        return tuple(index(number) for number in values) * (dims if len(values) == 1 else 1)


def pointwise(dims: int, in_channels: int, out_channels: int, groups: int = 1) -> ConvGeometry:
    """Return the 1×1 convolution with `dims` spatial axes; with none, the linear layer."""
    ones, zeros = (1,) * dims, (0,) * dims
    return ConvGeometry(
        in_channels, out_channels, ones, ones, zeros, ones, groups, output_padding=zeros
    )


def weight_to_kernel(
    weight: Tensor,  # (g·o, i, *k), or transposed (g·i, o, *k)
    convolution: ConvGeometry,
) -> Tensor:  # (g, o, i, *k)
    """Return a torch weight as a kernel."""
    groups, out, into, *size = convolution.kernel_shape
    if convolution.transposed:
        return weight.reshape(groups, into, out, *size).transpose(1, 2)
    return weight.reshape(groups, out, into, *size)


def kernel_to_weight(
    kernel: Tensor,  # (g, o, i, *k)
    convolution: ConvGeometry,
) -> Tensor:  # (g·o, i, *k), or transposed (g·i, o, *k)
    """Invert `weight_to_kernel`."""
    if convolution.transposed:
        kernel = kernel.transpose(1, 2)
    return kernel.flatten(0, 1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that a decomposition computes in: fp64 for fp64, fp32 for narrower ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32
