"""Approximations of matrices, and the second moments that they are measured by."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deeptwist import SpatialSVD
from deeptwist.decompositions.linalg import leading_subspace, relative_error, truncated_svd
from deeptwist.layers.moments import SecondMoment

MATRICES = st.builds(
    lambda shape, seed: torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ),
    st.tuples(*[st.integers(1, n) for n in (3, 12, 12)]),
    st.integers(0, 2**16),
)


@given(MATRICES, st.integers(1, 12))
def test_truncated_svd_is_the_best_approximation(matrix: Tensor, rank: int) -> None:
    rank = min(rank, *matrix.shape[1:])
    left, right = truncated_svd(matrix, rank)
    assert left.shape == (*matrix.shape[:2], rank)
    assert right.shape == (len(matrix), rank, matrix.shape[2])
    lost = (matrix - left @ right).square().sum()
    assert torch.isclose(
        lost, torch.linalg.svdvals(matrix)[:, rank:].square().sum(), atol=1e-12, rtol=1e-8
    )


@given(MATRICES)
def test_the_scale_is_split_evenly(matrix: Tensor) -> None:
    left, right = truncated_svd(matrix, 1)
    assert torch.allclose(left.norm(dim=(1, 2)), right.norm(dim=(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-37, -30, -20, 0, 20, 30, 38])
def test_any_scale_is_factored_as_well_as_one(exponent: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(8, 12, dtype=dtype)
    matrix = matrix / matrix.abs().max() * 10.0**exponent
    left, right = truncated_svd(matrix, 8)
    assert relative_error(matrix, left @ right) < 1e-5


def test_zero_and_deficient_matrices() -> None:
    left, right = truncated_svd(torch.zeros(2, 4, 5), 3)
    assert not (left @ right).any()
    outer = torch.outer(torch.arange(4.0), torch.arange(5.0))
    left, right = truncated_svd(torch.stack([outer, 0 * outer]), 3)
    assert torch.allclose(left @ right, torch.stack([outer, 0 * outer]), atol=1e-5)


@given(MATRICES, st.integers(1, 12))
def test_leading_subspace_holds_the_most(matrix: Tensor, rank: int) -> None:
    rank = min(rank, matrix.shape[1])
    basis = leading_subspace(matrix, rank)
    eye = torch.eye(rank, dtype=torch.float64).expand(len(matrix), rank, rank)
    assert torch.allclose(basis.mT @ basis, eye, atol=1e-9)
    held = (basis.mT @ matrix).square().sum()
    best = torch.linalg.svdvals(matrix)[:, :rank].square().sum()
    assert torch.isclose(held, best, atol=1e-9)


def test_the_strongest_direction_comes_first() -> None:
    basis = leading_subspace(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 3)
    assert basis.abs().argmax(0).tolist() == [1, 2, 0]


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1, 1e30, 1e300])
def test_relative_error_at_any_scale(scale: float) -> None:
    exact = torch.tensor([3.0, 4.0]).double() * scale
    actual = torch.tensor([3.0, 3.0]).double() * scale
    assert relative_error(exact, actual) == pytest.approx(0.2)
    assert relative_error(exact, exact) == 0


def test_relative_error_of_zero() -> None:
    zero = torch.zeros(3)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero, torch.ones(3)) > 0


def test_relative_error_of_other_tensors() -> None:
    y = torch.tensor([3.0, 4.0])
    assert math.isnan(relative_error(y, y * math.nan))
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    assert relative_error(torch.tensor([3, 4]), torch.tensor([3, 3])) == pytest.approx(0.2)
    assert relative_error(torch.tensor([3 + 4j]), torch.tensor([3 + 3j])) == pytest.approx(0.2)


SIZE = (3, 2, 2)
SIZE_AXES = len(SIZE)


@pytest.fixture
def patches() -> Tensor:
    """(positions, i, *k)"""
    return torch.randn(200, 4, *SIZE, dtype=torch.float64)


def moment(patches: Tensor) -> SecondMoment:
    flat = patches.flatten(1)
    return SecondMoment((flat.mT @ flat / len(flat))[None], tuple(patches.shape[2:]), SIZE_AXES)


def spatial(held: SecondMoment) -> Tensor:
    """What the columns of the separable lowering multiply."""
    (moments,) = SpatialSVD().column_moments(held, (1, 1, held.in_channels, *held.kernel_size))
    return moments


def test_views_average_over_what_they_do_not_resolve(patches: Tensor) -> None:
    held = moment(patches)
    rows = patches.transpose(1, 2).flatten(0, 1).flatten(1)  # a position of its own for each row
    assert torch.equal(held.full, held.values)
    assert torch.allclose(spatial(held)[0], rows.mT @ rows / len(rows))
    points = patches.flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(held.channels[0], points.mT @ points / len(points))
    for axes in range(SIZE_AXES + 1):
        reduced = SecondMoment(held.over(axes), SIZE, axes)
        assert torch.allclose(reduced.channels, held.channels)
        assert reduced.in_channels == 4


def test_what_is_not_resolved_counts_as_uncorrelated(patches: Tensor) -> None:
    channels = moment(patches).channels
    full = SecondMoment(channels, SIZE).full
    assert torch.allclose(full[0], torch.kron(channels[0], torch.eye(12).double()))
    assert torch.allclose(SecondMoment(full, SIZE, SIZE_AXES).channels, channels)


def test_without_kernel_axes_all_views_are_one() -> None:
    held = SecondMoment(torch.eye(5)[None].repeat(2, 1, 1))
    for view in (held.full, spatial(held), held.channels):
        assert torch.equal(view, held.values)
    row = SecondMoment(torch.eye(15)[None], (3,), 1)
    assert torch.equal(spatial(row), row.full)
