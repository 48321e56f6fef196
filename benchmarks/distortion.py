"""What a distortion costs beside `torch.linalg.svd` of the same tiles alone, in one run.

Weights are the network's own after a distortion, moved by 2 % of their norm, which is about what
200 optimizer steps do. A distortion gathers the tiles, factors them, writes the approximations
back and measures the shift; the SVD has them cut and stacked for it.

    python benchmarks/distortion.py
    python benchmarks/distortion.py --record resnet32 --data DIR --weights FILE
    python benchmarks/distortion.py --trajectory runs/trajectories/resnet32

The second trains ResNet-32 (from trained weights) or VGG19 (from random ones) under DeepTwist, as
the paper does, and keeps the compressed layers' weights as they are just before each distortion.
The third distorts along such real weights, each time from the factors of the time before, and says
how far each distortion is above the least squared error.
"""

import argparse
import contextlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.app.data import load_data
from deeptwist.app.training.recipe import make_recipe
from deeptwist.app.training.run import build_run, train
from deeptwist.layers.geometry import weight_to_kernel
from deeptwist.networks.build import build_model
from deeptwist.networks.weights import load_weights

METHOD = dt.TiledSVD(tile=(64, 64), rank=8)
MOVE, INTERVAL, ROUNDS = 0.02, 200, 5
# Which layers, by the fewest input channels; the paper's 128 would leave nothing of ResNet-32.
NETWORKS = {"resnet32": 64, "vgg19_bn": 128}


def main() -> None:
    """Print a row for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="of the ResNet-32")
    parser.add_argument("--step", action="store_true", help="time a training step too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trajectory", type=Path, help="a folder that --record wrote")
    parser.add_argument("--record", choices=NETWORKS)
    parser.add_argument("--out", default="runs/trajectories", type=Path)
    parser.add_argument("--data", help="CIFAR-10, to record on")
    parser.add_argument("--image-size", type=int, help="16 for a quarter of the time")
    parser.add_argument("--snapshots", default=5, type=int)
    options = parser.parse_args()
    if options.record:
        record(options)
        return
    torch.set_default_device(options.device)
    if options.trajectory:
        follow(options.trajectory)
        return
    print("| network | tiles | SVD alone, ms | first, ms | later, ms | × | excess error | share |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, channels in NETWORKS.items():
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


class Done(Exception):
    """Raised to leave the training once the last snapshot is written."""


def record(options: argparse.Namespace) -> None:
    """Train a network until so many snapshots are in its folder."""
    name, folder = options.record, options.out / options.record
    tiles = {"decomposition": "tiled_svd", "tile": METHOD.tile, "rank": METHOD.rank}
    values = {
        "model": name,
        "weights": options.weights if name == "resnet32" else None,
        "interval": INTERVAL,
        "schedule": {"epochs": 4},
        "data": {"source": options.data, "image_size": options.image_size},
        "compression": {**tiles, "skip_first_conv": False, "min_in_channels": NETWORKS[name]},
        "logging": {"images": 0},
    }
    recipe = make_recipe(values)
    data = load_data(recipe.data)
    # The test split is looked at after each epoch: a corner of it is enough.
    run = build_run(recipe, replace(data, test=data.test.subset(torch.arange(500))), name=name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(run.plan.to_json(), encoding="utf-8")
    snapshot: dict[str, Tensor] = {}

    def keep(layer: str, step: int, weight: Tensor, approximation: Tensor) -> Tensor:
        snapshot[layer] = weight.detach().clone(memory_format=torch.contiguous_format)
        if len(snapshot) == len(run.plan.compressed):
            path = folder / f"step-{step:06}.safetensors"
            save_file(snapshot, path)
            snapshot.clear()
            print(path, flush=True)
            if step >= options.snapshots * INTERVAL:
                raise Done
        return approximation

    with contextlib.suppress(Done), tempfile.TemporaryDirectory() as scratch:
        train(replace(run, perturb=keep), Path(scratch) / name, latency_batch=None)


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
