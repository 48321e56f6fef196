"""Accuracy and loss on a split."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from deeptwist.data import ImageData, Split, batches, normalize
from deeptwist.errors import DeepTwistError, first_line
from deeptwist.inspect.modes import FORWARD_ERRORS, eval_mode
from deeptwist.training.metrics import Evaluation

_BATCH = 500


def preprocess(images: Tensor, model: nn.Module, data: ImageData) -> Tensor:
    """Turn stored pixels into a model's input: normalised, of its type, on its device.

    Args:
        images: uint8 (B, C, H, W).
        model: whose first parameter says which type and device.
        data: says how pixels are normalised.

    Returns:
        (B, C, H, W), channels_last.
    """
    first = next(model.parameters())
    x = normalize(images.to(first.device), data.mean, data.std)
    return x.to(first.dtype, memory_format=torch.channels_last)


def training_inputs(data: ImageData, model: nn.Module, count: int) -> Iterator[Tensor]:
    """Yield batches of so many training images, not augmented, the same ones every time.

    Args:
        data: whose training split is read.
        model: see `preprocess`.
        count: images, rounded up to whole batches of up to 128.
    """
    shuffle, size = torch.Generator().manual_seed(0), min(count, 128)
    chosen = islice(batches(data.train, size, generator=shuffle), -(-count // size))
    return (preprocess(images, model, data) for images, _ in chosen)


def logits_of(output: object) -> Tensor:
    """Return the logits (B, classes) in a network's output.

    Of a tuple these are the first tensor: torchvision's GoogLeNet and Inception v3 put their
    auxiliary heads' logits after it while they train.

    Raises:
        DeepTwistError: if the output is something else.
    """
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise DeepTwistError(
            f"the model gives a {type(output).__name__} where a tensor of logits belongs: wrap it "
            "in a module that returns those"
        )
    return first


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    data: ImageData,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a model in evaluation mode, on its own device.

    Args:
        model: gives logits (B, classes).
        split: the images and labels.
        data: says how pixels are normalised and how many classes there are.
        on_batch: called after every batch of up to 500.

    Raises:
        DeepTwistError: if the model cannot run on the images, or its outputs are not one logit
            per class.
    """
    outputs = []
    with eval_mode(model):
        for images, _ in batches(split, _BATCH, generator=None):
            x = preprocess(images, model, data)
            try:
                output = model(x)
            except FORWARD_ERRORS as error:
                raise DeepTwistError(
                    f"{type(model).__name__} cannot run on images of {data.name}, "
                    f"{tuple(x.shape[1:])}: {first_line(error)}"
                ) from error
            outputs.append(logits_of(output).float())
            on_batch()
    logits, labels = torch.cat(outputs), split.labels.to(outputs[0].device)
    if logits.shape != (len(labels), len(data.classes)):
        raise DeepTwistError(
            f"the model gives outputs of shape {tuple(logits.shape[1:])}, "
            f"{data.name} has {len(data.classes)} classes"
        )
    return Evaluation(
        loss=float(functional.cross_entropy(logits, labels)),
        accuracy=_accuracy(logits, labels, 1),
        top5=_accuracy(logits, labels, 5) if len(data.classes) > 5 else None,
    )


def _accuracy(logits: Tensor, labels: Tensor, guesses: int) -> float:
    right = logits.topk(guesses).indices == labels[:, None]
    return float(right.any(1).float().mean())
