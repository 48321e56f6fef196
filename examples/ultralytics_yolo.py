"""Compress ultralytics' YOLO: decompose, fine-tune in its own trainer, predict, export.

What is planned is the network, ``yolo.model``. ``YOLO.train`` makes a network of its own from the
configuration, whatever ``yolo.model`` is: a trainer that returns the decomposed one trains it.

Run it: ``pip install ultralytics``, then ``python examples/ultralytics_yolo.py``. It draws its
pictures and begins with random weights: it shows the way, not an accuracy.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import deeptwist as dt
from deeptwist.decompositions import FactoredLayer
from deeptwist.integrations import after_each_step

SIZE, PICTURES = 64, 4


def draw(root: Path) -> Path:
    """Draw pictures of a box, with the labels that YOLO reads; return the data's description."""
    for part in ("train", "val"):
        (root / "images" / part).mkdir(parents=True)
        (root / "labels" / part).mkdir(parents=True)
        for number in range(PICTURES):
            image, left = Image.new("RGB", (SIZE, SIZE), (40, 40, 60)), 4 * number
            ImageDraw.Draw(image).rectangle((left, 16, left + 32, 48), fill=(200, 180, 0))
            image.save(root / "images" / part / f"{number}.jpg")
            label = f"0 {(left + 16) / SIZE} 0.5 0.5 0.5\n"
            (root / "labels" / part / f"{number}.txt").write_text(label)
    description = root / "data.yaml"
    description.write_text(
        f"path: {root}\ntrain: images/train\nval: images/val\nnames: {{0: box}}\n"
    )
    return description


def options(root: Path) -> dict[str, Any]:
    return {
        "imgsz": SIZE,
        "batch": 2,
        "workers": 0,
        "device": "cpu",
        "amp": False,  # its check would load a network from the net
        "plots": False,
        "verbose": False,
        "project": str(root / "runs"),
    }


def fine_tune(yolo: YOLO, small: nn.Module, data: Path, **settings: Any) -> None:
    """Train a decomposed network in ultralytics' own loop; `yolo` then holds the trained one."""

    class SmallTrainer(DetectionTrainer):
        def get_model(self, *_: Any, **__: Any) -> nn.Module:
            return small

    yolo.train(trainer=SmallTrainer, data=str(data), **settings)


def train_with_twist(yolo: YOLO, x: torch.Tensor, data: Path, **settings: Any) -> dt.DeepTwist:
    """Train the dense network with DeepTwist; `yolo` then holds the decomposed one."""
    twists: list[dt.DeepTwist] = []

    def start(trainer: DetectionTrainer) -> None:
        # The trainer's network, which has as many classes as the data.
        plan = dt.plan(trainer.model, dt.SpatialSVD(), ratio=2, example_input=x)
        twists.append(dt.DeepTwist(trainer.model, plan, interval=1))
        after_each_step(twists[0], [trainer.optimizer], twists[0].step)

    yolo.add_callback("on_train_start", start)
    yolo.train(data=str(data), **settings)
    yolo.model, yolo.predictor = twists[0].finish(), None  # of the weights, not of their average
    return twists[0]


def size(model: nn.Module) -> str:
    layers = sum(isinstance(module, FactoredLayer) for module in model.modules())
    return f"{sum(p.numel() for p in model.parameters()):,} parameters, {layers} factored layers"


def main(root: Path) -> None:
    data, yolo, x = draw(root / "data"), YOLO("yolov8n.yaml"), torch.rand(2, 3, SIZE, SIZE)
    plan = dt.plan(yolo.model, dt.SpatialSVD(), ratio=2, example_input=x)
    print("dense     ", size(yolo.model))
    small = dt.decompose(yolo.model, plan)
    fine_tune(yolo, small, data, epochs=1, **options(root))
    print("fine-tuned", size(yolo.model))
    picture = str(root / "data" / "images" / "val" / "0.jpg")
    yolo.predict(picture, imgsz=SIZE, device="cpu", verbose=False)  # folds batch norm by itself
    print("exported  ", Path(yolo.export(format="onnx", imgsz=SIZE, device="cpu")).name)

    second = YOLO("yolov8n.yaml")
    twist = train_with_twist(second, x, data, epochs=1, **options(root))
    print("DeepTwist ", size(second.model), f"after {len(twist.history)} distortions")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
