"""Scikit-learn's handwritten digits: a real task that trains in seconds, never downloaded."""

import torch

from deeptwist.data.dataset import ImageData, Split
from deeptwist.errors import require_extra


def load_digits() -> ImageData:
    """Load 1,437 training and 360 test images: grey, 8 × 8 pixels, 10 classes.

    The split is always the same and holds each digit in equal shares. Source: the test set of
    UCI's 'Optical Recognition of Handwritten Digits', its levels 0 to 16 scaled to 0 to 255.
    """
    with require_extra():
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0
    )
    return ImageData(
        name="digits",
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        classes=tuple(str(digit) for digit in range(10)),
        mean=(0.305,),  # of the training split
        std=(0.376,),
        padding=1,
        flip=False,  # a mirrored 2 is not a digit
    )
