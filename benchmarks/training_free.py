"""Accuracy of networks decomposed without labels: what calibration, budgets, distillation buy.

Every row is appended to a file, and those that are there are not computed again.

python benchmarks/training_free.py --data cifar10-jpeg --weights resnet32-cifar10.safetensors \
    --out results/training-free/resnet32.jsonl
python benchmarks/training_free.py --model timm/tf_efficientnet_lite0 --data imagenette224 \
    --weights efficientnet-lite0-imagenet.safetensors --methods svd --ratios 1.2 1.5 2 \
    --out results/training-free/efficientnet-lite0.jsonl
python benchmarks/training_free.py --data cifar10-jpeg --weights resnet32-cifar10.safetensors \
    --ways 'same ratio, calibrated' --ratios 2 3 4 --distill-steps 1000 --seeds 0 1 2 \
    --out results/training-free/resnet32.jsonl
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

import deeptwist as dt
from deeptwist.app.data import ImageData, batches, load_data
from deeptwist.app.training.evaluation import AugmentedInputs, preprocess
from deeptwist.distill import HELD_OUT
from deeptwist.networks.build import build_model
from deeptwist.networks.weights import load_weights

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
    "budget of weights": (False, ["weights"]),
    "budget of weights, calibrated": (True, ["weights"]),
    "both budgets, calibrated": (True, ["weights", "macs"]),
}
IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]  # its folders' classes of ImageNet
_BATCH = 50
_HALF = 0.5, 0.5, 0.5
KEY = "ratio", "method", "way", "images", "steps", "seed"  # steps of distillation; 0 for none
ACCURACIES = "accuracy", "batch_norm_anew", "distilled"
SHOWN = "ratio", "method", "way", "weights", "macs", *ACCURACIES, "steps", "seed", "seconds"

Images = tuple[Tensor, Tensor]  # normalised, and their labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="image folder with train/ and test/ or val/")
    parser.add_argument("--weights", required=True, help="the trained network's")
    parser.add_argument("--model", default="resnet32", help="one of timm/ is measured on ImageNet")
    parser.add_argument("--methods", default=["spatial_svd"], choices=METHODS, nargs="+")
    parser.add_argument("--ways", default=[*WAYS], choices=WAYS, nargs="+", help="the rows")
    parser.add_argument("--ratios", default=[1.5, 2, 3, 4], type=float, nargs="+")
    parser.add_argument("--image-size", type=int, help="of the folder's images, by default theirs")
    parser.add_argument("--images", type=int, help="of the test split; all of them by default")
    parser.add_argument("--calibration", type=Path, help="file to keep it in; read if it is there")
    parser.add_argument("--distill-steps", type=int, default=0, help="steps; none by default")
    parser.add_argument("--distill-images", type=int, default=2048, help="training images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the distillation")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, a row each")
    options = parser.parse_args()
    prepare = _imagenet if options.model.startswith("timm/") else _classes
    model, data, calibration_images, test = prepare(options)
    moments = _moments(model, calibration_images, options.calibration)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows, images, steps = _rows(options.out), len(test[1]), options.distill_steps
    wanted: list[tuple[Any, ...]] = [(1.0, "dense", "", images, 0, 0)]
    for case in product(options.ratios, options.methods, options.ways, options.seeds):
        *what, seed = case
        if what[1] != "list" or WAYS[what[2]][1]:  # one ratio takes one decomposition
            wanted.append((*what, images, steps, seed))
    for key in wanted:
        if key not in rows:
            small: list[nn.Module] = []
            costs = 1.0, 1.0
            if key[1] != "dense":
                costs, small = _decomposed(model, calibration_images, moments, *key[:3])
            row = dict(zip((*KEY, "weights", "macs"), (*key, *costs), strict=True))
            if row["steps"]:
                count, seed = options.distill_images, row["seed"]
                inputs = AugmentedInputs(data, model, count, seed=seed, held_out=HELD_OUT)
                begun = time.process_time()
                small.append(dt.distill(small[0], model, inputs, steps=steps))
                row["seconds"] = time.process_time() - begun
            accuracies = [_accuracy(network, test) for network in small or [model] * 2]
            rows[key] = row | dict(zip(ACCURACIES, accuracies, strict=False))
            with options.out.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
    print("| " + " | ".join(SHOWN) + " |\n" + "| --- " * len(SHOWN) + "|")
    for row in rows.values():
        print("| " + " | ".join(_format(row.get(column, "")) for column in SHOWN) + " |")


def _rows(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the rows that are there, by what they are of."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [{"steps": 0, "seed": 0} | json.loads(line) for line in lines]
    return {tuple(row[name] for name in KEY): row for row in rows}


def _format(value: str | float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _moments(model: nn.Module, images: list[Tensor], path: Path | None) -> dt.Calibration:
    if path is not None and path.exists():
        return dt.Calibration.load(path)
    moments = dt.calibrate(model, images)
    if path is not None:
        moments.save(path)
    return moments


def _decomposed(
    model: nn.Module,
    images: list[Tensor],
    calibration: dt.Calibration,
    ratio: float,
    method: str,
    way: str,
) -> tuple[tuple[float, float], list[nn.Module]]:
    """Return how many times fewer weights and MACs, of all convolutions but the first; networks."""
    calibrated, budgets = WAYS[way]
    moments = calibration if calibrated else None
    budget: dict[str, Any] = dict.fromkeys(budgets or ["ratio"], ratio)
    plan = dt.plan(
        model,
        METHODS[method],
        example_input=images[0][:2],
        calibration=moments,
        **budget,
    )
    small = dt.decompose(model, plan, calibration=moments)
    first = next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    layers = [x for x in plan.layers if x.name != first and x.kind != "Linear"]
    weights = sum(x.weight_numel for x in layers) / sum(x.compressed_numel for x in layers)
    dense, factored = (
        sum(plan.layer_macs(x, factored=factored) for x in layers) for factored in (False, True)
    )
    return (weights, dense / factored), [small, dt.recalibrate_batch_norm(small, images)]


@torch.inference_mode()
def _accuracy(network: nn.Module, test: Images) -> float:
    """Return the percentage of images whose class comes first."""
    network = dt.fuse(network, test[0][:2]).to(memory_format=torch.channels_last)
    guesses = torch.cat([network(x).argmax(1) for x in test[0].split(_BATCH)])
    return 100 * float((guesses == test[1]).float().mean())


def _classes(options: argparse.Namespace) -> tuple[nn.Module, ImageData, list[Tensor], Images]:
    """Return a network trained on the folder's classes, its images, those to calibrate and test."""
    data = load_data(options.data, preset="cifar", image_size=options.image_size)
    model = build_model(options.model, num_classes=len(data.classes))
    load_weights(model, options.weights)
    test = data.test if options.images is None else data.test.subsample(options.images)
    shuffle = torch.Generator().manual_seed(0)
    shuffled = islice(batches(data.train, 128, generator=shuffle), 16)
    images = [preprocess(x, model, data) for x, _ in shuffled]
    tested = [preprocess(x, model, data) for x, _ in batches(test, 500)]
    return model.eval(), data, images, (torch.cat(tested), test.labels)


def _imagenet(options: argparse.Namespace) -> tuple[nn.Module, ImageData, list[Tensor], Images]:
    """Return a network of ImageNet's 1,000 classes, measured on imagenette's ten among them all."""
    model = build_model(options.model, num_classes=1000)
    load_weights(model, options.weights)
    test = _images(Path(options.data) / "val", (options.images or 3850) // len(IMAGENETTE))
    calibration, _ = _images(Path(options.data) / "train", 26)
    data = load_data(options.data, preset="imagenet", image_size=224)
    return model.eval(), replace(data, mean=_HALF, std=_HALF), [*calibration.split(32)], test


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
