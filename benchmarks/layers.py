"""One 3×3 convolution, dense and in every factored form, beside what peers make of it.

All forms hold a quarter of the weights (ranks round down, so a little less; or `--ratio`) and run
in one process, in turn: fp32, channels_last. Speed-ups are medians over rounds; the efficiency in
brackets is speed-up ÷ MAC ratio.

    python benchmarks/layers.py
    python benchmarks/layers.py --rates

The second times the convolutions that factored layers are made of, one by one, each on an input
that is there already. That bounds what any order or fusion of them can reach: their times' sum
against the dense layer's, divided by the MAC ratio, is the efficiency if nothing came between them.
A large product of matrices shows what the processor can do at all.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import deeptwist as dt
from deeptwist.decompositions import Decomposition
from deeptwist.layers.geometry import ConvGeometry, LayerCall, weight_to_kernel
from deeptwist.measure.layer_clock import random_dense, random_input
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.timing import median_ratio, time_interleaved

SHAPES = ((64, 32, 64), (128, 28, 16), (256, 14, 16), (512, 7, 16))  # channels, size, batch
RATED, RANKS = {"SVD": dt.SVD, "spatial SVD": dt.SpatialSVD}, (14, 16, 24, 32)
PAPERS = "the paper's: unfold, batched GEMM"


def forms(channels: int) -> dict[str, tuple[Decomposition, int]]:
    """Decomposition, multiple of the rank."""
    return {
        "spatial SVD": (dt.SpatialSVD(), 1),
        "spatial SVD, ranks of 16": (dt.SpatialSVD(), 16),
        "SVD": (dt.SVD(), 1),
        "SVD, ranks of 16": (dt.SVD(), 16),
        "tiled SVD, its own choice of tile": (dt.TiledSVD(), 1),
        "tiled SVD, its own choice, ranks of 16": (dt.TiledSVD(), 16),
        "tiled SVD, T rows × 64 channels": (dt.TiledSVD(tile=(channels, 576)), 1),
        "tiled SVD, 64×64": (dt.TiledSVD(tile=(64, 64)), 1),
        "Tucker": (dt.Tucker(), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--rounds", default=15, type=int)
    parser.add_argument("--ratio", default=4.0, type=float)
    channels = [shape[0] for shape in SHAPES]
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--larger", default=1, type=int, help="times the batch, to fill a GPU")
    parser.add_argument("--channels", nargs="+", choices=channels, default=channels, type=int)
    parser.add_argument("--rates", action="store_true", help="of the parts of layers, of 64")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    if options.rates:
        rates(*SHAPES[0], options.rounds)
        print(f"\n{describe_machine()}")
        return
    columns = {}
    for width, size, few in SHAPES:
        batch = few * options.larger
        if width in options.channels:
            heading = f"{width}→{width}, {size}×{size}, batch {batch}"
            columns[heading] = measure(width, size, batch, options.ratio, options.rounds)
    print(f"| form | {' | '.join(columns)} |")
    print("| --- |" + " --- |" * len(columns))
    for name in next(iter(columns.values())):
        print(f"| {name} | {' | '.join(column[name] for column in columns.values())} |")
    print(f"\n{describe_machine()}")


@torch.inference_mode()
def measure(channels: int, size: int, batch: int, ratio: float, rounds: int) -> dict[str, str]:
    import tltorch  # which rates need not

    dense = nn.Conv2d(channels, channels, 3, padding=1).eval()
    dense = dense.to(memory_format=torch.channels_last)
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    convolution = ConvGeometry.from_module(dense)
    layers: dict[str, Callable[[Tensor], Tensor]] = {"dense": dense}
    ratios = {"dense": 1.0}
    for name, (open_decomposition, multiple) in forms(channels).items():
        decomposition = open_decomposition.resolve(convolution, ratio).round_ranks(multiple)
        factors = decomposition.decompose(weight_to_kernel(dense.weight, convolution))
        layer = decomposition.make_layer(convolution, factors.kernels(), dense.bias)
        layers[name] = layer.eval().to(memory_format=torch.channels_last)
        ratios[name] = convolution.macs((size, size)) / decomposition.macs(
            convolution, (size, size)
        )
    layers[PAPERS], ratios[PAPERS] = papers_way(dense), ratios["tiled SVD, 64×64"]
    ranks = dt.Tucker().resolve(convolution, ratio).rank
    assert ranks is not None
    peer = tltorch.FactorizedConv.from_conv(
        dense, rank=(*ranks, 3, 3), factorization="tucker", implementation="factorized"
    )
    layers["TensorLy-Torch's Tucker"], ratios["TensorLy-Torch's Tucker"] = (
        peer.eval(),
        ratios["Tucker"],
    )
    layers["Tucker, three plain convolutions"] = three_convolutions(channels, *ranks)
    ratios["Tucker, three plain convolutions"] = ratios["Tucker"]
    samples = dict(
        zip(
            layers,
            time_interleaved([lambda f=f: f(x) for f in layers.values()], rounds=rounds),
            strict=True,
        )
    )
    cells = {}
    for name, own in samples.items():
        speedup = median_ratio(samples["dense"], own)
        cells[name] = f"{speedup:.2f} ({speedup / ratios[name]:.2f})"
    milliseconds = sorted(samples["dense"])[rounds // 2]
    cells["dense"] = f"{milliseconds:.2f} ms"
    return cells


class Part(NamedTuple):
    """One convolution, or product of matrices, that is timed alone."""

    words: str
    macs: int
    run: Callable[[], Tensor]


@torch.inference_mode()
def rates(channels: int, size: int, batch: int, rounds: int) -> None:
    """Print how fast each part of a layer runs, and what that bounds."""
    convolution = ConvGeometry.from_module(nn.Conv2d(channels, channels, 3, padding=1))
    square = torch.randn(2048, 2048)
    product = Part("2048×2048 by 2048×2048", 2048**3, lambda: square @ square)
    dense = part_of(convolution, size, batch)
    layers = {
        f"{name}, R = {rank}": [
            part_of(stage, size, batch) for (stage,) in form(rank=rank).convolutions(convolution)
        ]
        for name, form in RATED.items()
        for rank in RANKS
    }
    parts = [product, dense, *(part for layer in layers.values() for part in layer)]
    taken = time_interleaved([part.run for part in parts], rounds=rounds)
    samples = dict(zip(map(id, parts), taken, strict=True))

    def row(name: str, part: Part, bound: str = "") -> None:
        milliseconds = statistics.median(samples[id(part)])
        rate = part.macs / milliseconds / 1e6
        print(f"| {name} | {part.words} | {milliseconds:.2f} | {rate:.1f} | {bound} |")

    print("| what | part | ms | GMAC/s | efficiency at most |\n| --- | --- | --- | --- | --- |")
    row("product of matrices", product)
    row("dense", dense)
    for name, layer in layers.items():
        ratio = dense.macs / sum(part.macs for part in layer)
        sums = [sum(own) for own in zip(*(samples[id(part)] for part in layer), strict=True)]
        bound = median_ratio(samples[id(dense)], sums) / ratio
        first, *others = layer
        row(f"{name}: {ratio:.2f} × fewer MACs", first, f"{bound:.2f}")
        for part in others:
            row("", part)


def part_of(convolution: ConvGeometry, size: int, batch: int) -> Part:
    """A convolution with random weights, on a batch of square images."""
    like, call = torch.empty(0), LayerCall(batch, (size, size))
    layer, x = random_dense(convolution, like), random_input(convolution, call, like)
    taps = "×".join(map(str, convolution.kernel_size))
    words = f"{convolution.in_channels} → {convolution.out_channels}, {taps}"
    return Part(words, batch * convolution.macs((size, size)), lambda: layer(x))


def papers_way(dense: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """Run `F.unfold`, then two batched matrix products, one pair for each tile."""
    channels = dense.out_channels
    rows, cols, rank = channels // 64, channels * 9 // 64, 8
    left, right = torch.randn(rows, cols, 64, rank), torch.randn(rows, cols, rank, 64)

    def run(x: Tensor) -> Tensor:
        windows = functional.unfold(x, 3, padding=1).unflatten(1, (cols, 64))  # (b, c, 64, l)
        hidden = torch.einsum("acrj,bcjl->bacrl", right, windows)
        out = torch.einsum("acir,bacrl->bail", left, hidden)
        return out.reshape(len(x), channels, *x.shape[2:])

    return run


def three_convolutions(channels: int, rank_out: int, rank_in: int) -> nn.Module:
    """What a script that follows a Tucker tutorial builds."""
    layers = nn.Sequential(
        nn.Conv2d(channels, rank_in, 1, bias=False),
        nn.Conv2d(rank_in, rank_out, 3, padding=1, bias=False),
        nn.Conv2d(rank_out, channels, 1),
    )
    return layers.eval().to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
