"""A data set: images in memory or read one by one, labels, and what prepares them."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from deeptwist.errors import DeepTwistError

if TYPE_CHECKING:
    from PIL import Image

Transform = Callable[["Image.Image | Tensor"], Tensor]  # gives uint8 (C, H, W)
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of float images and int labels


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that are read one by one: memory does not grow with their number.

    Attributes:
        read: gives the image of a row; a `DeepTwistError` where it cannot be decoded.
        rows: which of them, int64 (N,).
        transform: prepares an image for evaluation.
        size: (C, H, W) after that.
        workers: processes that read.
        skip_unreadable: whether images that cannot be decoded are left out.
    """

    read: Callable[[int], "Image.Image"]
    rows: npt.NDArray[np.int64]
    transform: Transform
    size: tuple[int, ...]
    workers: int = 0
    skip_unreadable: bool = False

    def __getitem__(self, number: int) -> "Image.Image":
        """Return an image as it is read."""
        return self.read(self.rows[number])

    def first(self, *, skip_unreadable: bool) -> "Image.Image":
        """Return the first image, or the first that can be decoded."""
        for row in self.rows if skip_unreadable else ():
            with suppress(DeepTwistError):
                return self.read(row)
        return self[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, C, H, W) as evaluation sees the images."""
        return (len(self.rows), *self.size)


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split and their labels.

    Attributes:
        images: uint8 (N, C, H, W), 0 to 255, or files.
        labels: int64 (N,), indices into the data set's classes.

    Raises:
        DeepTwistError: if a dtype or shape is another.
    """

    images: Tensor | ImageFiles
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.dim() != 4):
            raise DeepTwistError(f"images must be uint8 (N, C, H, W), not {_described(images)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DeepTwistError(
                f"labels must be int64 ({images.shape[0]},), one per image, not "
                f"{_described(labels)}"
            )

    def to(self, device: torch.device) -> "Split":
        """Return the split on another device, or as it is if its images are files."""
        if not isinstance(self.images, Tensor):
            return self
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, rows: Tensor) -> "Split":
        """Return the images of these rows, int64 (M,)."""
        if isinstance(self.images, Tensor):
            return Split(self.images[rows], self.labels[rows])
        files = replace(self.images, rows=self.images.rows[rows.numpy()])
        return Split(files, self.labels[rows])

    def subsample(self, count: int) -> "Split":
        """Return so many images, evenly spaced over the split: a folder's lie class after class."""
        total = len(self.labels)
        count = min(count, total)
        return self.subset(torch.arange(count) * total // max(count, 1))


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
        transform: augments an image by torch's global random numbers, in place of the two before.
        mix: blends a pair of images and their labels.
        workers: processes that augment where there is a transform.
        validation: images held out of the training split; `None` where there are none.
        resize: of an image's shorter side, in evaluation, before its centre is cropped to `shape`;
            `None` where images are taken as they are.
        interpolation: how.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    flip: bool = False
    transform: Transform | None = None
    mix: Mix | None = None
    workers: int = 0
    validation: Split | None = None
    resize: int | None = None
    interpolation: str = "bilinear"

    @property
    def sizes(self) -> dict[str, Any]:
        """Return what a network for these images is built with, see `build_model`."""
        channels = self.shape[0]
        # 3 is what networks take by themselves, and torchvision's take no number
        return {
            "num_classes": len(self.classes),
            "in_channels": None if channels == 3 else channels,
        }

    @property
    def metadata(self) -> dict[str, Any]:
        """Return what is to be known to serve a network of these images, as plain values."""
        _, height, width = self.shape
        return {
            "data": self.name,
            "classes": [*self.classes],
            **self.sizes,
            "image_size": [height, width],
            "resize": self.resize or min(height, width),
            "interpolation": self.interpolation,
            "mean": [*self.mean],
            "std": [*self.std],
        }

    @property
    def shape(self) -> tuple[int, ...]:
        """Return an image's (C, H, W) in evaluation."""
        return tuple(self.test.images.shape[1:])


def augment(
    images: Tensor,  # uint8 (B, C, H, W)
    draws: Tensor,  # float64 (B, 3), uniform in [0, 1)
    *,
    padding: int,
    flip: bool,
) -> Tensor:
    """Crop each image at random from its zero-padded self and mirror it with probability ½.

    This is the standard augmentation for CIFAR (He et al. 2015, section 4.2), of a whole batch on
    its device. All (2 · padding + 1)² crops are equally likely.
    """
    count, _, height, width = images.shape
    draws = draws.to(images.device, non_blocking=True)
    if padding:
        top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
        padded = F.pad(images, (padding,) * 4)
        # A view (B, C, 2·padding + 1, 2·padding + 1, H, W) of every crop; indexing copies one each.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        images = crops[torch.arange(count, device=images.device), :, top, left]
    if flip:
        images = torch.where(draws[:, 2].view(-1, 1, 1, 1) < 0.5, images.flip(3), images)
    return images


def normalize(
    images: Tensor,  # uint8 (B, C, H, W)
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Return float32 (images / 255 − mean) / std, per channel, on the images' device."""
    center, scale = (
        255 * torch.tensor(values).view(-1, 1, 1).to(images.device, non_blocking=True)
        for values in (mean, std)
    )
    return images.float().sub_(center).div_(scale)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
