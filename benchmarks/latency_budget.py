"""Does a plan for milliseconds keep its promise? ResNet-34 and VGG19, layers twice as fast.

The promise for the whole network is that of its layers, by their share of its dense time: alone,
in turn with their small forms, they may take longer than in it. Beside it: one ratio for every
layer, chosen so that the sum of the squared errors is as large as the plan's.

    python benchmarks/latency_budget.py
"""

import argparse

import torch
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.models import build_model
from deeptwist.plan.budget import Budgets
from deeptwist.plan.environment import describe_machine
from deeptwist.plan.layer_filter import LayerFilter
from deeptwist.plan.planner import Planner
from deeptwist.plan.timing import median_ratio, time_interleaved

NETWORKS = {"torchvision/resnet34": (3, 224, 224), "vgg19": (3, 32, 32)}
LATENCY = 2.0


def main() -> None:
    """Print a row for each network and batch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--batches", default=[1, 16], nargs="+", type=int)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| network | batch | dense, ms | promised | measured | as lossy, one ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in options.only:
        for batch in options.batches:
            print(f"| {name} | {batch} | {row(name, batch)} |", flush=True)
    print(f"\n{describe_machine()}")


def row(name: str, batch: int) -> str:
    """Return the milliseconds of a network, and of its small forms as speed-ups."""
    torch.manual_seed(0)
    model = build_model(name).eval().to(memory_format=torch.channels_last)
    x = torch.randn(batch, *NETWORKS[name]).to(memory_format=torch.channels_last)
    rules = LayerFilter(True, 64, False, ("*",), (), {})
    planner = Planner(model, x, [dt.TiledSVD()], rules)
    clock = planner.clock(batch)
    plan = planner.plan(Budgets(latency=LATENCY), None, clock)
    layers = sum(
        clock.times(layer.convolution, layer.calls, [])[0]
        for layer in plan.layers
        if layer.convolution is not None
        and rules.skip_reason(
            (layer.name,), layer.convolution, is_first=layer.name in ("conv1", "features.0")
        )
        is None
    )
    even = as_lossy(model, x, error(plan))
    networks = [model, dt.decompose(model, plan), dt.decompose(model, even)]
    with torch.inference_mode():
        samples = time_interleaved([lambda m=m: m(x) for m in networks], rounds=9)
    dense, small, uniform = samples
    whole = sorted(dense)[len(dense) // 2]
    share = min(1.0, layers / whole)
    promised = 1 / (1 - share + share / LATENCY)
    speedups = median_ratio(dense, small), median_ratio(dense, uniform)
    return f"{whole:.1f} | {promised:.2f}× | {speedups[0]:.2f}× | {speedups[1]:.2f}×"


def error(plan: dt.Plan) -> float:
    """Return the sum of the layers' relative squared errors."""
    return sum((layer.relative_error or 0) ** 2 for layer in plan.compressed)


def as_lossy(model: nn.Module, x: Tensor, limit: float) -> dt.Plan:
    """Return the plan of one ratio for all layers whose error is this large, by bisection."""
    low, high = 1.05, 8.0
    for _ in range(6):
        ratio = (low + high) / 2
        plan = dt.plan(
            model, dt.TiledSVD(), ratio=ratio, example_input=x, skip_first_conv=True,
            min_in_channels=64, linear=False,
        )  # fmt: skip
        low, high = (ratio, high) if error(plan) < limit else (low, ratio)
    return plan


if __name__ == "__main__":
    main()
