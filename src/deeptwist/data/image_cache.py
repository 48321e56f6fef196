"""Decoded images on disk: each is decoded once and memory-mapped from then on."""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deeptwist.errors import DeepTwistError, require_extra
from deeptwist.serialization import atomic_write

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 256  # images decoded ahead of the disk: 38 MB at 224 × 224
_WORTH_THREADS = 3 * 128 * 128  # numbers in an image

Pixels = npt.NDArray[np.uint8]


class MixedSizesError(Exception):
    """Images that differ in size cannot share an array."""


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return where data sets are kept: `cache`, else $DEEPTWIST_CACHE, else ~/.cache/deeptwist."""
    return Path(cache or os.environ.get("DEEPTWIST_CACHE") or "~/.cache/deeptwist").expanduser()


def open_images(file: Path, count: int) -> Tensor | None:
    """Memory-map what `write_images` wrote; return `None` if the file is missing or not whole.

    Args:
        file: the .npy file.
        count: N, how many images it should hold.

    Returns:
        uint8 (N, 3, H, W); writing to it changes this process's memory, never the file.
    """
    try:
        images = np.load(file, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:2] != (count, 3):
        return None
    return torch.from_numpy(images)


def write_images(file: Path, paths: Sequence[str], image_size: int | None) -> None:
    """Decode images into one .npy array (N, 3, H, W) that appears only when it is whole.

    Args:
        file: the .npy file; its folder is made.
        paths: the images, in order, at least one.
        image_size: H and W, see `read_image`; without it all images must be of one size.

    Raises:
        MixedSizesError: if `image_size` is not given and the images differ in size.
        DeepTwistError: if an image cannot be decoded or the file not be written.
    """
    shape = (len(paths), *read_image(paths[0], image_size).shape)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary, temporary.open("wb") as array:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            for image in _decoded(paths, image_size):
                if image.shape != shape[1:]:
                    raise MixedSizesError
                array.write(image.tobytes())
    except OSError as error:
        raise DeepTwistError(
            f"cannot cache decoded images in {file.parent} ({error.strerror}): "
            "point $DEEPTWIST_CACHE at a folder with room"
        ) from error


def read_image(path: str, image_size: int | None) -> Pixels:
    """Decode one image to RGB; grey ones of 16 bits are scaled to 8.

    Args:
        path: the image.
        image_size: if given, the shorter side is resized to it (bilinear, antialiased) and the
            centre square cropped, as torchvision does for evaluation.

    Returns:
        uint8 (3, H, W).

    Raises:
        DeepTwistError: if the file cannot be read as an image.
    """
    with require_extra():
        from PIL import Image
        from torchvision.transforms import functional
    try:
        with Image.open(path) as stored:
            image = _to_uint8(stored).convert("RGB")
    except Exception as error:  # damaged images surface as OSError, SyntaxError, ValueError, …
        raise DeepTwistError(
            f"cannot decode image '{path}' ({type(error).__name__}): replace or delete it"
        ) from error
    if image_size is not None:
        image = functional.center_crop(functional.resize(image, image_size), image_size)
    return np.asarray(image).transpose(2, 0, 1)


def _to_uint8(image: "Image.Image") -> "Image.Image":
    """Scale a grey image of 16 bits to 8, where Pillow would cut it off; keep others as they are.

    One of mode I, of 32 bits, is taken to hold 16: as that, older Pillows read such PNGs.
    """
    if not image.mode.startswith("I"):
        return image
    from PIL import Image

    values = np.asarray(image).clip(0, 65535).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # rounded: 65535 = 255 · 257


def _decoded(paths: Sequence[str], image_size: int | None) -> Iterator[Pixels]:
    with require_extra():
        from rich.console import Console
        from rich.progress import track
    starts = track(
        range(0, len(paths), _CHUNK),
        description=f"decoding {len(paths):,} images, once",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    decode = partial(read_image, image_size=image_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Smaller images hold the interpreter's lock most of the time, and threads slow them down.
        apply = pool.map if decode(paths[0]).size >= _WORTH_THREADS else map
        for start in starts:
            yield from apply(decode, paths[start : start + _CHUNK])
