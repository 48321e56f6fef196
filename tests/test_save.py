import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.cases import (
    EVERY_LAYER,
    GEOMETRIES,
    PLANNED_METHODS,
    build,
    error_of,
    every_layer,
    spoiled,
    works_or_is_refused,
)
from torch import nn
from torch.nn.utils import parametrize

import deeptwist
from deeptwist import CP, SVD, Decomposition, TiledSVD, Tucker, decompose, load, plan, save
from deeptwist.decompose import is_channels_last
from deeptwist.decompositions import FactoredLayer

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
EACH_METHOD = pytest.mark.parametrize("method", PLANNED_METHODS.values(), ids=PLANNED_METHODS)


def network(width: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 8, 3, padding=1),
        nn.Conv2d(8, 8, 1),
    )


def small_network(method: Decomposition | None = None, dtype: Any = torch.float32) -> nn.Module:
    model = network().to(dtype)
    model(X.to(dtype))  # gives the running statistics something to remember
    made = plan(
        model,
        method or SVD(),
        ratio=1.6,
        example_input=X.to(dtype),
        layers=every_layer(exclude=["4"]),
    )
    return decompose(model, made).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(small_network(), tmp_path / "out")


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def resign(folder: Path) -> None:
    """Makes the checksum fit again, as an attacker would."""
    import hashlib

    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder, weights_sha256=digest)


# --- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@EACH_METHOD
def test_a_loaded_model_gives_equal_outputs(
    method: Decomposition, dtype: torch.dtype, tmp_path: Path
) -> None:
    small = small_network(method, dtype)
    loaded = load(save(small, tmp_path), model=network)
    assert torch.equal(small(X.to(dtype)), loaded(X.to(dtype)))
    saved, actual = small.state_dict(), loaded.state_dict()
    assert list(saved) == list(actual)
    assert all(torch.equal(saved[name], actual[name]) for name in saved)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_kind_of_layer_survives(geometry: str, tmp_path: Path) -> None:
    make, _ = GEOMETRIES[geometry]
    layer, x = build(geometry, torch.float32)
    for name, method in PLANNED_METHODS.items():
        ratio = 4 if name == "cp" else 1.3
        made = plan(nn.Sequential(layer), method, ratio=ratio, example_input=x, layers=EVERY_LAYER)
        if made.compressed:
            small = decompose(nn.Sequential(layer), made)
            loaded = load(save(small, tmp_path / name), lambda: nn.Sequential(make()))
            assert torch.equal(small(x), loaded(x))


def test_a_loaded_model_is_for_use_and_can_be_trained_on(folder: Path) -> None:
    loaded = load(folder, network)
    assert not any(module.training for module in loaded.modules())
    assert sum(isinstance(module, FactoredLayer) for module in loaded.modules()) == 2
    loaded.train()(X).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in loaded.parameters())
    assert all(p.is_leaf for p in loaded.parameters())


def test_loaded_weights_own_their_memory(folder: Path) -> None:
    """Views into the file would be unaligned, which rounds otherwise, and would change with it."""
    for name, tensor in load(folder, network).state_dict().items():
        assert tensor.data_ptr() % 16 == 0, name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


def test_a_model_serves_as_its_own_factory_and_is_left_alone(folder: Path) -> None:
    model = network()
    before = [p.clone() for p in model.parameters()]
    assert torch.equal(load(folder, model)(X), load(folder, network)(X))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.training


def test_a_tied_module_stays_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        shared = nn.Conv2d(8, 8, 3, padding=1)
        return nn.Sequential(shared, nn.ReLU(), shared)

    model = tied()
    small = decompose(model, plan(model, CP(rank=3), example_input=X, layers=EVERY_LAYER))
    loaded = load(save(small, tmp_path), tied)
    assert loaded[0] is loaded[2]
    assert torch.equal(loaded(X), small(X))
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in small.parameters())


