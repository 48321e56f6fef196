"""The training engine beside timm's own loop, on a folder of images, and where the time goes.

ResNet-18 at 128 pixels, SGD, bf16 autocast: rounds of a few steps by timm's loader, transforms and
optimizer without deeptwist, and by the engine, in turn; both start their workers in every round.
Then each part of a step by itself, in processor time on one thread.

    python benchmarks/training_timm.py --data imagenette224
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from torch.nn import functional

from deeptwist.app.data import ImageData, ImageFiles, Split, load_data
from deeptwist.app.training.devices import Fabric
from deeptwist.app.training.evaluation import preprocess
from deeptwist.app.training.loop import Trainer
from deeptwist.app.training.optimizers import make_optimizer
from deeptwist.app.training.recipe import make_recipe
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.timing import median_ratio
from deeptwist.networks.build import build_model
from deeptwist.twist import DeepTwist

MODEL, SIZE, SCALE, INTERVAL = "torchvision/resnet18", 128, 0.25, 200
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--steps", default=4, type=int, help="of a round")
    parser.add_argument("--batch", default=64, type=int)
    parser.add_argument("--rounds", default=7, type=int)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--workers", default=2, type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_data(
        str(options.data), preset="imagenet", image_size=SIZE, scale=SCALE, workers=options.workers
    )
    rows = torch.arange(options.steps * options.batch)
    # One test image, in memory: the evaluation at an epoch's end is no part of a step.
    blank = Split(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), data.test.labels[:1])
    data = replace(data, train=data.train.subset(rows), test=blank)
    loops = {
        "timm": timm_loop(options.data, rows.tolist(), options.batch, options.workers),
        "deeptwist": engine(data, options.batch),
    }
    clocks = {"second": time.perf_counter, "second of processors": processor_seconds}
    spent: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds + 1):
        for name, loop in loops.items():
            started = {clock: now() for clock, now in clocks.items()}
            loop()
            for clock, now in clocks.items() if number else ():  # the first is for warming up
                spent.setdefault((clock, name), []).append(now() - started[clock])
    for clock in clocks:
        ours, others = (spent[clock, name] for name in ("deeptwist", "timm"))
        speeds = [len(rows) / statistics.median(seconds) for seconds in (ours, others)]
        print(
            f"images a {clock}: engine {speeds[0]:.1f}, timm's loop {speeds[1]:.1f}; "
            f"{1 / median_ratio(ours, others):.1%} (median of {options.rounds} pairs)"
        )
    print()
    torch.set_num_threads(1)
    print("| part of a step | ms an image | share |")
    print("| --- | --- | --- |")
    parts = time_parts(data, options.batch)
    for name, milliseconds in parts.items():
        print(f"| {name} | {milliseconds:.2f} | {milliseconds / sum(parts.values()):.1%} |")
    print(f"\n{describe_machine()}")


def processor_seconds() -> float:
    """Return what this process and the workers that it has ended have used."""
    return sum(os.times()[:4])


def timm_loop(folder: Path, rows: list[int], batch: int, workers: int) -> Callable[[], None]:
    model = build_model(MODEL, num_classes=10).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, "sgd", **SGD)
    dataset = create_dataset("", root=str(folder), split="train")
    dataset.reader.samples = [dataset.reader.samples[row] for row in rows]
    loader = create_loader(
        dataset,
        (3, SIZE, SIZE),
        batch,
        is_training=True,
        scale=(SCALE, 1.0),
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=workers,
        persistent_workers=False,
        device=torch.device("cpu"),
    )

    def run() -> None:
        model.train()
        for images, labels in loader:
            x = images.to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def engine(data: ImageData, batch: int) -> Callable[[], None]:
    values = {"precision": "bf16-mixed", "batch_size": batch, "optimizer": SGD}
    recipe = make_recipe({"model": MODEL, "mode": "dense", "schedule": {"epochs": 1}, **values})
    fabric = Fabric(accelerator="cpu", devices=1, precision=recipe.precision)
    model = build_model(MODEL, num_classes=10)

    def run() -> None:
        for _ in Trainer(fabric, model, data, recipe).fit():
            pass

    return run


def time_parts(data: ImageData, batch: int, repeats: int = 5) -> dict[str, float]:
    """Return the milliseconds of processor time that each part of a step takes for an image."""
    files = data.train.images
    assert isinstance(files, ImageFiles)
    assert data.transform is not None
    model = build_model(MODEL, num_classes=10).train().to(memory_format=torch.channels_last)
    compression = {"decomposition": "spatial_svd", "ratio": 3, "linear": True}
    recipe = make_recipe({"model": MODEL, "optimizer": SGD, "compression": compression})
    plan = recipe.compression.make_plan(model, torch.zeros(2, 3, SIZE, SIZE))
    optimizer, twist = make_optimizer(model, recipe.optimizer), DeepTwist(model, plan, 1)
    labels = data.train.labels[:batch]
    parts: dict[str, list[float]] = {}
    last = 0.0

    def lap(name: str | None = None, images: int = batch) -> None:
        nonlocal last
        now = time.process_time()
        if name is not None:
            parts.setdefault(name, []).append(1000 * (now - last) / images)
        last = time.process_time()

    for _ in range(repeats):
        lap()
        decoded = [files.read(row) for row in range(batch)]
        lap("decode")
        pixels = torch.stack([data.transform(image) for image in decoded])
        lap("transform")
        x = preprocess(pixels, model, data)
        lap("normalise")
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(x), labels)
        lap("forward")
        loss.backward()
        lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")
        twist.step()
        lap(f"distortion, every {INTERVAL} steps", batch * INTERVAL)
    return {name: statistics.median(values) for name, values in parts.items()}


if __name__ == "__main__":
    main()
