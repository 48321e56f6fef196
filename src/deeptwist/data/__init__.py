"""Data sets by name or folder, their batches, and augmentation."""

from pathlib import Path
from typing import Any

from deeptwist.data.augment import augment, normalize
from deeptwist.data.batches import batches
from deeptwist.data.cifar10 import load_cifar10
from deeptwist.data.dataset import ImageData, Split
from deeptwist.data.digits import load_digits
from deeptwist.data.image_folder import count_images, load_image_folder
from deeptwist.errors import DeepTwistError, unknown_name_error

__all__ = [
    "ImageData",
    "Split",
    "augment",
    "batches",
    "dataset_signature",
    "load_cifar10",
    "load_data",
    "load_digits",
    "load_image_folder",
    "normalize",
]

_NAMED = ("digits", "cifar10")


def load_data(
    spec: str, *, image_size: int | None = None, cache: str | Path | None = None
) -> ImageData:
    """Load a data set by name or folder.

    Args:
        spec: ``"digits"``, ``"cifar10"``, or the path of a folder, see `load_image_folder`.
        image_size: height and width in pixels, for folders only.
        cache: the cache folder; $DEEPTWIST_CACHE or ~/.cache/deeptwist if not given.

    Raises:
        DeepTwistError: if there is no such data set or it cannot be read.
    """
    named = spec in _NAMED
    if named and image_size is not None:
        raise DeepTwistError(f"{spec} has a fixed image size: leave out image_size={image_size}")
    if spec == "digits":
        return load_digits()
    if spec == "cifar10":
        return load_cifar10(cache=cache)
    _check_folder(spec)
    return load_image_folder(spec, image_size=image_size, cache=cache)


def dataset_signature(spec: str) -> dict[str, Any]:
    """Return what tells a data set from others of its name: its classes and their sizes.

    Args:
        spec: see `load_data`.

    Raises:
        DeepTwistError: if there is no such data set or it cannot be listed.
    """
    if spec in _NAMED:
        return {"name": spec}
    _check_folder(spec)
    return count_images(spec)


def _check_folder(spec: str) -> None:
    if Path(spec).name == spec and not Path(spec).expanduser().is_dir():
        raise unknown_name_error("data set", spec, [*_NAMED, "path/to/folder"])
