"""Data sets by name or folder, their batches, and augmentation."""

from deeptwist.app.data.dataset import ImageData, ImageFiles, Split, augment, normalize
from deeptwist.app.data.loading import batches, train_batches
from deeptwist.app.data.sources import load_data

__all__ = [
    "ImageData",
    "ImageFiles",
    "Split",
    "augment",
    "batches",
    "load_data",
    "normalize",
    "train_batches",
]
