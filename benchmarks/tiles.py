"""What a tile's shape costs: error against milliseconds, at a quarter of the weights.

Errors are of trained weights: the 64→64 convolutions of the public ResNet-32 and, where a folder
of snapshots is given (see distortion.py), 512→512 convolutions of a VGG19 that has trained for
200 steps. Times are of one layer, fp32, channels_last, in one process, in turn. The picture shows
both networks and is drawn only where both are given; the tables are always printed.

    python benchmarks/tiles.py --weights resnet32-cifar10.safetensors
        --vgg runs/trajectories/vgg19_bn
"""

import argparse
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from safetensors.torch import load_file
from torch import Tensor

import deeptwist as dt
from deeptwist.decompositions.linalg import relative_error
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.measure.layer_clock import random_dense, random_factored
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.timing import time_interleaved

RATIO = 4


@dataclass(frozen=True)
class Point:
    """One tile: its relative squared error, and its milliseconds."""

    label: str
    error: float
    milliseconds: float
    aligned: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", required=True, type=Path, help="the public ResNet-32")
    parser.add_argument("--vgg", type=Path, help="folder of VGG19's snapshots")
    parser.add_argument(
        "--out", default=Path("docs/tiles.svg"), type=Path, help="the picture, with --vgg"
    )
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--rounds", default=15, type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    panels = {
        "ResNet-32, 64→64, 8×8, batch 64": (kernels(options.weights, 64), 8, 64),
    }
    if options.vgg is not None:
        # The later ones have been distorted with 64×64 tiles, which would flatter those.
        first = min(options.vgg.glob("step-*.safetensors"))
        panels["VGG19, 512→512, 14×14, batch 4"] = (kernels(first, 512)[:2], 14, 4)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.8), squeeze=False, layout="constrained"
    )
    for place, (title, (weights, size, batch)) in zip(axes[0], panels.items(), strict=True):
        dense, points = measure(weights, size, batch, options.rounds)
        print(f"\n{title}: dense {dense:.2f} ms\n\n| tile | relative squared error | ms |")
        print("| --- | --- | --- |")
        for point in points:
            print(f"| {point.label} | {point.error:.3f} | {point.milliseconds:.2f} |")
        draw(place, title, dense, points)
    if options.vgg is not None:
        figure.savefig(options.out)
        print(f"\n{options.out}")
    print(f"\n{describe_machine()}")


def kernels(path: Path, channels: int) -> list[Tensor]:
    """All 3×3 kernels of so many input and output channels, (1, T, S, 3, 3) each."""
    shape = (channels, channels, 3, 3)
    return [tensor[None].float() for tensor in load_file(path).values() if tensor.shape == shape]


def tiles(channels: int) -> list[tuple[int, int]]:
    """Aligned tiles of several heights and widths, then raw ones."""
    heights = sorted({16, 32, 64, channels // 2, channels})
    widths = sorted({channels // part for part in (1, 2, 4, 8)})
    aligned = [(rows, 9 * width) for rows in heights for width in widths]
    return [*aligned, (16, 16), (32, 32), (64, 64), (64, channels)]


@torch.inference_mode()
def measure(weights: list[Tensor], size: int, batch: int, rounds: int) -> tuple[float, list[Point]]:
    channels = weights[0].shape[1]
    ones = (1, 1)
    convolution = ConvGeometry(channels, channels, (3, 3), ones, ones, ones, output_padding=(0, 0))
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    chosen = {tile: dt.TiledSVD(tile=tile).resolve(convolution, RATIO) for tile in tiles(channels)}
    layers = [random_dense(convolution, x)] + [
        random_factored(convolution, decomposition, x) for decomposition in chosen.values()
    ]
    samples = time_interleaved([partial(layer, x) for layer in layers], rounds=rounds)
    dense, *milliseconds = (statistics.median(own) for own in samples)
    points = []
    for (rows, cols), time in zip(chosen, milliseconds, strict=True):
        decomposition = chosen[rows, cols]
        errors = [
            relative_error(kernel, decomposition.decompose(kernel).reconstruct()) ** 2
            for kernel in weights
        ]
        aligned = cols % 9 == 0
        width = f"{cols // 9} channels" if aligned else str(cols)
        label = f"{rows} × {width}"
        points.append(Point(label, statistics.mean(errors), time, aligned))
    return dense, points


def draw(axes: Axes, title: str, dense: float, points: list[Point]) -> None:
    chosen = max((p for p in points if p.label.startswith("64 ×")), key=lambda p: width_of(p.label))
    for aligned, colour, name in ((True, "#2364aa", "aligned"), (False, "#c8553d", "raw")):
        own = [point for point in points if point.aligned == aligned]
        axes.scatter(
            [p.milliseconds for p in own], [p.error for p in own], c=colour, s=22, label=name
        )
    for point in points:
        if is_frontier(point, points) or point is chosen or not point.aligned:
            axes.annotate(
                point.label,
                (point.milliseconds, point.error),
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=7,
            )
    axes.axvline(dense, color="grey", linestyle="--", linewidth=1, label="dense")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("‖W − W′‖² / ‖W‖²")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def width_of(label: str) -> int:
    """Channels of an aligned tile's width."""
    return int(label.split("× ")[1].split()[0]) if "channels" in label else 0


def is_frontier(point: Point, points: list[Point]) -> bool:
    """Whether no other tile is both faster and closer."""
    return not any(
        other.milliseconds < point.milliseconds and other.error < point.error for other in points
    )


if __name__ == "__main__":
    main()
