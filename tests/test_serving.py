"""What a saved network says of itself serves it: by name, by the command line, by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.cases import error_of
from tests.test_cli import refused, run
from tests.test_docs import ROOT, blocks
from torch import nn

import deeptwist as dt
from deeptwist.app.data import ImageData, load_data
from deeptwist.app.serving import predict
from deeptwist.app.training.evaluation import training_inputs
from deeptwist.export import export_onnx, quantize_onnx
from deeptwist.measure.runtimes import OnnxNetwork
from deeptwist.networks.build import build_model

Folder = Callable[..., Path]
CLASSES = "ant", "bee", "cat"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noise, neither square nor of a size."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for image, height in enumerate((25, 30, 41)):
                pixels = generator.integers(0, 80 * (number + 1), (height, 33, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{image}.png")
    return root


@pytest.fixture(scope="module")
def data(pictures: Path) -> ImageData:
    return load_data(str(pictures), image_size=16, crop_pct=0.8, workers=0, interpolation="bicubic")


def decomposed(model: nn.Module) -> nn.Module:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.train()(x)  # statistics of its own
    return dt.decompose(model, dt.plan(model, dt.SVD(), ratio=2, example_input=x)).eval()


TINY = "tests.test_serving:tiny_network"


def tiny_network(num_classes: int = 10) -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return decomposed(tiny_network(num_classes=3))


@pytest.fixture(scope="module")
def folder(small: nn.Module, data: ImageData, pictures: Path) -> Path:
    return dt.save(small, pictures / "small", base_model=TINY, metadata=data.metadata)


@pytest.fixture(scope="module")
def onnx(small: nn.Module, data: ImageData, pictures: Path) -> Path:
    x = torch.randn(2, 3, 16, 16)
    return export_onnx(small, pictures / "served.onnx", x, metadata=data.metadata).path


@pytest.mark.parametrize(
    ("name", "num_classes"), [("resnet20", None), (TINY, 5), ("torchvision/squeezenet1_1", 4)]
)
def test_a_named_network_loads_by_its_folder_alone(
    name: str, num_classes: int | None, tmp_path: Path
) -> None:
    small = decomposed(build_model(name, num_classes=num_classes))
    metadata = {"num_classes": num_classes}
    x = torch.randn(2, 3, 32, 32)
    loaded = dt.load(dt.save(small, tmp_path, base_model=name, metadata=metadata))
    assert torch.equal(loaded(x), small(x))


@pytest.mark.parametrize(
    ("name", "metadata", "answer"),
    [
        (None, {}, "how to build 'Sequential': unknown model"),
        ("os:abort", {}, "Python's own"),
        (TINY, {"num_classes": "3"}, "num_classes '3' is not a whole number"),
        (TINY, {"num_classes": 10**15}, "load(path, model)"),
        (TINY, {}, "the saved model is another one"),
    ],
)
def test_a_name_that_builds_nothing_is_refused(
    small: nn.Module, name: str | None, metadata: dict[str, Any], answer: str, tmp_path: Path
) -> None:
    dt.save(small, tmp_path, base_model=name, metadata=metadata)
    assert answer in error_of(dt.load, tmp_path)


def test_metadata_that_json_does_not_hold_is_refused(small: nn.Module, tmp_path: Path) -> None:
    for value in (torch.ones(1), float("nan")):
        assert "not JSON's" in error_of(dt.save, small, tmp_path / "x", metadata={"mean": value})
    assert not (tmp_path / "x").exists()


def test_what_is_predicted_is_what_is_evaluated(
    small: nn.Module, data: ImageData, folder: Path, onnx: Path, pictures: Path
) -> None:
    """Both runtimes, on files, give what the network gives for the test split's images."""
    files = sorted((pictures / "test").rglob("*.png"))
    with torch.no_grad():
        x = (data.test.images / 255 - torch.tensor(data.mean).view(-1, 1, 1)) / torch.tensor(
            data.std
        ).view(-1, 1, 1)
        expected = small(x).softmax(1)
    for network in (folder, onnx):
        rows = predict(network, files, top=9)
        assert [row["path"] for row in rows] == [*map(str, files)]
        for row, shares in zip(rows, expected.tolist(), strict=True):
            assert [*row["classes"].values()] == sorted(row["classes"].values(), reverse=True)
            assert row["classes"] == pytest.approx(
                dict(zip(CLASSES, shares, strict=True)), abs=1e-4
            )


