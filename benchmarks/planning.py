"""Seconds that plans and `finish` take, and Tucker's exact decomposition beside TensorLy's.

python benchmarks/planning.py
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from tensorly import set_backend
from tensorly.decomposition import partial_tucker
from tensorly.tenalg import multi_mode_dot
from torch import nn

import deeptwist as dt
from deeptwist.decompositions.linalg import relative_error
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.measure.machine import describe_machine
from deeptwist.networks.build import build_model

METHODS = {x.method: x for x in (dt.SVD(), dt.SpatialSVD(), dt.TiledSVD(), dt.Tucker(), dt.CP())}
EVERY_LAYER = dt.Layers(skip_first_conv=False, linear=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="torchvision/resnet50")
    parser.add_argument("--ratio", default=4.0, type=float)
    parser.add_argument("--methods", default=[*METHODS], choices=METHODS, nargs="+")
    parser.add_argument("--cpu", action="store_true", help="one thread's CPU time: beside others")
    options = parser.parse_args()
    if options.cpu:
        torch.set_num_threads(1)
    clock = time.process_time if options.cpu else time.perf_counter
    torch.manual_seed(0)
    model, x = build_model(options.model).eval(), torch.randn(2, 3, 224, 224)
    dt.plan(nn.Conv2d(3, 8, 3), dt.SVD(), ratio=2, example_input=x)  # imports
    print(f"{options.model}, {options.ratio:g}×\n")
    print("| decomposition | same ratio, s | budget of weights, s | decompose, s | finish, s |")
    print("| --- " * 5 + "|")
    for name in options.methods:
        method = METHODS[name]
        cells = []
        for size in ({"ratio": options.ratio}, {"weights": options.ratio}):
            seconds, plan = _timed(
                lambda size=size, method=method: dt.plan(
                    model, method, example_input=x, layers=EVERY_LAYER, **size
                ),
                clock,
            )
            cells.append(f"{seconds:.1f}")
        if method != dt.CP():
            cells.append(f"{_timed(lambda plan=plan: dt.decompose(model, plan), clock)[0]:.1f}")
            twist = dt.DeepTwist(copy.deepcopy(model), plan, interval=200)
            cells.append(f"{_timed(twist.finish, clock)[0]:.1f}")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    print("\n| Tucker, 512→512, 3×3 | ranks | s | error | TensorLy's s | error |")
    print("| --- " * 6 + "|")
    for name, kernel in (("random", _random()), ("as if trained", _decaying())):
        print(f"| {name} | {_beside_tensorly(kernel, options.ratio, clock)} |", flush=True)
    print(f"\n{describe_machine()}")


def _timed(function: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    started = clock()
    result = function()
    return clock() - started, result


def _random() -> torch.Tensor:
    return torch.randn(512, 512, 3, 3)


def _decaying() -> torch.Tensor:
    """Return a kernel whose spectra fall by 16 along both channel axes."""
    sides = [torch.linalg.qr(torch.randn(512, 512)).Q * torch.logspace(0, -1.2, 512)] * 2
    return torch.einsum("oa,abhw,ib->oihw", sides[0], _random(), sides[1])


def _beside_tensorly(kernel: torch.Tensor, ratio: float, clock: Callable[[], float]) -> str:
    set_backend("pytorch")
    convolution = ConvGeometry.from_module(nn.Conv2d(512, 512, 3, padding=1))
    method = dt.Tucker().resolve(convolution, ratio)
    seconds, factors = _timed(lambda: method.decompose(kernel[None]), clock)
    tensorly, ((core, bases), _) = _timed(
        lambda: partial_tucker(kernel, rank=list(method.rank), modes=[0, 1], init="svd"), clock
    )
    errors = [
        relative_error(kernel, approximation)
        for approximation in (
            factors.reconstruct()[0],
            multi_mode_dot(core, bases, modes=[0, 1]),
        )
    ]
    cells = f"{seconds:.2f}", f"{errors[0]:.5f}", f"{tensorly:.2f}", f"{errors[1]:.5f}"
    return f"{'×'.join(map(str, method.rank))} | {' | '.join(cells)}"


if __name__ == "__main__":
    main()
