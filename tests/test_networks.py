"""Issue 2, point 3: `small` computes what the distorted dense model computes, on real networks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from tests.cases import EVERY_LAYER, difference, every_layer
from torch import Tensor, nn

from deeptwist import CP, SVD, Decomposition, DeepTwist, Plan, SpatialSVD, TiledSVD, Tucker, plan
from deeptwist.networks.build import MODELS, build_model

METHODS: dict[str, tuple[Decomposition, float | None]] = {
    "svd": (SVD(), 4),
    "tiled-64x64": (TiledSVD(tile=(64, 64)), 4),
    "tiled-aligned": (TiledSVD(tile=(64, 72)), 4),
    "spatial": (SpatialSVD(), 4),
    "tucker": (Tucker(), 4),
    "cp": (CP(rank=2), None),
}
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Network:
    """How to make a network, and the side of a small image that it takes.

    Layers that are large and of the same kind as others are left out, to be quick.
    """

    make: Callable[[], nn.Module]
    side: int
    without: tuple[str, ...] = ()


def from_torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision.models")
        model: nn.Module = models.get_model(name, weights=None, num_classes=10)
        return model

    return make


NETWORKS = {
    "resnet32": Network(MODELS["resnet32"], 16),
    "vgg19": Network(MODELS["vgg19"], 32, ("features.1[79]", "features.2*", "features.3*")),
    "resnet34": Network(
        from_torchvision("resnet34"), 64, ("layer2.[23].*", "layer3.*", "layer4.*")
    ),
    "mobilenet_v2": Network(from_torchvision("mobilenet_v2"), 64),
    "resnext50_32x4d": Network(
        from_torchvision("resnext50_32x4d"),
        64,
        ("layer2.[23].*", "layer3.[1-5].*", "layer4.*"),
    ),
}


@cache
def planned(name: str, method: str) -> Plan:
    network, (decomposition, ratio) = NETWORKS[name], METHODS[method]
    with torch.device("meta"):
        model, x = network.make(), torch.empty(2, 3, network.side, network.side)
    return plan(
        model,
        decomposition,
        ratio=ratio,
        example_input=x,
        layers=every_layer(skip_first_conv=True, exclude=network.without),
    )


@cache
def unequal(name: str) -> nn.Module:
    """A network whose channels differ, as training leaves them: on a flat spectrum HOOI is slow."""
    torch.manual_seed(0)
    model = NETWORKS[name].make().requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            norm = module.weight.norm()
            for axis in (0, 1):
                falling = torch.arange(1.0, module.weight.shape[axis] + 1).rsqrt()
                module.weight.transpose(axis, -1).mul_(falling[torch.randperm(len(falling))])
            module.weight.mul_(norm / module.weight.norm())
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.sweep] * (is_double and name != "resnet32"))
        for name in NETWORKS
        for dtype, is_double in ((torch.float32, False), (torch.float64, True))
    ],
    ids=str,
)
def test_the_decomposed_network_computes_what_the_distorted_one_does(
    name: str, method: str, dtype: torch.dtype
) -> None:
    model, made = copy.deepcopy(unequal(name)).to(dtype), planned(name, method)
    assert len(made.compressed) >= 8
    twist = DeepTwist(model, made, interval=1)
    small = twist.finish()
    x = torch.randn(2, 3, NETWORKS[name].side, NETWORKS[name].side, dtype=dtype)
    assert difference(model(x), small(x)) < LIMITS[dtype]
    assert twist.output_difference is not None
    assert twist.output_difference < LIMITS[dtype]
    assert sum(p.numel() for p in small.parameters()) == made.parameters < made.dense_parameters


@pytest.mark.parametrize("method", METHODS)
def test_the_trained_resnet32(method: str, resnet32_weights: dict[str, Tensor]) -> None:
    model, x = build_model("resnet32").requires_grad_(False), torch.randn(4, 3, 32, 32)
    model.load_state_dict(resnet32_weights, strict=True)
    twist = DeepTwist(model.eval(), planned("resnet32", method), interval=1, example_input=x)
    small = twist.finish()
    assert difference(model(x), small(x)) < 1e-5
    assert twist.output_difference is not None
    assert twist.output_difference < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_type_is_no_obstacle(
    dtype: torch.dtype, method: str, resnet32_weights: dict[str, Tensor]
) -> None:
    model, x = build_model("resnet32"), torch.randn(4, 3, 32, 32).to(dtype)
    model.load_state_dict(resnet32_weights)
    model.to(dtype).eval()
    twist = DeepTwist(model, planned("resnet32", method), interval=1, example_input=x)
    small = twist.finish()
    assert twist.output_difference is not None
    assert twist.output_difference < torch.finfo(dtype).eps ** 0.5
    assert {p.dtype for p in small.parameters()} == {dtype}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_compressed_or_says_why(name: str) -> None:
    with torch.device("meta"):
        model, x = NETWORKS[name].make(), torch.empty(1, 3, 64, 64)
    made = plan(model, SpatialSVD(), ratio=2, example_input=x, layers=EVERY_LAYER)
    weighted = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [layer.name for layer in made.layers] == weighted
    assert len(made.compressed) >= 0.4 * len(weighted)
    assert all(layer.reason for layer in made.kept)
