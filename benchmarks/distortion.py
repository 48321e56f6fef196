"""What a distortion costs, against every other way to factor the same weights, in one run.

Weights are real ones, S_D = 200 optimizer steps apart, where `benchmarks/trajectories.py` has left
them; else the network's own (given or random) after a distortion, moved by 2 % of their norm.

The ways of others, and "the approximation alone", have the tiles cut and stacked for them. A
distortion gathers them from the network, checks them, writes the approximations back in the
weights' memory format and measures the shift.

    python benchmarks/distortion.py --weights-dir ../shared/weights
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorly
import torch
from deeptwist.decompositions.subspace import follow
from safetensors.torch import load_file
from sklearn.utils.extmath import randomized_svd
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.benchmark.environment import describe_machine
from deeptwist.benchmark.memory import peak_memory
from deeptwist.layers.geometry import weight_to_kernel
from deeptwist.models import build_model, load_weights
from deeptwist.plan.planned_layer import CompressedLayer

TILE, RANK, INTERVAL, MOVE = 64, 8, 200, 0.02
METHOD = dt.TiledSVD(tile=(TILE, TILE), rank=RANK)
# Network: model, image size, fewest input channels, whether linear layers count (ConvNeXt's 1×1).
NETWORKS = {
    "ResNet-32": ("resnet32", 32, 64, False),
    "VGG19": ("vgg19_bn", 32, 128, False),
    "ResNet-34": ("torchvision/resnet34", 64, 64, False),
    "ConvNeXt-Tiny": ("torchvision/convnext_tiny", 64, 64, True),
}
OURS_COLD, OURS_WARM = "deeptwist, first distortion", "deeptwist, distortions after it"
OURS_ALONE = "deeptwist, after it: the approximation alone"


@dataclass
class Way:
    """One way to approximate: `run` is timed, `prepare` is not, `result` gives ‖W − W′‖²."""

    run: Callable[[], object]
    error: Callable[[], float]
    prepare: Callable[[], object] = lambda: None
    rounds: int = 5
    scale: float = 1  # where only a sample is run: whole ÷ sample
    traced: bool = True  # whether its memory is torch's


def measure(ways: dict[str, Way]) -> dict[str, tuple[float, float, int | None]]:
    """Milliseconds (median, taken in turn), squared error and peak bytes of every way."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    errors: dict[str, float] = {}
    for number in range(1 + max(way.rounds for way in ways.values())):
        for name, way in ways.items():
            if number > way.rounds:
                continue
            way.prepare()
            synchronize()
            started = time.perf_counter()
            way.run()
            synchronize()
            if number:  # the first is for warming up
                samples[name].append((time.perf_counter() - started) * 1000 * way.scale)
            else:
                errors[name] = way.error()
    found = {}
    for name, way in ways.items():
        way.prepare()
        peak = peak_memory(way.run) if way.traced else None
        found[name] = statistics.median(samples[name]), errors[name], peak
    return found


