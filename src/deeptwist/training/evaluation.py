"""Accuracy and loss on a split."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.classification import multiclass_accuracy

from deeptwist.data import Dataset, Split, batches, normalize
from deeptwist.errors import DeepTwistError, first_line
from deeptwist.inspect.layers import FORWARD_ERRORS, eval_mode
from deeptwist.training.records import Evaluation

_BATCH = 500


def as_input(images: Tensor, model: nn.Module, data: Dataset) -> Tensor:
    """Stored pixels as what a model takes: normalised, of its type, on its device, channels_last.

    Args:
        images: uint8 (B, C, H, W).
        model: whose first parameter says which type and device.
        data: says how pixels are normalised.
    """
    first = next(model.parameters())
    x = normalize(images.to(first.device), data.mean, data.std)
    return x.to(first.dtype, memory_format=torch.channels_last)


def logits_of(output: object) -> Tensor:
    """The logits (B, classes) in a network's output.

    The first tensor of a tuple: torchvision's GoogLeNet and Inception v3 put their auxiliary
    heads' logits after it while they train.

    Raises:
        DeepTwistError: if it is something else.
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
    images: Tensor,
    labels: Tensor,
    data: Dataset,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluates a model on images of a data set, in evaluation mode and on its own device.

    Args:
        model: gives logits (B, classes).
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        data: says how pixels are normalised and how many classes there are.
        on_batch: called after every batch of up to 500.

    Raises:
        DeepTwistError: if the model cannot run on the images, or its outputs are not one logit
            per class.
    """
    outputs = []
    with eval_mode(model):
        for some, _ in batches(Split(images, labels), _BATCH, generator=None):
            x = as_input(some, model, data)
            try:
                output = model(x)
            except FORWARD_ERRORS as error:
                raise DeepTwistError(
                    f"{type(model).__name__} cannot run on images of {data.name}, "
                    f"{tuple(x.shape[1:])}: {first_line(error)}"
                ) from error
            outputs.append(logits_of(output).float())
            on_batch()
    logits, targets = torch.cat(outputs), labels.to(outputs[0].device)
    if logits.shape != (len(labels), len(data.classes)):
        raise DeepTwistError(
            f"the model gives outputs of shape {tuple(logits.shape[1:])}, "
            f"{data.name} has {len(data.classes)} classes"
        )

    def right_among(guesses: int) -> float:
        return float(
            multiclass_accuracy(logits, targets, len(data.classes), average="micro", top_k=guesses)
        )

    return Evaluation(
        loss=float(functional.cross_entropy(logits, targets)),
        accuracy=right_among(1),
        top5=right_among(5) if len(data.classes) > 5 else None,
    )


class Probe:
    """A model on images spread over both splits, not augmented, each time it is asked.

    Attributes:
        train: what was found on the training split, in order.
        test: the same on the test split.
        seconds: that it took in all.
    """

    def __init__(self, model: nn.Module, data: Dataset, images: int):
        self._model, self._data, self._images = model, data, images
        self.train: list[Evaluation] = []
        self.test: list[Evaluation] = []
        self.seconds = 0.0

    def loss(self) -> float:
        """The loss on the training split's images; keeps all that was found."""
        started = time.perf_counter()
        for split, found in ((self._data.train, self.train), (self._data.test, self.test)):
            some = split.spread(self._images)
            found.append(evaluate(self._model, some.images, some.labels, self._data))
        self.seconds += time.perf_counter() - started
        return self.train[-1].loss