def test_the_page_s_lines_serve_the_file_by_hand(
    small: nn.Module,
    data: ImageData,
    onnx: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (lines,) = [b for b in blocks(ROOT / "docs/export.md", "python") if "served.onnx" in b]
    monkeypatch.chdir(tmp_path)
    Path("served.onnx").symlink_to(onnx)
    for index, file in enumerate(sorted((pictures / "test").rglob("*.png"))):
        Image.open(file).save("photo.jpg", format="PNG")
        names: dict[str, Any] = {}
        exec(lines, names)
        pixels = torch.from_numpy(names["pixels"]).permute(2, 0, 1) * 255
        assert torch.equal(pixels.round().to(torch.uint8), data.test.images[index])
        (row,) = predict(onnx, [Path("photo.jpg")], top=1)
        assert capsys.readouterr().out.split() == [*row["classes"]]


def test_the_commands(folder: Path, onnx: Path, pictures: Path, tmp_path: Path) -> None:
    said = json.loads(run("info", folder, "--json").stdout)
    assert (said["base_model"], said["metadata"]["classes"]) == (TINY, [*CLASSES])
    assert said["bytes"] == (folder / "model.safetensors").stat().st_size
    assert said["layers"][0] == {
        "layer": "2",
        "shape": said["layers"][0]["shape"],
        "lowered": "8×72",
        "decomposition": "svd",
        "rank": "3",
        "weights": "576 → 240",
    }
    printed = run("info", folder).stdout
    assert "classes: ant, bee, cat" in printed
    assert "576 → 240" in printed
    image = pictures / "test" / "ant" / "0.png"
    lines = [run("predict", network, image, "--top", 2).stdout for network in (folder, onnx)]
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"{image}: ")
    assert lines[0].count("%") == 2
    exported = tmp_path / "again.onnx"
    run("export", TINY, "--input", "3x16x16", "--small", folder, "--out", exported)
    assert OnnxNetwork(exported, 1).metadata == OnnxNetwork(onnx, 1).metadata
    told = refused("predict", onnx, folder / "config.json")
    assert told.endswith("config.json' (UnidentifiedImageError)\n")
    assert "no image file" in refused("predict", onnx, folder / "photo.jpg")


def test_what_says_nothing_of_images_predicts_nothing(
    small: nn.Module, tmp_path: Path, pictures: Path
) -> None:
    image = pictures / "test" / "ant" / "0.png"
    bare = dt.save(small, tmp_path, base_model=TINY, metadata={"num_classes": 3})
    assert "how images become its input: 'classes'" in refused("predict", bare, image)


def test_a_quantised_file_says_the_same(data: ImageData, onnx: Path, tmp_path: Path) -> None:
    batches = training_inputs(data, nn.Linear(1, 1), 4)
    path = quantize_onnx(onnx, tmp_path / "int8.onnx", batches)
    assert OnnxNetwork(path, 1).metadata == OnnxNetwork(onnx, 1).metadata


def test_int8_takes_onnxruntime_s_options(data: ImageData, onnx: Path, tmp_path: Path) -> None:
    """Layers that are left out keep their weights in fp32: no integer is left of them."""
    batches = [*training_inputs(data, nn.Linear(1, 1), 4)]
    sizes = [
        quantize_onnx(onnx, tmp_path / "int8.onnx", batches, **options).read_bytes()
        for options in ({}, {"op_types_to_quantize": ["Gemm"]})
    ]
    assert sizes[0].count(b"_quantized") > sizes[1].count(b"_quantized") > 0
