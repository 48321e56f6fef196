"""A decomposed ResNet-32 through onnxruntime's int8 quantisation: bytes, accuracy, difference.

deeptwist export resnet32 --weights resnet32-cifar10.safetensors --decomposition spatial-svd \
      --ratio 1.5 --skip-first-conv --no-linear --out small.onnx
python benchmarks/int8.py small.onnx --data cifar10-jpeg
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from deeptwist.data import ImageData, Split, load_data, normalize

PER_CLASS = {"test": 50, "calibration": 10}


class Calibration(CalibrationDataReader):
    """Ten images at a time."""

    def __init__(self, images: np.ndarray):
        self.batches: Iterator[np.ndarray] = iter(np.split(images, len(images) // 10))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("network", type=Path, help="what 'deeptwist export' wrote")
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    data = load_data(options.data)
    images, labels = first_of_each_class(data, data.test, PER_CLASS["test"])
    calibration, _ = first_of_each_class(data, data.train, PER_CLASS["calibration"])
    reference = logits(options.network, images)
    print("| file | bytes | accuracy | same class as fp32 | ‖y − y′‖ / ‖y‖ of the logits |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        dynamic, static = Path(folder) / "dynamic.onnx", Path(folder) / "static.onnx"
        quantize_dynamic(options.network, dynamic, weight_type=QuantType.QUInt8)
        quantize_static(options.network, static, Calibration(calibration), per_channel=True)
        for path in (options.network, dynamic, static):
            found = logits(path, images)
            right = np.mean(found.argmax(1) == labels)
            same = np.mean(found.argmax(1) == reference.argmax(1))
            away = np.linalg.norm(found - reference) / np.linalg.norm(reference)
            size = path.stat().st_size
            print(f"| `{path.name}` | {size:,} | {right:.1%} | {same:.1%} | {away:.3f} |")


def first_of_each_class(data: ImageData, split: Split, count: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = torch.cat(
        [(split.labels == label).nonzero().flatten()[:count] for label in range(len(data.classes))]
    )
    images = normalize(split.images[chosen], data.mean, data.std)
    return images.numpy(), split.labels[chosen].numpy()


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"input": images})[0]
    return found


if __name__ == "__main__":
    main()