def synchronize() -> None:
    """Waits for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Weights:
    """A network's compressed layers at two distortions, one after the other."""

    def __init__(self, name: str, options: argparse.Namespace):
        model_name, size, channels, linear = NETWORKS[name]
        torch.manual_seed(0)
        self.model = build_model(model_name)
        file = options.weights_dir / "resnet32-cifar10.safetensors"
        if model_name == "resnet32" and file.exists():
            load_weights(self.model, file)
        self.plan = dt.plan(
            self.model,
            METHOD,
            example_input=torch.zeros(2, 3, size, size),
            min_in_channels=channels,
            linear=linear,
        )
        self.model.to(options.device)
        if "/" not in model_name:  # as the training loop has it
            self.model.to(memory_format=torch.channels_last)
        snapshots = sorted((options.trajectories / model_name).glob("step-*.safetensors"))
        if len(snapshots) > 1:
            self.origin = "trained, {} to {}".format(*(path.stem for path in snapshots[-2:]))
            before, self.now = (load_file(path, device=options.device) for path in snapshots[-2:])
            self.put(before)
        else:
            self.origin = (
                f"{'given' if model_name == 'resnet32' else 'random'}, moved by {MOVE:.0%}"
            )
        twist = dt.DeepTwist(self.model, self.plan, INTERVAL)
        twist.distort()
        self.warm = twist.state_dict()
        if len(snapshots) < 2:
            self.now = {}
            for layer, weight in self.weights().items():
                noise = torch.randn_like(weight)
                self.now[layer] = weight + MOVE * weight.norm() / noise.norm() * noise

    def weights(self) -> dict[str, Tensor]:
        """The compressed weights as they are in the model."""
        return {
            layer.name: self.model.get_submodule(layer.name).weight.detach()
            for layer in self.plan.compressed
        }

    def put(self, weights: dict[str, Tensor]) -> None:
        """Writes weights into the model."""
        for layer, weight in self.weights().items():
            weight.copy_(weights[layer])

    def keys(self, layer: CompressedLayer) -> list[tuple[int, int, int]]:
        """The shape and rank of each of a layer's batches of matrices."""
        kernel = weight_to_kernel(self.now[layer.name], layer.convolution)
        return [(*parts.shape[1:], rank) for parts, rank in layer.decomposition.cut(kernel)]

    def tiles(self) -> dict[tuple[int, int, int], Tensor]:
        """All matrices of the next distortion, by shape and rank."""
        alike: dict[tuple[int, int, int], list[Tensor]] = {}
        for layer in self.plan.compressed:
            kernel = weight_to_kernel(self.now[layer.name], layer.convolution)
            for parts, rank in layer.decomposition.cut(kernel):
                alike.setdefault((*parts.shape[1:], rank), []).append(parts)
        return {key: torch.cat(parts) for key, parts in alike.items()}


