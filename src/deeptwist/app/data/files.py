"""Images that are read one by one: from class folders and from Hugging Face data sets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deeptwist.errors import DeepTwistError, first_line, require_extra

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class FolderImages:
    """The images of a split that is a folder of class folders.

    Attributes:
        root: the folder.
        names: the images' paths in it, encoded; not a list of strings, which workers would copy.
        labels: int64 (N,).
        classes: the name of each label.
    """

    root: str
    names: npt.NDArray[np.bytes_]
    labels: Tensor
    classes: tuple[str, ...]

    def __call__(self, row: int) -> "Image.Image":
        """Read an image as RGB; raise a `DeepTwistError` that names one that is damaged."""
        from PIL import Image

        path = os.path.join(self.root, os.fsdecode(self.names[row]))
        with _named(f"'{path}'"), Image.open(path) as image:
            return _to_rgb(image)


@dataclass(frozen=True, eq=False)
class HubImages:
    """The images of a split of a Hugging Face data set.

    Attributes:
        name: of the split, in messages.
        dataset: the split.
        column: of the images.
        labels: int64 (N,).
        classes: the name of each label.
    """

    name: str
    dataset: Any
    column: str
    labels: Tensor
    classes: tuple[str, ...]

    def __call__(self, row: int) -> "Image.Image":
        """Read an image as RGB; raise a `DeepTwistError` that names one that is damaged."""
        with _named(f"{row} of {self.name}"):
            return _to_rgb(self.dataset[int(row)][self.column])


Listing = FolderImages | HubImages


def list_source(source: str) -> tuple[Listing, Listing]:
    """List the training and the test images of a folder, or of ``hf/`` and a data set.

    Raises:
        DeepTwistError: if it cannot be listed, or the splits have different classes.
    """
    train: Listing
    test: Listing
    if source.startswith("hf/"):
        train, test = _list_hub(source.removeprefix("hf/"))
    else:
        root = Path(source).expanduser().resolve()
        if not root.is_dir():
            raise DeepTwistError(f"no folder of images at '{root}'")
        train = _list_folder(root / "train")
        test = _list_folder(root / ("test" if (root / "test").is_dir() else "val"))
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise DeepTwistError(
            f"'{source}' has classes in one split only: {', '.join(differing)}: add or delete them"
        )
    return train, test


def _list_folder(split: Path) -> Listing:
    with require_extra():
        from torchvision.datasets import ImageFolder
    if not split.is_dir():
        raise DeepTwistError(
            f"no folder '{split}': images belong in train/CLASS/ and test/CLASS/ or val/CLASS/"
        )
    try:
        folder = ImageFolder(str(split))
    except FileNotFoundError as error:
        raise DeepTwistError(f"no images in '{split}': {first_line(error)}") from error
    names = np.array([os.fsencode(os.path.relpath(path, split)) for path, _ in folder.samples])
    return FolderImages(str(split), names, torch.tensor(folder.targets), tuple(folder.classes))


def _list_hub(name: str) -> tuple[Listing, Listing]:
    with require_extra("huggingface"):
        import datasets
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser())
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # of the network, of files, of formats
        raise DeepTwistError(f"cannot load data set hf/{name}: {first_line(error)}") from error
    tests = [split for split in ("test", "validation", "val") if split in splits]
    if "train" not in splits or not tests:
        raise DeepTwistError(f"hf/{name} has the splits {', '.join(splits)}: it needs train, test")
    features = splits["train"].features
    columns = [n for n, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [n for n, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not columns or not labels:
        raise DeepTwistError(f"hf/{name} has no column of images, or none of class labels")
    train, test = (
        HubImages(
            f"hf/{name}/{split}",
            splits[split],
            columns[0],
            torch.tensor(splits[split].with_format("numpy")[labels[0]][:], dtype=torch.int64),
            tuple(splits[split].features[labels[0]].names),
        )
        for split in ("train", tests[0])
    )
    return train, test


@contextmanager
def _named(image: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged images surface as OSError, SyntaxError, ValueError, …
        raise DeepTwistError(
            f"cannot decode image {image} ({type(error).__name__}): replace or delete it, or "
            "set data.skip_unreadable"
        ) from error


def _to_rgb(image: "Image.Image") -> "Image.Image":
    """Convert to RGB, grey images of 16 bits by scaling them to 8, where Pillow would cut them off.

    One of mode I, of 32 bits, is taken to hold 16: as that, older Pillows read such PNGs.
    """
    if image.mode.startswith("I"):
        from PIL import Image

        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 · 257
    return image.convert("RGB")
