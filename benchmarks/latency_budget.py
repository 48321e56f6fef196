"""Does a plan for milliseconds keep its promise? ResNet-34 and VGG19, layers twice as fast.

The promise is what the plan measured of the whole network with random factors. Beside it: one
ratio for every layer, chosen so that the sum of the squared errors is as large as the plan's.

    python benchmarks/latency_budget.py
"""

import argparse

import torch
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.timing import median_ratio, time_modules
from deeptwist.networks.build import build_model

NETWORKS = {"torchvision/resnet34": (3, 224, 224), "vgg19": (3, 32, 32)}
LATENCY = 2.0
WIDE = dt.Layers(min_in_channels=64)


def main() -> None:
    """Print a row for each network and batch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--batches", default=[1, 16], nargs="+", type=int)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--runtime", default="eager", choices=["eager", "compile", "onnxruntime"])
    parser.add_argument("--rounds", default=9, type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| network | batch | dense, ms | promised | measured | as lossy, one ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in options.only:
        for batch in options.batches:
            latency = dt.Latency(
                LATENCY, batch=batch, runtime=options.runtime, threads=options.threads
            )
            print(f"| {name} | {batch} | {row(name, latency, options.rounds)} |", flush=True)
    print(f"\n{options.runtime}, {describe_machine()}")


def row(name: str, latency: dt.Latency, rounds: int) -> str:
    """Return the milliseconds of a network, and of its small forms as speed-ups."""
    torch.manual_seed(0)
    model = build_model(name).eval().to(memory_format=torch.channels_last)
    x = torch.randn(latency.batch, *NETWORKS[name]).to(memory_format=torch.channels_last)
    plan = dt.plan(model, dt.TiledSVD(), latency=latency, example_input=x, layers=WIDE)
    even = as_lossy(model, x, error(plan))
    networks = [model, dt.decompose(model, plan), dt.decompose(model, even)]
    setting = latency.setting(x.dtype)
    dense, small, uniform = time_modules(networks, x, setting, rounds=rounds)
    assert plan.latency is not None
    speedups = median_ratio(dense, small), median_ratio(dense, uniform)
    promised = f"{plan.latency.dense.median:.1f} | {plan.latency.speedup:.2f}×"
    return f"{promised} | {speedups[0]:.2f}× | {speedups[1]:.2f}×"


def error(plan: dt.Plan) -> float:
    """Return the sum of the layers' relative squared errors."""
    return sum((layer.relative_error or 0) ** 2 for layer in plan.compressed)


def as_lossy(model: nn.Module, x: Tensor, limit: float) -> dt.Plan:
    """Return the plan of one ratio for all layers whose error is this large, by bisection."""
    low, high = 1.05, 8.0
    for _ in range(6):
        ratio = (low + high) / 2
        plan = dt.plan(model, dt.TiledSVD(), ratio=ratio, example_input=x, layers=WIDE)
        low, high = (ratio, high) if error(plan) < limit else (low, ratio)
    return plan


if __name__ == "__main__":
    main()
