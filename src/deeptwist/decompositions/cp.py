"""CP (PARAFAC) by ALS: 1×1, one depthwise convolution per spatial axis, 1×1.

Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition",
2015; Kolda and Bader, "Tensor Decompositions and Applications", 2009 (ALS).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deeptwist.decompositions.base import (
    Decomposition,
    Factors,
    SingleRankDecomposition,
)
from deeptwist.decompositions.linalg import leading_subspace
from deeptwist.decompositions.subspace import Approximations
from deeptwist.decompositions.svd import SVD
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs, compute_dtype, pointwise

_SWEEPS = 200
_TOLERANCE = 1e-5  # a sweep that lowers the squared error by less, relatively, is the last
_EXACT = 1e-24  # of ‖W‖²: a squared error that rounding alone explains
_PULL = 1e-12
_SHARE = 0.1  # of the tolerance: what ALS still has to gain is several times its last gain


@dataclass(frozen=True)
class CP(SingleRankDecomposition):
    """A sum of R outer products over output channels, input channels and every spatial axis.

    A kernel of one tap is a matrix, for which CP is the SVD: it resolves to `SVD`.

    Attributes:
        rank: R, per group; none to let a ratio set it.
    """

    method: ClassVar[str] = "cp"

    def resolve(self, convolution: ConvGeometry, ratio: float | None) -> Decomposition:  # type: ignore[override]  # noqa: D102
        if convolution.kernel_numel == 1:
            return SVD(rank=self.rank).resolve(convolution, ratio)
        return super().resolve(convolution, ratio)

    def full_rank(self, convolution: ConvGeometry) -> int:
        """No tensor has a higher rank than the product of all its sides but the longest."""
        sides = convolution.kernel_shape[1:]
        return math.prod(sides) // max(sides)

    def lowered_shape(self, convolution: ConvGeometry) -> None:  # noqa: D102
        return None

    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:  # noqa: D102
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

    def decompose(self, kernel: Tensor) -> "CPFactors":  # noqa: D102
        bases, _ = _als(kernel, self.resolved_rank)
        return CPFactors(tuple(bases))

    def cut(self, kernel: Tensor) -> list[tuple[Tensor, int]]:  # noqa: D102
        return [(kernel, self.resolved_rank)]

    def follow(  # noqa: D102
        self, parts: Tensor, start: Sequence[Tensor], tolerance: float
    ) -> Approximations:
        bases, sweeps = _als(parts, self.resolved_rank, start, tolerance * _SHARE)
        return Approximations(tuple(bases), tuple(bases), sweeps)

    def factors(  # noqa: D102
        self, parts: Sequence[Sequence[Tensor]], shape: Sequence[int]
    ) -> "CPFactors":
        return CPFactors(tuple(parts[0]))


@dataclass(frozen=True)
class CPFactors(Factors):
    """One basis (g, side, r) for output channels, input channels and every spatial axis."""

    bases: tuple[Tensor, ...]

    def reconstruct(self) -> Tensor:  # noqa: D102
        out, into, *spatial = self.bases
        kernel: Tensor = out @ _khatri_rao([into, *spatial]).mT
        return kernel.reshape(*kernel.shape[:2], *[basis.shape[1] for basis in self.bases[1:]])

    def kernels(self) -> list[Tensor]:  # noqa: D102
        out, into, *spatial = self.bases
        dims = len(spatial)
        ones = [1] * dims
        depthwise = []
        for axis, basis in enumerate(spatial):
            if basis.shape[1] == 1:
                continue  # an axis of one tap has no convolution of its own
            size = [basis.shape[1] if a == axis else 1 for a in range(dims)]
            depthwise.append(basis.mT.reshape(-1, 1, 1, *size))
        return [into.mT.reshape(*into.mT.shape, *ones), *depthwise, out.reshape(*out.shape, *ones)]

    def starts(self) -> list[tuple[Tensor, ...]]:  # noqa: D102
        return [self.bases]


def _khatri_rao(bases: list[Tensor]) -> Tensor:
    """Columnwise Kronecker product: (g, n, r), (g, m, r), … → (g, n·m·…, r)."""
    product = bases[0]
    for basis in bases[1:]:
        product = (product.unsqueeze(2) * basis.unsqueeze(1)).flatten(1, 2)
    return product


def _als(
    kernel: Tensor, rank: int, start: Sequence[Tensor] = (), tolerance: float = _TOLERANCE
) -> tuple[list[Tensor], int]:
    """Alternating least squares, batched over groups: the bases, and how many sweeps they took.

    It starts from other bases of the kernel's, or else from the HOSVD's directions.

    Computed in fp64: components grow collinear on the way, and their normal equations with them.
    Every sweep costs three products with the kernel and holds Πk·max(o, i)·R numbers besides.
    """
    sides = kernel.shape[3:]
    wide = [side for side in sides if side > 1]  # an axis of one tap has nothing to explain
    tensor = kernel.double().flatten(3)  # (g, o, i, k)
    scale = tensor.abs().amax(dim=(1, 2, 3), keepdim=True)
    tensor = tensor / torch.where(scale > 0, scale, torch.ones_like(scale))
    by_out, by_in = tensor.flatten(2), tensor.transpose(1, 2).flatten(2)
    whole = tensor.unflatten(3, wide)
    unfoldings = [by_out, by_in, *(whole.movedim(3 + n, 1).flatten(2) for n in range(len(wide)))]
    if start:
        bases = [
            basis / basis.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-300)
            for basis in map(Tensor.double, start)
        ]
        bases = [*bases[:2], *(basis for basis in bases[2:] if basis.shape[1] > 1)]
        # ALS leaves a component that is zero as it is, however the kernel has changed.
        idle = torch.stack([(basis == 0).all(1).any(1) for basis in bases]).any(0)
        if idle.any():
            for basis, unfolding in zip(bases, unfoldings, strict=True):
                basis[idle] = _initial(unfolding[idle], rank)
    else:
        bases = [_initial(unfolding, rank) for unfolding in unfoldings]
    out, into, *spatial = bases
    total = tensor.square().sum()
    error = total
    sweeps = 0
    while True:
        sweeps += 1
        window = _khatri_rao(spatial)
        out = _solve(by_out @ _khatri_rao([into, window]), [into, *spatial], out)
        into = _solve(by_in @ _khatri_rao([out, window]), [out, *spatial], into)
        # What the spatial axes see once the channels are contracted: (g, *wide, r).
        seen = (by_out.mT @ out).unflatten(1, (into.shape[1], -1))
        seen = torch.einsum("gikr,gir->gkr", seen, into).unflatten(1, wide)
        for axis in range(len(wide)):
            target = seen
            for other, basis in enumerate(spatial):
                if other != axis:
                    shape = [wide[other] if n == other else 1 for n in range(len(wide))]
                    target = target * basis.reshape(len(seen), *shape, rank)
            target = target.movedim(1 + axis, 1).reshape(len(seen), wide[axis], -1, rank).sum(2)
            others = [basis for other, basis in enumerate(spatial) if other != axis]
            spatial[axis] = _solve(target, [out, into, *others], spatial[axis])
        fitted = (target * spatial[-1]).sum()
        before, error = error, total - 2 * fitted + _gram([out, into, *spatial]).sum()
        settled = before - error <= tolerance * error or error <= _EXACT * total
        if settled or sweeps == _SWEEPS:
            break
        out, into, *spatial = _balance([out, into, *spatial])
    share = scale.flatten(1).pow(1 / (2 + len(wide))).unsqueeze(1)
    dtype = compute_dtype(kernel.dtype)
    out, into, *spatial = ((basis * share).to(dtype) for basis in _balance([out, into, *spatial]))
    windows = iter(spatial)
    ones = torch.ones_like(out[:, :1])
    return [out, into, *(next(windows) if side > 1 else ones for side in sides)], sweeps


def _initial(unfolding: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors; random ones, the same every time, for what is missing."""
    groups, side, _ = unfolding.shape
    basis = leading_subspace(unfolding, min(rank, side))
    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(groups, side, max(0, rank - side), generator=generator)
    return torch.cat([basis, extra.to(basis) / side**0.5], dim=2)


