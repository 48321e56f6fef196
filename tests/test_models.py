import copy
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.conftest import SHARED
from torch import Tensor, nn

from deeptwist.app.data import load_data, normalize
from deeptwist.networks.build import MODELS, build_model
from deeptwist.networks.cifar import PadShortcut
from deeptwist.networks.names import registered
from deeptwist.networks.weights import build_trained, load_weights

ErrorOf = Callable[..., str]
RESNET32 = SHARED / "weights" / "resnet32-cifar10.safetensors"
IMAGES_PER_CLASS = 100

needs_shared = pytest.mark.skipif(not RESNET32.exists(), reason=f"no {RESNET32}")


@pytest.fixture
def cifar10_sample(tmp_path: Path) -> Path:
    """An image folder of the first test images of each class; both splits are the same."""
    unpack, home = str(SHARED / "data" / "unpack"), str(Path.home() / ".cache" / "deeptwist-data")
    command = [unpack, "cifar10-jpeg", home]
    full = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    for split in ("train", "test"):
        for category in sorted((full / "test").iterdir()):
            (tmp_path / split / category.name).mkdir(parents=True)
            for image in sorted(category.iterdir())[:IMAGES_PER_CLASS]:
                (tmp_path / split / category.name / image.name).symlink_to(image)
    return tmp_path


# --- the networks


@needs_shared
def test_public_resnet32_scores_what_it_should(cifar10_sample: Path) -> None:
    model = build_model("resnet32").eval()
    load_weights(model, RESNET32)
    data = load_data(str(cifar10_sample))
    with torch.inference_mode():
        logits = model(normalize(data.test.images, data.mean, data.std))
    accuracy = (logits.argmax(1) == data.test.labels).float().mean().item()
    assert len(data.test.labels) == 10 * IMAGES_PER_CLASS
    assert 0.78 < accuracy < 0.88  # 82.6 % on all 10,000


@pytest.mark.parametrize(
    ("name", "convolutions", "parameters"),
    [  # He et al. 2015, table 6, to the last digit as counted by akamaster
        ("resnet20", 19, 269_722),
        ("resnet32", 31, 464_154),
        ("resnet44", 43, 658_586),
        ("resnet56", 55, 853_018),
        ("resnet110", 109, 1_727_962),
        ("vgg19", 16, 20_554_826),
        ("vgg19_bn", 16, 20_565_834),
    ],
)
def test_depth_and_size(name: str, convolutions: int, parameters: int) -> None:
    model = build_model(name)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_vgg19_has_the_convolutions_that_the_paper_counts() -> None:
    model = build_model("vgg19")
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(w.numel() for w in weights if w.shape[1] >= 128) == 19_906_560
    linear = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear == [(512, 512), (512, 512), (512, 10)]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in build_model("vgg19_bn").modules()) == 16


@pytest.mark.parametrize("name", MODELS)
def test_class_and_channel_counts_are_the_callers(name: str) -> None:
    model = build_model(name, num_classes=7, in_channels=1).eval()
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    assert build_model(name)(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@given(height=st.integers(8, 37), width=st.integers(8, 37))
@settings(max_examples=20, deadline=None)
def test_resnet_takes_any_size(height: int, width: int) -> None:
    assert build_model("resnet20").eval()(torch.rand(1, 3, height, width)).shape == (1, 10)


@pytest.mark.parametrize("size", [32, 40, 65])
def test_vgg_takes_larger_images(size: int) -> None:
    assert build_model("vgg19").eval()(torch.rand(1, 3, size, size)).shape == (1, 10)


def test_option_a_shortcut_against_its_definition() -> None:
    x = torch.rand(2, 4, 5, 7)
    expected = torch.zeros(2, 9, 3, 4)
    for channel in range(4):
        for row in range(3):
            for column in range(4):
                expected[:, 2 + channel, row, column] = x[:, channel, 2 * row, 2 * column]
    assert torch.equal(PadShortcut(4, 9, stride=2)(x), expected)


@pytest.mark.parametrize("name", ["resnet20", "vgg19"])
def test_networks_copy_export_and_trace_whole(name: str) -> None:
    model = build_model(name).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = model(images)
    exported = torch.export.export(model, (images,)).module()
    traced = torch.compile(model, fullgraph=True, backend="eager")
    for twin in (copy.deepcopy(model), exported, traced):
        torch.testing.assert_close(twin(images), expected)


# --- networks by name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnt32", "resnet32"),
        ("torchvison/resnet18", "torchvision/resnet18"),
        ("torchvision/resnt18", "resnet18"),
        ("torchvision/fcn_resnet50", "resnet50"),  # its backbone would be downloaded
        ("timm/mobilnetv3_large_100", "mobilenetv3_large_100"),
        ("timm/resnet18.a1_in1", "resnet18.a1_in1k"),
        ("torch.nn:Identty", "Identity"),
    ],
)
def test_misspelt_names_give_the_nearest(error_of: ErrorOf, name: str, nearest: str) -> None:
    assert error_of(build_model, name).endswith(f"did you mean {nearest!r}?")


