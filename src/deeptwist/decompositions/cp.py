"""CP (PARAFAC) by ALS: 1×1, one depthwise convolution per spatial axis, 1×1.

Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition",
2015; Kolda and Bader, "Tensor Decompositions and Applications", 2009 (ALS).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import numpy
import torch
from torch import Tensor

from deeptwist.decompositions.base import Decomposition, SingleRankDecomposition, Tensors
from deeptwist.decompositions.linalg import (
    cholesky,
    leading_subspace,
    relative_error,
    to_unit_scale,
)
from deeptwist.decompositions.svd import SVD
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs, pointwise
from deeptwist.layers.moments import SecondMoment

_SWEEPS = 200
_WARM_SWEEPS = 2
_TOLERANCE = 1e-5  # a sweep that lowers the squared error by less, relatively, is the last
_EXACT = 1e-24  # of ‖W‖²: a squared error that rounding alone explains
_PROXIMAL_WEIGHT = 4096  # in units of the type's precision
_SMALL_NUMEL = 2**18  # numbers in a kernel: an estimate may then take its time
_MIN_ERROR = 1e-12


@dataclass(frozen=True)
class CP(SingleRankDecomposition):
    """A sum of R outer products over output channels, input channels and every spatial axis.

    A kernel of one tap is a matrix, for which CP is the SVD: it resolves to `SVD`.

    Attributes:
        rank: R, per group; `None` to let a ratio set it.
    """

    method: ClassVar[str] = "cp"

    def resolve(self, convolution: ConvGeometry, ratio: float | None) -> Decomposition:
        if convolution.kernel_numel == 1:
            return SVD(rank=self.rank).resolve(convolution, ratio)
        return super().resolve(convolution, ratio)

    def full_rank(self, convolution: ConvGeometry) -> int:
        """Return the product of all sides but the longest: no tensor has a higher rank."""
        sides = convolution.kernel_shape[1:]
        return math.prod(sides) // max(sides)

    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:
        groups, dims = convolution.groups, convolution.dims
        hidden = groups * self.resolved_rank
        wide = [axis for axis in range(dims) if convolution.kernel_size[axis] > 1]
        # An axis of one tap may still stride or pad: the first depthwise convolution does it too.
        narrow = [axis for axis in range(dims) if axis not in wide]
        depthwise = [
            (
                convolution.restricted_to(
                    (axis, *narrow) if axis == wide[0] else (axis,), *[hidden] * 3
                ),
            )
            for axis in wide
        ]
        return (
            (pointwise(dims, convolution.in_channels, hidden, groups),),
            *depthwise,
            (pointwise(dims, hidden, convolution.out_channels, groups),),
        )

    def factorize(
        self,
        kernel: Tensor,  # (g, o, i, *k)
        start: Tensors | None,
        second_moment: SecondMoment | None,
    ) -> Tensors:  # (g, side, r) each
        """Return a basis for output channels, input channels and every spatial axis.

        Computed in fp64: components grow collinear on the way, and their normal equations with
        them.
        """
        sweeps = None if start is None else _WARM_SWEEPS
        return self._fit(kernel, start, second_moment, sweeps, torch.float64)

    def _fit(
        self,
        kernel: Tensor,  # (g, o, i, *k)
        start: Tensors | None,
        second_moment: SecondMoment | None,
        sweeps: int | None,
        dtype: torch.dtype,
    ) -> Tensors:  # (g, side, r) each
        rank, sides = self.resolved_rank, kernel.shape[3:]
        wide = [side for side in sides if side > 1]  # an axis of one tap has nothing to explain
        tensor, scale = to_unit_scale(kernel.to(dtype).flatten(3), 3)
        root = None
        if second_moment is not None:
            root = cholesky(second_moment.channels).to(dtype)
            tensor = torch.einsum("goik,gij->gojk", tensor, root)
        if start is not None:
            # Channels and the axes that have more than one tap.
            start = start[:2] + tuple(basis for basis in start[2:] if basis.shape[1] > 1)
        out, into, *spatial = _als(tensor.unflatten(3, wide), rank, start, sweeps)
        if root is not None:
            into = torch.linalg.solve_triangular(root.mT, into, upper=True)
        # A kernel of zeros stays zero: sweeps alone would only shrink the first directions.
        nonzero = tensor.flatten(1).any(1)[:, None, None]
        share = scale.flatten(2).pow(1 / (2 + len(wide))) * nonzero
        bases = [(basis * share).to(kernel.dtype) for basis in _balance([out, into, *spatial])]
        windows, ones = iter(bases[2:]), torch.ones_like(bases[0][:, :1])
        return (*bases[:2], *(next(windows) if side > 1 else ones for side in sides))

    def errors_at_all_ranks(
        self,
        kernel: Tensor,  # (g, o, i, *k)
        second_moment: SecondMoment | None = None,
    ) -> Tensor:  # (full rank,)
        """Return an estimate: what a few sweeps lose at some ranks, and in between by their logs.

        Full ALS loses less, mostly by little; beyond a quarter of the rank that holds as many
        numbers as the kernel it is a guess.
        """
        kernel = kernel.detach().float()
        sides = [side for side in kernel.shape[1:] if side > 1] or [1]
        as_large = max(1, math.prod(sides) // sum(sides))
        full = math.prod(sides) // max(sides)
        sweeps, shares = (20, (16, 4, 1)) if kernel.numel() < _SMALL_NUMEL else (5, (16, 4))
        points = {0: 1.0}
        for rank in sorted({min(full, max(1, as_large // share)) for share in shares}):
            method = replace(self, rank=rank)
            factors = method._fit(kernel, None, second_moment, sweeps, torch.float32)
            approximation = method.reconstruct(factors, kernel.shape)
            error = relative_error(kernel, approximation, second_moment)
            points[rank] = min(error, *points.values())
        last = points[max(points)]
        ranks = torch.arange(1, full + 1, dtype=torch.float64)
        logs = numpy.log([max(_MIN_ERROR, error) for error in points.values()])
        errors = torch.from_numpy(numpy.interp(ranks, [*points], logs)).exp()
        beyond = ranks > max(points)
        rest = (1 - (ranks - max(points)) / max(1, 1.5 * as_large - max(points))).clamp_min(0)
        return torch.where(beyond, last * rest.sqrt(), errors)

    def reconstruct(self, tensors: Tensors, shape: Sequence[int]) -> Tensor:  # (g, o, i, *k)
        kernel: Tensor = tensors[0] @ _khatri_rao(tensors[1:]).mT
        return kernel.reshape(tuple(shape))

    def kernels(self, tensors: Tensors, shape: Sequence[int]) -> list[Tensor]:  # (g, o, i, *k)
        out, into, *spatial = tensors
        dims = len(spatial)
        ones = [1] * dims
        depthwise = []
        for axis, basis in enumerate(spatial):
            if basis.shape[1] == 1:
                continue  # an axis of one tap has no convolution of its own
            size = [basis.shape[1] if a == axis else 1 for a in range(dims)]
            depthwise.append(basis.mT.reshape(-1, 1, 1, *size))
        return [into.mT.reshape(*into.mT.shape, *ones), *depthwise, out.reshape(*out.shape, *ones)]


def _khatri_rao(bases: Sequence[Tensor]) -> Tensor:  # (g, n, r), (g, m, r), … → (g, n·m·…, r)
    """Return the columnwise Kronecker product."""
    return reduce(lambda x, y: (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1, 2), bases)


def _als(
    tensor: Tensor,  # (g, o, i, *k)
    rank: int,
    start: Tensors | None,
    sweeps: int | None,
) -> list[Tensor]:  # (g, side, r) each
    """Return the bases that alternating least squares finds, over all groups at once.

    It begins with a few sweeps' worth of other bases, or with the higher-order SVD's directions.
    Every sweep costs three products with the tensor and holds Πk·max(o, i)·R numbers besides.

    Args:
        tensor: at unit scale, without axes of one tap.
        rank: the number of components.
        start: the bases to begin with.
        sweeps: how many; `None` for as many as gain something.
    """
    by_out, by_in = tensor.flatten(2), tensor.transpose(1, 2).flatten(2)
    if start is None:
        bases = [
            _initial(tensor.movedim(axis, 1).flatten(2), rank) for axis in range(1, tensor.dim())
        ]
    else:
        # ALS leaves a component that is zero as it is, however the kernel has changed.
        bases = _balance([_without_zeros(basis.to(tensor.dtype)) for basis in start])
    out, into, *spatial = bases
    total = tensor.square().sum()
    error = total
    for _ in range(sweeps or _SWEEPS):
        window = _khatri_rao(spatial)
        out = _solve(by_out @ _khatri_rao([into, window]), [into, *spatial], out)
        into = _solve(by_in @ _khatri_rao([out, window]), [out, *spatial], into)
        # The spatial axes once the channels are contracted: (g, *k, r).
        contracted = (by_out.mT @ out).unflatten(1, (into.shape[1], -1))
        contracted = torch.einsum("gikr,gir->gkr", contracted, into)
        fitted = _solve_spatial(contracted.unflatten(1, tensor.shape[3:]), out, into, spatial)
        before, error = error, total - 2 * fitted + _gram([out, into, *spatial]).sum()
        # A number of sweeps is kept without a look at the numbers: an accelerator would wait.
        if not sweeps and (before - error <= _TOLERANCE * error or error <= _EXACT * total):
            break
        out, into, *spatial = _balance([out, into, *spatial])
    return [out, into, *spatial]


def _solve_spatial(
    contracted: Tensor,  # (g, *k, r): the tensor, its channels contracted
    out: Tensor,  # (g, o, r)
    into: Tensor,  # (g, i, r)
    spatial: list[Tensor],  # (g, side, r) each
) -> Tensor:  # ()
    """Replace each spatial basis by its least-squares one; return ⟨W, W′⟩."""
    groups, *sides, rank = contracted.shape
    for axis, side in enumerate(sides):
        target = contracted
        others = [basis for n, basis in enumerate(spatial) if n != axis]
        for n, basis in enumerate(spatial):
            if n != axis:
                shape = [sides[n] if a == n else 1 for a in range(len(sides))]
                target = target * basis.reshape(groups, *shape, rank)
        target = target.movedim(1 + axis, 1).reshape(groups, side, -1, rank).sum(2)
        spatial[axis] = _solve(target, [out, into, *others], spatial[axis])
    fitted: Tensor = (target * spatial[-1]).sum()
    return fitted


def _initial(unfolding: Tensor, rank: int) -> Tensor:  # (g, side, n) → (g, side, r)
    """Return leading left singular vectors, and random ones, the same every time, for the rest."""
    side = unfolding.shape[1]
    basis = leading_subspace(unfolding, min(rank, side))
    extra = _random(len(basis), side, max(0, rank - side)).to(basis)
    return torch.cat([basis, extra], dim=2)


def _without_zeros(basis: Tensor) -> Tensor:  # (g, side, r) → (g, side, r)
    """Return a basis with random columns, the same every time, in place of those that are zero."""
    groups, side, rank = basis.shape
    zero = (basis == 0).all(dim=1, keepdim=True)
    return torch.where(zero, _random(groups, side, rank).to(basis, non_blocking=True), basis)


def _random(groups: int, side: int, rank: int) -> Tensor:  # (g, side, r)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(groups, side, rank, generator=generator, device="cpu")
    return numbers / math.sqrt(side)


def _gram(bases: list[Tensor]) -> Tensor:  # (g, n, r), … → (g, r, r)
    """Return the Gram matrix of the Khatri-Rao product."""
    return reduce(torch.mul, (basis.mT @ basis for basis in bases))


def _solve(
    target: Tensor,  # (g, n, r)
    others: list[Tensor],  # (g, m, r) each
    current: Tensor,  # (g, n, r)
) -> Tensor:  # (g, n, r)
    """Return the least-squares basis for what the other bases leave to explain.

    Where components are collinear it is not unique: a sliver of pull towards the current one
    settles the choice and, unlike a ridge, leaves the fixed points where they are.
    """
    gram = _gram(others)
    weight = _PROXIMAL_WEIGHT * torch.finfo(gram.dtype).eps
    proximal = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None] * weight
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    # Without a check of its success, for which an accelerator would wait.
    factor, _ = torch.linalg.cholesky_ex(gram + proximal * identity)
    solution: Tensor = torch.cholesky_solve((target + proximal * current).mT, factor).mT
    return solution


def _balance(bases: list[Tensor]) -> list[Tensor]:  # (g, side, r) each
    """Spread the norm of every component evenly over its bases."""
    norms = [torch.linalg.vector_norm(basis, dim=1, keepdim=True) for basis in bases]
    share = torch.stack(norms).prod(0).pow(1 / len(bases))  # (g, 1, r)
    return [
        basis / norm.clamp_min(torch.finfo(basis.dtype).tiny) * share
        for basis, norm in zip(bases, norms, strict=True)
    ]
