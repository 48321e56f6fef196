"""README and docs: Python blocks run, command lines parse, links lead somewhere."""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cyclopts import MissingArgumentError
from examples.own_decomposition import InputBasis
from tests.cases import EVERY_LAYER, at, build, difference, factored, read, with_kernel
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.app.cli.commands import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


WITH_PYTHON = {name for name in NAMES if blocks(ROOT / name, "python")}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


class Labelled(nn.Module):
    """A network that gives its loss, as Hugging Face's Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def names_of_a_page(page: str, folder: Path) -> dict[str, Any]:
    """What the blocks of a page take for granted."""
    model, x, y = network(), torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    plan = dt.plan(model, dt.SpatialSVD(), ratio=2, example_input=x, layers=EVERY_LAYER)
    return {
        "dt": dt,
        "DeepTwist": dt.DeepTwist,
        "model": model,
        "x": x,
        "y": y,
        "loader": torch.utils.data.DataLoader([(a, b) for a, b in zip(x, y, strict=True)], 2),
        "loss": nn.functional.cross_entropy,
        "optimizer": optimizer,
        "factory": network,
        "pruned": network(),
        "plan": plan,
        "total_steps": 10,
        "batches": [x, x, x],
        "evaluate": lambda model: float(sum(p.numel() for p in model.parameters()) > 0),
        "fine_tune": lambda model: model.train(),
    } | {"docs/integrations.md": loops, "docs/export.md": exports}.get(page, lambda folder: {})(
        folder
    )


def loops(folder: Path) -> dict[str, Any]:
    """A Lightning module, a transformers Trainer, an Accelerator, a scaler."""
    import lightning as L
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def trainer(**options: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return L.Trainer(max_steps=1, accelerator="cpu", **quiet, **options)

    model = Labelled()
    pixel_values = torch.randn(2, 3, 8, 8)
    arguments = TrainingArguments(
        str(folder), max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True
    )
    return {
        "scaler": torch.amp.GradScaler("cpu"),
        "accumulate": 1,
        "number": 1,
        "twist": SimpleNamespace(step=lambda: None),
        "module": Module(),
        "L": SimpleNamespace(Trainer=trainer),
        "Trainer": Trainer,
        "args": arguments,
        "pixel_values": pixel_values,
        "data": [{"pixel_values": a, "labels": torch.tensor(0)} for a in pixel_values],
        "huggingface_model": model,
        "accelerator": Accelerator(cpu=True),
        "network": network(),
    }


def pretrained(x: Tensor) -> dict[str, Any]:
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    )
    plan = dt.plan(model, dt.SVD(), ratio=2, example_input=x)
    return {"model": model, "small": dt.decompose(model, plan)}


def exports(folder: Path) -> dict[str, Any]:
    from PIL import Image

    from deeptwist.export import export_onnx

    says = {
        "classes": [*"abcdefghij"],
        "image_size": [8, 8],
        "resize": 9,
        "interpolation": "bicubic",
    }
    says |= {"mean": [0.5] * 3, "std": [0.2] * 3}
    x = torch.randn(2, 3, 8, 8)
    export_onnx(small := network(), folder / "served.onnx", x, metadata=says)
    Image.new("RGB", (30, 20)).save(folder / "photo.jpg")
    return {"small": small, "batches": [x]}


@pytest.mark.parametrize("name", sorted(WITH_PYTHON))
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    names = names_of_a_page(name, tmp_path)
    ran = 0
    for block in blocks(ROOT / name, "python"):
        if "Trainer(model, args" in block:
            names["model"] = names["huggingface_model"]
        if "from_pretrained" in block:
            names |= pretrained(names["x"])
        if "accelerator.prepare" in block:
            names |= {
                "plan": dt.plan(
                    names["network"],
                    dt.SpatialSVD(),
                    ratio=2,
                    example_input=names["x"],
                    layers=EVERY_LAYER,
                )
            }
            names["optimizer"] = torch.optim.SGD(names["network"].parameters(), lr=0.01)
            names["model"] = names["network"]
        exec(compile(block, f"{name}, block {ran + 1}", "exec"), names)
        ran += 1
    assert ran == len(blocks(ROOT / name, "python"))


def command_lines() -> Iterator[tuple[str, str]]:
    """Every command of a page, and of the commands' own help: where it is written, and what."""
    for name, page in zip(NAMES, PAGES, strict=True):
        text = page.read_text()
        indented = re.findall(
            r"^    ((?:python|deeptwist|torchrun) (?:.*\\\n)*.*)", text, re.MULTILINE
        )
        for block in [*blocks(page, "sh"), *indented]:
            yield from ((name, line) for line in joined(block))
        for line in re.findall(r"`(deeptwist [a-z]+ [^`…|]*)`", text):
            yield f"{name}, in a sentence", line
    for command in (name for name in app if not name.startswith("-")):
        text = app[command].default_command.__doc__ or ""
        (block,) = re.findall(r"^ *```\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
        assert max(map(len, block.splitlines())) <= 4 + 78  # whole on a narrow terminal
        yield from ((f"deeptwist {command} --help", line) for line in joined(block))


def joined(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        yield from (part.strip() for part in line.split("&&") if part.strip())


LINES = sorted(set(command_lines()))


@pytest.mark.parametrize(("where", "line"), LINES)
def test_command_lines_are_understood(
    where: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if "-m" in words and words[words.index("-m") + 1] == "deeptwist":
        words = ["deeptwist", *words[words.index("-m") + 2 :]]
    match words:
        case ["deeptwist", *rest]:
            with suppress(*[MissingArgumentError] if "in a sentence" in where else []):
                app.parse_args(rest, exit_on_error=False, print_error=False)
        case ["python", "-m", module, *_]:
            assert (ROOT / module.replace(".", "/") / "__main__.py").is_file()
        case ["python", script, *rest]:
            source = (ROOT / script).read_text()
            for option in (word for word in rest if word.startswith("--")):
                assert f'"{option}"' in source, option
        case [tool, *_]:
            assert tool in {"pip", "pytest", "mypy", "ruff", "pre-commit", ".ci/run", "mkdocs"}


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has torch already; its cells are plain Python."""
    notebook = json.loads((ROOT / "docs/notebooks/resnet18.ipynb").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENETTE", raising=False)
    monkeypatch.setenv("SIZE", "32")
    monkeypatch.setenv("STEPS", "2")
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    small, plan = names["small"], names["plan"]
    assert sum(p.numel() for p in small.parameters()) == plan.parameters < plan.dense_parameters / 2
    assert [record.step for record in names["twist"].history] == [2, 2]
    assert (tmp_path / "small.onnx").is_file()


def test_there_are_command_lines_and_blocks() -> None:
    """So that no change of form leaves the tests above with nothing to do."""
    assert len(LINES) > 40
    assert sum(len(blocks(page, "python")) for page in PAGES) > 8


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_begins_with_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert len(blocks(ROOT / "README.md", "sh")[0].splitlines()) == 2  # which .ci/run runs


@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D", "transposed 2-D", "3-D"])
def test_the_example_of_a_decomposition(geometry: str) -> None:
    layer, x = build(geometry)
    convolution, kernel = read(layer)
    for share in (0.5, 1.0):
        method = at(InputBasis(), convolution, share)
        factors, small = factored(layer, method)
        assert difference(with_kernel(layer, factors.reconstruct())(x), small(x)) < 1e-11
        stored = sum(p.numel() for n, p in small.named_parameters() if not n.endswith("bias"))
        assert stored == method.weight_numel(convolution)
        warm = method.decompose(factors.reconstruct(), factors).reconstruct()
        assert difference(factors.reconstruct(), warm) < 1e-6
    assert difference(kernel, factors.reconstruct()) < 1e-10
