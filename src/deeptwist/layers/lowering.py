"""Lowering: a kernel as a matrix, and back (paper, section 3.2).

A kernel (g, o, i, *k) holds one convolution kernel per group; each is lowered on its own.
Nothing outside this file knows how a kernel's axes become rows and columns.
"""

import math
from collections.abc import Sequence

from torch import Tensor


def lower(kernel: Tensor) -> Tensor:
    """The paper's lowering T × (S·d·d): (g, o, i, *k) → (g, o, i·Πk), input channels outermost."""
    return kernel.flatten(2)


def unlower(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `lower`, for a kernel of this shape."""
    return matrix.reshape(tuple(shape))


def lower_spatial(kernel: Tensor) -> Tensor:
    """The separable lowering (T·d_h) × (S·d_w): (g, o, i, kh, *kw) → (g, o·kh, i·Πkw).

    With fewer than two spatial axes it is `lower`; with three, the first goes with the outputs
    and the other two with the inputs.
    """
    if kernel.dim() < 5:
        return lower(kernel)
    groups, out, into, first, *rest = kernel.shape
    return kernel.transpose(2, 3).reshape(groups, out * first, into * math.prod(rest))


def unlower_spatial(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `lower_spatial`, for a kernel of this shape."""
    if len(shape) < 5:
        return unlower(matrix, shape)
    groups, out, into, first, *rest = shape
    return matrix.reshape(groups, out, first, into, *rest).transpose(2, 3)
