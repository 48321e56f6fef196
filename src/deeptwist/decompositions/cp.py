"""CP (PARAFAC) by ALS: 1×1, one depthwise convolution per spatial axis, 1×1.

Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition",
2015; Kolda and Bader, "Tensor Decompositions and Applications", 2009 (ALS).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deeptwist.convolution import Convolution, computing_dtype, pointwise
from deeptwist.decompositions.base import Decomposition, Factors, Level, OneRank
from deeptwist.decompositions.svd import SVD
from deeptwist.linalg import leading_subspace

_SWEEPS = 200
_TOLERANCE = 1e-6  # on the fall of the squared relative error in a sweep


@dataclass(frozen=True)
class CP(OneRank):
    """A sum of R outer products over output channels, input channels and every spatial axis.

    A kernel of one tap is a matrix, for which CP is the SVD: it resolves to `SVD`.

    Attributes:
        rank: R, per group; none to let a ratio set it.
    """

    method: ClassVar[str] = "cp"

    def resolve(self, convolution: Convolution, ratio: float | None) -> Decomposition:  # type: ignore[override]  # noqa: D102
        if convolution.taps == 1:
            return SVD(rank=self.rank).resolve(convolution, ratio)
        return super().resolve(convolution, ratio)

    def full_rank(self, convolution: Convolution) -> int:
        """No tensor has a higher rank than the product of all its sides but the longest."""
        sides = convolution.kernel_shape[1:]
        return math.prod(sides) // max(sides)

    def lowered_shape(self, convolution: Convolution) -> None:  # noqa: D102
        return None

    def levels(self, convolution: Convolution) -> tuple[Level, ...]:  # noqa: D102
        groups, dims = convolution.groups, convolution.dims
        hidden = groups * self.known_rank
        wide = [axis for axis in range(dims) if convolution.kernel_size[axis] > 1]
        # An axis of one tap may still stride or pad: the first depthwise convolution does it too.
        narrow = [axis for axis in range(dims) if axis not in wide]
        depthwise = [
            (convolution.along((axis, *narrow) if axis == wide[0] else (axis,), *[hidden] * 3),)
            for axis in wide
        ]
        return (
            (pointwise(dims, convolution.in_channels, hidden, groups),),
            *depthwise,
            (pointwise(dims, hidden, convolution.out_channels, groups),),
        )

    def decompose(self, kernel: Tensor) -> "CPFactors":  # noqa: D102
        return CPFactors(tuple(_als(kernel, self.known_rank)))


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
                continue  # a side of one is a mere scale, which `_als` has put elsewhere
            size = [basis.shape[1] if a == axis else 1 for a in range(dims)]
            depthwise.append(basis.mT.reshape(-1, 1, 1, *size))
        return [into.mT.reshape(*into.mT.shape, *ones), *depthwise, out.reshape(*out.shape, *ones)]


def _khatri_rao(bases: list[Tensor]) -> Tensor:
    """Columnwise Kronecker product: (g, n, r), (g, m, r), … → (g, n·m·…, r)."""
    product = bases[0]
    for basis in bases[1:]:
        product = (product.unsqueeze(2) * basis.unsqueeze(1)).flatten(1, 2)
    return product


def _als(kernel: Tensor, rank: int) -> list[Tensor]:
    """Alternating least squares from the HOSVD's directions, batched over groups.

    Every sweep costs three products with the kernel and holds Πk·max(o, i)·R numbers besides.
    """
    tensor = kernel.to(computing_dtype(kernel.dtype)).flatten(3)  # (g, o, i, k)
    scale = tensor.abs().amax(dim=(1, 2, 3), keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    tensor = tensor / scale
    by_out, by_in = tensor.flatten(2), tensor.transpose(1, 2).flatten(2)
    sides = kernel.shape[3:]
    out = _initial(by_out, rank)
    into = _initial(by_in, rank)
    whole = tensor.unflatten(3, sides)
    spatial = [_initial(whole.movedim(3 + axis, 1).flatten(2), rank) for axis in range(len(sides))]
    total = tensor.double().square().sum()
    error = total
    for _ in range(_SWEEPS):
        window = _khatri_rao(spatial)
        out = _unit(_solve(by_out @ _khatri_rao([into, window]), [into, *spatial]))
        into = _unit(_solve(by_in @ _khatri_rao([out, window]), [out, *spatial]))
        # What the spatial axes see once the channels are contracted: (g, k, r).
        seen = (by_out.mT @ out).unflatten(1, (into.shape[1], -1))
        seen = torch.einsum("gikr,gir->gkr", seen, into).unflatten(1, sides)
        for axis, side in enumerate(sides):
            target = seen
            for other, basis in enumerate(spatial):
                if other != axis:
                    shape = [1] * len(sides)
                    shape[other] = sides[other]
                    target = target * basis.reshape(basis.shape[0], *shape, rank)
            target = target.movedim(1 + axis, 1).reshape(len(seen), side, -1, rank).sum(2)
            rest = [basis for other, basis in enumerate(spatial) if other != axis]
            solved = _solve(target, [out, into, *rest])
            # The last axis carries the norms until the end.
            spatial[axis] = solved if axis == len(sides) - 1 else _unit(solved)
        before = error
        fitted = (target.double() * spatial[-1].double()).sum()
        norm = (_gram([out, into, *spatial])).sum()
        error = total - 2 * fitted + norm
        if before - error <= _TOLERANCE * total:
            break
    return _balance([out, into, *spatial], scale.flatten(1))


def _initial(unfolding: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors; random ones, the same every time, for what is missing."""
    groups, side, _ = unfolding.shape
    basis = leading_subspace(unfolding, min(rank, side))
    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(groups, side, max(0, rank - side), generator=generator)
    return torch.cat([basis, _unit(extra.to(basis))], dim=2)


def _gram(bases: list[Tensor]) -> Tensor:
    """The Gram matrix of the Khatri-Rao product (g, r, r), in fp64: it squares the condition."""
    gram = torch.ones((), dtype=torch.float64, device=bases[0].device)
    for basis in bases:
        gram = gram * (basis.double().mT @ basis.double())
    return gram


def _solve(target: Tensor, others: list[Tensor]) -> Tensor:
    """The least-squares basis (g, n, r) for what the other bases leave to explain."""
    gram = _gram(others)
    # A sliver of ridge: collinear components are the rule in overcomplete CP, not an accident.
    ridge = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30) * 1e-10
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + ridge[:, None, None] * eye)
    solution: Tensor = torch.cholesky_solve(target.double().mT, factor).mT
    return solution.to(target.dtype)


def _unit(basis: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(basis, dim=1, keepdim=True)
    return basis / norms.clamp_min(torch.finfo(basis.dtype).tiny)


def _balance(bases: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Spreads every component's norm evenly over the bases of more than one row."""
    norms = [torch.linalg.vector_norm(basis, dim=1, keepdim=True) for basis in bases]
    size = torch.stack(norms).prod(0) * scale.unsqueeze(-1)  # (g, 1, r)
    long = sum(basis.shape[1] > 1 for basis in bases)
    share = size.pow(1 / long)
    return [
        _unit(basis) * share if basis.shape[1] > 1 else torch.ones_like(basis) for basis in bases
    ]
