"""What leaves PyTorch computes what the model computes, or is not there."""

import io
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.cases import EVERY_LAYER, PLANNED_METHODS, difference, error_of, every_layer
from tests.test_cli import refused, run
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from deeptwist import CP, SVD, Decomposition, SpatialSVD, TiledSVD, decompose, plan, save
from deeptwist.export import (
    BATCHES,
    Exported,
    export_onnx,
    export_program,
    export_state_dict,
    quantize_onnx,
)
from deeptwist.networks.build import build_model

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

X = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))
IMAGES = Path.home() / ".cache" / "deeptwist-data" / "cifar10-jpeg"
EXPORTS = pytest.mark.parametrize("export", [export_onnx, export_program])


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=2, padding="same"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 12),
    )


def small_network(method: Decomposition) -> nn.Module:
    model = network()
    model(X)  # gives the running statistics something to remember
    ratio = 4 if isinstance(method, CP) else 1.5  # below, CP would need more MACs
    made = plan(model, method, ratio=ratio, example_input=X, layers=EVERY_LAYER)
    assert {"0", "3"} <= {layer.name for layer in made.compressed}
    return decompose(model, made)


def convolution() -> nn.Module:
    """The least that can be exported."""
    return nn.Sequential(nn.Conv2d(8, 4, 3))


def session(path: Path) -> Any:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def outputs(path: Path, x: Tensor) -> Tensor:
    return torch.from_numpy(session(path).run(None, {"input": x.numpy()})[0])


def check_graph(written: Exported) -> Any:
    """One file, whose batch is free in every input and output."""
    assert [path.name for path in written.path.parent.iterdir()] == [written.path.name]
    assert written.bytes == written.path.stat().st_size
    assert written.batches == BATCHES
    graph = onnx.load(written.path)
    onnx.checker.check_model(graph)
    for value in (*graph.graph.input, *graph.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [entry.version for entry in graph.opset_import if not entry.domain] == [written.opset]
    return graph


# --- ONNX


@pytest.mark.parametrize("method", PLANNED_METHODS.values(), ids=PLANNED_METHODS)
def test_every_decomposition_leaves_as_onnx(method: Decomposition, tmp_path: Path) -> None:
    small = small_network(method)
    written = export_onnx(small, tmp_path / "small.onnx", X)
    check_graph(written)
    assert written.worst_difference is not None
    assert written.worst_difference < 1e-5
    x = torch.randn(7, 8, 9, 9)
    assert difference(small.eval()(x), outputs(written.path, x)) < 1e-5


@pytest.mark.slow
def test_resnet32_leaves_as_onnx_in_tiles(tmp_path: Path) -> None:
    model, x = build_model("resnet32"), torch.randn(3, 3, 32, 32)
    tiles = TiledSVD(tile=(64, 64))
    small = decompose(
        model,
        plan(model, tiles, ratio=4, example_input=x, layers=every_layer(skip_first_conv=True)),
    )
    written = export_onnx(small, tmp_path / "small.onnx", x)
    check_graph(written)
    assert difference(small.eval()(x), outputs(written.path, x)) < 1e-5


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_the_opset_is_honoured(
    opset: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written = export_onnx(convolution(), tmp_path / "small.onnx", X, opset=opset)
    assert written.opset == opset
    check_graph(written)
    assert capfd.readouterr() == ("", "")  # torch would tell of every step


@pytest.mark.parametrize(("opset", "mode"), [(999, "zeros"), (17, "reflect")])
def test_an_opset_that_cannot_be_had_is_refused(opset: int, mode: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode))
    message = error_of(export_onnx, model, tmp_path / "small.onnx", X, opset=opset)
    assert f"opset {opset} cannot be had" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [0, -1, 2.5, "17", True])
def test_an_opset_that_is_no_number(opset: Any, tmp_path: Path) -> None:
    assert "opset" in error_of(export_onnx, convolution(), tmp_path / "x.onnx", X, opset=opset)


def test_an_example_of_one_image_leaves_the_batch_free(tmp_path: Path) -> None:
    check_graph(export_onnx(convolution(), tmp_path / "small.onnx", X[:1]))


# --- free sizes and fixed batches


