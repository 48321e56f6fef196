"""A data set in memory: images, labels, and the preparation that suits them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deeptwist.errors import DeepTwistError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split and their labels.

    Attributes:
        images: uint8 (N, C, H, W), 0 to 255.
        labels: int64 (N,), indices into the data set's classes.

    Raises:
        DeepTwistError: if a dtype or shape is another.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DeepTwistError(f"images must be uint8 (N, C, H, W), not {_described(images)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DeepTwistError(
                f"labels must be int64 ({len(images)},), one per image, not {_described(labels)}"
            )

    def to(self, device: torch.device) -> "Split":
        """Return the split on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def evenly_spaced(self, count: int) -> "Split":
        """Return so many images, evenly spaced over the split: a folder's lie class after class."""
        total = len(self.labels)
        count = min(count, total)
        rows = torch.arange(count, device=self.labels.device) * total // max(count, 1)
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True, eq=False)
class ImageData:
    """Two splits of one classification task, with the preparation that suits them.

    Attributes:
        name: as reports call it.
        train: for training.
        test: for evaluation.
        classes: the name of each label.
        mean: per channel, of pixel values scaled to [0, 1].
        std: per channel, of pixel values scaled to [0, 1].
        padding: pixels of zero padding for random crops, see `augment`.
        flip: whether mirrored images are still of their class.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
