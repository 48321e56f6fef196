"""Accuracy of ResNet-32 on CIFAR-10 decomposed without training: what calibration and budgets buy.

python benchmarks/training_free.py --data DIR --weights resnet32-cifar10.safetensors
"""

import argparse
from itertools import islice

import torch
from torch import nn

import deeptwist as dt
from deeptwist.data import batches, load_data
from deeptwist.models import build_model, load_weights
from deeptwist.training.evaluation import evaluate, preprocess

WAYS = {  # allocation and whether ranks and factors are calibrated
    "same ratio": ({}, "ratio", False),
    "same ratio, calibrated": ({}, "ratio", True),
    "budget of MACs": ({"allocation": "budget"}, "macs", False),
    "budget of MACs, calibrated": ({"allocation": "budget"}, "macs", True),
    "budget of weights, calibrated": ({"allocation": "budget"}, "ratio", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="image folder with train/ and test/")
    parser.add_argument("--weights", required=True, help="the trained ResNet-32")
    parser.add_argument("--ratios", default=[1.5, 2, 3, 4], type=float, nargs="+")
    parser.add_argument("--batches", default=16, type=int, help="of 128 images, to calibrate on")
    parser.add_argument("--images", type=int, help="of the test split; all of them by default")
    options = parser.parse_args()
    data = load_data(options.data)
    model = build_model("resnet32", num_classes=len(data.classes))
    load_weights(model, options.weights)
    model.eval()
    test = data.test if options.images is None else data.test.evenly_spaced(options.images)
    shuffle = torch.Generator().manual_seed(0)
    images = [
        preprocess(x, model, data)
        for x, _ in islice(batches(data.train, 128, generator=shuffle), options.batches)
    ]
    calibration = dt.calibrate(model, images)

    def accuracy(network: nn.Module) -> str:
        return f"{100 * evaluate(network, test, data).accuracy:.1f}"

    print(f"dense: {accuracy(model)} on {len(test.labels):,} images\n")
    print("| budget | way | weights ÷ | MACs ÷ | accuracy | batch norm anew |")
    print("| --- " * 6 + "|")
    for ratio in options.ratios:
        for name, (allocation, resource, calibrated) in WAYS.items():
            moments = calibration if calibrated else None
            plan = dt.plan(
                model,
                dt.SpatialSVD(),
                example_input=images[0][:2],
                skip_first_conv=True,
                linear=False,
                calibration=moments,
                **allocation,
                **{resource: ratio},
            )
            small = dt.decompose(model, plan, calibration=moments)
            again = dt.recalibrate_batch_norm(small, images)
            layers = [x for x in plan.layers if x.name != "conv1" and x.kind == "Conv2d"]
            weights = sum(x.weight_numel for x in layers)
            kept = sum(x.compressed_numel for x in layers)
            macs = [
                sum(plan.layer_macs(x, factored=factored) for x in layers)
                for factored in (False, True)
            ]
            print(
                f"| {ratio:g}× | {name} | {weights / kept:.2f} | {macs[0] / macs[1]:.2f} | "
                f"{accuracy(small)} | {accuracy(again)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
