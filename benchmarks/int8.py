"""A decomposed ResNet-32 through onnxruntime's int8 quantisation: bytes, accuracy, difference.

deeptwist export resnet32 --weights resnet32-cifar10.safetensors --decomposition spatial-svd \
      --ratio 1.5 --out small.onnx
python benchmarks/int8.py small.onnx --data cifar10-jpeg
"""

import argparse
import tempfile
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

from deeptwist.app.data import ImageData, Split, load_data, normalize
from deeptwist.decompositions.linalg import relative_error
from deeptwist.export import quantize_onnx
from deeptwist.measure.runtimes import OnnxNetwork


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("network", type=Path, help="what 'deeptwist export' wrote")
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    data = load_data(options.data)
    images, labels = first_of_each_class(data, data.test, 50)
    calibration, _ = first_of_each_class(data, data.train, 10)
    reference = OnnxNetwork(options.network, 1)(images)
    print("| file | bytes | accuracy | same class as fp32 | ‖y − y′‖ / ‖y‖ of the logits |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        dynamic, static = Path(folder) / "dynamic.onnx", Path(folder) / "static.onnx"
        quantize_dynamic(options.network, dynamic, weight_type=QuantType.QUInt8)
        quantize_onnx(options.network, static, calibration.split(10))
        for path in (options.network, dynamic, static):
            logits = OnnxNetwork(path, 1)(images)
            right = (logits.argmax(1) == labels).double().mean()
            same = (logits.argmax(1) == reference.argmax(1)).double().mean()
            away, size = relative_error(reference, logits), path.stat().st_size
            print(f"| `{path.name}` | {size:,} | {right:.1%} | {same:.1%} | {away:.3f} |")


def first_of_each_class(data: ImageData, split: Split, count: int) -> tuple[Tensor, Tensor]:
    chosen = torch.cat(
        [(split.labels == label).nonzero().flatten()[:count] for label in range(len(data.classes))]
    )
    return normalize(split.images[chosen], data.mean, data.std), split.labels[chosen]


if __name__ == "__main__":
    main()
