"""Data sets laid out as one folder of images per class."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deeptwist.data.dataset import IMAGENET_MEAN, IMAGENET_STD, ImageData, Split
from deeptwist.data.image_cache import MixedSizesError, cache_folder, open_images, write_images
from deeptwist.errors import DeepTwistError, require_extra

_SIZE_FOR_MIXED = 224  # where images differ in size and none was asked for


def load_image_folder(
    root: str | Path, *, image_size: int | None = None, cache: str | Path | None = None
) -> ImageData:
    """Read ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg, or val/ where there is no test/.

    The first load decodes every image into one file of the cache; later loads map that file, for
    as long as names, sizes and times of all images stay the same.

    Args:
        root: the folder. Any file that torchvision's `ImageFolder` takes is an image.
        image_size: height and width in pixels: the shorter side is resized to it, then the centre
            cropped. If not given, images keep their size, or become 224 where their sizes differ.
        cache: the cache folder; $DEEPTWIST_CACHE or ~/.cache/deeptwist if not given.

    Returns:
        RGB images, normalised with ImageNet's statistics, to be cropped at random from an eighth
        of their size in padding and mirrored.

    Raises:
        DeepTwistError: if a folder, a split or an image is missing or unreadable, or the splits
            have different classes.
    """
    if image_size is not None and image_size < 1:
        raise DeepTwistError(f"image_size must be at least 1, not {image_size}")
    root = Path(root).expanduser().resolve()
    train, test = _splits(root)
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise DeepTwistError(
            f"'{root}' has classes in one split only: {', '.join(differing)}: add or delete them"
        )
    images = _images(root, train.paths + test.paths, image_size, cache_folder(cache))
    first_test = len(train.paths)
    return ImageData(
        name=root.name,
        train=Split(images[:first_test], train.labels),
        test=Split(images[first_test:], test.labels),
        classes=train.classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        padding=max(1, min(images.shape[2:]) // 8),
        flip=True,
    )


def count_images(root: str | Path) -> dict[str, dict[str, int]]:
    """Count each split's images of each class; none is opened.

    Raises:
        DeepTwistError: if a folder or a split is missing or empty.
    """
    train, test = _splits(Path(root).expanduser().resolve())
    return {
        name: dict(zip(split.classes, split.labels.bincount().tolist(), strict=True))
        for name, split in (("train", train), ("test", test))
    }


def _splits(root: Path) -> "tuple[_SplitFiles, _SplitFiles]":
    if not root.is_dir():
        raise DeepTwistError(f"no folder of images at '{root}'")
    return _list_split(root / "train"), _list_split(
        root / "test" if (root / "test").is_dir() else root / "val"
    )


@dataclass(frozen=True, eq=False)
class _SplitFiles:
    paths: list[str]
    labels: Tensor  # int64 (N,)
    classes: tuple[str, ...]


def _list_split(split: Path) -> _SplitFiles:
    with require_extra():
        from torchvision.datasets import ImageFolder
    if not split.is_dir():
        raise DeepTwistError(
            f"no folder '{split}': images belong in train/CLASS/ and test/CLASS/ or val/CLASS/"
        )
    try:
        folder = ImageFolder(str(split))
    except FileNotFoundError as error:
        raise DeepTwistError(f"no images in '{split}': {error}") from error
    paths = [path for path, _ in folder.samples]
    return _SplitFiles(paths, torch.tensor(folder.targets), tuple(folder.classes))


def _images(root: Path, paths: list[str], image_size: int | None, cache: Path) -> Tensor:
    file = cache / f"{root.name}-{_fingerprint(root, paths, image_size)}.npy"
    images = open_images(file, len(paths))
    if images is None:
        try:
            write_images(file, paths, image_size)
        except MixedSizesError:
            write_images(file, paths, _SIZE_FOR_MIXED)
        images = open_images(file, len(paths))
    if images is None:
        raise DeepTwistError(f"'{file}' was damaged as soon as it was written: try again")
    return images


def _fingerprint(root: Path, paths: Iterable[str], image_size: int | None) -> str:
    digest = hashlib.sha256(f"{image_size}".encode())
    for path in sorted(paths):
        stat = os.stat(path)
        digest.update(os.fsencode(path.removeprefix(str(root))))
        digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]