def _gram(bases: list[Tensor]) -> Tensor:
    """The Gram matrix of the Khatri-Rao product: (g, n, r), … → (g, r, r)."""
    gram = bases[0].mT @ bases[0]
    for basis in bases[1:]:
        gram = gram * (basis.mT @ basis)
    return gram


def _solve(target: Tensor, others: list[Tensor], current: Tensor) -> Tensor:
    """The least-squares basis (g, n, r) for what the other bases leave to explain.

    Where components are collinear it is not unique: a sliver of pull towards the current one
    settles the choice and, unlike a ridge, leaves the fixed points where they are.
    """
    gram = _gram(others)
    pull = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None] * _PULL
    factor = torch.linalg.cholesky(gram + pull * torch.eye(gram.shape[1]).to(gram))
    solution: Tensor = torch.cholesky_solve((target + pull * current).mT, factor).mT
    return solution


def _balance(bases: list[Tensor]) -> list[Tensor]:
    """Spreads the norm of every component evenly over its bases."""
    norms = [torch.linalg.vector_norm(basis, dim=1, keepdim=True) for basis in bases]
    share = torch.stack(norms).prod(0).pow(1 / len(bases))  # (g, 1, r)
    return [
        basis / norm.clamp_min(torch.finfo(basis.dtype).tiny) * share
        for basis, norm in zip(bases, norms, strict=True)
    ]
