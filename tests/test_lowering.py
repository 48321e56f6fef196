from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from deeptwist.layers.lowering import lower, lower_spatial, unlower, unlower_spatial

SHAPES = st.integers(0, 3).flatmap(lambda dims: st.tuples(*[st.integers(1, 5)] * (3 + dims)))


def counting(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@given(SHAPES)
def test_lowering_and_back(shape: tuple[int, ...]) -> None:
    kernel = counting(*shape)
    assert torch.equal(unlower(lower(kernel), shape), kernel)
    assert torch.equal(unlower_spatial(lower_spatial(kernel), shape), kernel)


@given(SHAPES)
def test_the_papers_lowering_has_input_channels_outermost(shape: tuple[int, ...]) -> None:
    kernel = counting(*shape)
    groups, out, *rest = shape
    assert torch.equal(lower(kernel), kernel.reshape(groups, out, torch.Size(rest).numel()))


def test_lowered_columns_are_those_of_unfold() -> None:
    kernel, x = torch.randn(1, 5, 3, 2, 4).double(), torch.randn(2, 3, 6, 7).double()
    by_matrix = lower(kernel)[0] @ F.unfold(x, (2, 4))
    assert torch.allclose(by_matrix, F.conv2d(x, kernel[0]).flatten(2))


def test_the_separable_lowering_element_by_element() -> None:
    kernel = counting(2, 3, 4, 5, 6)
    matrix = lower_spatial(kernel)
    assert matrix.shape == (2, 3 * 5, 4 * 6)
    for g, o, i, h, w in product(*map(range, kernel.shape)):
        assert matrix[g, o * 5 + h, i * 6 + w] == kernel[g, o, i, h, w]


def test_in_three_axes_the_first_goes_with_the_outputs() -> None:
    kernel = counting(1, 2, 3, 2, 3, 2)
    matrix = lower_spatial(kernel)
    assert matrix.shape == (1, 2 * 2, 3 * 3 * 2)
    for o, i, d, h, w in product(*map(range, kernel.shape[1:])):
        assert matrix[0, o * 2 + d, (i * 3 + h) * 2 + w] == kernel[0, o, i, d, h, w]


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 4, 3, 5)])
def test_below_two_axes_there_is_but_one_lowering(shape: tuple[int, ...]) -> None:
    assert torch.equal(lower_spatial(counting(*shape)), lower(counting(*shape)))
