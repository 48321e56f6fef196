"""Data sets by name or folder, their batches, and augmentation."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deeptwist.data.config import DataConfig as DataConfig
    from deeptwist.data.dataset import ImageData as ImageData
    from deeptwist.data.dataset import ImageFiles as ImageFiles
    from deeptwist.data.dataset import Split as Split
    from deeptwist.data.loading import batches as batches
    from deeptwist.data.loading import train_batches as train_batches
    from deeptwist.data.sources import dataset_signature as dataset_signature
    from deeptwist.data.sources import load_data as load_data
    from deeptwist.data.sources import load_digits as load_digits
    from deeptwist.data.transforms import augment as augment
    from deeptwist.data.transforms import normalize as normalize

# Imported on first use: recipes read `config`, and their help must not wait for torch.
_MODULES = {
    "DataConfig": "config",
    "ImageData": "dataset",
    "ImageFiles": "dataset",
    "Split": "dataset",
    "augment": "transforms",
    "batches": "loading",
    "dataset_signature": "sources",
    "load_data": "sources",
    "load_digits": "sources",
    "normalize": "transforms",
    "train_batches": "loading",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'deeptwist.data' has no attribute {name!r}")
    return getattr(import_module(f"deeptwist.data.{_MODULES[name]}"), name)
