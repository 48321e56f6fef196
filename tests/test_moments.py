"""Second moments: their views against sums over the patches themselves."""

import pytest
import torch
from torch import Tensor

from deeptwist import SpatialSVD
from deeptwist.layers.moments import SecondMoment

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
