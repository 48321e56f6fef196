"""Networks of other libraries, each in a process of its own: ``pytest -m sweep`` runs them all.

A network is planned, twisted, decomposed and, once saved, loaded; the sample runs in every build.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLE = [
    ("timm", "mobilenetv3_small_050", 64),
    ("timm", "lcnet_050", 64),
    ("timm", "tf_efficientnet_lite0", 64),
    ("torchvision", "resnet18", 64),
    ("torchvision", "mnasnet0_5", 64),
    ("torchvision", "swin_t", 64),
    ("torchvision", "r3d_18", 32),
]
_MODELS = ("resnet", "regnet", "efficientnet", "mobile", "dense", "convnext", "swin", "vit", "deit")


def names(library: str) -> list[tuple[str, str, int]]:
    if library == "torchvision":
        models = pytest.importorskip("torchvision.models")
        return [(library, name, 224) for name in models.list_models(models)]
    timm = pytest.importorskip("timm")
    return [(library, n, 224) for n in timm.list_models(pretrained=False) if n.startswith(_MODELS)]


def measure(library: str, name: str, size: int, folder: str) -> dict[str, float]:
    """Take a network from the plan to the loaded artefact; run in a process of its own."""
    import torch

    from deeptwist import SVD, DeepTwist, load, plan, save

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def make() -> torch.nn.Module:
        if library == "timm":
            import timm

            model: torch.nn.Module = timm.create_model(name)
        else:
            import torchvision

            model = torchvision.models.get_model(name, weights=None)
        return model.eval()

    model, is_video = make(), name.startswith(("r3d", "mc3", "r2plus1d"))
    x = torch.randn(1, 3, *([4] if is_video else []), size, size)
    made = plan(model, SVD(), ratio=3, example_input=x, rank_multiple=1)
    twist = DeepTwist(model, made, interval=1, example_input=x)
    small = twist.finish().eval()
    loaded = load(save(small, folder), make)
    with torch.no_grad():
        is_equal = torch.equal(loaded(x), small(x))
    weights = sum(layer.weight_numel for layer in made.layers)
    return {
        "compressed_share": sum(layer.weight_numel for layer in made.compressed) / weights,
        "output_difference": twist.output_difference or 0.0,
        "is_equal": is_equal,
        "parameters": made.parameters,
        "stored": sum(p.numel() for p in small.parameters()),
    }


def in_a_process(library: str, name: str, size: int, folder: Path) -> dict[str, float]:
    arguments = repr((library, name, size, str(folder)))
    code = f"import json, test_sweep; print(json.dumps(test_sweep.measure(*{arguments})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1:]
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def check(measured: dict[str, float]) -> None:
    assert measured["compressed_share"] > 0.5
    assert measured["output_difference"] < 1e-4
    assert measured["is_equal"]
    assert measured["stored"] <= measured["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name", "size"), SAMPLE)
def test_a_sample_of_networks(library: str, name: str, size: int, tmp_path: Path) -> None:
    pytest.importorskip(library)
    check(in_a_process(library, name, size, tmp_path))


@pytest.mark.sweep
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_every_network(library: str, tmp_path: Path) -> None:
    failures = {}
    for number, (_, name, size) in enumerate(names(library)):
        try:
            check(in_a_process(library, name, size, tmp_path / str(number)))
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failures[name] = str(error)[:200]
    assert not failures
