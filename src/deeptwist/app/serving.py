"""Networks as they are served: what their folder says of them, and what they say of images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import nn

from deeptwist.app.data import normalize
from deeptwist.app.data.sources import eval_transform, read_image
from deeptwist.app.training.evaluation import logits_of
from deeptwist.compress import Values
from deeptwist.errors import DATA_ERRORS, check_int, explaining
from deeptwist.measure.runtimes import OnnxNetwork
from deeptwist.plan.codec import decode
from deeptwist.plan.plan import layer_row
from deeptwist.save import WEIGHTS, load, read_saved


@dataclass(frozen=True)
class ImageInput:
    """How images become a network's input, and what its outputs are called.

    As of `ImageData.metadata`, which has more: the shorter side is resized, the centre cropped.
    """

    classes: tuple[str, ...]
    image_size: tuple[int, int]  # height, width
    resize: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def describe(folder: Path) -> Values:
    """Return what a folder says of its network, as plain values; the network is not built."""
    saved = read_saved(folder)
    # Without MACs, which hang on the size of the input.
    rows = [layer_row(layer) for layer in saved.plan().compressed]
    keys = "layer", "shape", "lowered", "decomposition", "rank", "weights"
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in [*file.keys()]]
    return {
        "path": str(folder),
        "base_model": saved.base_model,
        "deeptwist_version": saved.deeptwist_version,
        "bytes": (folder / WEIGHTS).stat().st_size,
        "numbers": sum(map(math.prod, shapes)),
        "layers": [dict(zip(keys, row, strict=False)) for row in rows],
        "metadata": saved.metadata,
    }


def predict(path: Path, images: Sequence[Path], *, top: int) -> list[Values]:
    """Classify images.

    Args:
        path: a saved folder, or an ONNX file, which onnxruntime runs.
        images: files.
        top: classes that are told of each.

    Returns:
        For each image its path and its likeliest classes with their shares, the surest first.

    Raises:
        DeepTwistError: if the network or an image cannot be read, or nothing says how images
            become its input.
    """
    check_int("top", top)
    network, metadata = _open(path)
    problem = f"{path} does not say how images become its input"
    advice = "give save, or export_onnx, that metadata, as the commands that read images do"
    with explaining(problem, advice, DATA_ERRORS):
        values = {key.name: metadata[key.name] for key in fields(ImageInput)}
        says: ImageInput = decode(ImageInput, values)
    prepare = eval_transform(says.resize, says.image_size, says.interpolation)
    rows = []
    for image in images:
        mode = "L" if len(says.mean) == 1 else "RGB"
        x = normalize(prepare(read_image(image, "").convert(mode))[None], says.mean, says.std)
        with explaining(f"{path} cannot run on {tuple(x.shape[1:])}"), torch.no_grad():
            shares = logits_of(network(x.to(next(network.parameters()).dtype)))[0].softmax(0)
        best = shares.topk(min(top, len(shares)))
        names = [says.classes[index] for index in best.indices.tolist()]
        classes = dict(zip(names, best.values.tolist(), strict=True))
        rows.append({"path": str(image), "classes": classes})
    return rows


def _open(path: Path) -> tuple[nn.Module, Values]:
    if path.suffix == ".onnx":
        onnx = OnnxNetwork(path, torch.get_num_threads())
        return onnx, onnx.metadata
    return load(path), read_saved(path).metadata
