"""Networks that users bring, from the plan over a saved folder to ONNX, at small sizes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases import EVERY_LAYER, difference, every_layer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import weight_norm

from deeptwist import (
    CP,
    SVD,
    Decomposition,
    DeepTwist,
    Plan,
    SpatialSVD,
    TiledSVD,
    Tucker,
    load,
    plan,
    save,
)
from deeptwist.export import Exported, export_onnx
from deeptwist.inspection.proof import run_counted
from deeptwist.inspection.run import Inputs
from deeptwist.networks.build import MODELS, build_model

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)


def whole_way(
    make: Callable[[], nn.Module], x: Any, folder: Path, include: Any = "*", **export: Any
) -> tuple[Plan, Exported]:
    model = make().eval()
    made = plan(model, SVD(), ratio=2, example_input=x, layers=every_layer(include=include))
    twist = DeepTwist(model, made, interval=1, example_input=x)
    twist.step()
    small = twist.finish().eval()
    assert twist.output_difference is not None
    assert 0 < twist.output_difference < 1e-5
    assert sum(p.numel() for p in small.parameters()) == made.parameters < made.dense_parameters
    loaded = load(save(small, folder / "small"), make)
    pairs = zip(*(run_counted(each, Inputs.of(x))[0] for each in (small, loaded)), strict=True)
    assert all(torch.equal(y, y_loaded) for y, y_loaded in pairs)
    written = export_onnx(loaded, folder / "small.onnx", x, **export)
    assert written.worst_difference is not None
    assert written.worst_difference < 1e-4
    return made, written


def compressed_share(made: Plan) -> float:
    weights = sum(layer.weight_numel for layer in made.layers)
    return sum(layer.weight_numel for layer in made.compressed) / weights


def test_a_detector_of_torchvision(tmp_path: Path) -> None:
    detection = pytest.importorskip("torchvision.models.detection")

    def make() -> nn.Module:
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
        backbone.out_channels = 32  # type: ignore[assignment]
        anchors = detection.anchor_utils.AnchorGenerator(((16,),), ((1.0,),))
        model: nn.Module = detection.RetinaNet(
            backbone, 3, min_size=64, max_size=64, anchor_generator=anchors, detections_per_img=5
        )
        for name, parameter in model.named_parameters():
            if "cls_logits" in name:  # scores that differ, as those of a trained detector
                nn.init.normal_(parameter, std=0.5)
        return model

    made, written = whole_way(make, torch.rand(1, 3, 64, 64), tmp_path, batch=1)
    assert compressed_share(made) == 1
    assert written.batches == (1,)


def test_a_3d_unet_of_monai(tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")

    def make() -> nn.Module:
        torch.manual_seed(0)
        unet: nn.Module = nets.UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2))
        return unet

    made, _ = whole_way(make, torch.randn(2, 1, 16, 16, 16), tmp_path)
    assert compressed_share(made) > 0.9


def test_a_unet_of_diffusers(tmp_path: Path) -> None:
    """Called by keyword, with a number."""
    diffusers = pytest.importorskip("diffusers")

    def make() -> nn.Module:
        torch.manual_seed(0)
        unet: nn.Module = diffusers.UNet2DModel(
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
        )
        return unet

    call = {"sample": torch.randn(2, 3, 8, 8), "timestep": 3}
    made, _ = whole_way(make, call, tmp_path)
    assert compressed_share(made) > 0.9
    assert {"conv_in", "mid_block.attentions.0.to_q"} <= {layer.name for layer in made.compressed}


def test_deeplab(tmp_path: Path) -> None:
    segmentation = pytest.importorskip("torchvision.models.segmentation.deeplabv3")

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 32, 3, stride=8, padding=1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.layer(x).relu()}

    made, written = whole_way(
        lambda: segmentation.DeepLabV3(Backbone(), segmentation.DeepLabHead(32, 5)),
        torch.randn(1, 3, 64, 72),
        tmp_path,
        dynamic_size=True,
    )
    assert compressed_share(made) == 1
    assert len(written.sizes) >= 2


def test_r3d_18(tmp_path: Path) -> None:
    video = pytest.importorskip("torchvision.models.video")
    made, _ = whole_way(
        video.r3d_18, torch.randn(1, 3, 4, 32, 32), tmp_path, include=("stem.*", "layer[12].*")
    )
    assert {layer.kind for layer in made.compressed} == {"Conv3d", "Conv3DSimple"}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.leave = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        return self.leave(torch.cat([x, self.up(self.down(x).relu())], 1))


def test_a_unet_of_any_even_size(tmp_path: Path) -> None:
    made, written = whole_way(UNet, torch.randn(1, 3, 16, 20), tmp_path, dynamic_size=True)
    assert compressed_share(made) == 1
    assert written.sizes == ((24, 36), (48, 84))  # one pixel more is refused by the network itself


class CausalConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (self.kernel_size[0] - 1, 0)))


def test_an_audio_codec_with_weight_norm(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = [
            CausalConv1d(1, 16, 7),
            nn.ELU(),
            weight_norm(nn.Conv1d(16, 32, 8, stride=4, padding=2)),
            nn.ELU(),
            weight_norm(nn.ConvTranspose1d(32, 16, 8, stride=4, padding=2)),
            nn.ELU(),
            CausalConv1d(16, 1, 7),
        ]
        return nn.Sequential(*layers)

    model = make().eval()
    x = torch.randn(1, 1, 64)
    made = plan(model, SVD(), ratio=2, example_input=x, layers=EVERY_LAYER)
    twist = DeepTwist(model, made, interval=1, example_input=x)
    twist.step()
    small = twist.finish().eval()
    loaded = load(save(small, tmp_path / "small"), make)
    assert torch.equal(loaded(x), small(x))
    assert {"2", "4"} <= {layer.name for layer in made.compressed}
    assert not any("parametrizations" in name for name in small.state_dict())
    written = export_onnx(loaded, tmp_path / "small.onnx", x, dynamic_size=True)
    assert written.sizes
    assert written.worst_difference is not None
    assert written.worst_difference < 1e-5


class Block(nn.Module):
    """Convolution, batch norm and SiLU, as YOLO's `Conv`."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Split(nn.Module):
    """Two ways, one of them through a bottleneck, as YOLO's `C2f`."""

    def __init__(self, channels: int):
        super().__init__()
        self.cv1, self.cv2 = Block(channels, channels), Block(channels * 3 // 2, channels)
        self.m = nn.ModuleList([Block(channels // 2, channels // 2, 3)])

    def forward(self, x: Tensor) -> Tensor:
        ways = [*self.cv1(x).chunk(2, 1)]
        ways += [layer(ways[-1]) for layer in self.m]
        return self.cv2(torch.cat(ways, 1))


class Yolo(nn.Module):
    """Layers that name where their inputs come from, as ultralytics' parsed models."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList(
            [
                Block(3, 16, 3, 2),
                Split(16),
                Block(16, 32, 3, 2),
                Split(32),
                nn.Upsample(scale_factor=2),
                Block(48, 16),
                nn.Conv2d(16, 8, 1),
            ]
        )
        self.sources: list[tuple[int, ...]] = [(-1,)] * 5 + [(-1, 1), (-1,)]

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for layer, sources in zip(self.model, self.sources, strict=True):
            inputs = [outputs[i] for i in sources] if outputs else [x]
            outputs.append(layer(torch.cat(inputs, 1)))
        return outputs[-1]


def fused(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Block):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return model


def test_a_yolo_fused_before(tmp_path: Path) -> None:
    made, _ = whole_way(
        lambda: fused(Yolo().eval()), torch.randn(1, 3, 32, 32), tmp_path, dynamic_size=True
    )
    assert compressed_share(made) > 0.98


@pytest.mark.slow
def test_an_efficientnet_with_same_padding(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    def front() -> nn.Module:
        whole = timm.create_model("tf_efficientnet_b0")
        return nn.Sequential(whole.conv_stem, whole.bn1, *whole.blocks[:2])

    # Odd sizes: the margins differ.
    made, _ = whole_way(front, torch.randn(1, 3, 33, 33), tmp_path)
    kinds = {layer.name: layer.kind for layer in made.compressed}
    assert kinds["0"] == "Conv2dSame"


def test_the_vision_tower_of_clip(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(
        **sizes, num_hidden_layers=2, image_size=32, patch_size=8
    )
    made, _ = whole_way(
        lambda: transformers.CLIPVisionModel(config), torch.randn(1, 3, 32, 32), tmp_path
    )
    assert compressed_share(made) > 0.97
    assert all("Embedding" in layer.reason for layer in made.kept)


# --- issue 2, point 3: `small` computes what the distorted dense model computes, on real networks

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