class Joined(nn.Module):
    """Two images of one size, whatever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(torch.cat([x, y], 1)).mean((2, 3))


def test_height_and_width_are_free_where_asked(tmp_path: Path) -> None:
    model = Joined()
    written = export_onnx(model, tmp_path / "small.onnx", (X, X), dynamic_size=True)
    graph = check_graph(written).graph
    for value in graph.input:
        names = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        assert names == ["batch", "", "height", "width"]
    assert written.sizes == ((10, 11), (17, 25), (41, 73))
    x, y = torch.randn(2, 3, 8, 31, 5)
    output = session(written.path).run(None, {"input_0": x.numpy(), "input_1": y.numpy()})[0]
    assert difference(model(x, y), torch.from_numpy(output)) < 1e-5


def test_a_program_has_a_free_length(tmp_path: Path) -> None:
    model = nn.Conv1d(8, 4, 3, padding=1)
    written = export_program(model, tmp_path / "small.pt2", X[..., 0], dynamic_size=True)
    assert written.sizes
    program = torch.export.load(written.path).module()
    x = torch.randn(3, 8, 50)
    assert difference(model(x), program(x)) < 1e-6


def test_sizes_that_the_network_fixes_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8 * 81, 4))
    message = error_of(export_onnx, model, tmp_path / "x.onnx", X, dynamic_size=True)
    assert "its size cannot be free" in message
    message = error_of(
        export_onnx, nn.Linear(9, 4), tmp_path / "x.onnx", X[0, 0], dynamic_size=True
    )
    assert message == "no input has a height and width that could be free"
    assert not list(tmp_path.iterdir())


class Filters(nn.Module):
    """As many outputs as numbers are positive: torch.export cannot guard on such a count."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x[0][x[0] > 0]
        return kept if kept.numel() > 4 else kept * 2


def test_a_fixed_batch_lets_out_what_depends_on_numbers(tmp_path: Path) -> None:
    message = error_of(export_onnx, Filters(), tmp_path / "x.onnx", X)
    assert "--batch 1" in message
    written = export_onnx(Filters(), tmp_path / "x.onnx", X, batch=1)
    assert written.batches == (1,)
    assert written.worst_difference == 0
    x = torch.randn(1, 8, 9, 9)
    assert difference(Filters()(x), outputs(written.path, x)) == 0


