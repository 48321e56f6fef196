"""Approximation in the metric of the outputs, against dense least squares and the data itself."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cases import METHODS, at, build, difference, pairs, read
from torch import Tensor, nn

from deeptwist import CP, SVD, Decomposition, SpatialSVD, TiledSVD, Tucker
from deeptwist.decompositions.linalg import truncated_svd
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.layers.moments import SecondMoment

SEED = st.integers(0, 2**16)


def moment_of(convolution: ConvGeometry, positions: int = 400, live: int = 99) -> SecondMoment:
    """The moment of correlated patches, all but `live` of whose channels are dead."""
    groups, _, into, *size = convolution.kernel_shape
    width = into * convolution.kernel_numel
    mixing = torch.randn(groups, width, width, dtype=torch.float64) / width**0.5
    mixing *= torch.logspace(0, -1.5, width, dtype=torch.float64)
    patches = torch.randn(groups, positions, width, dtype=torch.float64) @ mixing
    patches.reshape(groups, positions, into, -1)[:, :, live:] = 0
    return SecondMoment(patches.mT @ patches / positions, tuple(size), len(size))


def output_error(kernel: Tensor, approximation: Tensor, moment: SecondMoment) -> float:
    """By a root of the full moment, found another way."""
    values, vectors = torch.linalg.eigh(moment.full)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    exact, away = ((x.double().flatten(2) @ root) for x in (kernel, kernel - approximation))
    return float(away.norm() / exact.norm())


@given(st.tuples(*[st.integers(1, n) for n in (3, 9, 9)]), st.integers(1, 9), SEED)
def test_the_weighted_svd_is_the_best_in_its_metric(
    shape: tuple[int, int, int], rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rank = min(rank, *shape[1:])
    matrix = torch.randn(shape, dtype=torch.float64)
    mixing = torch.randn(shape[0], shape[2], shape[2] + 2, dtype=torch.float64)
    moment = mixing @ mixing.mT
    left, right = truncated_svd(matrix, rank, moment)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # M = root rootᵀ
    tail = torch.linalg.svdvals(matrix @ root)[:, rank:].square().sum()
    lost = ((matrix - left @ right) @ root).square().sum()
    assert float(lost) <= float(tail) * (1 + 1e-6) + 1e-6 * float((matrix @ root).square().sum())
    # Given right, no left does better: a dense least-squares problem.
    best = torch.linalg.lstsq((right @ root).mT, (matrix @ root).mT).solution.mT
    again = ((matrix - best @ right) @ root).square().sum()
    assert float(lost) <= float(again) + 1e-6 * float((matrix @ root).square().sum())


@pytest.mark.parametrize(("method", "geometry"), pairs())
def test_outputs_never_lose_by_it_and_the_error_is_the_moments(
    method: Decomposition, geometry: str
) -> None:
    convolution, kernel = read(build(geometry)[0])
    moment = moment_of(convolution)
    resolved = at(method, convolution, 0.4)
    plain = resolved.decompose(kernel).reconstruct()
    calibrated = resolved.decompose(kernel, second_moment=moment).reconstruct()
    errors = [output_error(kernel, x, moment) for x in (calibrated, plain)]
    assert errors[0] <= errors[1] * (1 + 1e-9)
    assert moment.relative_error(kernel, calibrated) == pytest.approx(errors[0], abs=1e-7)


@pytest.mark.parametrize("method", [SVD(rank=4), SpatialSVD(rank=8), Tucker(rank=(5, 3))], ids=str)
def test_it_is_worth_its_while(method: Decomposition) -> None:
    convolution, kernel = read(build("3x3")[0])
    moment = moment_of(convolution)
    plain, calibrated = (
        output_error(kernel, factors.reconstruct(), moment)
        for factors in (method.decompose(kernel), method.decompose(kernel, second_moment=moment))
    )
    assert calibrated < 0.95 * plain


@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D", "transposed 2-D", "3-D"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "cp"])
def test_full_rank_is_the_identity_for_dead_channels_too(name: str, geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    for positions, live in ((400, 99), (5, 2)):
        moment = moment_of(convolution, positions, live)
        full = at(METHODS[name], convolution, 1.0)
        rebuilt = full.decompose(kernel, second_moment=moment).reconstruct()
        assert rebuilt.isfinite().all()
        assert difference(kernel, rebuilt) < 1e-6


@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D", "transposed 2-D"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_outputs_error_never_rises_with_the_rank(method: Decomposition, geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    moment = moment_of(convolution)
    errors = []
    for share in range(7):
        factors = at(method, convolution, share / 6).decompose(kernel, second_moment=moment)
        errors.append(moment.relative_error(kernel, factors.reconstruct()))
    slack = 0.03 if method.method in ("cp", "tucker", "tiled_svd", "spatial_svd") else 1e-7
    assert all(more <= less + slack for less, more in pairwise(errors)), errors


@pytest.mark.parametrize("axes", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_any_structure_and_type_will_do(method: Decomposition, axes: int) -> None:
    convolution, kernel = read(build("3x3", torch.float32)[0])
    full = moment_of(convolution)
    moment = SecondMoment(full.over(axes), full.kernel_size, axes)
    resolved = at(method, convolution, 0.4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        factors = resolved.decompose(kernel.to(dtype), second_moment=moment)
        assert {x.dtype for x in factors.tensors} == {torch.float32}
        plain = resolved.decompose(kernel.to(dtype)).reconstruct()
        errors = [moment.relative_error(kernel, x) for x in (factors.reconstruct(), plain)]
        assert errors[0] <= errors[1] + 1e-3


def test_a_moment_of_zero_is_no_accident() -> None:
    _, kernel = read(nn.Conv2d(4, 6, 3))
    moment = SecondMoment(torch.zeros(1, 36, 36), (3, 3), 2)
    for method in (SVD(rank=2), Tucker(rank=(3, 2)), CP(rank=2)):
        factors = method.decompose(kernel, second_moment=moment)
        assert factors.reconstruct().isfinite().all()
        assert moment.relative_error(kernel, factors.reconstruct()) == 0


# --- errors at all ranks


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D", "more in than out"])
@pytest.mark.parametrize("name", ["svd", "spatial", "tiled-ragged", "tiled-rows"])
def test_one_spectrum_tells_the_errors_at_all_ranks(
    name: str, geometry: str, calibrated: bool
) -> None:
    convolution, kernel = read(build(geometry)[0])
    moment = moment_of(convolution) if calibrated else None
    method = METHODS[name]
    errors = method.errors_at_all_ranks(kernel, moment)
    full = at(method, convolution, 1.0)
    assert errors is not None
    assert len(errors) == full.rank
    assert float(errors[-1]) < 1e-6
    for rank in range(1, len(errors) + 1):
        resolved = at(method, convolution, rank / len(errors))
        factors = resolved.decompose(kernel)
        if moment is None:
            assert float(errors[resolved.rank - 1]) == pytest.approx(
                difference(kernel, factors.reconstruct()), abs=1e-6
            )
        elif name == "svd":
            factors = resolved.decompose(kernel, second_moment=moment)
            assert float(errors[resolved.rank - 1]) == pytest.approx(
                moment.relative_error(kernel, factors.reconstruct()), abs=1e-3
            )


@pytest.mark.parametrize("geometry", ["3x3", "groups", "1-D"])
def test_the_higher_order_spectra_bound_tucker(geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    bounds = Tucker().errors_at_all_ranks(kernel)
    assert bounds.shape == kernel.shape[1:3]
    for share in (0.3, 0.6, 1.0):
        method = at(Tucker(), convolution, share)
        error = difference(kernel, method.decompose(kernel).reconstruct())
        bound = float(bounds[method.rank[0] - 1, method.rank[1] - 1])
        assert 0.8 * bound - 1e-6 <= error <= bound + 1e-6


@pytest.mark.parametrize("geometry", ["3x3", "groups", "1-D"])
def test_a_few_sweeps_tell_what_cp_loses_about(geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    estimates = CP().errors_at_all_ranks(kernel)
    assert len(estimates) == CP().full_rank(convolution)
    assert all(more <= less for less, more in pairwise(estimates.tolist()))
    method = CP().resolve(convolution, 4)
    error = difference(kernel, method.decompose(kernel).reconstruct())
    assert error == pytest.approx(float(estimates[method.rank - 1]), rel=0.15)


@pytest.mark.parametrize("name", ["svd", "spatial", "tiled-rows", "tucker"])
def test_the_outputs_errors_at_all_ranks_are_near_what_is_lost(name: str) -> None:
    convolution, kernel = read(build("3x3")[0])
    moment = moment_of(convolution)
    for share in (0.15, 0.3, 0.6):
        method = at(METHODS[name], convolution, share)
        errors = method.without_rank().errors_at_all_ranks(kernel, moment)
        ranks = method.rank if isinstance(method.rank, tuple) else (method.rank,)
        told = float(errors[tuple(rank - 1 for rank in ranks)])
        factors = method.decompose(kernel, second_moment=moment)
        assert moment.relative_error(kernel, factors.reconstruct()) == pytest.approx(told, rel=0.25)


def test_a_kernel_of_zeros_loses_nothing() -> None:
    assert TiledSVD().errors_at_all_ranks(torch.zeros(1, 4, 4, 3, 3)).max() == 0


@given(
    st.sampled_from([*METHODS.values()]),
    st.sampled_from(["3x3", "groups", "1x1", "linear"]),
    st.integers(0, 2),
    st.integers(-45, 36),
    st.sampled_from([0.0, 1e-6, 0.3]),
    SEED,
)
def test_any_moment_is_factored(
    method: Decomposition, geometry: str, rank: int, exponent: int, noise: float, seed: int
) -> None:
    """Of any rank and scale, each group of its own; with rounding that leaves it indefinite."""
    convolution, kernel = read(build(geometry)[0])
    torch.manual_seed(seed)
    groups, _, into, *size = convolution.kernel_shape
    side = into * convolution.kernel_numel
    patches = torch.randn(groups, rank, side)
    values = patches.mT @ patches + noise * torch.randn(groups, side, side)
    values = (values + values.mT) / 2
    values.diagonal(dim1=1, dim2=2).clamp_(min=0)  # a sum of squares
    values = (
        values.clamp(-30, 30) * 10.0 ** (exponent * torch.arange(1, 0, -1 / groups))[:, None, None]
    )
    moment = SecondMoment(values, tuple(size), len(size))
    resolved = at(method, convolution, 0.4)
    approximation = resolved.decompose(kernel, second_moment=moment).reconstruct()
    assert approximation.isfinite().all()
    assert moment.relative_error(kernel, approximation) < math.inf
    errors = resolved.without_rank().errors_at_all_ranks(kernel, moment)
    assert errors is None or (errors.isfinite().all() and errors.min() >= 0)
