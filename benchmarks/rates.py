"""How fast the convolutions that factored layers are made of run, one by one.

A layer's parts, each timed alone on an input that is there already, bound what any order or fusion
of these convolutions can reach: their times' sum against the dense layer's, divided by the MAC
ratio, is the efficiency if nothing came between them. fp32, channels_last, in turn, medians. A
large product of matrices shows what the processor can do at all.

    python benchmarks/rates.py
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.layers.geometry import ConvGeometry, LayerCall
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.random_layers import random_dense, random_input
from deeptwist.measure.timing import median_ratio, time_interleaved

FORMS = {"SVD": dt.SVD, "spatial SVD": dt.SpatialSVD}


@dataclass(frozen=True)
class Part:
    """One convolution, or product of matrices, that is timed alone."""

    words: str
    macs: int
    run: Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--rounds", default=15, type=int)
    parser.add_argument("--channels", default=64, type=int)
    parser.add_argument("--size", default=32, type=int)
    parser.add_argument("--batch", default=64, type=int)
    parser.add_argument("--ranks", nargs="+", default=[14, 16, 24, 32], type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    measure(options.channels, options.size, options.batch, options.ranks, options.rounds)
    print(f"\n{describe_machine()}")


@torch.inference_mode()
def measure(channels: int, size: int, batch: int, ranks: list[int], rounds: int) -> None:
    convolution = ConvGeometry.from_module(nn.Conv2d(channels, channels, 3, padding=1))
    square = torch.randn(2048, 2048)
    product = Part("2048×2048 by 2048×2048", 2048**3, lambda: square @ square)
    dense = part_of(convolution, size, batch)
    layers = {
        f"{name}, R = {rank}": [
            part_of(stage, size, batch) for (stage,) in form(rank=rank).convolutions(convolution)
        ]
        for name, form in FORMS.items()
        for rank in ranks
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


if __name__ == "__main__":
    main()
