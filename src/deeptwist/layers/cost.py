"""What a network costs: parameters and MACs, and the paper's own way of counting.

A multiply-accumulate (MAC) is one multiplication with its addition. Only convolutions and
linear layers are counted, per example; biases, normalisation and activations are not.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from deeptwist.layers.geometry import ConvGeometry

MEGA = 2**20  # the paper's M


@dataclass(frozen=True)
class LayerCall:
    """One use of a layer on the example input.

    Attributes:
        count: leading positions: the batch, and for a linear layer also tokens and the like.
        size: the spatial input size; ``()`` for a linear layer.
    """

    count: int
    size: tuple[int, ...]


Workload = Iterable[tuple[ConvGeometry, tuple[int, ...]]]  # convolutions with their input sizes


def macs(work: Workload) -> int:
    """Multiply-accumulates for one example."""
    return sum(convolution.macs(size) for convolution, size in work)


def paper_flops(work: Workload) -> int:
    """The paper's FLOPs for one example: 2K − 1 for an output that sums K products.

    Table 2 prints these, and weight counts, in units of `MEGA`.
    """
    return sum(
        2 * convolution.macs(size)
        - convolution.out_channels * math.prod(convolution.output_size(size))
        for convolution, size in work
    )
