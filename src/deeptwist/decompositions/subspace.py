"""Following the leading singular subspace of matrices that move a little at a time.

Warm-started block power iteration: from the basis of a moment ago, one step is a product with the
matrix and one with its transpose, each made orthonormal. See ``docs/distortion.md``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deeptwist.decompositions.linalg import truncated_svd

STEPS = 8  # by then an exact factorisation would have cost no more
_NUMBERS = 5 * 2**17  # handled at once on a processor, so that a step finds them in its cache
_SAFE = 1e-20, 1e30  # the range of ‖W‖² in which fp32 squares neither under- nor overflow
_PIVOT = 0.1  # of Cholesky, at least: the basis is then orthonormal to r·ε/0.01
_CAUTION = 2  # an estimate is taken for this many times as much
_GRAIN = 1e3  # ε times this, of ‖W‖²: a residual below it is rounding as much as error

Orthonormalize = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Approximations:
    """Low-rank approximations of a batch, found from those of a moment ago.

    Attributes:
        factors: tensors (b, …), as the decomposition's `factors` takes them.
        start: tensors (b, …) that the next ones may be found from.
        steps: the most that any of the batch took.
        exact: which of the batch had to be factored exactly after all.
    """

    factors: tuple[Tensor, ...]
    start: tuple[Tensor, ...]
    steps: int
    exact: tuple[int, ...] = ()


def follow(matrices: Tensor, basis: Tensor, tolerance: float) -> Approximations:
    """Approximates matrices from a basis that was theirs a moment ago, whatever their scale.

    Takes the steps that bring the estimated squared error above the optimum down to `tolerance`,
    in the mean over the batch, and one at least. A matrix whose step is ill-conditioned, or whose
    scale is beyond fp32's squares, is taken at unit scale with Householder's orthonormal bases;
    one that has not settled after `STEPS` is factored exactly. Accelerators are waited for once
    per step.

    Args:
        matrices: (b, m, n), finite, fp32 or fp64.
        basis: (b, r, min(m, n)), rows that span the subspace on the matrices' shorter side; they
            need be neither orthonormal nor independent.
        tolerance: relative to the optimum's squared error.

    Returns:
        With left (b, m, r) and right (b, r, n) for factors and the new basis for a start.
    """
    if matrices.shape[1] > matrices.shape[2]:
        found = follow(matrices.mT, basis, tolerance)
        left, right = found.factors
        return Approximations((right.mT, left.mT), found.start, found.steps, found.exact)
    count, rows, cols = matrices.shape
    at_once = count if matrices.is_cuda else max(1, _NUMBERS // (rows * cols))
    parts = [
        _follow(some, start, tolerance)
        for some, start in zip(matrices.split(at_once), basis.split(at_once), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    left, right, start = (
        torch.cat(pieces)
        for pieces in zip(*((*part.factors, *part.start) for part in parts), strict=True)
    )
    exact = [n * at_once + index for n, part in enumerate(parts) for index in part.exact]
    return Approximations((left, right), (start,), max(part.steps for part in parts), tuple(exact))


def start_of(left: Tensor, right: Tensor) -> Tensor:
    """The basis (b, r, min(m, n)) that `follow` starts from, of factors (b, m, r) and (b, r, n)."""
    return unit_rows(left.mT if left.shape[-2] <= right.shape[-1] else right)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (b, r, n) at length 1; zero stays zero."""
    norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    unit: Tensor = rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)
    return unit


def least_residual(energy: Tensor) -> Tensor:
    """The squared error below which it is the rounding of sums as much as an error."""
    grain: float = _GRAIN * torch.finfo(energy.dtype).eps
    return (energy * grain).clamp_min(_SAFE[0])


