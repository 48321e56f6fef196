"""What goes wrong with a training's input: one line, exit code 2, and nothing lost."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from tests.test_cli import refused, run

from deeptwist.networks.build import build_model

WORDS = ["--image-size", "8", "--mode", "dense", "--epochs", "2"]
WORDS += ["--batch-size", "4", "--logging.checkpoint-every", "1"]
DAMAGED = Path("pets/train/cat/4.png")  # in the fourth of an epoch's steps


@pytest.fixture(autouse=True)
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes of images, and a network whose third step ends the processes that read them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for category in ("cat", "dog"):
            (folder := Path("pets", split, category)).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(256, size=(9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    Path("deadly.py").write_text(
        textwrap.dedent("""
            import multiprocessing
            from torch import nn

            class Net(nn.Linear):
                steps = 0

                def forward(self, x):
                    self.steps += self.training
                    for process in multiprocessing.active_children() if self.steps == 3 else ():
                        process.kill()
                    return super().forward(x.flatten(1))

            def network(num_classes):
                return Net(192, num_classes)
        """)
    )


def command(model: str, *more: object, preset: str = "imagenet", workers: int = 1) -> list[object]:
    named = ["--data", "pets", "--data.preset", preset, "--data.workers", workers]
    return ["train", model, "--out", "run", *named, *WORDS, *more]


def test_a_damaged_image_in_the_middle_of_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    whole = DAMAGED.read_bytes()
    DAMAGED.write_bytes(whole[:-60])
    message = refused(*command("resnet20"))
    assert f"{DAMAGED}' (" in message
    assert "leave such out: --skip-unreadable" in message
    steps = [int(path.stem.split("-")[1]) for path in Path("run").glob("checkpoint-*.pt")]
    assert max(steps) == 3
    skipping = run(*command("resnet20", "--resume", "--data.skip-unreadable", workers=0))
    assert skipping.returncode == 0, skipping
    assert "left out: cannot decode image" in caplog.text
    assert Path("run/run.json").exists()


def test_workers_that_are_killed() -> None:
    words = [sys.executable, "-m", "deeptwist", *map(str, command("deadly:network"))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    *progress, told = done.stderr.splitlines()  # of what takes more than three seconds
    assert all(re.search(r" \d+ of \d+", line) for line in progress), done.stderr
    assert done.returncode == 2
    assert told.startswith("deeptwist: a process that reads images has died")
    assert [*Path("run").glob("checkpoint-*.pt")]
    assert run(*command("deadly:network", "--resume", workers=0)).returncode == 0


def test_a_class_without_images() -> None:
    Path("pets/train/fox").mkdir()
    assert "no images in" in (message := refused(*command("resnet20")))
    assert "fox" in message


def test_a_preset_that_does_not_exist() -> None:
    message = refused(*command("resnet20", preset="imagnet"))
    assert "imagnet" in message
    assert 'Choose from: "cifar", "imagenet"' in message


def test_a_teacher_of_another_number_of_classes() -> None:
    save_file(build_model("resnet20", num_classes=7).state_dict(), "seven.safetensors")
    teacher = ("--distillation.model", "resnet20", "--distillation.weights", "seven.safetensors")
    assert "teacher resnet20: 'seven.safetensors' is not of this model" in refused(
        *command("resnet20", *teacher)
    )
    Path("seven.py").write_text(
        "from deeptwist.networks.build import build_model\n"
        "net = lambda: build_model('resnet20', num_classes=7)"
    )
    teacher = ("--distillation.model", "seven:net", "--distillation.weights", "seven.safetensors")
    assert "outputs of shape (7,), pets has 2 classes" in refused(*command("resnet20", *teacher))
