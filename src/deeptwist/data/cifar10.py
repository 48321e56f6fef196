"""CIFAR-10 (Krizhevsky 2009), downloaded once through torchvision."""

from pathlib import Path

import torch

from deeptwist.data.dataset import IMAGENET_MEAN, IMAGENET_STD, ImageData, Split
from deeptwist.data.image_cache import cache_folder
from deeptwist.errors import DeepTwistError, first_line, require_extra


def load_cifar10(*, cache: str | Path | None = None) -> ImageData:
    """Load 50,000 and 10,000 colour images of 32 × 32 pixels in 10 classes.

    Normalised with ImageNet's statistics, as the public CIFAR ResNets are.

    Args:
        cache: where it is downloaded to; $DEEPTWIST_CACHE or ~/.cache/deeptwist if not given.

    Raises:
        DeepTwistError: if it is not in the cache and cannot be downloaded.
    """
    with require_extra():
        from torchvision.datasets import CIFAR10
    folder = str(cache_folder(cache))
    try:
        train, test = (CIFAR10(folder, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DeepTwistError(
            f"cannot download CIFAR-10 into {folder} ({first_line(error)}): "
            "give a folder that holds train/CLASS/*.png and test/CLASS/*.png instead"
        ) from error
    train_split, test_split = (
        Split(
            images=torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            labels=torch.tensor(part.targets),
        )
        for part in (train, test)
    )
    return ImageData(
        name="cifar10",
        train=train_split,
        test=test_split,
        classes=tuple(train.classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        padding=4,
        flip=True,
    )