def test_tied_weights_stay_tied_and_can_be_saved_again(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[1].weight
        return model

    model = tied()
    made = plan(model, SVD(), ratio=2, example_input=X, layers=every_layer(include=["0"]))
    loaded = load(save(decompose(model, made), tmp_path / "first"), tied)
    assert loaded[1].weight is loaded[2].weight
    again = load(save(loaded, tmp_path / "second"), tied)
    assert torch.equal(again(X), loaded(X))


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_overlap_in_memory_are_saved(tmp_path: Path, whole: bool) -> None:
    small = small_network()
    source = small[1].weight if whole else small[3][0].weight.as_strided((16,), (1,))
    small[1].bias = nn.Parameter(source.detach())
    loaded = load(save(small, tmp_path), network)
    assert torch.equal(loaded(X), small(X))


def test_saving_a_loaded_model_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    again = save(load(folder, network), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_folder_is_described(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["deeptwist_version"] == deeptwist.__version__
    assert config["base_model"] == "Sequential"
    assert list(config["layers"]) == ["0", "3"]
    assert config["layers"]["0"]["decomposition"]["method"] == "svd"


def test_the_base_model_may_be_named(tmp_path: Path) -> None:
    save(small_network(), tmp_path, base_model="torchvision/resnet34")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base_model"] == "torchvision/resnet34"


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_memory_format_comes_back(tmp_path: Path, memory_format: torch.memory_format) -> None:
    small = small_network(TiledSVD(tile=(4, 18))).to(memory_format=memory_format)
    loaded = load(save(small, tmp_path), network)
    assert torch.equal(loaded(X), small(X))
    assert is_channels_last(loaded) == (memory_format == torch.channels_last)


def test_a_folder_that_tells_no_memory_format_is_read(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["channels_last"]
    (folder / "config.json").write_text(json.dumps(config))
    assert all(p.is_contiguous() for p in load(folder, network).parameters())


def test_saving_what_is_not_decomposed_is_refused(tmp_path: Path) -> None:
    assert "decompose it first" in error_of(save, network(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- damage


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    assert "no config.json" in error_of(load, tmp_path / "nowhere", network)
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in error_of(load, folder, network)
    (folder / "config.json").unlink()
    assert "no config.json" in error_of(load, folder, network)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_weights_file(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "damaged" in error_of(load, folder, network)
    resign(folder)
    assert "model.safetensors" in error_of(load, folder, network)


@pytest.mark.parametrize("place", [0, 9, -1])
def test_one_edited_byte(folder: Path, place: int) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[place] ^= 1
    weights.write_bytes(content)
    assert "checksum" in error_of(load, folder, network)


@given(data=st.data())
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_edited_weights_with_a_checksum_that_fits(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = save(SMALL, tmp_path_factory.mktemp("out"))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header + 16))] = data.draw(st.integers(0, 255))
    weights.write_bytes(content)
    resign(folder)
    works_or_is_refused(lambda: load(folder, network))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors.popitem(),
        lambda tensors: tensors.update(extra=torch.zeros(1)),
        lambda tensors: tensors.update({"1.bias": torch.zeros(15)}),
        lambda tensors: tensors.update({"1.bias": torch.zeros(16, dtype=torch.int32)}),
        lambda tensors: tensors.update({"4.weight": torch.zeros(8, 8, 1, 1, dtype=torch.bool)}),
        lambda tensors: tensors.update({"1.bias": torch.zeros(16, dtype=torch.complex64)}),
        lambda tensors: tensors.update({"two\nlines": torch.zeros(1)}),
    ],
    ids=["missing", "extra", "shape", "integer", "bool", "complex", "two lines"],
)
def test_other_tensors_than_the_models(folder: Path, spoil: Callable[[Any], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    resign(folder)
    assert "model" in error_of(load, folder, network)


@pytest.mark.parametrize(
    "other",
    [
        lambda: network(24),
        lambda: nn.Sequential(),
        lambda: nn.Sequential(*network(), nn.Linear(6, 6)),
        lambda: nn.Sequential(*network()[:3]),
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=True), *network()[1:]),
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3, padding=2, bias=False), *network()[1:]),
        lambda: nn.Sequential(nn.ReLU(), *network()[1:]),
        nn.Identity,
        small_network,
    ],
    ids=[
        "width", "empty", "longer", "shorter", "bias", "padding", "kind", "identity", "decomposed"
    ],
)  # fmt: skip
def test_a_wrong_architecture(folder: Path, other: Callable[[], nn.Module]) -> None:
    error_of(load, folder, other)


def test_a_factory_that_makes_no_model(folder: Path) -> None:
    assert "the factory gave a NoneType" in error_of(load, folder, lambda: None)


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5, True, [], {}])
def test_an_unknown_format_version(folder: Path, version: Any) -> None:
    edit(folder, format_version=version)
    assert "format version" in error_of(load, folder, network)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b'{"format_version": 1',
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"format_version": ' + b"9" * 10_000 + b"}",
        b'{"format_version": 1, "layers": {}}',
        b" " * (17 * 2**20),
    ],
    ids=["empty", "null", "list", "cut", "bytes", "deep", "deeper", "digits", "bare", "large"],
)
def test_a_configuration_that_is_none(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    assert "config.json" in error_of(load, folder, network)


# --- hostility

HUGE = 10**9


@pytest.mark.parametrize(
    "layer",
    [
        {"decomposition": {"method": "svd", "rank": HUGE}},
        {"decomposition": {"method": "tucker", "rank": [HUGE, HUGE], "fraction": None}},
        {"decomposition": {"method": "cp", "rank": HUGE}},
        {"decomposition": {"method": "tiled_svd", "rank": HUGE, "tile": [HUGE, HUGE]}},
        {"decomposition": {"method": "svd", "rank": None}},
        {"decomposition": {"method": "svd", "rank": "16"}},
        {"decomposition": {"method": "svd", "rank": 2, "device": "cuda"}},
        {"decomposition": {"method": "os.system"}},
        {"decomposition": {"method": ["svd"]}},
        {"decomposition": "svd"},
        {"decomposition": None},
        {},
        [],
        None,
    ],
    ids=str,
)
def test_a_decomposition_that_is_none(folder: Path, layer: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    if isinstance(layer, dict):
        layer = {"convolution": config["layers"]["0"]["convolution"], **layer}
    edit(folder, layers={**config["layers"], "0": layer})
    assert "'0'" in error_of(load, folder, network)


@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": HUGE},
        {"in_channels": 10**30},
        {"in_channels": math.inf},
        {"in_channels": -8},
        {"in_channels": 8.0},
        {"in_channels": "8"},
        {"in_channels": None},
        {"kernel_size": [HUGE, HUGE]},
        {"kernel_size": [3] * 1000},
        {"kernel_size": 3},
        {"kernel_size": "33"},
        {"kernel_size": [[3], [3]]},
        {"groups": 0},
        {"groups": -1, "out_channels": -16},
        {"padding": "../.."},
        {"transposed": "no"},
        {"color": "red"},
        {"two\nlines": 0},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_geometry_that_is_not_the_layers(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["layers"]["0"]["convolution"].update(changes)
    edit(folder, layers=config["layers"])
    assert "'0'" in error_of(load, folder, network)


def test_absurd_sizes_cost_no_memory(folder: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = json.loads((folder / "config.json").read_text())
    layer = config["layers"]["0"]
    layer["convolution"].update(in_channels=2**20, out_channels=2**20)
    for method in (
        {"method": "svd", "rank": 2**20},
        {"method": "tiled_svd", "rank": 1, "tile": [1, 1]},
        {"method": "tucker", "rank": [2**20, 2**20], "fraction": None},
        {"method": "cp", "rank": 2**20},
    ):
        layer["decomposition"] = method
        edit(folder, layers=config["layers"])
        assert "'0'" in error_of(load, folder, network)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # kilobytes


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "", ".", "0.weight", "99", "a\nb"]
)
def test_a_layer_by_a_name_that_is_no_layer(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(folder, layers={name: config["layers"]["0"]})
    error_of(load, folder, network)


@pytest.mark.parametrize(
    "changes",
    [
        {"aliases": []},
        {"aliases": {"x": "0.0.weight"}},
        {"aliases": {"0.0.weight": "1.bias"}},
        {"aliases": {"x": []}},
        {"aliases": {"x": {}}},
        {"layers": []},
        {"layers": None},
        {"layers": {}},
        {"base_model": 3},
        {"base_model": "two\nlines\x1b[31m", "aliases": {"x": "0.0.weight"}},
        {"weights_sha256": None},
        {"weights_sha256": "0" * 64},
    ],
    ids=str,
)
def test_other_fields_of_nonsense(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    assert "\x1b" not in error_of(load, folder, network)


SMALL = small_network(Tucker())
CONFIG: dict[str, Any] = {}


def config_of_small(folder: Path) -> dict[str, Any]:
    if not CONFIG:
        CONFIG.update(json.loads((save(SMALL, folder) / "config.json").read_text()))
    return CONFIG


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
def test_a_spoiled_configuration_is_refused_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "spoiled"
    document = data.draw(spoiled(config_of_small(folder)))
    (folder / "config.json").write_text(json.dumps(document))
    works_or_is_refused(lambda: load(folder, network)(X))


# --- saving that does not succeed


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_save_that_fails_leaves_the_old_artefact_loading(folder: Path, name: str) -> None:
    expected = load(folder, network)(X)
    block_writing(folder, name)
    assert "cannot write" in error_of(save, small_network(CP()), folder)
    assert torch.equal(load(folder, network)(X), expected)


def block_writing(folder: Path, name: str) -> None:
    """A folder stands where the new file would be written, whatever it is called meanwhile."""
    import os

    (folder / f".{name}.{os.getpid()}.tmp").mkdir()


def test_saving_where_a_file_stands(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    assert "cannot write" in error_of(save, small_network(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_saving_over_an_artefact_replaces_it(folder: Path) -> None:
    other = small_network(Tucker())
    save(other, folder)
    assert torch.equal(load(folder, network)(X), other(X))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_moved_folder_loads(folder: Path, tmp_path: Path) -> None:
    expected = load(folder, network)(X)
    shutil.move(folder, tmp_path / "elsewhere")
    assert torch.equal(load(str(tmp_path / "elsewhere"), network)(X), expected)


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    small = small_network(TiledSVD(tile=(8, 20)))
    save(small, tmp_path / "whole")
    for part in small.modules():
        if parametrize.is_parametrized(part):
            parametrize.remove_parametrizations(part, "weight")
    assert "before its parametrizations are removed" in error_of(save, small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_on_meta_is_refused(folder: Path) -> None:
    with torch.device("meta"):
        assert "make it on the CPU" in error_of(load, folder, network())


# --- what else a model holds


class Versioned(nn.Module):
    """Looks at the version of its state, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        if metadata.get("version") not in (1, 2):
            raise ValueError("version should be set to 1 or 2")
        self.loaded_version = metadata["version"]
        super()._load_from_state_dict(state, prefix, metadata, *args)


def test_the_version_of_a_modules_state_is_kept(tmp_path: Path) -> None:
    model = Versioned()
    small = decompose(model, plan(model, SVD(), ratio=2, example_input=X, layers=EVERY_LAYER))
    folder = save(small, tmp_path)
    assert load(folder, Versioned).loaded_version == 2
    config = json.loads((folder / "config.json").read_text())
    assert config["module_versions"] == {"": 2}
    assert torch.equal(load(folder, Versioned)(X), small.eval()(X))


@pytest.mark.parametrize(
    "aliases",
    [{"4.bias": "nothing"}, {"4.bias": "4.weight"}, {"a": "b", "b": "a"}, {"a": "a"}],
    ids=str,
)
def test_aliases_of_nothing_or_in_a_ring(folder: Path, aliases: dict[str, str]) -> None:
    edit(folder, aliases=aliases)
    assert "damaged" in error_of(load, folder, network)


def test_a_function_that_would_run_the_dense_layers_is_refused(folder: Path) -> None:
    def patched() -> nn.Module:
        model = network()
        model.forward = lambda x: nn.Sequential.forward(model, x)  # type: ignore[method-assign]
        return model

    assert "store it afterwards" in error_of(load, folder, patched)


def test_a_compiled_forward_is_no_obstacle(folder: Path) -> None:
    def compiled() -> nn.Module:
        model = network()
        model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
        return model

    assert torch.equal(load(folder, compiled)(X), load(folder, network)(X))
