"""The second moment of a layer's inputs, in whose metric an approximation may be measured.

A layer's lowered kernel W (o, i·Πk) multiplies patches p (i·Πk) of its input, one for every output
position. With M = E[p pᵀ], the mean squared error of the outputs is ‖(W − W′) M^½‖²_F.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SecondMoment:
    """E[p pᵀ] of the patches p that one layer's lowered kernel multiplies, group by group.

    It is full (``axes == len(kernel_size)``), or resolves the last `axes` kernel axes only, down to
    the input channels alone (``axes == 0``): what a full one of a large layer would hold is
    bounded so. Positions along an axis that is not resolved count as uncorrelated and alike.

    For a transposed convolution, p is what one output position sees: zero at every (channel, tap)
    from which no input reaches it.

    Attributes:
        values: (g, n, n) with n = i·Π(the last `axes` sizes), input channels outermost, as the
            lowered kernel's columns are; symmetric, positive semidefinite, in fp32 or fp64. The
            mean over output positions (and over the axes that are not resolved): its scale does
            not matter to an approximation, but must be one for the whole layer.
        kernel_size: of the layer; ``()`` for a linear one.
        axes: how many of the last kernel axes are resolved.
    """

    values: Tensor
    kernel_size: tuple[int, ...] = ()
    axes: int = 0

    @property
    def in_channels(self) -> int:
        """Return the input channels i of one group."""
        return self.values.shape[-1] // self._taps(self.axes)

    @property
    def full(self) -> Tensor:  # (g, i·Πk, i·Πk)
        """Return the moment of whole patches: what `lower`'s columns multiply."""
        return self.over(len(self.kernel_size))

    @property
    def channels(self) -> Tensor:  # (g, i, i)
        """Return the moment of the input channels."""
        return self.over(0)

    def over(self, axes: int) -> Tensor:  # (g, n, n)
        """Return the moment over input channels and the last `axes` kernel axes.

        Axes that are held but not asked for are averaged out (the mean of the diagonal blocks);
        axes that are asked for but not held come in as uncorrelated.
        """
        channels, held, asked = self.in_channels, self._taps(self.axes), self._taps(axes)
        groups = len(self.values)
        if asked < held:
            inner = (groups, channels, held // asked, asked)
            blocks = self.values.reshape(*inner, *inner[1:]).diagonal(dim1=2, dim2=5)
            return blocks.mean(-1).reshape(groups, channels * asked, channels * asked)
        if asked == held:
            return self.values
        added = asked // held
        wide = torch.zeros(
            *(groups, channels, added, held, channels, added, held),
            dtype=self.values.dtype,
            device=self.values.device,
        )
        blocks = self.values.reshape(groups, channels, held, channels, held)
        wide.diagonal(dim1=2, dim2=5).copy_(blocks.unsqueeze(-1))
        return wide.reshape(groups, channels * asked, channels * asked)

    def to(self, device: torch.device) -> "SecondMoment":
        """Return the same moment on a device."""
        return replace(self, values=self.values.to(device))

    def squared_norm(self, kernel: Tensor) -> Tensor:  # (g, o, i, *k) → ()
        """Return ‖K M^½‖²_F of a kernel K, in fp64.

        Of W − W′ it is the mean squared error of the outputs, times the positions along axes that
        are not resolved.
        """
        held = self._taps(self.axes)
        groups, out, channels = kernel.shape[:3]
        rows = kernel.double().reshape(groups, out, channels, -1, held).transpose(2, 3)
        rows = rows.reshape(groups, -1, channels * held)
        return ((rows @ self.values.double()) * rows).sum()

    def relative_error(
        self,
        exact: Tensor,  # (g, o, i, *k)
        approximation: Tensor,  # (g, o, i, *k)
    ) -> float:
        """Return the root of E‖y − y′‖² / E‖y‖² of the outputs y of two kernels.

        It is 0 where no output differs, and also where there is no output to compare with.
        """
        scale = exact.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        lost = self.squared_norm((exact.double() - approximation.double()) / scale)
        total = self.squared_norm(exact.double() / scale)
        return math.sqrt(max(0.0, float(lost / total))) if total > 0 else 0.0

    def _taps(self, axes: int) -> int:
        return math.prod(self.kernel_size[len(self.kernel_size) - axes :])
