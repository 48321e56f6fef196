"""The paper's Table 2: VGG19's convolutions of 128 input channels and more, in units of 2²⁰."""

import pytest
import torch
from experiments.table2 import MEGA, paper_flops, plan_flops
from tests.cases import EVERY_LAYER, PLANNED_METHODS, at, every_layer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deeptwist import SVD, Decomposition, Plan, TiledSVD, Tucker, decompose, plan
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.networks.build import build_model

IMAGE = (1, 3, 32, 32)


@pytest.fixture(scope="module")
def meta_vgg19() -> nn.Module:
    with torch.device("meta"):
        return build_model("vgg19")


def table2(model: nn.Module, decomposition: Decomposition) -> Plan:
    return plan(
        model,
        decomposition,
        example_input=torch.empty(IMAGE, device="meta"),
        layers=every_layer(linear=False, min_in_channels=128),
    )


def weights(made: Plan, *, factored: bool) -> float:
    return sum(x.compressed_numel if factored else x.weight_numel for x in made.compressed) / MEGA


def test_table_2_dense(meta_vgg19: nn.Module) -> None:
    made = table2(meta_vgg19, Tucker(fraction=0.5))
    assert len(made.compressed) == 13
    assert round(weights(made, factored=False), 2) == 18.98
    assert round(plan_flops(made, factored=False) / MEGA, 2) == 647.87


@pytest.mark.parametrize(("rank", "millions"), [(16, 9.49), (11, 6.53), (10, 5.93), (8, 4.75)])
def test_table_2_tiled_svd(meta_vgg19: nn.Module, rank: int, millions: float) -> None:
    made = table2(meta_vgg19, TiledSVD(rank=rank, tile=(64, 64)))
    assert len(made.compressed) == 13
    assert round(weights(made, factored=True), 2) == millions


@pytest.mark.parametrize(
    ("fraction", "millions"), [(0.6, 320.00), (0.5, 235.74), (0.45, 196.62), (0.4, 161.61)]
)
def test_table_2_tucker_flops(meta_vgg19: nn.Module, fraction: float, millions: float) -> None:
    made = table2(meta_vgg19, Tucker(fraction=fraction))
    assert round(plan_flops(made, factored=True) / MEGA, 2) == millions


def test_paper_flops_by_hand() -> None:
    """2K − 1 for each output element that sums K = S·d² products."""
    convolution = ConvGeometry.from_module(nn.Conv2d(6, 10, 3, padding=1))
    linear = ConvGeometry(9, 4)
    assert convolution.macs((7, 8)) + linear.macs(()) == 6 * 9 * 10 * 56 + 36
    assert paper_flops(convolution, (7, 8)) == (2 * 54 - 1) * 10 * 56
    assert paper_flops(linear, ()) == (2 * 9 - 1) * 4


@pytest.mark.parametrize("stride", [1, 2])
def test_paper_flops_of_a_raw_tile_count_no_zero_taps(stride: int) -> None:
    """Tiles of 20 columns: products of 8×20 and of 24×R matrices at every output position."""
    model = nn.Sequential(nn.Conv2d(20, 24, 3, stride=stride, padding=1))
    x = torch.randn(2, 20, 8, 8)
    made = plan(model, TiledSVD(tile=(24, 20), rank=2), example_input=x, layers=EVERY_LAYER)
    hidden = 9 * 2
    flops = hidden * (2 * 20 - 1) + 24 * (2 * hidden - 1)
    assert plan_flops(made, factored=True) == flops * (8 // stride) ** 2


@pytest.mark.parametrize("name", PLANNED_METHODS)
def test_a_whole_models_macs_and_parameters_are_the_models(name: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 24, 3, groups=2),
        nn.Flatten(2),
        nn.Linear(36, 20),
        nn.Conv1d(24, 12, 3, padding="same"),
        nn.ConvTranspose1d(12, 20, 3, stride=2),
    )
    x = torch.randn(3, 3, 16, 16)
    made = plan(model, PLANNED_METHODS[name], ratio=1.5, example_input=x, layers=EVERY_LAYER)
    assert made.compressed
    for network, counted, parameters in (
        (model, made.dense_macs, made.dense_parameters),
        (decompose(model, made), made.macs, made.parameters),
    ):
        assert counted_macs(network, x) == len(x) * counted
        assert sum(p.numel() for p in network.parameters()) == parameters


def counted_macs(network: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("conv", "shape", "tile"),
    [
        (nn.Conv3d(32, 32, 3), (1, 32, 6, 9, 9), (16, 16)),
        (nn.Conv2d(64, 64, 7, padding=3), (1, 64, 9, 9), (64, 64)),
    ],
    ids=["3-D", "7x7"],
)
def test_raw_tiles_whose_zeros_cost_more_than_the_dense_layer_stay_dense(
    conv: nn.Module, shape: tuple[int, ...], tile: tuple[int, int]
) -> None:
    made = plan(
        nn.Sequential(conv),
        TiledSVD(tile=tile),
        ratio=1.5,
        example_input=torch.empty(shape),
        layers=EVERY_LAYER,
    )
    (kept,) = made.kept
    method = TiledSVD(tile=tile).resolve(kept.convolution, 1.5)
    layer = method.make_layer(
        kept.convolution,
        [torch.zeros(part.kernel_shape) for part in method.parts(kept.convolution)],
        None,
    )
    macs = counted_macs(layer, torch.zeros(shape))
    assert macs > made.dense_macs
    assert kept.reason == f"would slow down: {macs:,} MACs for {made.dense_macs:,}"


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 3, 16, 16), (7, 3, 16, 16)])
def test_macs_are_those_of_one_example(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1))
    made = plan(
        model,
        SVD(),
        ratio=1.5,
        example_input=torch.randn(shape),
        layers=EVERY_LAYER,
    )
    assert made.dense_macs == 3 * 16 * 9 * 16 * 16


def test_a_factored_layer_counts_what_its_decomposition_says() -> None:
    convolution = ConvGeometry.from_module(nn.Conv2d(16, 32, 3, stride=2, padding=1))
    method = at(TiledSVD(tile=(16, 64)), convolution, 0.5)
    rank = method.resolved_rank  # type: ignore[attr-defined]
    blocks = (144 // 64) * 2  # and two narrower tiles of 16 columns
    edge = max(1, rank * 16 * 16 * (16 + 64) // (16 * 64 * (16 + 16)))
    expected = blocks * rank * (16 + 64) + 2 * edge * (16 + 16)
    assert method.weight_numel(convolution) == expected
    # Columns 0-63 and 64-127 touch 8 channels each, the other 16 columns 2: whole windows count.
    first = 9 * (2 * rank * (8 + 8) + 2 * edge * 2)
    second = 2 * 16 * (2 * rank + edge)
    assert method.macs(convolution, (8, 8)) == (first + second) * 4 * 4