def power_step(
    matrices: Tensor, image: Tensor, orthonormalize: Orthonormalize
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """One step of block power iteration, by way of the other side.

    Args:
        matrices: (b, m, n).
        image: (b, r, n), the product of the last basis and the matrices.
        orthonormalize: `by_cholesky` or `by_householder`.

    Returns:
        The new basis (b, r, m); the energies that the last basis and the one on the other side
        hold of the matrices, each (b,); and which of the batch can be relied on.
    """
    rows, before, sound = orthonormalize(image)
    basis, between, sound_too = orthonormalize(rows @ matrices.mT)
    return basis, (before, between), sound & sound_too


def excess(before: Tensor, between: Tensor, after: Tensor, ratio: Tensor | float = 1) -> Tensor:
    """What a basis holds less of the energy than the best one, estimated from a step's gains.

    Each half of a step leaves a share of what was missing, and the share only rises from one to
    the next: from the ratio of the two gains towards (σ_{r+1} / σ_r)². The estimate continues the
    gains as a geometric series, in the geometric mean of that ratio and a bound from above, and
    doubles it.

    Args:
        before: ‖basis·W‖² of the basis that the step began with.
        between: the same of the basis on the other side.
        after: the same of the new basis.
        ratio: what (σ_{r+1} / σ_r)² is at most.
    """
    first, second = between - before, after - between
    # Gains that rounding alone explains are none.
    second = (second - 8 * torch.finfo(after.dtype).eps * after).clamp_min(0)
    share = torch.where(second > 0, second / first.clamp_min(torch.finfo(after.dtype).tiny), 0)
    share = (share.clamp_max(1) * ratio).sqrt().clamp_max(0.99)
    return _CAUTION * second * share / (1 - share)


def by_cholesky(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal rows with the span of an image (b, r, n): Cholesky QR, its rows scaled first.

    Returns:
        The rows (b, r, n); ‖image‖² (b,); and where they are as orthonormal as said.
    """
    gram = image @ image.mT
    energies = gram.diagonal(dim1=1, dim2=2)
    scale = energies.rsqrt()
    factor, info = torch.linalg.cholesky_ex(gram * scale.unsqueeze(1) * scale.unsqueeze(2))
    inverse = torch.linalg.solve_triangular(factor, scale.diag_embed(), upper=False)
    sound = (info == 0) & (factor.diagonal(dim1=1, dim2=2).amin(1) > _PIVOT)
    return inverse @ image, energies.sum(1), sound


def by_householder(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `by_cholesky`, for any image: where it lacks rank, other directions fill in.

    Rows beyond the n that there can be are zero.
    """
    energy = image.flatten(1).square().sum(1)
    rows = torch.linalg.qr(unit_rows(image).mT).Q.mT.contiguous()
    missing = image.shape[1] - rows.shape[1]
    return functional.pad(rows, (0, 0, 0, missing)), energy, torch.ones_like(energy).bool()


@dataclass(frozen=True)
class _Found:
    """A basis (b, r, m), its image (b, r, n), and of which of the batch they are no use."""

    basis: Tensor
    image: Tensor
    steps: int
    unsound: Tensor
    late: Tensor


def _follow(matrices: Tensor, start: Tensor, tolerance: float) -> Approximations:
    found = _iterate(matrices, start, tolerance, by_cholesky)
    basis, left, right = found.basis, found.basis.mT, found.image
    steps, late = found.steps, found.late
    if len(found.unsound):
        index, left = found.unsound, left.clone()
        scale = matrices[index].abs().amax(dim=(1, 2), keepdim=True)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        again = _iterate(matrices[index] / scale, start[index], tolerance, by_householder)
        root = scale.sqrt()  # half of the scale each, so that neither factor over- or underflows
        basis[index] = again.basis
        left[index], right[index] = again.basis.mT * root, again.image * root
        steps, late = max(steps, again.steps), torch.cat([late, index[again.late]])
    if len(late):
        left = left.clone()
        left[late], right[late] = truncated_svd(matrices[late], start.shape[1])
        basis[late] = start_of(left[late], right[late])
    return Approximations((left, right), (basis,), steps, tuple(late.tolist()))


def _iterate(
    matrices: Tensor, start: Tensor, tolerance: float, orthonormalize: Orthonormalize
) -> _Found:
    energy = torch.linalg.vector_norm(matrices.flatten(1), dim=1).square()
    low, high = _SAFE
    sound = (energy > low) & (energy < high)
    if orthonormalize is by_householder:  # comes at unit scale
        sound = torch.ones_like(sound)
    floor = least_residual(energy)
    image = start @ matrices
    step = 0
    while True:
        step += 1
        basis, (before, between), reliable = power_step(matrices, image, orthonormalize)
        image = basis @ matrices
        held = image.square().sum(2)
        after = held.sum(1)
        residual = (energy - after).clamp_min(floor)
        bound = (residual / held.amin(1)).clamp_max(1)
        error = excess(before, between, after, bound) / residual
        sound = sound & reliable & after.isfinite()
        # The one thing that is waited for.
        mean, unsound = torch.stack(
            [torch.where(sound, error, 0).sum() / sound.sum().clamp_min(1), (~sound).sum()]
        ).tolist()
        if mean <= tolerance or step == STEPS:
            break
    none = torch.empty(0, dtype=torch.long, device=matrices.device)
    return _Found(
        basis,
        image,
        step,
        unsound=(~sound).nonzero().squeeze(1) if unsound else none,
        late=none if mean <= tolerance else (sound & (error > tolerance)).nonzero().squeeze(1),
    )
