"""Each method against an oracle: closed forms, loops, `F.unfold`, TensorLy, published figures."""

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.cases import METHODS, at, build, difference, error_of, factored, read
from torch import Tensor, nn

from deeptwist import CP, SVD, Decomposition, SpatialSVD, TiledSVD, Tucker
from deeptwist.decompositions.linalg import leading_subspace, relative_error, truncated_svd
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.layers.moments import SecondMoment
from deeptwist.layers.tiled import is_aligned
from deeptwist.plan.codec import decode, encode

KERNELS = st.builds(
    lambda shape, seed: torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ),
    st.tuples(*[st.integers(1, n) for n in (3, 9, 9, 4, 3)]),
    st.integers(0, 2**16),
)
SHARE = st.floats(0, 1)


def geometry_of(kernel: Tensor) -> ConvGeometry:
    groups, out, into, *size = kernel.shape
    ones = (1,) * len(size)
    return ConvGeometry(
        groups * into, groups * out, tuple(size), ones, ones, ones, groups, output_padding=ones
    )


def squared_error(kernel: Tensor, decomposition: Decomposition) -> float:
    return float((kernel - decomposition.decompose(kernel).reconstruct()).square().sum())


def tail(matrix: Tensor, rank: int) -> float:
    """The squared error of the best approximation of this rank (Eckart–Young)."""
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


def close(actual: float, expected: float, kernel: Tensor) -> bool:
    return abs(actual - expected) <= 1e-10 * float(kernel.square().sum())


# --- SVD


@given(KERNELS, SHARE)
def test_svd_loses_the_tail_of_the_singular_values(kernel: Tensor, share: float) -> None:
    method = at(SVD(), geometry_of(kernel), share)
    expected = sum(tail(group.reshape(len(group), -1), method.rank) for group in kernel)
    assert close(squared_error(kernel, method), expected, kernel)


@given(KERNELS, SHARE)
def test_spatial_svd_loses_the_tail_of_the_separable_matrix(kernel: Tensor, share: float) -> None:
    method = at(SpatialSVD(), geometry_of(kernel), share)
    expected = 0.0
    for group in kernel:
        out, into, height, width = group.shape
        rows = [
            torch.stack([group[o, i, h, w] for i, w in product(range(into), range(width))])
            for o, h in product(range(out), range(height))
        ]
        expected += tail(torch.stack(rows), method.rank)
    assert close(squared_error(kernel, method), expected, kernel)


@given(KERNELS, SHARE, st.integers(1, 10), st.integers(1, 40))
def test_tiled_svd_loses_the_tails_of_its_tiles(
    kernel: Tensor, share: float, rows: int, cols: int
) -> None:
    method = at(TiledSVD(tile=(rows, cols)), geometry_of(kernel), share)
    full = min(rows, kernel.shape[1]), min(cols, kernel[0, 0].numel())
    expected = 0.0
    for group in kernel:
        matrix = group.reshape(len(group), -1)
        for top, left in product(range(0, matrix.shape[0], rows), range(0, matrix.shape[1], cols)):
            tile = matrix[top : top + rows, left : left + cols]
            expected += tail(tile, edge_rank(method.rank, full, tuple(tile.shape)))
    assert close(squared_error(kernel, method), expected, kernel)


def edge_rank(rank: int, full: tuple[int, int], tile: tuple[int, int]) -> int:
    """The largest rank that keeps (m·n) / (r·(m + n)) of a full tile; full where that one is."""
    if rank >= min(full):
        return min(tile)
    ratio = full[0] * full[1] / (rank * (full[0] + full[1]))
    allowed = [
        r
        for r in range(1, min(tile) + 1)
        if tile[0] * tile[1] / (r * sum(tile)) >= ratio * (1 - 1e-12)
    ]
    return max(allowed, default=1)


def test_a_tile_as_large_as_the_matrix_is_the_plain_svd() -> None:
    _, kernel = read(build("groups")[0])
    plain, tiled = SVD(rank=3).decompose(kernel), TiledSVD(rank=3, tile=(99, 999))
    assert difference(plain.reconstruct(), tiled.decompose(kernel).reconstruct()) < 1e-12


