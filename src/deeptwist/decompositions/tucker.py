"""Tucker-2 over output and input channels, by HOOI: 1×1, d×d on the core, 1×1.

Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", 2016; De Lathauwer et al., "On the Best Rank-1 and Rank-(R1, …, RN)
Approximation", 2000 (HOOI); DeepTwist, section 3.1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Self

import torch
from torch import Tensor

from deeptwist.decompositions.base import (
    CannotDecomposeError,
    Decomposition,
    Tensors,
    cannot_shrink_error,
    largest_rank,
    no_rank_error,
    rescale_to_moment,
)
from deeptwist.decompositions.linalg import (
    cholesky,
    leading_subspace,
    power_step,
    solve_gram,
    to_unit_scale,
)
from deeptwist.decompositions.svd import SVD
from deeptwist.errors import DeepTwistError, check_int, check_ratio
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs, pointwise
from deeptwist.layers.moments import SecondMoment

_SWEEPS = 100  # HOOI gains little after ten; this only bounds a matrix that never settles
_TOLERANCE = 2e-5  # on what a sweep adds to the share of ‖W‖² that the core holds
_WARM_SWEEPS = 2


@dataclass(frozen=True)
class Tucker(Decomposition):
    """Tucker-2: a core between an input and an output basis.

    A kernel of one tap is a matrix, for which the core is a detour: it resolves to `SVD`.

    Attributes:
        rank: (R_t, R_s) for output and input channels, per group; `None` to let `fraction` or
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

    def without_rank(self) -> Self:
        return replace(self, rank=None, fraction=None)

    @property
    def resolved_rank(self) -> tuple[int, int]:
        """Return the ranks (R_t, R_s), once resolved."""
        if self.rank is None:
            raise no_rank_error(self)
        return self.rank

    def resolve(self, convolution: ConvGeometry, ratio: float | None) -> Decomposition:
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
            raise no_rank_error(self)
        return self._largest(convolution, check_ratio(ratio))

    def _as_svd(self, full_rank: int) -> SVD:
        if self.rank is not None:
            return SVD(rank=min(self.rank))
        if self.fraction is not None:
            return SVD(rank=max(1, floor_fraction(full_rank, self.fraction)))
        return SVD()

    def _largest(self, convolution: ConvGeometry, ratio: float) -> "Tucker":
        """Return the largest ranks in the proportion T : S, as the paper's fraction keeps it."""
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
            raise cannot_shrink_error(convolution, weight_numel(1), ratio)
        return at(step)

    def full_rank(self, convolution: ConvGeometry) -> tuple[int, int]:
        _, out, into, *_ = convolution.kernel_shape
        return out, into

    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:
        rank_out, rank_in = (convolution.groups * rank for rank in self.resolved_rank)
        groups, dims = convolution.groups, convolution.dims
        return (
            (pointwise(dims, convolution.in_channels, rank_in, groups),),
            (convolution.restricted_to(range(dims), rank_in, rank_out, groups),),
            (pointwise(dims, rank_out, convolution.out_channels, groups),),
        )

    def factorize(
        self,
        kernel: Tensor,  # (g, o, i, *k)
        start: Tensors | None,
        second_moment: SecondMoment | None,
    ) -> Tensors:  # basis_out (g, o, r_out), core (g, r_out, r_in, *k), basis_in (g, i, r_in)
        ranks, dtype, size = self.resolved_rank, kernel.dtype, kernel.shape[3:]
        tensor, scale = to_unit_scale(kernel.flatten(3), 3)
        root = None
        if second_moment is not None:
            root = cholesky(second_moment.channels)
            tensor = torch.einsum("goik,gij->gojk", tensor.double(), root)
        if start is None:
            basis_out, core, basis_in = _hooi(tensor, *ranks)
        else:
            basis_out, core, basis_in = _sweep(tensor, start[0], start[2], _WARM_SWEEPS)
        if root is not None:
            basis_in = torch.linalg.solve_triangular(root.mT, basis_in, upper=True)
        # A third of the scale each, so that no factor over- or underflows a narrow type.
        third = scale.flatten(2).pow(1 / 3)
        core = core.unflatten(2, (basis_out.shape[2], -1)).transpose(1, 2) * third.unsqueeze(-1)
        factors = basis_out * third, core.unflatten(3, tuple(size)), basis_in * third
        return tuple(factor.to(dtype) for factor in factors)

    def errors_at_all_ranks(
        self,
        kernel: Tensor,  # (g, o, i, *k)
        second_moment: SecondMoment | None = None,
    ) -> Tensor:  # (o, i)
        """Return what the truncated higher-order SVD loses at ranks (R_t, R_s).

        HOOI, which starts from it, loses no more and seldom much less. In a second moment's
        metric it is the outputs' at a quarter of the ranks, and in proportion elsewhere.
        """
        tensor, scale = to_unit_scale(kernel.detach().double().flatten(3), 4)
        root = None
        if second_moment is not None:
            root = cholesky(second_moment.channels)
            tensor = torch.einsum("goik,gij->gojk", tensor, root)
        by_out, by_in = _unfoldings(tensor)
        basis_out = leading_subspace(by_out, tensor.shape[1])
        basis_in = leading_subspace(by_in, tensor.shape[2])
        # The core's energy by output and input direction, of all groups, taps together.
        rotated = (basis_out.mT @ by_out).unflatten(2, tensor.shape[2:])
        core = basis_in.mT.unsqueeze(1) @ rotated
        energy = core.square().sum(dim=(0, 3))
        kept = energy.cumsum(0).cumsum(1)
        lost = (energy.sum() - kept) / energy.sum().clamp_min(1e-300)
        errors: Tensor = lost.clamp_min(0).sqrt()
        if root is None or second_moment is None:
            return errors
        out, into = (max(1, side // 4) for side in errors.shape)
        basis_in = torch.linalg.solve_triangular(root.mT, basis_in[..., :into], upper=True)
        factors = basis_out[..., :out], core[:, :out, :into], basis_in
        approximation = self.reconstruct(factors, kernel.shape) * scale.flatten()
        at = errors[out - 1, into - 1]
        return rescale_to_moment(errors, at, kernel, approximation, second_moment)

    def reconstruct(self, tensors: Tensors, shape: Sequence[int]) -> Tensor:  # (g, o, i, *k)
        basis_out, core, basis_in = tensors
        kernel = torch.einsum("gor,grsk,gis->goik", basis_out, core.flatten(3), basis_in)
        return kernel.reshape(tuple(shape))

    def kernels(self, tensors: Tensors, shape: Sequence[int]) -> list[Tensor]:  # (g, o, i, *k)
        basis_out, core, basis_in = tensors
        ones, into = [1] * (len(shape) - 3), basis_in.mT
        return [into.reshape(*into.shape, *ones), core, basis_out.reshape(*basis_out.shape, *ones)]

    def tensors(self, kernels: Sequence[Tensor], shape: Sequence[int]) -> Tensors:
        basis_in, core, basis_out = kernels
        return basis_out.flatten(2), core, basis_in.flatten(2).mT

    def tangent(self, tensors: Tensors, gradients: Tensors, damping: float) -> Tensors:
        """See `Decomposition.tangent`; what lies within both bases is the core's to move.

        Koch and Lubich, "Dynamical Tensor Approximation", 2010.
        """
        (basis_out, core, basis_in), (of_out, of_core, of_in) = tensors, gradients
        by_out, by_in = basis_out.mT @ basis_out, basis_in.mT @ basis_in
        flat = core.flatten(3)  # (g, r_out, r_in, k)
        beside_out = torch.einsum("grsk,gst,gqtk->grq", flat, by_in, flat)
        beside_in = torch.einsum("grsk,grq,gqtk->gst", flat, by_out, flat)
        step_out = solve_gram(beside_out, of_out.mT, damping).mT
        step_in = solve_gram(beside_in, of_in.mT, damping).mT
        step_out = step_out - basis_out @ solve_gram(by_out, basis_out.mT @ step_out, damping)
        step_in = step_in - basis_in @ solve_gram(by_in, basis_in.mT @ step_in, damping)
        half = solve_gram(by_out, of_core.flatten(2), damping).reshape(flat.shape)
        by_rows = half.transpose(1, 2).flatten(2)  # (g, r_in, r_out·k)
        step_core = solve_gram(by_in, by_rows, damping).unflatten(2, (flat.shape[1], -1))
        return step_out, step_core.transpose(1, 2).reshape(core.shape), step_in


def floor_fraction(channels: int, fraction: float) -> int:
    """Return ⌊fraction · channels⌋, the paper's rank (section 4).

    The fraction is read as the decimal that was written: 0.29 · 100 is 29, not 28.
    """
    return math.floor(Fraction(str(float(fraction))) * channels)


def _hooi(
    tensor: Tensor,  # (g, o, i, k)
    rank_out: int,
    rank_in: int,
) -> Tensors:  # as `_sweep`
    """Sweep from the higher-order SVD until the core holds hardly more than before.

    Each sweep takes the leading eigenvectors of Gram matrices: power steps, which are cheaper
    one by one, need many times as many where the spectrum is flat.
    """
    by_out, by_in = _unfoldings(tensor)
    basis_in = leading_subspace(by_in, rank_in)
    # Summed in fp64: near the optimum a sweep gains less than fp32 sums resolve.
    energy, total = 0.0, float(tensor.double().square().sum())
    for _ in range(_SWEEPS):
        basis_out = leading_subspace(_project(basis_in, by_in, tensor.shape[1]), rank_out)
        projected = _project(basis_out, by_out, tensor.shape[2])
        basis_in = leading_subspace(projected, rank_in)
        before, energy = energy, float((basis_in.mT @ projected).double().square().sum())
        if energy - before <= _TOLERANCE * total:
            break
    # Gram matrices square the condition: directions that are weak in fp32 are settled by this.
    return _sweep(tensor, basis_out, basis_in, 1)


def _sweep(
    tensor: Tensor,  # (g, o, i, k)
    basis_out: Tensor,  # (g, o, r_out)
    basis_in: Tensor,  # (g, i, r_in)
    count: int,
) -> Tensors:  # basis_out, the core as (g, r_in, r_out·k), basis_in
    """Improve the bases in turn, each by a power step on what the other leaves of the tensor."""
    by_out, by_in = _unfoldings(tensor)
    for _ in range(count):
        basis_out = power_step(_project(basis_in, by_in, tensor.shape[1]), basis_out)
        projected = _project(basis_out, by_out, tensor.shape[2])
        basis_in = power_step(projected, basis_in)
    return basis_out, basis_in.mT @ projected, basis_in


def _unfoldings(tensor: Tensor) -> tuple[Tensor, Tensor]:  # (g, o, i, k)
    """Return the tensor as (g, o, i·k) and as (g, i, o·k)."""
    return tensor.flatten(2), tensor.transpose(1, 2).flatten(2)


def _project(
    basis: Tensor,  # (g, n, r)
    unfolding: Tensor,  # (g, n, side·k)
    side: int,
) -> Tensor:  # (g, side, r·k)
    """Contract an unfolding with a basis, and unfold what it leaves by the other side."""
    projected: Tensor = (basis.mT @ unfolding).unflatten(2, (side, -1))
    return projected.transpose(1, 2).flatten(2)
