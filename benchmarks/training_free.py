"""Accuracy of networks decomposed without training: what calibration and budgets buy.

python benchmarks/training_free.py --data DIR --weights resnet32-cifar10.safetensors
python benchmarks/training_free.py --data imagenette224 --weights efficientnet-lite0.safetensors \
    --model timm/tf_efficientnet_lite0 --ratios 1.2 1.5 2 --methods list
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

import deeptwist as dt
from deeptwist.data import batches, load_data
from deeptwist.models import build_model, load_weights
from deeptwist.training.evaluation import evaluate, preprocess

METHODS: dict[str, dt.Decomposition | list[dt.Decomposition]] = {
    "spatial_svd": dt.SpatialSVD(),
    "tiles": dt.TiledSVD(tile=(64, 144)),  # all rows over 16 input channels
    "tucker": dt.Tucker(),
    "svd": dt.SVD(),
}
METHODS["list"] = [METHODS[name] for name in ("spatial_svd", "tiles", "tucker")]  # type: ignore[misc]
WAYS: dict[str, tuple[bool, Sequence[str]]] = {  # calibrated, and the budgets; none: one ratio
    "same ratio": (False, ()),
    "same ratio, calibrated": (True, ()),
    "budget of MACs": (False, ["macs"]),
    "budget of MACs, calibrated": (True, ["macs"]),
    "budget of weights": (False, ["ratio"]),
    "budget of weights, calibrated": (True, ["ratio"]),
    "both budgets, calibrated": (True, ["ratio", "macs"]),
}
IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]  # its folders' classes of ImageNet

Accuracy = Callable[[nn.Module], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="image folder with train/ and test/ or val/")
    parser.add_argument("--weights", required=True, help="the trained network's")
    parser.add_argument("--model", default="resnet32", help="one of timm/ is measured on ImageNet")
    parser.add_argument("--methods", default=["spatial_svd"], choices=METHODS, nargs="+")
    parser.add_argument("--ways", default=[*WAYS], nargs="+", help="the rows, by their first words")
    parser.add_argument("--ratios", default=[1.5, 2, 3, 4], type=float, nargs="+")
    parser.add_argument("--images", type=int, help="of the test split; all of them by default")
    parser.add_argument("--save", help="file to keep the calibration in")
    parser.add_argument("--load", help="such a file, instead of calibrating")
    options = parser.parse_args()
    prepare = _imagenet if options.model.startswith("timm/") else _classes
    model, images, accuracy = prepare(options)
    calibration = (
        dt.calibrate(model, images) if options.load is None else dt.Calibration.load(options.load)
    )
    if options.save is not None:
        calibration.save(options.save)
    first = next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    print(f"dense: {accuracy(model):.1f} %\n", flush=True)
    print("| budget | decomposition | way | weights ÷ | MACs ÷ | accuracy | batch norm anew |")
    print("| --- " * 7 + "|")
    for ratio in options.ratios:
        for method in options.methods:
            for way in options.ways:
                if method != "list" or WAYS[way][1]:  # one ratio takes one decomposition
                    row = _row(model, images, calibration, accuracy, method, way, ratio, first)
                    print(f"| {ratio:g}× | {method} | {way} | {' | '.join(row)} |", flush=True)


def _row(
    model: nn.Module,
    images: list[Tensor],
    calibration: dt.Calibration,
    accuracy: Accuracy,
    method: str,
    way: str,
    ratio: float,
    first: str,
) -> list[str]:
    """Return the weights' and the MACs' ratios, of all convolutions but the first; accuracies."""
    calibrated, budgets = WAYS[way]
    moments = calibration if calibrated else None
    budget: dict[str, Any] = dict.fromkeys(budgets or ["ratio"], ratio)
    plan = dt.plan(
        model,
        METHODS[method],
        example_input=images[0][:2],
        allocation="budget" if budgets else "uniform",
        skip_first_conv=True,
        linear=False,
        calibration=moments,
        **budget,
    )
    small = dt.decompose(model, plan, calibration=moments)
    again = dt.recalibrate_batch_norm(small, images)
    layers = [x for x in plan.layers if x.name != first and x.kind != "Linear"]
    weights = sum(x.weight_numel for x in layers) / sum(x.compressed_numel for x in layers)
    dense, factored = (
        sum(plan.layer_macs(x, factored=factored) for x in layers) for factored in (False, True)
    )
    accuracies = [f"{accuracy(network):.1f}" for network in (small, again)]
    return [f"{weights:.2f}", f"{dense / factored:.2f}", *accuracies]


def _classes(options: argparse.Namespace) -> tuple[nn.Module, list[Tensor], Accuracy]:
    """Return a network trained on the folder's classes, images to calibrate on, its accuracy."""
    data = load_data(options.data)
    model = build_model(options.model, num_classes=len(data.classes))
    load_weights(model, options.weights)
    test = data.test if options.images is None else data.test.evenly_spaced(options.images)
    shuffle = torch.Generator().manual_seed(0)
    shuffled = islice(batches(data.train, 128, generator=shuffle), 16)
    images = [preprocess(x, model, data) for x, _ in shuffled]
    return model.eval(), images, lambda network: 100 * evaluate(network, test, data).accuracy


def _imagenet(options: argparse.Namespace) -> tuple[nn.Module, list[Tensor], Accuracy]:
    """Return a network of ImageNet's 1,000 classes, measured on imagenette's ten among them all."""
    model = build_model(options.model, num_classes=1000)
    load_weights(model, options.weights)
    model = model.eval().to(memory_format=torch.channels_last)
    per_class = (options.images or 200) // len(IMAGENETTE)
    images, labels = _images(Path(options.data) / "val", per_class)
    calibration, _ = _images(Path(options.data) / "train", 26)

    @torch.no_grad()
    def accuracy(network: nn.Module) -> float:
        guesses = torch.cat([network(x).argmax(1) for x in images.split(50)])
        return 100 * float((guesses == labels).float().mean())

    return model, [*calibration.split(32)], accuracy


def _images(folder: Path, per_class: int) -> tuple[Tensor, Tensor]:
    """Return the first images of every class, shorter side 224, centre crop, mean and std 0.5."""
    images, labels = [], []
    for label, place in zip(IMAGENETTE, sorted(folder.iterdir()), strict=True):
        for path in sorted(place.iterdir())[:per_class]:
            image = transforms.resize(Image.open(path).convert("RGB"), 224, interpolation=3)
            image = transforms.center_crop(image, [224, 224])
            images.append(transforms.pil_to_tensor(image) / 127.5 - 1)
            labels.append(label)
    stacked = torch.stack(images).to(memory_format=torch.channels_last)
    # Shuffled, so that every batch that calibrates holds all classes.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return stacked[order], torch.tensor(labels)[order]


if __name__ == "__main__":
    main()
