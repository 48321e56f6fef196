"""Real weights, S_D optimizer steps apart, for `benchmarks/distortion.py`.

Trains ResNet-32 (from trained weights) and VGG19 (from random ones) under DeepTwist, as the paper
does, and keeps the compressed layers' weights as they are just before each distortion. A network
whose snapshots are all there is skipped; one that was cut off is trained again from the start,
over the same images in the same order.

    python benchmarks/trajectories.py --data DIR --weights resnet32-cifar10.safetensors
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import deeptwist as dt
from deeptwist.app.data import ImageData, load_data
from deeptwist.app.models import build_model, load_weights
from deeptwist.app.training.devices import Fabric
from deeptwist.app.training.loop import Trainer
from deeptwist.app.training.recipe import make_recipe
from deeptwist.measure.machine import describe_machine
from deeptwist.twist.distortion import Distortion

# Which layers, by the fewest input channels; the paper's 128 would leave nothing of ResNet-32.
NETWORKS = {"resnet32": 64, "vgg19_bn": 128}
METHOD = dt.TiledSVD(tile=(64, 64), rank=8)


class Done(Exception):
    """Raised to leave the training loop once the last snapshot is written."""


class Snapshots(dt.DeepTwist):
    """DeepTwist that keeps the compressed weights before each distortion."""

    def __init__(self, model: nn.Module, plan: dt.Plan, interval: int, folder: Path, count: int):
        super().__init__(model, plan, interval)
        self.folder, self.count = folder, count
        self.step_seconds: list[float] = []
        self._last = time.perf_counter()

    def step(self, loss: Callable[[], Any] | None = None) -> Distortion | None:
        """As DeepTwist's, with a clock on the training steps."""
        self.step_seconds.append(time.perf_counter() - self._last)
        record = super().step(loss)
        self._last = time.perf_counter()
        return record

    def distort(self, loss: Callable[[], Any] | None = None) -> Distortion:
        """As DeepTwist's, after a snapshot."""
        weights = {
            layer.name: self.model.get_submodule(layer.name).weight.detach().contiguous()
            for layer in self.plan.compressed
        }
        path = self.folder / f"step-{self.steps:06}.safetensors"
        save_file(weights, path)
        print(f"{path}: {statistics.median(self.step_seconds):.2f} s a step", flush=True)
        written = self.steps // self.interval
        (self.folder / "trajectory.json").write_text(
            json.dumps(
                {
                    "snapshots": written,
                    "interval": self.interval,
                    "seconds_per_step": statistics.median(self.step_seconds),
                    "machine": describe_machine(),
                }
            )
        )
        if written >= self.count:
            raise Done
        return super().distort(loss)


def train(name: str, data: ImageData, weights: str | None, folder: Path, count: int) -> None:
    """Trains one network until `count` snapshots are in `folder`."""
    recipe = make_recipe({"model": name, "schedule": {"epochs": 4}, "interval": 200})
    torch.manual_seed(0)
    model = build_model(name)
    if weights is not None:
        load_weights(model, weights)
    plan = dt.plan(
        model,
        METHOD,
        example_input=torch.zeros(2, 3, 32, 32),
        layers=dt.Layers(skip_first_conv=False, min_in_channels=NETWORKS[name]),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(plan.to_json())
    twist = Snapshots(model, plan, recipe.interval, folder, count)
    fabric = Fabric(accelerator="auto", devices=1, precision=recipe.precision)
    trainer = Trainer(fabric, model, data, recipe, twist=twist)
    with contextlib.suppress(Done):
        trainer.fit(lambda record: print(name, record, flush=True))


def main() -> None:
    """Trains what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 as load_data takes it")
    parser.add_argument("--weights", required=True, help="the trained ResNet-32")
    parser.add_argument("--out", default="runs/trajectories", type=Path)
    parser.add_argument("--image-size", type=int, help="16 for a quarter of the time")
    parser.add_argument("--snapshots", default=5, type=int, help="of each network")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()

    data = load_data(options.data, image_size=options.image_size)
    # The test split is looked at after each epoch: a corner of it is enough.
    data = replace(
        data,
        test=replace(data.test, images=data.test.images[:500], labels=data.test.labels[:500]),
    )
    for name in options.only:
        folder = options.out / name
        if len(list(folder.glob("step-*.safetensors"))) >= options.snapshots:
            print(f"{folder}: there")
            continue
        weights = options.weights if name == "resnet32" else None
        train(name, data, weights, folder, options.snapshots)


if __name__ == "__main__":
    main()
