"""What the training engine and DeepTwist cost: ResNet-32, batch 128, bf16 autocast, random images.

A block of steps by a bare loop and by the engine under DeepTwist, in turn, medians over blocks; at
the end of each block a distortion, timed by itself with what is recorded around it (loss and
accuracy of 100 images spread over each split), as shares of S_D = 200 steps.

    python benchmarks/training.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from deeptwist.app.data import ImageData, Split, augment, normalize
from deeptwist.app.training.devices import Fabric
from deeptwist.app.training.evaluation import evaluate
from deeptwist.app.training.loop import Trainer
from deeptwist.app.training.recipe import make_recipe
from deeptwist.compress import Values
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.timing import median_ratio
from deeptwist.networks.build import build_model

MODEL, BATCH, INTERVAL, IMAGES = "resnet32", 128, 200, 100
TILES = {"decomposition": "tiled_svd", "tile": [64, 64], "ratio": 4, "skip_first_conv": True}


@dataclass(frozen=True)
class Block:
    """Seconds that a block of steps took by the engine, and those of its distortion alone."""

    steps: float
    distortion: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--block", default=40, type=int, help="steps")
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--threads", default=2, type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = random_data(BATCH * options.block)
    bare, engine = bare_loop(data), engine_under_deeptwist(data, options.block)
    loops, blocks = [], []
    for number in range(options.rounds + 1):
        started = time.perf_counter()
        bare()
        seconds = time.perf_counter() - started
        block = engine()
        if number:  # the first is for warming up
            loops.append(seconds)
            blocks.append(block)
    step = statistics.median(block.steps for block in blocks) / options.block
    distortion = statistics.median(block.distortion for block in blocks)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = fabric.setup(build_model(MODEL))
    started = time.perf_counter()
    for _ in range(10):
        for split in (data.train, data.test):
            evaluate(model, split.subsample(IMAGES), data)
    records = 2 * (time.perf_counter() - started) / 10
    slower = median_ratio([block.steps for block in blocks], loops) - 1
    whole = INTERVAL * step
    print("| what | ms | share |")
    print("| --- | --- | --- |")
    bare_step = statistics.median(loops) / options.block
    print(f"| a step of a bare loop | {bare_step * 1000:.1f} | |")
    print(f"| a step of the engine | {step * 1000:.1f} | {slower:+.1%} against the bare loop |")
    print(
        f"| a distortion | {distortion * 1000:.1f} | {distortion / whole:.2%} of {INTERVAL} steps |"
    )
    print(
        f"| what is recorded around it (may be left out) | {records * 1000:.0f} | "
        f"{records / whole:.1%} of {INTERVAL} steps |"
    )
    print(f"\n{describe_machine()}")


def random_data(images: int) -> ImageData:
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (images,))
    names = tuple("0123456789")
    few = Split(pixels[:IMAGES], labels[:IMAGES])
    train = Split(pixels, labels)
    return ImageData("random", train, few, names, (0.5,) * 3, (0.25,) * 3, padding=4, flip=True)


def bare_loop(data: ImageData) -> Callable[[], None]:
    """What one writes without a library: the same batches, augmentation and precision."""
    model = build_model(MODEL).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        model.train()
        order = torch.randperm(len(data.train.labels), generator=generator)
        for rows in order.split(BATCH):
            draws = torch.rand(BATCH, 3, generator=generator, dtype=torch.float64)
            images = augment(data.train.images[rows], draws, padding=data.padding, flip=data.flip)
            x = normalize(images, data.mean, data.std).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = functional.cross_entropy(model(x), data.train.labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def engine_under_deeptwist(data: ImageData, block: int) -> Callable[[], Block]:
    """An epoch of the engine, which is one block, with a distortion at its end."""
    recipe = make_recipe(
        {
            "model": MODEL,
            "interval": block,
            "precision": "bf16-mixed",
            "optimizer": {"lr": 0.01},
            "schedule": {"epochs": 1},
            "compression": {**TILES, "linear": False},
            "logging": {"images": 0},
        }
    )
    model = build_model(MODEL)
    example = torch.zeros(2, 3, 32, 32)
    made = recipe.compression.make_plan(model, example)
    fabric = Fabric(accelerator="cpu", devices=1, precision=recipe.precision)
    # One test image: the evaluation at an epoch's end is no part of a step.
    images = replace(data, test=Split(data.test.images[:1], data.test.labels[:1]))

    def run() -> Block:
        records: list[Values] = []
        trainer = Trainer(fabric, model, images, recipe, plan=made, on_record=records.append)
        started = time.perf_counter()
        for _ in trainer.fit():
            pass
        seconds = time.perf_counter() - started
        distorted = next(record for record in records if record["event"] == "distortion")
        return Block(seconds - distorted["seconds"], distorted["seconds"])

    return run


if __name__ == "__main__":
    main()