def svd_ways(weights: Weights) -> tuple[dict[str, Way], float, int]:
    """Every way to the truncated SVD of a network's tiles; the optimum; how many tiles."""
    batches = weights.tiles()
    optimum = sum(
        float(torch.linalg.svdvals(batch.double())[:, key[2] :].square().sum())
        for key, batch in batches.items()
    )
    count = sum(map(len, batches.values()))
    results: list[tuple[Tensor, Tensor]] = []

    def each(factor: Callable[[Tensor, int], Tensor]) -> Callable[[], None]:
        def run() -> None:
            results.clear()
            results.extend((batch, factor(batch, key[2])) for key, batch in batches.items())

        return run

    def lost() -> float:
        return sum(float((a.double() - b.double()).square().sum()) for a, b in results)

    def exact(tiles: Tensor, rank: int) -> Tensor:
        u, s, vh = torch.linalg.svd(tiles, full_matrices=False)
        return (u[:, :, :rank] * s[:, None, :rank]) @ vh[:, :rank]

    def gram(tiles: Tensor, rank: int) -> Tensor:
        basis = torch.linalg.eigh(tiles @ tiles.mT).eigenvectors[:, :, -rank:]
        return basis @ (basis.mT @ tiles)

    def lowrank(tiles: Tensor, rank: int) -> Tensor:
        u, s, v = torch.svd_lowrank(tiles, q=rank, niter=2)
        return (u * s[:, None]) @ v.mT

    key, largest = max(batches.items(), key=lambda item: len(item[1]))
    sample = largest[:: max(1, len(largest) // 64)][:64].cpu().numpy()

    def scikit() -> None:
        results.clear()
        for tile in sample:
            u, s, vh = randomized_svd(tile, key[2], random_state=0)
            results.append((torch.from_numpy(tile), torch.from_numpy((u * s) @ vh)))

    def scikit_error() -> float:
        best = np.square(np.linalg.svd(sample.astype(float))[1][:, key[2] :]).sum()
        return lost() / float(best) * optimum

    twist = dt.DeepTwist(weights.model, weights.plan, INTERVAL)
    bases: dict[tuple[int, int, int], list[Tensor]] = {}
    for layer in weights.plan.compressed:
        for (basis,), key in zip(
            weights.warm["starts"][layer.name], weights.keys(layer), strict=True
        ):
            bases.setdefault(key, []).append(basis)
    starts = {key: torch.cat(parts) for key, parts in bases.items()}

    def alone(tiles: Tensor, rank: int) -> Tensor:
        left, right = follow(tiles, starts[(*tiles.shape[1:], rank)], 1e-3).factors
        return left @ right

    def start(state: dict) -> Callable[[], None]:
        def prepare() -> None:
            twist.load_state_dict(state)
            weights.put(weights.now)

        return prepare

    def shift() -> float:
        found, tally = weights.weights(), 0.0
        for layer, weight in weights.now.items():
            tally += float((weight.double() - found[layer].double()).square().sum())
        return tally

    cold = {"steps": 0, "records": []}
    slow = 3 if count > 500 else 5
    return (
        {
            "torch.linalg.svd, batched": Way(each(exact), lost, rounds=slow),
            "torch.linalg.eigh of W·Wᵀ, batched": Way(each(gram), lost, rounds=slow),
            "torch.svd_lowrank, batched": Way(each(lowrank), lost, rounds=slow),
            f"scikit-learn randomized_svd (of {len(sample)} tiles)": Way(
                scikit, scikit_error, rounds=1, scale=count / len(sample), traced=False
            ),
            OURS_ALONE: Way(each(alone), lost, rounds=9),
            OURS_COLD: Way(twist.distort, shift, start(cold), rounds=slow),
            OURS_WARM: Way(twist.distort, shift, start(weights.warm), rounds=9),
        },
        optimum,
        count,
    )


def tensor_ways(kernel: Tensor, before: Tensor, method: dt.Decomposition) -> dict[str, Way]:
    """TensorLy's way to Tucker-2 or CP of one kernel (1, o, i, h, w), and ours."""
    result: list[Tensor] = []

    def keep(approximation: Tensor) -> None:
        result[:] = [approximation]

    def theirs() -> None:
        weight = kernel[0]
        if isinstance(method, dt.Tucker):
            (core, bases), _ = partial_tucker(weight, rank=list(method.rank), modes=[0, 1])
            keep(tensorly.tenalg.multi_mode_dot(core, bases, modes=[0, 1]))
        else:
            keep(tensorly.cp_to_tensor(parafac(weight, rank=method.rank, random_state=0)))

    start = method.decompose(before).starts()[0]

    def warm() -> None:
        found = method.follow(kernel, start, 1e-3)
        keep(method.factors([found.factors], kernel.shape).reconstruct()[0])

    def lost() -> float:
        return float((kernel[0].double() - result[0].double()).square().sum())

    name = "partial_tucker" if isinstance(method, dt.Tucker) else "parafac"
    return {
        f"TensorLy {name}": Way(theirs, lost, rounds=1),
        OURS_COLD: Way(lambda: keep(method.decompose(kernel).reconstruct()[0]), lost, rounds=1),
        OURS_WARM: Way(warm, lost, rounds=3),
    }


def table(
    title: str, found: dict[str, tuple[float, float, int | None]], optimum: float, against: str
) -> None:
    """Prints one comparison as markdown."""
    print(f"\n### {title}\n")
    print(f"| way | ms | × {against} | squared error above the optimum | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: |")
    reference = found[against][0]
    for name, (ms, error, peak) in found.items():
        memory = "" if peak is None else f"{peak / 2**20:,.1f} MiB"
        above = 100 * (error / optimum - 1)
        print(
            f"| {name} | {ms:,.2f} | {reference / ms:,.1f} | {above:.4f} % | {memory} |", flush=True
        )


def share(options: argparse.Namespace) -> None:
    """Prints what part of training time distortions take, steps and distortions timed in turn."""
    print(f"\n### Share of distortions in training time at S_D = {INTERVAL}, batch 128\n")
    print("| network | step, ms | distortion, ms | share | weights |")
    print("| --- | ---: | ---: | ---: | --- |")
    for name in ("ResNet-32", "VGG19"):
        if name not in options.only:
            continue
        weights = Weights(name, options)
        twist = dt.DeepTwist(weights.model, weights.plan, INTERVAL)
        model = build_model(NETWORKS[name][0])
        model = model.to(options.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9)
        x = torch.randn(128, 3, 32, 32, device=options.device)
        x = x.to(memory_format=torch.channels_last)
        y = torch.randint(10, (128,), device=options.device)

        def step(model=model, optimizer=optimizer, x=x, y=y) -> None:
            with torch.enable_grad():
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

        def before(twist=twist, weights=weights) -> None:
            twist.load_state_dict(weights.warm)
            weights.put(weights.now)

        ways = {
            "step": Way(step, lambda: 0.0, traced=False),
            "distortion": Way(twist.distort, lambda: 0.0, before, traced=False),
        }
        found = {way: ms for way, (ms, _, _) in measure(ways).items()}
        part = found["distortion"] / (INTERVAL * found["step"])
        print(
            f"| {name} | {found['step']:,.0f} | {found['distortion']:,.2f} | {part:.3%} | "
            f"{weights.origin} |",
            flush=True,
        )


def linearity(options: argparse.Namespace) -> None:
    """Prints the time of a distortion and of its approximations alone, for 72 to 4,608 tiles."""
    print(f"\n### Time by the number of {TILE}×{TILE} tiles, R = {RANK}, moved by {MOVE:.0%}\n")
    print("| tiles | distortion, ms | µs a tile | the approximation alone, ms | µs a tile |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for count in (1, 2, 4, 8, 16, 32, 64):
        # 144 tiles to a pair of layers; one layer for the first.
        sides = [128, 256] if count == 1 else [128, *[256, 128] * (count // 2)]
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sides)]
        model = nn.Sequential(*convolutions)
        model.to(options.device, memory_format=torch.channels_last)
        x = torch.zeros(1, 128, 4, 4, device=options.device)
        twist = dt.DeepTwist(model, dt.plan(model, METHOD, example_input=x), INTERVAL)
        twist.distort()
        warm, moved = twist.state_dict(), []
        for layer in convolutions:
            noise = torch.randn_like(layer.weight)
            moved.append(layer.weight + MOVE * layer.weight.norm() / noise.norm() * noise)

        def before(twist=twist, warm=warm, layers=convolutions, moved=moved) -> None:
            twist.load_state_dict(warm)
            for layer, weight in zip(layers, moved, strict=True):
                layer.weight.copy_(weight)

        tiles = torch.cat([METHOD.cut(weight.unsqueeze(0))[0][0] for weight in moved])
        starts = torch.cat([bases for layer in warm["starts"].values() for ((bases,),) in [layer]])
        ways = {
            "whole": Way(twist.distort, lambda: 0.0, before, rounds=9, traced=False),
            "alone": Way(
                lambda tiles=tiles, starts=starts: follow(tiles, starts, 1e-3),
                lambda: 0.0,
                rounds=9,
                traced=False,
            ),
        }
        whole, alone = (ms for ms, _, _ in measure(ways).values())
        each = 1000 / len(tiles)
        print(
            f"| {len(tiles):,} | {whole:.2f} | {whole * each:.1f} | {alone:.2f} | "
            f"{alone * each:.1f} |",
            flush=True,
        )


def main() -> None:
    """Runs and prints everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights-dir", required=True, type=Path, help="with the ResNet-32")
    parser.add_argument("--trajectories", default="runs/trajectories", type=Path)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--linearity", action="store_true", help="only time by number of tiles")
    parser.add_argument("--share", action="store_true", help="only the share in training time")
    options = parser.parse_args()
    tensorly.set_backend("pytorch")
    torch.set_grad_enabled(False)

    print(f"{describe_machine()}")
    if options.linearity or options.share:
        for wanted, part in ((options.linearity, linearity), (options.share, share)):
            if wanted:
                part(options)
        return
    for name in options.only:
        weights = Weights(name, options)
        ways, optimum, count = svd_ways(weights)
        found = measure(ways)
        title = f"{name}: {count:,} tiles, R = {RANK}; weights {weights.origin}"
        table(title, found, optimum, "torch.linalg.svd, batched")
        # The two tensor methods on the largest kernel of the network.
        spatial = [layer for layer in weights.plan.compressed if layer.convolution.kernel_numel > 1]
        if not spatial:
            continue
        layer = max(spatial, key=lambda layer: layer.weight_numel)
        now = weight_to_kernel(weights.now[layer.name], layer.convolution).contiguous()
        before = now + MOVE * now.norm() / now.numel() ** 0.5 * torch.randn_like(now)
        out, into = now.shape[1:3]
        for method in (dt.Tucker(rank=(out // 2, into // 2)), dt.CP(rank=16)):
            found = measure(tensor_ways(now, before, method))
            best = min(error for _, error, _ in found.values())
            title = f"{name}, {layer.name} ({layer.convolution}), {method}; optimum: the best here"
            table(title, found, best, next(iter(found)))
    linearity(options)
    share(options)


if __name__ == "__main__":
    main()
