"""Tucker-2 over output and input channels, by HOOI: 1×1, d×d on the core, 1×1.

Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", 2016; De Lathauwer et al., "On the Best Rank-1 and Rank-(R1, …, RN)
Approximation", 2000 (HOOI); DeepTwist, section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Self

import torch
from torch import Tensor

from deeptwist.decompositions.base import (
    CannotDecomposeError,
    Decomposition,
    Factors,
    cannot_shrink,
)
from deeptwist.decompositions.linalg import leading_subspace
from deeptwist.decompositions.ranks import check_ratio, floor_fraction, largest_rank, round_down
from deeptwist.decompositions.subspace import (
    STEPS,
    Approximations,
    Orthonormalize,
    by_cholesky,
    by_householder,
    excess,
    least_residual,
    power_step,
    unit_rows,
)
from deeptwist.decompositions.svd import SVD
from deeptwist.errors import DeepTwistError, check_int
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs, compute_dtype, pointwise

_SWEEPS = 100  # HOOI gains little after ten; this only bounds a matrix that never settles
_TOLERANCE = 1e-6  # on what a sweep adds to the share of ‖W‖² that the core holds


@dataclass(frozen=True)
class Tucker(Decomposition):
    """Tucker-2: a core between an input and an output basis.

    A kernel of one tap is a matrix, for which the core is a detour: it resolves to `SVD`.

    Attributes:
        rank: (R_t, R_s) for output and input channels, per group; none to let `fraction` or
            a ratio set both.
        fraction: the paper's R_c: R_t = ⌊R_c·T⌋ and R_s = ⌊R_c·S⌋.
    """

    method: ClassVar[str] = "tucker"
    rank: tuple[int, int] | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            if self.fraction is not None:
                raise DeepTwistError("Tucker takes a rank or a fraction, not both")
            if not isinstance(self.rank, tuple) or len(self.rank) != 2:
                raise DeepTwistError(f"Tucker rank {self.rank!r} is not a pair (R_t, R_s)")
            for rank in self.rank:
                check_int("Tucker rank", rank)
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise DeepTwistError(f"Tucker fraction {self.fraction} is not above 0 and at most 1")

    @property
    def needs_ratio(self) -> bool:  # noqa: D102
        return self.rank is None and self.fraction is None

    def without_rank(self) -> Self:  # noqa: D102
        return replace(self, rank=None, fraction=None)

    def round_ranks(self, multiple: int) -> Self:  # noqa: D102
        out, into = self.resolved_rank
        return replace(self, rank=(round_down(out, multiple), round_down(into, multiple)))

    @property
    def resolved_rank(self) -> tuple[int, int]:
        """The ranks (R_t, R_s), once resolved."""
        if self.rank is None:
            raise DeepTwistError(f"{self} has no rank: resolve it for a layer first")
        return self.rank

    def resolve(self, convolution: ConvGeometry, ratio: float | None) -> Decomposition:  # noqa: D102
        _, out, into, *_ = convolution.kernel_shape
        if convolution.kernel_numel == 1:
            return self._as_svd(min(out, into)).resolve(convolution, ratio)
        if self.rank is not None:
            if self.rank[0] > out or self.rank[1] > into:
                raise CannotDecomposeError(
                    f"cannot hold Tucker ranks {self.rank}: at most {(out, into)}"
                )
            return self
        if self.fraction is not None:
            ranks = floor_fraction(out, self.fraction), floor_fraction(into, self.fraction)
            if min(ranks) == 0:
                raise CannotDecomposeError(
                    f"has rank 0 at fraction {self.fraction} of {min(out, into)} channels"
                )
            return Tucker(rank=ranks)
        if ratio is None:
            raise DeepTwistError(f"{self} has no rank: give it one, or give a ratio")
        return self._largest(convolution, check_ratio(ratio))

    def _as_svd(self, full_rank: int) -> SVD:
        if self.rank is not None:
            return SVD(rank=min(self.rank))
        if self.fraction is not None:
            return SVD(rank=max(1, floor_fraction(full_rank, self.fraction)))
        return SVD()

    def _largest(self, convolution: ConvGeometry, ratio: float) -> "Tucker":
        """The largest ranks in the proportion T : S, as the paper's fraction keeps it."""
        _, out, into, *_ = convolution.kernel_shape
        # Every fraction at which one of the floors steps up.
        steps = sorted({Fraction(r, n) for n in (out, into) for r in range(1, n + 1)})

        def at(step: int) -> Tucker:
            fraction = steps[step - 1]
            return Tucker(rank=(max(1, int(fraction * out)), max(1, int(fraction * into))))

        def weight_numel(step: int) -> int:
            return at(step).weight_numel(convolution)

        step = largest_rank(weight_numel, len(steps), convolution.weight_numel / ratio)
        if step == 0:
            raise cannot_shrink(convolution, weight_numel(1), ratio)
        return at(step)

    def lowered_shape(self, convolution: ConvGeometry) -> None:  # noqa: D102
        return None

    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:  # noqa: D102
        rank_out, rank_in = (convolution.groups * rank for rank in self.resolved_rank)
        groups, dims = convolution.groups, convolution.dims
        return (
            (pointwise(dims, convolution.in_channels, rank_in, groups),),
            (convolution.restricted_to(range(dims), rank_in, rank_out, groups),),
            (pointwise(dims, rank_out, convolution.out_channels, groups),),
        )

    def cut(self, kernel: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:  # noqa: D102
        return [(kernel, self.resolved_rank)]

    def decompose(self, kernel: Tensor) -> "TuckerFactors":  # noqa: D102
        rank_out, rank_in = self.resolved_rank
        tensor, scale = _at_unit_scale(kernel.to(compute_dtype(kernel.dtype)))
        by_out, by_in = _unfoldings(tensor)
        basis_in = leading_subspace(by_in, rank_in)
        # Summed in fp64: near the optimum a sweep gains less than fp32 sums resolve.
        held, total = 0.0, float(tensor.double().square().sum())
        for _ in range(_SWEEPS):
            basis_out = leading_subspace(_seen(basis_in.mT, by_in, tensor.shape[1]), rank_out)
            seen = _seen(basis_out.mT, by_out, tensor.shape[2])
            basis_in = leading_subspace(seen, rank_in)
            core = basis_in.mT @ seen
            before, held = held, float(core.double().square().sum())
            if held - before <= _TOLERANCE * total:
                break
        return TuckerFactors(*_scaled(basis_out, core, basis_in, scale, kernel.shape[3:]))

    def follow(  # noqa: D102
        self, parts: Tensor, start: Sequence[Tensor], tolerance: float
    ) -> Approximations:
        tensor, scale = _at_unit_scale(parts)
        found = _follow(tensor, start, tolerance, by_cholesky)
        if not found.sound:
            found = _follow(tensor, start, tolerance, by_householder)
        bases = found.rows_out, found.rows_in
        size = parts.shape[3:]
        factors = _scaled(bases[0].mT, found.core, bases[1].mT, scale, size)
        if len(found.late):
            exact = self.decompose(parts[found.late])
            for factor, better in zip(
                (*factors, *bases),
                (exact.basis_out, exact.core, exact.basis_in, *exact.starts()[0]),
                strict=True,
            ):
                factor[found.late] = better
        return Approximations(factors, bases, found.steps, tuple(found.late.tolist()))

    def factors(  # noqa: D102
        self, parts: Sequence[Sequence[Tensor]], shape: Sequence[int]
    ) -> "TuckerFactors":
        ((basis_out, core, basis_in),) = parts
        return TuckerFactors(basis_out, core, basis_in)


def _at_unit_scale(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """A kernel as (g, o, i, k), and the scale (g, 1, 1) that was divided out."""
    scale = kernel.abs().amax(dim=tuple(range(1, kernel.dim())), keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).flatten(2)
    return kernel.flatten(3) / scale.unsqueeze(-1), scale


def _unfoldings(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(g, o, i·k) and (g, i, o·k)."""
    return tensor.flatten(2), tensor.transpose(1, 2).flatten(2)


def _seen(rows: Tensor, unfolding: Tensor, side: int) -> Tensor:
    """What the other channels see through a basis: (g, r, n) of (g, n, side·k) → (g, side, r·k)."""
    seen: Tensor = (rows @ unfolding).unflatten(2, (side, -1))
    return seen.transpose(1, 2).flatten(2)


def _scaled(
    basis_out: Tensor, core: Tensor, basis_in: Tensor, scale: Tensor, size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The factors, the core (g, r_in, r_out·k) as (g, r_out, r_in, *k), with the scale put back."""
    # A third of the scale each, so that no factor over- or underflows a narrow type.
    third = scale.pow(1 / 3)
    core = core.unflatten(2, (basis_out.shape[2], -1)).transpose(1, 2) * third.unsqueeze(-1)
    return basis_out * third, core.unflatten(3, tuple(size)), basis_in * third


@dataclass(frozen=True)
class _Followed:
    """Orthonormal rows (g, r, n) with their core, and which groups have not settled."""

    rows_out: Tensor
    rows_in: Tensor
    core: Tensor
    steps: int
    sound: bool
    late: Tensor


def _follow(
    tensor: Tensor, start: Sequence[Tensor], tolerance: float, orthonormalize: Orthonormalize
) -> _Followed:
    """HOOI with a step of power iteration in place of every eigendecomposition."""
    rows_out, rows_in = start
    by_out, by_in = _unfoldings(tensor)
    energy = tensor.flatten(1).square().sum(1)
    floor = least_residual(energy)
    step = 0
    while True:
        step += 1
        seen = _seen(rows_in, by_in, tensor.shape[1])
        rows_out, (first, second), sound = power_step(seen, rows_out @ seen, orthonormalize)
        seen = _seen(rows_out, by_out, tensor.shape[2])
        rows_in, (third, fourth), sound_too = power_step(seen, rows_in @ seen, orthonormalize)
        core = rows_in @ seen
        held = core.flatten(1).square().sum(1)
        missing = excess(first, second, third) + excess(third, fourth, held)
        error = missing / (energy - held).clamp_min(floor)
        mean, unsound = torch.stack([error.mean(), (~(sound & sound_too)).sum()]).tolist()
        if unsound or mean <= tolerance or step == STEPS:
            break
    late = (~(error <= tolerance)).nonzero().squeeze(1) if mean > tolerance else error.new_empty(0)
    return _Followed(rows_out, rows_in, core, step, not unsound, late.long())


@dataclass(frozen=True)
class TuckerFactors(Factors):
    """basis_out (g, o, r_out), core (g, r_out, r_in, *k) and basis_in (g, i, r_in)."""

    basis_out: Tensor
    core: Tensor
    basis_in: Tensor

    def reconstruct(self) -> Tensor:  # noqa: D102
        kernel = torch.einsum(
            "gor,grsk,gis->goik", self.basis_out, self.core.flatten(3), self.basis_in
        )
        return kernel.reshape(*kernel.shape[:3], *self.core.shape[3:])

    def kernels(self) -> list[Tensor]:  # noqa: D102
        ones = [1] * (self.core.dim() - 3)
        into, out = self.basis_in.mT, self.basis_out
        return [into.reshape(*into.shape, *ones), self.core, out.reshape(*out.shape, *ones)]

    def starts(self) -> list[tuple[Tensor, ...]]:  # noqa: D102
        return [(unit_rows(self.basis_out.mT), unit_rows(self.basis_in.mT))]
