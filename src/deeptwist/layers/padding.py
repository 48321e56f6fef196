"""Paddings that convolutions apply in a forward of their own, as modules before the factors."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class ConstantPad(nn.Module):
    """Pads by fixed margins, as causal convolutions do; `margins` are those of `F.pad`."""

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
