"""What a distortion costs beside `torch.linalg.svd` of the same tiles alone, in one run.

Weights are the network's own after a distortion, moved by 2 % of their norm, which is about what
200 optimizer steps do. A distortion gathers the tiles, factors them, writes the approximations
back and measures the shift; the SVD has them cut and stacked for it.

    python benchmarks/distortion.py
    python benchmarks/distortion.py --trajectory runs/trajectories/resnet32

With a trajectory, it distorts along real weights (see trajectories.py), each time from the factors
of the time before, and says how far each distortion is above the least squared error.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.app.models import build_model, load_weights
from deeptwist.layers.geometry import weight_to_kernel

METHOD = dt.TiledSVD(tile=(64, 64), rank=8)
MOVE, INTERVAL, ROUNDS = 0.02, 200, 5


def main() -> None:
    """Print a row for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="of the ResNet-32")
    parser.add_argument("--step", action="store_true", help="time a training step too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trajectory", type=Path)
    options = parser.parse_args()
    torch.set_default_device(options.device)
    if options.trajectory:
        follow(options.trajectory)
        return
    print("| network | tiles | SVD alone, ms | first, ms | later, ms | × | excess error | share |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, channels in (("resnet32", 64), ("vgg19_bn", 128)):
        torch.manual_seed(0)
        model = build_model(name)
        if options.weights and name == "resnet32":
            load_weights(model, options.weights)
        print(measure(name, model, channels, options.step), flush=True)


@torch.no_grad()
def measure(name: str, model: nn.Module, channels: int, with_step: bool) -> str:
    """Return a network's row."""
    x = torch.zeros(2, 3, 32, 32)
    layers = dt.Layers(skip_first_conv=False, min_in_channels=channels)
    plan = dt.plan(model, METHOD, example_input=x, layers=layers)
    twist = dt.DeepTwist(model, plan, INTERVAL)
    first = seconds(twist.distort)
    state = twist.state_dict()
    weights = [model.get_submodule(layer.name).weight for layer in plan.compressed]
    moved = [moved_by(MOVE, weight) for weight in weights]
    stacks = stacks_of(plan, moved)
    svd = min(
        seconds(lambda: [torch.linalg.svd(x, full_matrices=False) for x in stacks]) for _ in "12"
    )
    times = []
    for _ in range(ROUNDS):
        twist.load_state_dict(state)
        for weight, new in zip(weights, moved, strict=True):
            weight.copy_(new)
        times.append(seconds(twist.distort))
    later = min(times)
    excess = excess_error(stacks, weights, moved)
    share = f"{later / (INTERVAL * step_seconds(model)):.3%}" if with_step else ""
    return (
        f"| {name} | {sum(map(len, stacks)):,} | {1e3 * svd:,.0f} | {1e3 * first:,.0f} "
        f"| {1e3 * later:,.1f} | {svd / later:.1f} | {excess:.4%} | {share} |"
    )


@torch.no_grad()
def follow(folder: Path) -> None:
    """Print a row for each snapshot of a trajectory."""
    plan = dt.Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    model = build_model(folder.name)
    twist = dt.DeepTwist(model, plan, INTERVAL)
    weights = [model.get_submodule(layer.name).weight for layer in plan.compressed]
    print("| snapshot | moved by | excess error |\n| --- | ---: | ---: |")
    for path in sorted(folder.glob("step-*.safetensors")):
        snapshot = load_file(path)
        new = [snapshot[layer.name] for layer in plan.compressed]
        away = [(a - b).norm() / a.norm() for a, b in zip(weights, new, strict=True)]
        for weight, values in zip(weights, new, strict=True):
            weight.copy_(values)
        twist.distort()
        excess = excess_error(stacks_of(plan, new), weights, new)
        print(f"| {path.stem} | {torch.stack(away).median():.1%} | {excess:.4%} |")


def stacks_of(plan: dt.Plan, weights: list[Tensor]) -> list[Tensor]:
    """Return all tiles of weights, those of one size together."""
    batches: dict[tuple[int, ...], list[Tensor]] = {}
    for layer, weight in zip(plan.compressed, weights, strict=True):
        for tiles in layer.decomposition.partition(weight_to_kernel(weight, layer.convolution)):
            batches.setdefault(tuple(tiles.shape[1:]), []).append(tiles)
    return [torch.cat(tiles) for tiles in batches.values()]


def excess_error(stacks: list[Tensor], weights: list[Tensor], exact: list[Tensor]) -> float:
    """Return how far approximations are above the least squared error, relative to it."""
    best = sum(float(torch.linalg.svdvals(x.double())[:, 8:].square().sum()) for x in stacks)
    lost = sum(float((a - b).double().square().sum()) for a, b in zip(weights, exact, strict=True))
    return lost / best - 1


def moved_by(share: float, weight: Tensor) -> Tensor:
    """Return a weight after a step of this share of its norm in a random direction."""
    noise = torch.randn_like(weight)
    return weight + share * weight.norm() / noise.norm() * noise


@torch.enable_grad()
def step_seconds(model: nn.Module) -> float:
    """Return what one training step on 128 images takes."""
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    return min(
        seconds(lambda: nn.functional.cross_entropy(model(x), y).backward()) for _ in range(2)
    )


def seconds(work: object) -> float:
    """Return how long a call takes."""
    synchronize()
    started = time.perf_counter()
    work()  # type: ignore[operator]
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