class Fixed(nn.Module):
    """Has an output whose first axis torch.export cannot tell from the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class BlockAttention(nn.Module):
    """Attention over five axes, as Hiera's: torch's ONNX exporter takes four."""

    def forward(self, x: Tensor) -> Tensor:
        y = x[..., None]
        return functional.scaled_dot_product_attention(y, y, y)


@pytest.mark.parametrize("make", [Fixed, BlockAttention])
def test_the_older_exporter_helps_out(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    written = export_onnx(make(), tmp_path / "x.onnx", X)
    assert written.batches == (1, 2, 5)
    for batch in (3, 4):
        x = torch.randn(batch, *X.shape[1:])
        assert difference(make()(x), outputs(written.path, x)) < 1e-6


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, index: Tensor, x: Tensor) -> dict[str, Tensor]:
        y = self.linear(self.table(index) + x)
        return {"y": y, "largest": y.argmax(1)}


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    inputs = torch.tensor([4, 0, 2]), torch.randn(3, 8)
    written = export_onnx(TwoInputs(), tmp_path / "small.onnx", inputs)
    graph = check_graph(written).graph
    assert [value.name for value in graph.input] == ["input_0", "input_1"]
    assert [value.name for value in graph.output] == ["output_0", "output_1"]


def test_more_than_one_file_can_hold(tmp_path: Path) -> None:
    model = nn.Linear(2**15, 2**15, device="meta")
    message = error_of(export_onnx, model, tmp_path / "x.onnx", torch.zeros(2, 2**15))
    assert "4.0 GB" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    message = error_of(export_onnx, convolution(), tmp_path / "x.onnx", X)
    assert message == f"{package} is not installed: pip install '.[onnx]' in deeptwist's checkout"


# --- a program


@pytest.mark.parametrize("name", ["tiled-ragged", "cp"])
def test_a_program_is_written_with_zeros(name: str, tmp_path: Path) -> None:
    written = export_program(small_network(PLANNED_METHODS[name]), tmp_path / "small.pt2", X + 1)
    assert written.worst_difference is not None
    assert written.worst_difference < 1e-6
    assert written.bytes == written.path.stat().st_size
    with zipfile.ZipFile(written.path) as archive:
        (samples,) = (n for n in archive.namelist() if "sample_inputs" in n)
        kept = torch.load(io.BytesIO(archive.read(samples)), weights_only=True)
    ((sample,), _) = kept
    assert sample.shape == X.shape
    assert not sample.any()


@EXPORTS
def test_no_path_of_this_machine_is_written(
    export: Callable[..., Exported], tmp_path: Path
) -> None:
    written = export(TwoInputs(), tmp_path / "small", (torch.tensor([1]), X[:1, :, 0, 0]))
    content = written.path.read_bytes()
    assert Path(__file__).name.encode() not in content
    assert b"site-packages" not in content


# --- a state dict


def test_a_state_dict_loads(tmp_path: Path) -> None:
    small = small_network(TiledSVD(tile=(4, 18)))
    written = export_state_dict(small, tmp_path / "small.safetensors")
    assert written == Exported(written.path, written.path.stat().st_size)
    exported = load_file(written.path)
    assert exported.keys() == small.state_dict().keys()
    assert all(torch.equal(exported[name], value) for name, value in small.state_dict().items())


def test_shared_tensors_are_there_under_each_name(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        shared = nn.Linear(4, 4)
        model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 4, bias=False))
        model[3].weight = shared.weight
        return model

    model, other = tied(), tied()
    export_state_dict(model, tmp_path / "small.safetensors")
    other.load_state_dict(load_file(tmp_path / "small.safetensors"), strict=True)
    x = torch.randn(3, 4)
    assert torch.equal(model(x), other(x))


# --- the model that is passed


@EXPORTS
def test_the_model_stays_as_it_was(export: Callable[..., Exported], tmp_path: Path) -> None:
    model = small_network(SVD()).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    export(model, tmp_path / "small", X)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def parametrized() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Conv2d(8, 4, 3)), nn.ReLU())


def test_parametrized_weights_leave_as_plain_ones(tmp_path: Path) -> None:
    model = parametrized()
    expected, names = model(X), list(model.state_dict())
    written = export_onnx(model, tmp_path / "small.onnx", X)
    assert {node.op_type for node in onnx.load(written.path).graph.node} <= {"Conv", "Relu"}
    export_state_dict(model, tmp_path / "small.safetensors")
    exported = load_file(tmp_path / "small.safetensors")
    assert exported.keys() == {"0.weight", "0.bias"}
    assert torch.equal(exported["0.weight"], model[0].weight)
    assert list(model.state_dict()) == names
    assert torch.equal(model(X), expected)


# --- what cannot leave


class ByData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Total(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


@pytest.mark.parametrize(
    ("export", "make", "answer"),
    [
        (export_program, Fixed, "free batch: You marked batch as dynamic"),
        (export_onnx, ByData, "free batch"),
        (export_onnx, Noisy, "does not compute what the model does"),
        (export_program, Noisy, "does not compute what the model does"),
        (export_onnx, Total, "'output' is ()"),
        (export_onnx, lambda: nn.Conv2d(3, 4, 3), "cannot run on inputs (2, 8, 9, 9)"),
        (export_program, lambda: nn.Conv2d(3, 4, 3), "cannot run on inputs (2, 8, 9, 9)"),
    ],
)
def test_nothing_is_left_of_an_export_that_fails(
    export: Callable[..., Exported], make: Callable[[], nn.Module], answer: str, tmp_path: Path
) -> None:
    (tmp_path / "small").write_text("an earlier one")
    assert answer in error_of(export, make(), tmp_path / "small", X)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert (tmp_path / "small").read_text() == "an earlier one"


@EXPORTS
def test_a_tolerance_is_kept(export: Callable[..., Exported], tmp_path: Path) -> None:
    message = error_of(export, Noisy(), tmp_path / "small", X, tolerance=1e-3)
    assert "above the tolerance 1.0e-03" in message
    assert export(Noisy(), tmp_path / "small", X, tolerance=9).worst_difference > 0.01


@pytest.mark.parametrize("example", [torch.zeros(0, 8, 9, 9), torch.tensor(1.0), "x", (1,)])
def test_an_example_without_a_batch(example: Any, tmp_path: Path) -> None:
    message = error_of(export_onnx, convolution(), tmp_path / "small", example)
    assert "batch in front" in message or "neither a tensor" in message


@pytest.mark.parametrize("place", ["", "nowhere/small"])
def test_a_place_where_nothing_can_be_written(place: str, tmp_path: Path) -> None:
    assert "cannot write" in error_of(export_onnx, convolution(), tmp_path / place, X)
    assert "cannot write" in error_of(export_state_dict, convolution(), tmp_path / place)


# --- int8


def images(split: str, per_class: int) -> Tensor:
    """CIFAR-10 as ResNet-32 takes it; random numbers on a machine that has none."""
    if not IMAGES.is_dir():
        return torch.randn(10 * per_class, 3, 32, 32)
    from PIL import Image

    from deeptwist.app.data import normalize
    from deeptwist.app.data.sources import IMAGENET_MEAN, IMAGENET_STD

    folders = sorted((IMAGES / split).iterdir())
    files = [file for folder in folders for file in sorted(folder.iterdir())[:per_class]]
    arrays = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files]
    pixels = torch.stack(arrays).permute(0, 3, 1, 2)
    return normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)


def test_layers_beside_a_residual_connection_run_in_int8_too(tmp_path: Path) -> None:
    model, x = build_model("resnet20").eval(), torch.randn(4, 3, 32, 32)
    source, path = tmp_path / "a.onnx", tmp_path / "a-int8.onnx"
    export_onnx(model, source, x[:2])
    quantize_onnx(source, path, [x])
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(path, options)
    operators = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    assert {"Conv", "Add"}.isdisjoint(operators)
    assert (operators.count("QLinearConv"), operators.count("QLinearAdd")) == (19, 9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [SpatialSVD(), pytest.param(TiledSVD(tile=(16, 144)), marks=pytest.mark.sweep)],
    ids=str,
)
def test_resnet32_leaves_as_onnx_and_int8_stays_near(
    method: Decomposition, tmp_path: Path, resnet32_weights: dict[str, Tensor]
) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, x = build_model("resnet32"), images("test", 20)
    model.load_state_dict(resnet32_weights)
    made = plan(model, method, ratio=1.5, example_input=x[:2])
    dense = tmp_path / "small.onnx"
    small = decompose(model, made)
    written = export_onnx(small, dense, x[:2])
    check_graph(written)
    expected = outputs(dense, x)
    assert difference(small.eval()(x), expected) < 1e-5
    dynamic, static = tmp_path / "dynamic.onnx", tmp_path / "static.onnx"
    quantize_dynamic(dense, dynamic, weight_type=QuantType.QUInt8)
    quantize_onnx(dense, static, images("train", 10).split(10))
    for path in (dynamic, static):
        output = outputs(path, x)
        assert difference(expected, output) < 0.1
        assert (expected.argmax(1) == output.argmax(1)).float().mean() > 0.9
        assert path.stat().st_size < 0.5 * written.bytes


# --- torch.compile


@pytest.mark.slow
def test_every_decomposition_compiles_whole() -> None:
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, groups=2, padding="same") for _ in PLANNED_METHODS))
    model.append(nn.Linear(9, 9))
    overrides = {str(index): method for index, method in enumerate(PLANNED_METHODS.values())}
    made = plan(model, SVD(), ratio=1.2, example_input=X, layers=every_layer(overrides=overrides))
    assert len(made.compressed) == len(PLANNED_METHODS) + 1
    small = decompose(model, made).eval().requires_grad_(False)
    compiled = torch.compile(small, fullgraph=True)
    assert difference(small(X), compiled(X)) < 1e-5


@pytest.mark.parametrize("decomposition", PLANNED_METHODS.values(), ids=PLANNED_METHODS)
def test_fx_traces_what_is_decomposed_and_folds_batch_norm_into_it(
    decomposition: Decomposition,
) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Linear(7, 7))
    cast(nn.BatchNorm2d, dense[1]).running_mean = torch.randn(12)
    small = decompose(
        dense.eval(), plan(dense, decomposition, ratio=1.2, example_input=X, layers=EVERY_LAYER)
    )
    folded = fuse(small)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert difference(small(X), folded(X)) < 1e-5


# --- the command


WORDS = ["export", "test_export:network", "--input", "8x9x9"]


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    return save(small_network(SVD()), tmp_path / "artefact")


def test_the_command_frees_sizes_and_fixes_batches(tmp_path: Path) -> None:
    words = [*WORDS, "--ratio", 1.5, "--out", tmp_path / "small"]
    printed = json.loads(run(*words, "--dynamic-size", "--batch", 1, "--json").stdout)
    assert printed["batches"] == [1]
    assert printed["sizes"][0] == [10, 11]
    assert "no inputs" in refused(*words, "--format", "state-dict", "--batch", 1)
    assert "batch 0" in refused(*words, "--batch", 0)


@pytest.mark.parametrize("kind", ["onnx", "program", "state-dict"])
def test_the_command_writes_an_artefact(kind: str, artefact: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    words = [*WORDS, "--small", artefact, "--format", kind, "--out", out]
    printed = json.loads(run(*words, "--json").stdout)
    assert printed.keys() == {*asdict(Exported(out, 0)), "format"}
    assert printed["path"] == str(out)
    assert printed["bytes"] == out.stat().st_size
    assert (printed["worst_difference"] is None) == (kind == "state-dict")


def test_the_command_decomposes_by_itself(tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    done = run(*WORDS, "--ratio", "1.5", "--decomposition", "svd", "--opset", "18", "--out", out)
    assert done.returncode == 0, done
    assert "onnx (opset 18)" in done.stdout
    assert "at batches 1, 2, 5" in done.stdout
    assert out.is_file()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            ["--ratio", "1.5", "--format", "program", "--opset", "17"],
            "--opset applies to ONNX only",
        ),
        (["--ratio", "1.5", "--format", "tflite"], "tflite"),
        (["--small", "nowhere"], "no config.json"),
        (["--small", "nowhere", "--ratio", "2"], "--small is decomposed already"),
        (["--ratio", "1.5", "--exclude", "*"], "compresses no layer"),
        ([], "say how small: --ratio 4, --weight-budget 4"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], answer: str, tmp_path: Path) -> None:
    assert answer in refused(*WORDS, *words, "--out", tmp_path / "small")
    assert not list(tmp_path.iterdir())
