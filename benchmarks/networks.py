"""ResNet-34 and VGG19, dense and decomposed at ratio 4.

On the layers that the paper compresses (S ≥ 128), and on all convolutions but the first (S ≥ 64).
PyTorch eager and compiled, and onnxruntime, fp32, beside TensorLy-Torch's Tucker of the
same size. The weights are random: they do not change the time.

    python benchmarks/networks.py
"""

import argparse
import copy
from typing import get_args

import tltorch
import torch
from torch import nn

import deeptwist as dt
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.runtimes import Run, Runtime, Setting, make_runner
from deeptwist.measure.timing import time_settings
from deeptwist.networks.build import build_model

NETWORKS = {"torchvision/resnet34": (3, 224, 224), "vgg19": (3, 32, 32)}
FORMS: dict[str, tuple[dt.Decomposition, int, int]] = {  # fewest inputs S, multiple of the rank
    "spatial SVD": (dt.SpatialSVD(), 128, 1),
    "tiled SVD": (dt.TiledSVD(), 128, 1),
    "SVD": (dt.SVD(), 128, 1),
    "Tucker": (dt.Tucker(), 128, 1),
    "spatial SVD, ranks of 16": (dt.SpatialSVD(), 128, 16),
    "tiled SVD, ranks of 16": (dt.TiledSVD(), 128, 16),
    "SVD, ranks of 16": (dt.SVD(), 128, 16),
    "spatial SVD, ranks of 16, S ≥ 64": (dt.SpatialSVD(), 64, 16),
    "tiled SVD, ranks of 16, S ≥ 64": (dt.TiledSVD(), 64, 16),
}
RUNTIMES = get_args(Runtime)
PEER = "TensorLy-Torch's Tucker"
RATIO = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--rounds", default=9, type=int)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--forms", nargs="+", choices=[*FORMS, PEER], default=[*FORMS, PEER])
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", default=16, type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    print("| network | form | MAC ratio | runtime | dense ms | ms | speed-up |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.only:
        size = NETWORKS[name]
        model = build_model(name).eval().to(memory_format=torch.channels_last)
        plans = {
            form: dt.plan(
                model,
                decomposition,
                ratio=RATIO,
                example_input=torch.zeros(2, *size),
                layers=dt.Layers(skip_first_conv=False, min_in_channels=channels),
                rank_multiple=multiple,
            )
            for form, (decomposition, channels, multiple) in FORMS.items()
            if form in options.forms or (form == "Tucker" and PEER in options.forms)
        }
        for form, plan in plans.items():
            if form not in options.forms:
                continue
            macs_ratio = plan.dense_macs / plan.macs
            report(
                options,
                f"{name} | {form} | {macs_ratio:.2f}",
                model,
                dt.decompose(model, plan),
                size,
            )
        if PEER in options.forms:
            peer = tensorly_torch(model, plans["Tucker"])
            macs_ratio = plans["Tucker"].dense_macs / plans["Tucker"].macs
            report(options, f"{name} | {PEER} | {macs_ratio:.2f}", model, peer, size)
    print(describe_machine())


def report(
    options: argparse.Namespace,
    words: str,
    model: nn.Module,
    small: nn.Module,
    size: tuple[int, ...],
) -> None:
    # The peer's layers pass neither torch.compile nor the ONNX exporter's trace of a free batch.
    runtimes = ["eager"] if PEER in words else options.runtimes
    settings = [Setting(options.batch, options.threads, runtime=runtime) for runtime in runtimes]
    x = torch.randn(options.batch, *size)

    def make_runners(setting: Setting) -> list[Run]:
        return [make_runner(network, x, setting) for network in (model, small)]

    for setting, times in time_settings(make_runners, settings, rounds=options.rounds):
        assert not isinstance(times, str), times
        print(
            f"| {words} | {setting.runtime} | {times.dense.median:.1f} | "
            f"{times.decomposed.median:.1f} | {times.speedup:.2f}× |",
            flush=True,
        )


def tensorly_torch(model: nn.Module, plan: dt.Plan) -> nn.Module:
    """The same layers at the same ranks, factored by TensorLy-Torch."""
    peer = copy.deepcopy(model)
    for layer in plan.compressed:
        dense = peer.get_submodule(layer.name)
        assert isinstance(dense, nn.Conv2d)
        rank = getattr(layer.decomposition, "rank", None)
        ranks = rank if isinstance(rank, tuple) else (rank, rank)  # one rank: a 1×1 kernel's SVD
        factored = tltorch.FactorizedConv.from_conv(
            dense,
            rank=(*ranks, *dense.kernel_size),
            factorization="tucker",
            implementation="factorized",
            decompose_weights=False,
        )
        owner, _, child = layer.name.rpartition(".")
        setattr(peer.get_submodule(owner), child, factored)
    return peer.eval()


if __name__ == "__main__":
    main()
