"""Data sets by name or folder, as memory holds them or as files."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deeptwist.app.data.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from deeptwist.app.data.dataset import ImageData, ImageFiles, Split
from deeptwist.app.data.files import Listing, list_source
from deeptwist.app.data.loading import batches
from deeptwist.app.data.transforms import eval_transform, mix_transform, train_transform
from deeptwist.errors import DeepTwistError, first_line, require_extra, unknown_name_error

_NAMED = ("digits", "cifar10")
_SMALL = 64  # pixels: up to here, images are kept in memory without being asked for


def load_data(config: DataConfig | str, **options: Any) -> ImageData:
    """Load a data set by name or folder.

    Args:
        config: see `DataConfig`; or its source alone.
        options: other fields of a `DataConfig`.

    Raises:
        DeepTwistError: if there is no such data set, or it cannot be read or prepared so.
    """
    if isinstance(config, str):
        try:
            config = DataConfig(source=config, **options)
        except (TypeError, ValueError) as error:
            raise DeepTwistError(f"cannot prepare {config}: {error}") from error
    if config.source in _NAMED:
        return _load_named(config)
    _check_name(config.source)
    return _load_files(config)


def load_digits() -> ImageData:
    """Load 1,437 training and 360 test images: grey, 8 × 8 pixels, 10 classes.

    The split is always the same and holds each digit in equal shares. Source: the test set of
    UCI's 'Optical Recognition of Handwritten Digits', its levels 0 to 16 scaled to 0 to 255.
    """
    return load_data("digits")


def dataset_signature(source: str) -> dict[str, Any]:
    """Return what tells a data set from others of its name: its classes and their sizes.

    Args:
        source: see `DataConfig`.

    Raises:
        DeepTwistError: if there is no such data set or it cannot be listed.
    """
    if source in _NAMED:
        return {"name": source}
    _check_name(source)
    return {
        name: dict(zip(split.classes, split.labels.bincount().tolist(), strict=True))
        for name, split in zip(("train", "test"), list_source(source), strict=True)
    }


def _load_named(config: DataConfig) -> ImageData:
    name, is_digits = config.source, config.source == "digits"
    if config.image_size is not None or config.preset == "imagenet":
        raise DeepTwistError(
            f"{name} has a fixed image size and is kept in memory: leave out image_size and the "
            "imagenet preset"
        )
    config = replace(config, preset="cifar")
    if is_digits:  # mean and std are those of the training split; a mirrored 2 is not a digit
        config = _with_defaults(config, padding=1, flip=False, mean=(0.305,), std=(0.376,))
    else:
        config = _with_defaults(config, padding=4)
    return _image_data(config, name, *(_digits() if is_digits else _cifar10()))


def _load_files(config: DataConfig) -> ImageData:
    train, test = list_source(config.source)
    if config.preset is None:
        size = config.image_size or max(train(0).size)
        config = replace(config, preset="cifar" if size <= _SMALL else "imagenet")
    if config.preset == "imagenet":
        config = _with_defaults(config, image_size=224, crop_pct=0.875)
    config = _with_defaults(config, eval_size=config.image_size)
    splits = [
        Split(_files(listing, config, size), listing.labels)
        for listing, size in ((train, config.image_size), (test, config.eval_size))
    ]
    if config.preset == "cifar":
        splits = [_decoded(split) for split in splits]
    return _image_data(config, Path(config.source).name, splits[0], splits[1], train.classes)


def _with_defaults(config: DataConfig, **defaults: Any) -> DataConfig:
    """Return the config with values where it has `None`."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    defaults = {
        "flip": True,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "workers": min(16, max(1, len(os.sched_getaffinity(0)) // processes)),
        **defaults,
    }
    return replace(config, **{n: v for n, v in defaults.items() if getattr(config, n) is None})


def _image_data(
    config: DataConfig, name: str, train: Split, test: Split, classes: tuple[str, ...]
) -> ImageData:
    """Return a data set with the augmentation that the config, which is whole, asks for."""
    height, width = train.images.shape[2:]
    padding = max(1, min(height, width) // 8) if config.padding is None else config.padding
    mix = mix_transform(config, len(classes))
    by_batch = isinstance(train.images, Tensor) and not (config.auto_augment or config.erase or mix)
    assert config.mean is not None
    assert config.std is not None
    return ImageData(
        name=name,
        train=train,
        test=test,
        classes=classes,
        mean=config.mean,
        std=config.std,
        padding=padding,
        flip=bool(config.flip),
        transform=None if by_batch else train_transform(config, (height, width), padding=padding),
        mix=mix,
        workers=config.workers or 0,
    )


def _files(listing: Listing, config: DataConfig, size: int | None) -> ImageFiles:
    transform = eval_transform(config, size)
    shape = tuple(transform(listing(0)).shape) if size is None else (3, size, size)
    rows = np.arange(len(listing.labels))
    return ImageFiles(listing, rows, transform, shape, config.workers or 0, config.skip_unreadable)


def _decoded(split: Split) -> Split:
    """Return a split whose images are in memory.

    Raises:
        DeepTwistError: if an image cannot be decoded, or all would not fit.
    """
    needed = math.prod(split.images.shape)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise DeepTwistError(
            f"{len(split.labels):,} images take {needed / 2**30:.0f} GiB of this machine's "
            f"{memory / 2**30:.0f}: choose the imagenet preset, which reads them as needed"
        )
    images, labels = zip(*batches(split, 512, generator=None), strict=True)
    return Split(torch.cat(images), torch.cat(labels))


def _digits() -> tuple[Split, Split, tuple[str, ...]]:
    with require_extra():
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    whole = Split(images, torch.from_numpy(digits.target).long())
    train, test = train_test_split(
        range(len(images)), test_size=0.2, stratify=digits.target, random_state=0
    )
    return whole.subset(torch.tensor(train)), whole.subset(torch.tensor(test)), tuple("0123456789")


def _cifar10() -> tuple[Split, Split, tuple[str, ...]]:
    """Return CIFAR-10 (Krizhevsky 2009), downloaded once through torchvision."""
    with require_extra():
        from torchvision.datasets import CIFAR10
    folder = str(Path(os.environ.get("DEEPTWIST_CACHE") or "~/.cache/deeptwist").expanduser())
    try:
        train, test = (CIFAR10(folder, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DeepTwistError(
            f"cannot download CIFAR-10 into {folder} ({first_line(error)}): "
            "give a folder that holds train/CLASS/*.png and test/CLASS/*.png instead"
        ) from error
    train_split, test_split = (
        Split(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
        )
        for part in (train, test)
    )
    return train_split, test_split, tuple(train.classes)


def _check_name(source: str) -> None:
    if Path(source).name == source and not Path(source).expanduser().is_dir():
        raise unknown_name_error("data set", source, [*_NAMED, "path/to/folder", "hf/NAME"])
