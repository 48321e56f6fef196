"""Accuracy and loss on a split, and what deployed networks are prepared and measured on."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from deeptwist.app.data import ImageData, Split, batches, normalize, train_batches
from deeptwist.compress import Progress, no_progress
from deeptwist.distributed import process_rank, world_size
from deeptwist.errors import DeepTwistError, explaining
from deeptwist.inspection.run import eval_mode


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy on a split.

    Attributes:
        loss: mean cross-entropy.
        accuracy: share of the images whose first guess is right (0 to 1).
        top5: share of those with the right one among the first five; `None` where there are no
            more classes than that.
    """

    loss: float
    accuracy: float
    top5: float | None = None


def preprocess(
    images: Tensor,  # uint8 (B, C, H, W)
    model: nn.Module,
    data: ImageData,
) -> Tensor:  # (B, C, H, W), channels_last
    """Turn stored pixels into a model's input: normalised, of its first parameter's type, there."""
    first = next(model.parameters())
    x = normalize(images.to(first.device), data.mean, data.std)
    return x.to(first.dtype, memory_format=torch.channels_last)


def training_inputs(
    data: ImageData,
    model: nn.Module,
    count: int,
    batch_size: int = 128,
    *,
    progress: Progress = no_progress,
) -> Iterator[Tensor]:
    """Yield batches of so many training images, not augmented, the same ones every time.

    Progress is shown as that of a calibration.
    """
    shuffle = torch.Generator().manual_seed(0)
    chosen = data.train.subset(torch.randperm(len(data.train.labels), generator=shuffle)[:count])
    size = min(count, batch_size)
    with progress("calibrate", math.ceil(len(chosen.labels) / size)) as advance:
        for images, _ in batches(chosen, size):
            yield preprocess(images, model, data)
            advance()


_BATCH = 64  # images that are distilled on at once


class AugmentedInputs(Iterable[Tensor]):
    """Training images without labels, augmented anew whenever they are gone through.

    The first batches are always the same, not augmented, and none of the others' images: what a
    result is judged on. All is drawn from the seed.
    """

    def __init__(self, data: ImageData, model: nn.Module, count: int, *, seed: int, held_out: int):
        """Choose so many training images, evenly spaced, and as many batches to hold out."""
        chosen = data.train.subsample(count + held_out * _BATCH)
        total = len(chosen.labels)
        self._batch = max(1, min(_BATCH, total // (held_out + 2)))  # of few images, some to learn
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        self._judges = chosen.subset(order[: held_out * self._batch])
        self._data = replace(data, train=chosen.subset(order[held_out * self._batch :]))
        self._model, self._seed, self._round = model, seed, 0

    @property
    def count(self) -> int:
        """Images to learn on."""
        return len(self._data.train.labels)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches of the next round."""
        data, per_round = self._data, self.count // self._batch
        steps = range(self._round * per_round, (self._round + 1) * per_round)
        self._round += 1
        for images, _ in batches(self._judges, self._batch):
            yield preprocess(images, self._model, data)
        for images, _ in train_batches(data, self._batch, seed=self._seed, steps=steps):
            yield preprocess(images, self._model, data)


def test_inputs(data: ImageData, model: nn.Module, count: int) -> Tensor:
    """Return a model's input for so many test images, from the first on, over again if need be."""
    total = len(data.test.labels)
    first = data.test.subset(torch.arange(min(count, total)))
    images = torch.cat([x for x, _ in batches(first, 128)])
    return preprocess(images[torch.arange(count) % len(images)], model, data)


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
    model: nn.Module, split: Split, data: ImageData, *, progress: Progress = no_progress
) -> Evaluation:
    """Evaluate a model in evaluation mode, on its own device; processes share the images out.

    Args:
        model: gives logits (B, classes); not wrapped to communicate by itself.
        split: the images and labels.
        data: says how pixels are normalised and how many classes there are.
        progress: shows the batches, see `deeptwist.compress.Job`.

    Raises:
        DeepTwistError: if the model cannot run on the images, or its outputs are not one logit
            per class.
    """
    share = split.subset(torch.arange(process_rank(), len(split.labels), world_size()))
    # images, loss, right, right among five
    totals = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)
    size = max(1, min(500, 2**23 // math.prod(data.shape)))  # fewer if they are large
    with eval_mode(model), progress("evaluate", math.ceil(len(share.labels) / size)) as advance:
        for images, labels in batches(share, size):
            totals += _totals(_logits(model, images, data), labels)
            advance()
    if world_size() > 1:
        dist.all_reduce(totals)
    count, loss, right, right_of_five = totals.tolist()
    return Evaluation(
        loss=loss / count,
        accuracy=right / count,
        top5=right_of_five / count if len(data.classes) > 5 else None,
    )


def _logits(model: nn.Module, images: Tensor, data: ImageData) -> Tensor:
    x = preprocess(images, model, data)
    name, shape = type(model).__name__, tuple(x.shape[1:])
    with explaining(f"{name} cannot run on images of {data.name}, {shape}"):
        logits = logits_of(model(x)).float()
    if logits.shape != (len(images), len(data.classes)):
        raise DeepTwistError(
            f"the model gives outputs of shape {tuple(logits.shape[1:])}, "
            f"{data.name} has {len(data.classes)} classes"
        )
    return logits


def _totals(logits: Tensor, labels: Tensor) -> Tensor:
    labels = labels.to(logits.device)
    right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="none").double()
    parts = torch.ones_like(loss), loss, right[:, 0].double(), right.any(1).double()
    return torch.stack([part.sum() for part in parts])
