"""What keeps factors behind the dense form in a short training: their rate, conditioning, or start.

ResNet-32 at 16×16 pixels, batch 128, SGD with Nesterov, cosine to zero. Factors are trained through
the weight that they stand for: the same function, and steps, as of factored layers, at the dense
network's price. Each row is appended to a file, and those that are there are not trained again.

python benchmarks/factors.py --data cifar10-jpeg --weights resnet32-cifar10.safetensors \
    --out results/factors/tucker-4x.jsonl
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import deeptwist as dt
from deeptwist.app.data import ImageData, load_data, train_batches
from deeptwist.app.training.evaluation import evaluate, preprocess
from deeptwist.layers.geometry import kernel_to_weight, weight_to_kernel
from deeptwist.networks.build import build_model
from deeptwist.networks.weights import load_weights
from deeptwist.plan.plan import CompressedLayer

WAYS = "plain", "frobenius", "preconditioned", "deeptwist"
KEY = "way", "lr", "dense_steps", "epochs", "seed"
_BATCH, _DAMPING, _DECAY = 128, 1e-4, 5e-4


class Product(nn.Module):
    """Parametrizes a convolution: from factors to the weight that they stand for."""

    def __init__(self, layer: CompressedLayer):
        super().__init__()
        self.decomposition, self.convolution = layer.decomposition, layer.convolution

    def forward(self, *factors: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            kernel = self.decomposition.reconstruct(factors, self.convolution.kernel_shape)
        return kernel_to_weight(kernel, self.convolution)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        return self.decomposition.decompose(weight_to_kernel(weight, self.convolution)).tensors


def hold_as_factors(model: nn.Module, plan: dt.Plan) -> list[tuple[Product, list[nn.Parameter]]]:
    """Hold every planned weight as its factors; return them with their parameters."""
    held = []
    for layer in plan.compressed:
        module, factors = model.get_submodule(layer.name), Product(layer)
        parametrize.register_parametrization(module, "weight", factors)
        held.append((factors, [*module.parametrizations.weight.parameters()]))  # type: ignore[union-attr]
    return held


@torch.no_grad()
def precondition(held: list[tuple[Product, list[nn.Parameter]]]) -> None:
    """Replace factors' gradients as `deeptwist.precondition` does."""
    for factors, parameters in held:
        gradients = [p.grad for p in parameters if p.grad is not None]
        steps = factors.decomposition.tangent(tuple(parameters), tuple(gradients), _DAMPING)
        for gradient, step in zip(gradients, steps, strict=True):
            gradient.copy_(step)


def train(row: dict[str, Any], data: ImageData, options: argparse.Namespace) -> dict[str, Any]:
    """Train one way; return the row with its outcome."""
    model = build_model("resnet32", num_classes=len(data.classes))
    load_weights(model, options.weights)
    model.to(memory_format=torch.channels_last)
    example = torch.zeros(2, *data.shape)
    plan = dt.plan(model, dt.Tucker(), example_input=example, ratio=options.ratio)
    distorts = row["way"] == "deeptwist"
    twist = dt.DeepTwist(model, plan, options.interval) if distorts else None
    steps = row["epochs"] * (len(data.train.labels) // _BATCH)
    held: list[tuple[Product, list[nn.Parameter]]] = []
    is_frobenius = row["way"] == "frobenius"  # the product decays: Khodak et al. (2021)
    losses, started = [], time.process_time()
    optimizer = _sgd(model)
    model.train()
    batches = train_batches(data, _BATCH, seed=row["seed"], steps=range(steps))
    for step, (images, labels) in enumerate(batches):
        if twist is None and step == row["dense_steps"]:
            held = hold_as_factors(model, plan)
            factors = [parameter for _, parameters in held for parameter in parameters]
            optimizer = _sgd(model, without_decay=factors if is_frobenius else ())
        for group in optimizer.param_groups:
            group["lr"] = row["lr"] * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(preprocess(images, model, data))
        loss = functional.cross_entropy(logits.float(), labels)
        loss.backward()
        if held and is_frobenius:
            weights = [model.get_submodule(layer.name).weight for layer in plan.compressed]
            torch.stack([_DECAY / 2 * weight.square().sum() for weight in weights]).sum().backward()
        if row["way"] == "preconditioned":
            precondition(held)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if twist is not None and step >= row["dense_steps"] - options.interval:
            twist.step()  # after the first interval it distorts
    small = model if twist is None else twist.finish()
    seconds = time.process_time() - started
    accuracy = 100 * evaluate(small, data.test, data).accuracy
    last = losses[-len(losses) // 4 :]
    return row | {"accuracy": accuracy, "loss": sum(last) / len(last), "seconds": seconds}


def _sgd(model: nn.Module, without_decay: Sequence[nn.Parameter] = ()) -> torch.optim.SGD:
    free = {*map(id, without_decay)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in free], "weight_decay": _DECAY},
        {"params": [*without_decay]},
    ]
    return torch.optim.SGD(groups, lr=0, momentum=0.9, nesterov=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="image folder with train/ and test/")
    parser.add_argument("--weights", required=True, help="ResNet-32's")
    parser.add_argument("--ways", default=WAYS, choices=WAYS, nargs="+")
    parser.add_argument("--lrs", default=[0.0125, 0.05, 0.2], type=float, nargs="+")
    parser.add_argument("--dense-steps", default=[0, 100], type=int, nargs="+", help="before")
    parser.add_argument("--epochs", default=1, type=int)
    parser.add_argument("--interval", default=100, type=int, help="S_D of DeepTwist")
    parser.add_argument("--ratio", default=4.0, type=float)
    parser.add_argument("--seeds", default=[0], type=int, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, a row each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = options.out.read_text().splitlines() if options.out.exists() else []
    known = [{key: row[key] for key in KEY} for row in map(json.loads, rows)]
    data = load_data(options.data, image_size=16)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed, dense, lr, way in product(
        options.seeds, options.dense_steps, options.lrs, options.ways
    ):
        dense_steps = max(dense, options.interval) if way == "deeptwist" else dense
        row = dict(zip(KEY, (way, lr, dense_steps, options.epochs, seed), strict=True))
        if row in known:
            continue
        known.append(row)
        outcome = train(row, data, options)
        print(json.dumps(outcome), flush=True)
        with options.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main()