@pytest.mark.parametrize(
    ("channels", "cols"), [(3, 27), (130, 1170), (256, 1152), (384, 1152), (390, 1170)]
)
def test_without_a_tile_it_is_all_rows_over_equal_parts_of_the_inputs(
    channels: int, cols: int
) -> None:
    convolution = ConvGeometry.from_module(nn.Conv2d(channels, 40, 3))
    chosen = TiledSVD(rank=5).resolve(convolution, None)
    assert chosen == TiledSVD(rank=5, tile=(40, cols))
    assert is_aligned(chosen.grid(convolution.kernel_shape), convolution.kernel_numel)


# --- layers against F.unfold


@pytest.mark.parametrize("tile", [(5, 7), (4, 9), (10, 54), (3, 18), (64, 64), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_tiled_layer_is_a_sum_over_tiles_of_the_unfolded_input(
    tile: tuple[int, int], stride: int
) -> None:
    layer = nn.Conv2d(6, 10, 3, stride, padding=1).double()
    method = at(TiledSVD(tile=tile), read(layer)[0], 0.5)
    _, small = factored(layer, method)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    columns = F.unfold(x, 3, padding=1, stride=stride)  # (b, i·9, positions)
    matrix = layer.weight.detach().reshape(10, -1)
    y = torch.zeros(2, 10, columns.shape[2], dtype=torch.float64)
    full = min(tile[0], 10), min(tile[1], 54)
    for top, left in product(range(0, 10, tile[0]), range(0, 54, tile[1])):
        part = matrix[top : top + tile[0], left : left + tile[1]]
        u, s, vh = torch.linalg.svd(part, full_matrices=False)
        r = edge_rank(method.rank, full, tuple(part.shape))
        y[:, top : top + tile[0]] += (u[:, :r] * s[:r]) @ (
            vh[:r] @ columns[:, left : left + tile[1]]
        )
    y = y.reshape(small(x).shape) + layer.bias[:, None, None]
    assert difference(y, small(x)) < 1e-12


def test_svd_and_tucker_layers_are_what_their_papers_draw() -> None:
    layer, _ = build("stride")
    shapes = {}
    for method in (SVD(rank=4), SpatialSVD(rank=4), Tucker(rank=(4, 3)), CP(rank=4)):
        _, small = factored(layer, method)
        shapes[method.method] = [
            (part.in_channels, part.out_channels, part.kernel_size, part.groups) for part in small
        ]
    assert shapes == {  # type: ignore[comparison-overlap]
        "svd": [(6, 4, (3, 3), 1), (4, 10, (1, 1), 1)],
        "spatial_svd": [(6, 4, (1, 3), 1), (4, 10, (3, 1), 1)],
        "tucker": [(6, 3, (1, 1), 1), (3, 4, (3, 3), 1), (4, 10, (1, 1), 1)],
        "cp": [(6, 4, (1, 1), 1), (4, 4, (3, 1), 4), (4, 4, (1, 3), 4), (4, 10, (1, 1), 1)],
    }


# --- Tucker and CP


@given(KERNELS, SHARE)
def test_tucker_lies_between_its_bounds(kernel: Tensor, share: float) -> None:
    """Not better than either unfolding allows, not worse than the HOSVD is known to be."""
    kernel = kernel[:1]
    _, out, into, *_ = kernel.shape
    rank_out, rank_in = max(1, int(share * out)), max(1, int(share * into))
    error = squared_error(kernel, Tucker(rank=(rank_out, rank_in)))
    by_out = tail(kernel[0].reshape(out, -1), rank_out)
    by_in = tail(kernel[0].transpose(0, 1).reshape(into, -1), rank_in)
    slack = 1e-9 * float(kernel.square().sum())
    assert max(by_out, by_in) - slack <= error <= by_out + by_in + slack


@given(KERNELS, st.integers(1, 6))
def test_cp_is_no_better_than_its_unfoldings_allow(kernel: Tensor, rank: int) -> None:
    kernel = kernel[:1]
    assume(geometry_of(kernel).kernel_numel > 1)
    error = squared_error(kernel, CP(rank=rank))
    norm = float(kernel.square().sum())
    unfolding = kernel[0].reshape(kernel.shape[1], -1)
    assert tail(unfolding, rank) - 1e-9 * norm <= error <= norm * (1 + 1e-9)


@given(st.integers(0, 2**16), st.integers(1, 2))
def test_cp_finds_a_sum_of_few_outer_products(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bases = [
        torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64, generator=generator))[0][:, :rank]
        for n in (7, 6, 3, 3)
    ]
    kernel = torch.einsum("or,ir,hr,wr->oihw", *bases)[None]
    actual = CP(rank=rank).decompose(kernel).reconstruct()
    assert difference(kernel, actual) < 1e-2


@given(KERNELS, st.integers(1, 3), st.integers(1, 3))
def test_tucker_finds_a_core_again(kernel: Tensor, rank_out: int, rank_in: int) -> None:
    _, out, into, *_ = kernel.shape
    rank = min(rank_out, out), min(rank_in, into)
    core, to_out = kernel[:, : rank[0], : rank[1]], torch.randn(out, rank[0]).double()
    kernel = torch.einsum("gabhw,oa,ib->goihw", core, to_out, torch.randn(into, rank[1]).double())
    assert difference(kernel, Tucker(rank=rank).decompose(kernel).reconstruct()) < 1e-6


@given(KERNELS, SHARE)
def test_tucker_bases_are_orthogonal(kernel: Tensor, share: float) -> None:
    factors = Tucker(rank=(max(1, int(share * kernel.shape[1])), 1)).decompose(kernel)
    basis_out, _, _ = factors.tensors
    gram = basis_out.mT @ basis_out
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert torch.allclose(gram / scale, torch.eye(gram.shape[1]).double(), atol=1e-9)


@pytest.mark.parametrize("name", ["svd", "spatial", "tiled-ragged", "tucker", "cp"])
def test_groups_are_independent(name: str) -> None:
    """Together they lose what they lose one by one; loops may run a little longer together."""
    convolution, kernel = read(build("groups")[0])
    method = at(METHODS[name], convolution, 0.5)
    together = squared_error(kernel, method)
    alone = sum(squared_error(group[None], method) for group in kernel)
    assert together == pytest.approx(alone, rel=0.02 if name in ("tucker", "cp") else 1e-9)


@pytest.mark.parametrize("method", [Tucker(), CP()], ids=str)
@pytest.mark.parametrize("geometry", ["1x1", "linear"])
def test_a_kernel_of_one_tap_is_a_matrix(method: Any, geometry: str) -> None:
    convolution, _ = read(build(geometry)[0])
    resolved = method.resolve(convolution, 1.5)
    assert resolved == SVD().resolve(convolution, 1.5)


RANK_DEFICIENT = st.tuples(
    st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**16)
)