def test_a_name_of_other_libraries_is_told_with_theirs(error_of: ErrorOf) -> None:
    pytest.importorskip("timm")
    message = error_of(build_model, "resnet18")
    assert message.endswith("did you mean 'torchvision/resnet18' or 'timm/resnet18'?")


def test_a_name_like_no_other_lists_them(error_of: ErrorOf) -> None:
    message = error_of(build_model, "xyz")
    assert "resnet32" in message
    assert "torchvision/NAME" in message


def test_names_are_known_without_importing_the_libraries() -> None:
    """The oracle: what the libraries themselves list."""
    models, timm = pytest.importorskip("torchvision.models"), pytest.importorskip("timm")
    assert registered("torchvision") == {*models.list_models(module=models)}
    assert registered("timm") >= {*timm.list_models()}
    assert registered("timm") >= {name.partition(".")[0] for name in timm.list_pretrained()}
    assert not registered("nowhere")


def test_torchvision(error_of: ErrorOf) -> None:
    pytest.importorskip("torchvision")
    model = build_model("torchvision/resnet18", num_classes=5, in_channels=3).eval()
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5)
    assert "not 1" in error_of(build_model, "torchvision/resnet18", in_channels=1)


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/resnet18.a1_in1k"])
def test_timm(name: str) -> None:
    pytest.importorskip("timm")
    model = build_model(name, num_classes=5, in_channels=1).eval()
    assert model(torch.rand(1, 1, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("timm/resnet18", "timm", "pip install '.[timm]' in"),
        ("torchvision/resnet18", "torchvision.models", "pip install '.[cli]' in"),
    ],
)
def test_a_missing_package_says_how_to_get_it(
    error_of: ErrorOf, name: str, module: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    assert command in error_of(build_model, name)


def test_own_factories(error_of: ErrorOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ownnets.py").write_text(
        "from torch import nn\n"
        "def plain(): return nn.Linear(1, 1)\n"
        "def sized(num_classes=3): return nn.Linear(1, num_classes)\n"
        "def free(**sizes): return nn.Linear(sizes['in_channels'], sizes['num_classes'])\n"
        "def needy(depth): return nn.Linear(depth, 1)\n"
        "def wrong(): return 3\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self): super().__init__(4, 4)\n"
        "built = nn.Linear(1, 1)\n"
    )
    (tmp_path / "lacking.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    path_before = sys.path.copy()

    def weight_shape(factory: str, **sizes: int) -> tuple[int, ...]:
        weight: Tensor = build_model(f"ownnets:{factory}", **sizes).get_parameter("weight")
        return tuple(weight.shape)

    assert weight_shape("plain", num_classes=7, in_channels=2) == (1, 1)
    assert weight_shape("sized") == (3, 1)
    assert weight_shape("sized", num_classes=7, in_channels=2) == (7, 1)
    assert weight_shape("free", num_classes=7, in_channels=2) == (7, 2)
    assert weight_shape("Net") == (4, 4)
    assert "depth" in error_of(build_model, "ownnets:needy")
    assert "returned type int" in error_of(build_model, "ownnets:wrong")
    assert "type Linear, not a function" in error_of(build_model, "ownnets:built")
    assert error_of(build_model, "ownnets:sizd").endswith("did you mean 'sized'?")
    assert "'absent'" in error_of(build_model, "absent:net")
    assert "full name" in error_of(build_model, ":net")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        build_model("lacking:net")
    assert sys.path == path_before


# --- checkpoints


class Small(nn.Module):
    """Has a child of the very name that DistributedDataParallel wraps with, and others."""

    def __init__(self, out: int = 3) -> None:
        super().__init__()
        self.module = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, out)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def all_below_module() -> nn.Module:
    return nn.ModuleDict({"module": nn.Linear(2, 3)})


def numbers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@given(
    wrapper=st.sampled_from(
        [None, "state_dict", "model", "model_state", "model_state_dict", "state_dict_ema"]
    ),
    prefix=st.sampled_from(
        ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
    ),
    factory=st.sampled_from([plain, Small, all_below_module]),
    zipped=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_common_form_loads(
    wrapper: str | None, prefix: str, factory: Any, zipped: bool, tmp_path_factory: Any
) -> None:
    stored, model = factory(), factory()
    if factory is not plain and "module." in prefix:
        prefix = "_orig_mod."  # what else is ambiguous even to a reader
    content: dict[str, Any] = {f"{prefix}{k}": v for k, v in stored.state_dict().items()}
    if wrapper is not None:
        content = {"epoch": 3, "optimizer": {"lr": 0.1}, wrapper: content}
    path = tmp_path_factory.mktemp("checkpoint") / "weights.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    load_weights(model, path)
    assert_same(model, stored.state_dict())


def test_safetensors_load_and_a_missing_step_counter_is_no_fault(tmp_path: Path) -> None:
    stored, model = Small(), Small()
    save_file(stored.state_dict(), tmp_path / "bare.safetensors")
    load_weights(model, tmp_path / "bare.safetensors")
    assert_same(model, stored.state_dict())

    plain, twin = nn.Sequential(nn.BatchNorm2d(4)), nn.Sequential(nn.BatchNorm2d(4))
    nn.init.uniform_(plain[0].weight)  # type: ignore[arg-type]
    weights = {f"module.{k}": v for k, v in plain.state_dict().items() if "num_batches" not in k}
    save_file(weights, tmp_path / "old.safetensors")
    load_weights(twin, str(tmp_path / "old.safetensors"))
    assert_same(twin, plain.state_dict())


def test_weights_take_the_models_dtype(tmp_path: Path) -> None:
    stored, model = nn.Linear(2, 2).half(), nn.Linear(2, 2)
    torch.save(stored.state_dict(), tmp_path / "half.pt")
    load_weights(model, tmp_path / "half.pt")
    assert torch.equal(model.weight, stored.weight.float())


def test_weights_that_do_not_fit_change_nothing(error_of: ErrorOf, tmp_path: Path) -> None:
    model = Small()
    before = numbers_of(model)

    def message_for(content: Any) -> str:
        torch.save(content, tmp_path / "weights.pt")
        message = error_of(load_weights, model, tmp_path / "weights.pt")
        assert_same(model, before)
        assert str(tmp_path / "weights.pt") in message
        return message

    fitting = Small().state_dict()
    lacking = {k: v for k, v in fitting.items() if not k.startswith("linear")}
    assert "2 missing (linear.bias, linear.weight)" in message_for(lacking)
    extra = fitting | {f"extra{i}": torch.ones(1) for i in range(5)}
    assert "5 unexpected (extra0, extra1, extra2, and 2 more)" in message_for(extra)
    both = message_for({"head": torch.ones(1)})
    assert "8 missing" in both
    assert "1 unexpected (head)" in both
    wider = message_for(Small(out=5).state_dict())
    assert "linear.weight (5, 4) where the model has (3, 4)" in wider
    assert "not a tensor but of type int" in message_for({"epoch": 3})
    assert "a list where a state dict belongs" in message_for([torch.ones(1)])
    assert "a dict where a state dict" in message_for({})
    assert "a dict where a state dict" in message_for({"state_dict": {}})


def test_a_prefix_of_some_names_stays(error_of: ErrorOf, tmp_path: Path) -> None:
    weights = plain().state_dict()
    weights["module.0.bias"] = weights.pop("0.bias")
    torch.save(weights, tmp_path / "mixed.pt")
    message = error_of(load_weights, plain(), tmp_path / "mixed.pt")
    assert "1 missing (0.bias), 1 unexpected (module.0.bias)" in message


def test_a_missing_file_is_named(error_of: ErrorOf, tmp_path: Path) -> None:
    assert str(tmp_path / "absent.pt") in error_of(load_weights, Small(), tmp_path / "absent.pt")
    assert "no weights file" in error_of(load_weights, Small(), tmp_path)


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "weights.safetensors"])
@pytest.mark.parametrize("kept", [0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(
    error_of: ErrorOf, name: str, kept: float, tmp_path: Path
) -> None:
    model, path = Small(), tmp_path / name
    before = numbers_of(model)
    if name.endswith("safetensors"):
        save_file(model.state_dict(), path)
    else:
        zipped = name == "zip.pt"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert str(path) in error_of(load_weights, model, path)
    assert_same(model, before)


def test_text_is_refused(error_of: ErrorOf, tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<html>404 not found</html>\n" * 30)
    assert "page.pt" in error_of(load_weights, Small(), tmp_path / "page.pt")


class Hostile:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_but_tensors_is_unpickled(error_of: ErrorOf, tmp_path: Path) -> None:
    hostile = Hostile(tmp_path / "trace")
    path = tmp_path / "hostile.pt"
    torch.save({"state_dict": Small().state_dict(), "epoch": hostile}, path)
    assert "mkdir, which could run code" in error_of(load_weights, Small(), path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(hostile, protocol))
        assert str(path) in error_of(load_weights, Small(), path)
    assert not hostile.trace.exists()
    assert pickle.loads(path.read_bytes()) is None
    assert hostile.trace.exists()  # it would have

    torch.save({"state_dict": Small().state_dict(), "args": Namespace(lr=1)}, path)
    assert "argparse.Namespace" in error_of(load_weights, Small(), path)
    torch.save(Small(), path)
    assert "Small" in error_of(load_weights, Small(), path)


# --- weights by name, and for other classes


def stored_as(model: nn.Module, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return path


def test_torchvision_weights_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: ErrorOf
) -> None:
    """Torchvision reads its own cache; where that holds nothing, the way to a file is told."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # no net, whatever the machine has
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    name = "torchvision/squeezenet1_1"
    message = error_of(build_trained, name, "DEFAULT")
    file = message.rpartition("download its weights from ")[2].split()[0].rpartition("/")[2]
    assert file.startswith("squeezenet1_1-")
    assert "give the file: --weights FILE" in message
    stored = build_model(name)
    stored_as(stored, tmp_path / "checkpoints" / file)
    for weights in ("DEFAULT", "IMAGENET1K_V1"):
        assert_same(build_trained(name, weights), stored.state_dict())
    assert "mean 'IMAGENET1K_V1'?" in error_of(build_trained, name, "IMAGENET1K_V2")


@pytest.mark.parametrize(
    ("name", "weights", "asked"),
    [
        ("timm/test_resnet.r160_in1k", None, "test_resnet.r160_in1k"),
        ("timm/test_resnet", "DEFAULT", "test_resnet"),
        ("timm/test_resnet", "r160_in1k", "test_resnet.r160_in1k"),
        ("timm/test_resnet", "timm/test_resnet.r160_in1k", "test_resnet.r160_in1k"),
        ("timm/test_resnet", "hf-hub:me/mine", "hf-hub:me/mine"),
    ],
)
def test_timm_weights_by_name(
    name: str, weights: str | None, asked: str, monkeypatch: pytest.MonkeyPatch, error_of: ErrorOf
) -> None:
    """Timm is asked for them, with its own name for them; it has no net here."""
    timm = pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = error_of(build_trained, name, weights)
    assert message.startswith(f"cannot get {asked}: ")
    assert "give the file: --weights FILE" in message

    made: list[Any] = []
    create = timm.create_model

    def from_cache(network: str, pretrained: bool = False, **options: Any) -> nn.Module:
        model: nn.Module = create(network if pretrained is False else "test_resnet", **options)
        made.extend([network, model] if pretrained else [])
        return model

    monkeypatch.setattr(timm, "create_model", from_cache)
    model = build_trained(name, weights)
    assert made[0] == asked
    assert_same(model, made[1].state_dict())


def test_weights_for_other_classes_keep_all_but_the_last_layer(
    error_of: ErrorOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = build_model("resnet20", num_classes=7)
    path = stored_as(stored, tmp_path / "seven.pt")
    model = build_trained("resnet20", path, num_classes=4, new_head=True)
    assert caplog.messages == [f"'{path}' is for 7 classes, not 4: new linear.weight, linear.bias"]
    assert torch.equal(model.layer3[2].conv2.weight, stored.layer3[2].conv2.weight)
    assert model.linear.weight.shape == (4, 64)
    refused = error_of(build_trained, "resnet20", path, num_classes=4)  # to evaluate, say
    assert "linear.weight (7, 64) where the model has (4, 64)" in refused
    wider = stored_as(build_model("resnet20", in_channels=1, num_classes=7), tmp_path / "grey.pt")
    assert "conv1.weight" in error_of(
        build_trained, "resnet20", wider, num_classes=4, new_head=True
    )


def test_random_weights_are_said(caplog: pytest.LogCaptureFixture) -> None:
    build_trained("resnet20")
    assert caplog.messages == ["resnet20 has random weights: --weights gives it trained ones"]
    caplog.clear()
    build_trained("torch.nn:Identity")  # may have loaded its own
    assert not caplog.messages


def test_names_where_there_are_none(error_of: ErrorOf) -> None:
    message = error_of(build_trained, "resnet20", "DEFAULT")
    assert message == "no weights file at 'DEFAULT', and resnet20 has none by name"


def test_a_checkpoint_of_lightning_s_may_hold_others(tmp_path: Path, error_of: ErrorOf) -> None:
    """Its state dict is the whole module's: the network is below the attribute that holds it."""
    stored, model, path = Small(), Small(), tmp_path / "epoch=3.ckpt"
    state = {f"model.{name}": value for name, value in stored.state_dict().items()}
    state |= {"loss.weight": torch.ones(2), "ema_model.linear.bias": torch.ones(3)}
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": state, "epoch": 3}, path)
    load_weights(model, path)
    assert_same(model, stored.state_dict())
    torch.save({"state_dict": state}, path)  # of anybody's, what is left over is a fault
    assert "unexpected" in error_of(load_weights, Small(), path)
