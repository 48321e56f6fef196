"""Data sets by name or folder, their batches, and augmentation."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deeptwist.app.data.config import DataConfig as DataConfig
    from deeptwist.app.data.dataset import ImageData as ImageData
    from deeptwist.app.data.dataset import ImageFiles as ImageFiles
    from deeptwist.app.data.dataset import Split as Split
    from deeptwist.app.data.dataset import augment as augment
    from deeptwist.app.data.dataset import normalize as normalize
    from deeptwist.app.data.loading import batches as batches
    from deeptwist.app.data.loading import train_batches as train_batches
    from deeptwist.app.data.sources import load_data as load_data
    from deeptwist.app.data.sources import load_digits as load_digits

# Imported on first use: recipes read `config`, and their help must not wait for torch.
_MODULES = {
    "DataConfig": "config",
    "ImageData": "dataset",
    "ImageFiles": "dataset",
    "Split": "dataset",
    "augment": "dataset",
    "batches": "loading",
    "load_data": "sources",
    "load_digits": "sources",
    "normalize": "dataset",
    "train_batches": "loading",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'deeptwist.app.data' has no attribute {name!r}")
    return getattr(import_module(f"deeptwist.app.data.{_MODULES[name]}"), name)