@given(RANK_DEFICIENT, st.sampled_from([torch.float32, torch.float64]))
def test_a_rank_deficient_kernel_is_met_exactly(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Channels that repeat: rank 1 over the inputs, so every method of rank ≥ 3 holds it all."""
    groups, out, into, seed = shape
    generator = torch.Generator().manual_seed(seed)
    window = torch.randn(3, 3, generator=generator, dtype=dtype)
    channels = torch.randn(groups, out, into, 1, 1, generator=generator, dtype=dtype)
    kernel = channels[:, :, :1] * window + 0 * channels
    convolution = geometry_of(kernel)
    limit = 1e-4 if dtype == torch.float32 else 1e-8
    for method in (SVD(rank=1), SpatialSVD(rank=3), Tucker(rank=(1, 1)), CP(rank=3)):
        rank = getattr(method, "rank", 1)
        if isinstance(rank, int) and rank > method.full_rank(convolution):
            continue
        actual = method.decompose(kernel).reconstruct()
        assert difference(kernel, actual) < limit, method


# --- real weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["layer1.0.conv1", "layer2.0.conv1", "layer2.2.conv2", "layer3.0.conv1", "layer3.2.conv1"],
)
def test_no_worse_than_tensorly_on_real_weights(
    name: str, resnet32_weights: dict[str, Tensor]
) -> None:
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import parafac, partial_tucker

    tensorly.set_backend("pytorch")
    weight = resnet32_weights[f"{name}.weight"].double()
    out, into = weight.shape[:2]
    for divisor in (4, 2):
        rank = (out // divisor, into // divisor)
        (core, bases), _ = partial_tucker(weight, rank=list(rank), modes=[0, 1], tol=1e-8)
        reference = (
            (weight - tensorly.tenalg.multi_mode_dot(core, bases, modes=[0, 1])).square().sum()
        )
        assert squared_error(weight[None], Tucker(rank=rank)) <= 1.01 * float(reference)
        cp = parafac(weight, rank=out // divisor, n_iter_max=100, init="svd", random_state=0)
        reference = (weight - tensorly.cp_to_tensor(cp)).square().sum()
        assert squared_error(weight[None], CP(rank=out // divisor)) <= 1.01 * float(reference)


@pytest.mark.parametrize(
    ("method", "ratio", "expected"),
    [
        (TiledSVD(tile=(64, 64)), 2, 0.231),
        (TiledSVD(tile=(64, 64)), 4, 0.466),
        (SpatialSVD(), 2, 0.202),
        (SpatialSVD(), 4, 0.429),
        (SVD(rank=29), 2, 0.269),  # 1.99×: the rank of 2× rounded to the nearest
        (SVD(), 4, 0.535),
        (Tucker(), 2, 0.265),
        (Tucker(), 4, 0.472),
    ],
    ids=str,
)
def test_errors_on_the_trained_resnet32(
    method: Decomposition, ratio: float, expected: float, resnet32_weights: dict[str, Tensor]
) -> None:
    """The squared relative errors of issue 2, over the nine layers of 64 × 64 channels."""
    kernels = [w[None] for w in resnet32_weights.values() if w.shape == (64, 64, 3, 3)]
    assert len(kernels) == 9
    resolved = method.resolve(geometry_of(kernels[0]), ratio)
    lost = sum(squared_error(kernel, resolved) for kernel in kernels)
    held = sum(float(kernel.square().sum()) for kernel in kernels)
    assert lost / held == pytest.approx(expected, abs=6e-4)


def test_tensor_methods_on_real_weights_gain_with_the_rank(
    resnet32_weights: dict[str, Tensor],
) -> None:
    kernel = resnet32_weights["layer2.1.conv1.weight"][None].double()
    for make in (lambda r: Tucker(rank=(r, r)), lambda r: CP(rank=r)):
        errors = [squared_error(kernel, make(rank)) for rank in (2, 4, 8, 16, 32)]
        assert all(more < less for less, more in pairwise(errors))


# --- values that are refused


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: SVD(rank=0), "SVD rank 0 is not a whole number from 1 on"),
        (lambda: SVD(rank=2.0), "2.0"),
        (lambda: SVD(rank=True), "True"),
        (lambda: CP(rank=-1), "-1"),
        (lambda: TiledSVD(tile=(64,)), "pair"),
        (lambda: TiledSVD(tile=64), "pair"),
        (lambda: TiledSVD(tile=(64, 0)), "0"),
        (lambda: Tucker(rank=(1, 2, 3)), "pair"),
        (lambda: Tucker(rank=3), "pair"),
        (lambda: Tucker(rank=(1, 0)), "0"),
        (lambda: Tucker(rank=(1, 1), fraction=0.5), "not both"),
        (lambda: Tucker(fraction=0), "fraction 0"),
        (lambda: Tucker(fraction=1.5), "1.5"),
        (lambda: Tucker(fraction=float("nan")), "nan"),
        (lambda: decode(Decomposition, {"method": "tuckr"}), "did you mean 'tucker'?"),
        (lambda: decode(Decomposition, {"method": "svd", "rnk": 3}), "did you mean 'rank'?"),
        (lambda: decode(Decomposition, {"rank": 3}), "not a Decomposition"),
        (lambda: decode(Decomposition, []), "not a Decomposition"),
    ],
)
def test_nonsense_is_refused(make: Callable[[], Any], reason: str) -> None:
    assert reason in error_of(make)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_open_rank_is_refused(method: Decomposition) -> None:
    convolution, kernel = read(build("3x3")[0])
    assert method.needs_ratio
    assert "no rank" in error_of(method.resolve, convolution, None)
    assert "no rank" in error_of(method.decompose, kernel)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_rank_beyond_the_full_one_is_refused(method: Decomposition) -> None:
    convolution, _ = read(build("3x3")[0])
    rank = (99, 1) if isinstance(method, Tucker) else 999
    beyond = decode(Decomposition, {**encode(method), "rank": rank})
    assert "at most" in error_of(beyond.resolve, convolution, None)


# --- approximations of matrices, and the second moments that they are measured by

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
