"""Runs that are cut: at any moment, at the worst ones, by full disks and by damaged files."""

import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.cases import EVERY_LAYER
from torch import nn

import deeptwist as dt
from deeptwist.app.cli import main
from deeptwist.app.data import load_data
from deeptwist.app.folders import read_run
from deeptwist.app.training.recipe import make_recipe
from deeptwist.app.training.run import TrainingRun, build_run
from deeptwist.app.training.run import train as train_run
from deeptwist.app.training.run_dir import read_checkpoint, write_checkpoint

# Everything that has a state: distortions with their bases, batch norm, dropout, an average, a
# best network, a tail.
RECIPE: dict[str, Any] = {
    "model": "tests:network",
    "interval": 4,
    "ema": 0.9,
    "schedule": {"epochs": 2},
    "compression": {
        "decomposition": "spatial_svd",
        "ratio": 2,
        "linear": True,
        "include": ["4", "7"],
    },
    "data": {"validation": 100},
    "finetune_after": {"epochs": 1},
    "logging": {"images": 50, "checkpoint_every": 3},
}
# The same with everything that a recipe may ask for besides.
SCHEDULED: dict[str, Any] = {
    **RECIPE,
    "interval": 3,
    "calibration_images": 100,
    "compression": {
        **RECIPE["compression"],
        "decomposition": "tucker",
        "ratio": None,
        "weight_budget": 2,
        "macs": 2,
    },
    "batch_norm_batches": 2,
    "label_smoothing": 0.1,
    "distillation": {"weight": 0.3},
}  # fmt: skip
Kill = tuple[str, float]  # what to count or wait for, and how much of it


