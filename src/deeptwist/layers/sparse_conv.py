"""Tiles that cut through input channels, as ordinary convolutions.

Such a tile touches some whole channels and parts of the first and the last. Its convolution runs
over all the channels that it touches, its *window*, and the taps that lie outside are zero. Only
the tile's own numbers are stored and trained: the zeros come in by a parametrization, which
`torch.nn.utils.parametrize.remove_parametrizations` makes permanent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deeptwist.layers.geometry import ConvGeometry, kernel_to_weight
from deeptwist.layers.lowering import Segment


@dataclass(frozen=True)
class ChannelWindows:
    """The channels that the tiles of one span of columns touch, in each group.

    Attributes:
        span: the tiles, in columns of the lowered kernel.
        taps: columns of one channel.
        channels: input channels of one group.
    """

    span: Segment
    taps: int
    channels: int

    @property
    def width(self) -> int:
        """Channels in a window: as many as the tile that touches most."""
        # How tiles lie in channels repeats after as many as a channel has taps.
        return max(
            (start + self.span.length - 1) // self.taps - start // self.taps + 1
            for start in self._columns()[: self.taps]
        )

    @property
    def starts(self) -> list[int]:
        """The first channel of every window."""
        last = self.channels - self.width
        return [min(start // self.taps, last) for start in self._columns()]

    @property
    def shifts(self) -> list[int]:
        """How many taps of every window lie before its tile."""
        return [
            start - first * self.taps
            for first, start in zip(self.starts, self._columns(), strict=True)
        ]

    def order(self, groups: int) -> Tensor:
        """The input channels (groups · tiles · width,) of all windows."""
        window = torch.tensor(self.starts)[:, None] + torch.arange(self.width)
        first = torch.arange(groups)[:, None, None] * self.channels
        return (first + window).flatten()

    def _columns(self) -> range:
        """The first column of every tile."""
        return range(self.span.offset, self.span.stop, self.span.length)


class ScatterWeight(nn.Module):
    """Parametrization of a convolution over windows: from its tiles' numbers to its weight."""

    places: Tensor

    def __init__(self, convolution: ConvGeometry, windows: ChannelWindows):
        super().__init__()
        self.convolution = convolution
        shifts = torch.tensor(windows.shifts).repeat(
            convolution.groups // windows.span.count
        )  # (blocks,)
        places = shifts[:, None, None] + torch.arange(windows.span.length)
        self.register_buffer("places", places, persistent=False)  # follows from the geometry

    def forward(self, columns: Tensor) -> Tensor:
        """(blocks · hidden, tile columns) → the convolution's weight."""
        blocks, hidden, *rest = self.convolution.kernel_shape
        tiles = columns.unflatten(0, (blocks, hidden))
        padded = tiles.new_zeros(blocks, hidden, torch.Size(rest).numel())
        padded = padded.scatter(2, self.places.expand(-1, hidden, -1), tiles)
        return kernel_to_weight(padded.unflatten(2, rest), self.convolution)


def window_convolution(
    convolution: ConvGeometry, windows: ChannelWindows, kernel: Tensor
) -> nn.Module:
    """The convolution over windows, one group for every tile; without bias.

    Args:
        convolution: its geometry, of as many groups as there are tiles in all groups.
        windows: where the tiles lie.
        kernel: (blocks, hidden, tile columns, …), the tiles' numbers.
    """
    layer = convolution.make_module(torch.empty(convolution.kernel_shape, device="meta"), None)
    layer.weight = nn.Parameter(kernel.flatten(2).flatten(0, 1).clone())
    # 'unsafe' allows the stored numbers to be fewer than the weight's.
    parametrize.register_parametrization(
        layer, "weight", ScatterWeight(convolution, windows), unsafe=True
    )
    return layer