def network(channels: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def job(**values: Any) -> TrainingRun:
    return build_run(
        make_recipe({**RECIPE, **values}), load_data("digits"), name="run", model=network()
    )


def job_on_files(images: Path) -> TrainingRun:
    """The same on images that a worker reads, augments and mixes."""
    options = {"preset": "imagenet", "image_size": 8, "auto_augment": "trivial", "mixup": 0.2}
    data = load_data(str(images), workers=1, **options)
    logging = {"images": 0, "checkpoint_every": 3}
    recipe = make_recipe({**RECIPE, "batch_size": 32, "logging": logging})
    return build_run(recipe, data, name="run", model=network(3))


def train(
    folder: Path,
    kill: Kill | None = None,
    values: dict[str, Any] | None = None,
    images: Path | None = None,
) -> None:
    """In a process of its own, which does not survive the moment it is told."""
    torch.set_num_threads(1)
    # As on the command line: what a forkserver started would outlive a kill.
    multiprocessing.set_start_method("fork", force=True)
    if kill is not None:
        _arm(folder, *kill)
    run = job(**(values or {})) if images is None else job_on_files(images)
    train_run(run, folder, resume=True, latency_batch=None)


def _arm(folder: Path, moment: str, amount: float) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    left = amount
    if moment == "seconds":
        signal.setitimer(signal.ITIMER_REAL, amount)  # nothing handles SIGALRM: the process ends
    elif moment == "checkpoint":
        flush = os.fsync

        def fsync(file: int) -> None:
            nonlocal left
            # Of checkpoints alone: records are flushed too, and a thread flushes TensorBoard's.
            written = {path.stat().st_ino for path in folder.rglob(".checkpoint*.tmp")}
            if os.fstat(file).st_ino not in written:
                return
            left -= 1
            if left < 0:
                os.truncate(file, os.fstat(file).st_size // 2)
                die()
            flush(file)

        os.fsync = fsync  # type: ignore[assignment]
    else:

        def profile(frame: FrameType, event: str, arg: object) -> None:
            nonlocal left
            if event == "c_call" and "/deeptwist/twist.py" in frame.f_code.co_filename:
                left -= 1
                if left < 0:
                    die()

        sys.setprofile(profile)


CONTEXT = multiprocessing.get_context("forkserver")


def start(
    folder: Path,
    kill: Kill | None = None,
    values: dict[str, Any] | None = None,
    images: Path | None = None,
) -> int:
    process = CONTEXT.Process(target=train, args=(folder, kill, values, images))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights that a run left."""
    return {
        f"{path.parent.name}/{name}": tensor
        for path in sorted(folder.glob("model*/model.safetensors"))
        for name, tensor in load_file(path).items()
    }


USUAL = (0, 1, 6, 7)  # of twenty kills: every kind of moment, in memory and on files


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert start(folder) == 0
    started = time.perf_counter()
    assert start(folder / "again") == 0
    return folder, time.perf_counter() - started


@pytest.fixture(scope="module")
def uninterrupted_on_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, Path]:
    """A run on the digits as a folder of files, its seconds, and the folder."""
    folder = tmp_path_factory.mktemp("files")
    data = load_data("digits")
    for name, split, count in (("train", data.train, 300), ("test", data.test, 20)):
        few = split.subsample(count)
        assert isinstance(few.images, torch.Tensor)
        for row, (image, label) in enumerate(zip(few.images, few.labels.tolist(), strict=True)):
            path = folder / "images" / name / str(label) / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(path)
    started = time.perf_counter()
    assert start(folder / "run", images=folder / "images") == 0
    return folder / "run", time.perf_counter() - started, folder / "images"


def check_same(folder: Path, expected: Path) -> None:
    actual, wanted = tensors(folder), tensors(expected)
    assert {name.split("/")[0] for name in wanted} - {"model-not-recalibrated"} == {
        "model",
        "model-best-on-validation",
        "model-moving-average",
        "model-tail",
    }
    assert actual.keys() == wanted.keys()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in wanted.items())
    runs = read_run(folder), read_run(expected)
    timed = {"seconds", "images_per_second"}
    for kind in ("epochs", "distortions"):
        actual_lines, expected_lines = (
            [{k: v for k, v in line.items() if k not in timed} for line in getattr(run, kind)]
            for run in runs
        )
        assert actual_lines == expected_lines
    assert len({run.summary["accuracy"] for run in runs}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [n if n in USUAL else pytest.param(n, marks=pytest.mark.sweep) for n in range(20)]
)
def test_a_run_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
    number: int,
    uninterrupted: tuple[Path, float],
    uninterrupted_on_files: tuple[Path, float, Path],
    tmp_path: Path,
) -> None:
    """On images in memory, and every other time on files that a worker reads."""
    images: Path | None
    if number % 8 < 4:
        (expected, seconds), images = uninterrupted, None
    else:
        expected, seconds, images = uninterrupted_on_files
    rng = random.Random(number)
    moments: list[Kill] = [
        ("seconds", rng.uniform(0.05, 0.95) * seconds),
        ("checkpoint", rng.randrange(8)),
        ("distortion", rng.randrange(400)),
        ("seconds", rng.uniform(0.05, 0.95) * seconds),
    ]
    for kill in (moments[number % 4], moments[(number + 1) % 4]):  # it may happen twice
        start(tmp_path, kill, images=images)
    assert start(tmp_path, images=images) == 0
    check_same(tmp_path, expected)


def test_all_schedules_together_survive_a_kill(tmp_path: Path) -> None:
    assert start(tmp_path / "whole", values=SCHEDULED) == 0
    for kill in (("distortion", 250.0), ("checkpoint", 2.0)):
        assert start(tmp_path / "cut", kill, SCHEDULED) == -signal.SIGKILL
    assert start(tmp_path / "cut", values=SCHEDULED) == 0
    assert (tmp_path / "cut" / "model-not-recalibrated").exists()
    check_same(tmp_path / "cut", tmp_path / "whole")


def test_the_moments_are_hit(tmp_path: Path) -> None:
    assert start(tmp_path / "a", ("checkpoint", 2)) == -signal.SIGKILL
    assert [*(tmp_path / "a").glob(".checkpoint*.tmp")]  # half a file, which is no checkpoint
    assert len([*(tmp_path / "a").glob("checkpoint*")]) == 2
    assert start(tmp_path / "b", ("distortion", 10)) == -signal.SIGKILL
    assert start(tmp_path / "c", ("seconds", 0.01)) == -signal.SIGALRM


def test_a_finished_run_is_read_again_not_run(
    uninterrupted: tuple[Path, float],
) -> None:
    folder, _ = uninterrupted
    ticks: list[int] = []
    summary = train_run(job(), folder, resume=True, on_step=lambda: ticks.append(1))
    assert summary == read_run(folder).summary
    assert not ticks


def test_a_finished_run_of_another_recipe_is_not_read(
    uninterrupted: tuple[Path, float], error_of: Callable[..., str]
) -> None:
    folder, _ = uninterrupted
    assert "(interval differ)" in error_of(train_run, job(interval=5), folder, resume=True)


# --- damaged and foreign files


def cut(tmp_path: Path) -> Path:
    """A run that died at its fourth checkpoint."""
    folder = tmp_path / "cut"
    assert start(folder, ("checkpoint", 4)) == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("damage", ["truncated", "foreign", "pickle"])
def test_the_checkpoint_before_a_damaged_one_is_used(
    damage: str,
    tmp_path: Path,
    uninterrupted: tuple[Path, float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = cut(tmp_path)
    before, last = sorted(folder.glob("checkpoint*"))
    if damage == "truncated":
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    elif damage == "foreign":
        torch.save({"step": 3}, last)
    else:
        torch.save(network(), last)
    state = read_checkpoint(folder)
    assert state is not None
    assert state["training"]["step"] == int(before.stem.split("-")[1])
    assert str(last) in caplog.text
    assert start(folder) == 0
    check_same(folder, uninterrupted[0])


def test_no_checkpoint_that_can_be_read_is_an_error(
    tmp_path: Path, error_of: Callable[..., str]
) -> None:
    write_checkpoint(tmp_path, 3, {})
    (tmp_path / "checkpoint-000000003.pt").write_bytes(b"nothing")
    assert "can be read: remove them" in error_of(read_checkpoint, tmp_path)


def test_a_checkpoint_of_another_network_is_an_error(
    tmp_path: Path, error_of: Callable[..., str]
) -> None:
    folder = cut(tmp_path)
    other = nn.Sequential(nn.Flatten(), *[nn.Linear(64, 64) for _ in range(8)], nn.Linear(64, 10))
    recipe = make_recipe(RECIPE)
    stranger = TrainingRun(
        recipe,
        other,
        dt.plan(other, dt.SVD(rank=1), example_input=torch.zeros(2, 1, 8, 8), layers=EVERY_LAYER),
        load_data("digits"),
        None,
        "run",
    )
    assert "of another run" in error_of(train_run, stranger, folder, resume=True)


def test_records_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable: dict[int, int] = {}
    flush, counted = os.fsync, []

    def fsync(file: int) -> None:
        flush(file)
        opened = os.fstat(file)
        durable[opened.st_ino] = opened.st_size

    def check() -> None:
        state = read_checkpoint(tmp_path)
        if state is not None:
            counted.append(state["metrics"])
            assert counted[-1] <= durable[(tmp_path / "metrics.jsonl").stat().st_ino]

    monkeypatch.setattr(os, "fsync", fsync)
    train_run(job(), tmp_path, on_step=check, latency_batch=None)
    assert counted[-1] > 0


def test_records_that_are_lost_are_an_error(tmp_path: Path, error_of: Callable[..., str]) -> None:
    folder = cut(tmp_path)
    metrics = folder / "metrics.jsonl"
    size = metrics.stat().st_size
    os.truncate(metrics, 10)
    message = error_of(train_run, job(), folder, resume=True)
    assert "metrics.jsonl' holds 10 bytes, and held" in message
    assert "to start anew" in message
    assert metrics.stat().st_size == 10 < size


def test_another_recipe_is_not_a_continuation(tmp_path: Path, error_of: Callable[..., str]) -> None:
    folder = cut(tmp_path)
    told = error_of(train_run, job(optimizer={"lr": 0.5}), folder, resume=True)
    assert "(optimizer.lr differ)" in told
    told = error_of(train_run, job(distillation={}), folder, resume=True)
    assert "(distillation differ)" in told
    assert "(interval differ)" in error_of(train_run, job(interval=5), folder, resume=True)
    assert "--resume" in error_of(train_run, job(), folder)


# --- other processes, full disks


def test_a_folder_in_use_is_refused_and_left_alone(
    tmp_path: Path, error_of: Callable[..., str], uninterrupted: tuple[Path, float]
) -> None:
    refusals: list[str] = []
    other = job()  # made beforehand: it draws from the random numbers that dropout draws from

    def meanwhile() -> None:
        if not refusals:
            refusals.append(error_of(train_run, other, tmp_path, resume=True))

    train_run(job(), tmp_path, on_step=meanwhile, latency_batch=None)
    assert "in use by another process" in refusals[0]
    check_same(tmp_path, uninterrupted[0])


def _main(folder: Path, words: list[str], limit: int) -> None:
    """Run the command in a process of its own, which can write files of `limit` bytes at most."""
    torch.set_num_threads(1)
    os.chdir(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with (folder / "stderr").open("w") as sys.stderr:
        main(words)


FACTORY = """
import os, signal
from torch import nn
class Net(nn.Sequential):
    steps = 0
    def forward(self, x):
        self.steps += self.training
        if self.steps == {step}:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(x)
def network():
    return Net(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10)
    )
"""


def test_ctrl_c_leaves_a_checkpoint_and_the_command_that_goes_on(tmp_path: Path) -> None:
    for name, step in (("whole", -1), ("cut", 5)):
        (tmp_path / f"{name}.py").write_text(FACTORY.format(step=step))

    def started(name: str, *more: str) -> tuple[int | None, list[str]]:
        words = ["train", f"{name}:network", "--ratio", "2", "--out", name, "--epochs", "1", *more]
        process = CONTEXT.Process(target=_main, args=(tmp_path, words, 2**30))
        process.start()
        process.join()
        return process.exitcode, (tmp_path / "stderr").read_text().splitlines()

    assert started("whole")[0] == 0
    code, said = started("cut")
    assert code == 130
    command = "deeptwist train cut:network --ratio 2 --out cut --epochs 1"
    assert said[-2:] == ["interrupted: go on with", f"{command} --resume"]
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == [
        "checkpoint-000000005.pt"
    ]
    (tmp_path / "cut.py").write_text(FACTORY.format(step=-1))
    assert started("cut", "--resume")[0] == 0
    weights, expected = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    factory = tmp_path / "mine.py"
    factory.write_text(
        textwrap.dedent("""
            from torch import nn
            def network():
                return nn.Sequential(
                    nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(),
                    nn.Linear(512, 10),
                )
        """)
    )
    words = ["train", "mine:network", "--ratio", "2", "--out", "run", "--epochs", "1"]
    words += ["--logging.checkpoint-every", "2"]

    def started(*more: str, limit: int) -> tuple[int | None, str]:
        process = CONTEXT.Process(target=_main, args=(tmp_path, [*words, *more], limit))
        process.start()
        process.join()
        return process.exitcode, (tmp_path / "stderr").read_text()

    code, stderr = started(limit=60_000)  # less than a checkpoint's
    assert code == 2, stderr
    assert stderr.splitlines()[-1].startswith("deeptwist: cannot write 'run/checkpoint-")
    assert not [*(tmp_path / "run").glob("*checkpoint*")]
    assert started("--resume", limit=2**30)[0] == 0
    assert (tmp_path / "run" / "run.json").exists()


# --- several processes


def in_a_group(rank: int, world: int, port: int, folder: Path, stop: int | None) -> None:
    """Train as one of the processes that torchrun starts, which all end after `stop` steps.

    What each of them trained is left beside the folder.
    """
    torch.set_num_threads(1)
    if world > 1:  # what torchrun sets
        names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        os.environ.update(zip(names, map(str, (rank, rank, 0, world, world)), strict=True))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="1")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10),
    ).double()  # fmt: skip
    values = {
        "model": "script",
        "interval": 4,
        "schedule": {"epochs": 2},
        "precision": "64-true",
        "compression": {
            "decomposition": "svd",
            "ratio": 2,
            "linear": True,
            "include": ["2", "4"],
        },
        "logging": {"images": 50, "checkpoint_every": 5},
    }
    left = -1 if stop is None else stop

    def tick() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(9)  # in every process at once

    run = build_run(make_recipe(values), load_data("digits"), name="run", model=model)
    train_run(run, folder, resume=True, on_step=tick)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder.with_name(f"{folder.name}-{rank}.safetensors"))


def train_in_group(folder: Path, world: int, stop: int | None = None) -> None:
    """Train in so many processes, from the last checkpoint in the folder if there is one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [
        CONTEXT.Process(target=in_a_group, args=(rank, world, port, folder, stop))
        for rank in range(world)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join()
    assert {process.exitcode for process in group} == {0 if stop is None else 9}


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_stay_identical(tmp_path: Path) -> None:
    """Also where two go on with what one began, and the other way round."""
    train_in_group(tmp_path / "one", 1)
    train_in_group(tmp_path / "two", 2)
    left, right = (load_file(tmp_path / f"two-{rank}.safetensors") for rank in range(2))
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    for out, before, after in (("grown", 1, 2), ("shrunk", 2, 1)):
        train_in_group(tmp_path / out, before, stop=12)
        assert len([*(tmp_path / out).glob("checkpoint-*.pt")]) == 2
        train_in_group(tmp_path / out, after)
    single = tensors(tmp_path / "one")
    for out in ("two", "grown", "shrunk"):
        other = tensors(tmp_path / out)
        assert single.keys() == other.keys()
        for name, tensor in single.items():
            assert torch.allclose(tensor.abs(), other[name].abs(), atol=1e-7), (out, name)
    first, second, shrunk = (read_run(tmp_path / name) for name in ("one", "two", "shrunk"))
    assert (second.summary["processes"], shrunk.summary["processes"]) == (2, 1)
    assert [epoch["train_loss"] for epoch in second.epochs] == pytest.approx(
        [epoch["train_loss"] for epoch in first.epochs]
    )
    assert [line["weight_shift"] for line in second.distortions] == pytest.approx(
        [line["weight_shift"] for line in first.distortions]
    )
