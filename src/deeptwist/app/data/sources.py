"""Data sets by name or folder, listed and prepared: what `load_data` is made of."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deeptwist.app.data.dataset import ImageData, ImageFiles, Mix, Split, Transform
from deeptwist.app.data.loading import batches
from deeptwist.errors import DeepTwistError, explaining, require_extra

if TYPE_CHECKING:
    from PIL import Image

    from deeptwist.app.training.recipe import DataRecipe

logger = logging.getLogger("deeptwist")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ADVICE = ": replace or delete it, or leave such out: --skip-unreadable"
_SMALL = 64  # pixels: up to here, images are kept in memory without being asked for


def load_data(config: "DataRecipe | str", **options: Any) -> ImageData:
    """Load a data set by name or folder.

    Args:
        config: see `DataRecipe`; or its source alone.
        options: other fields of a `DataRecipe`.

    Raises:
        DeepTwistError: if there is no such data set, or it cannot be read or prepared so.
    """
    if isinstance(config, str):
        with require_extra():
            from deeptwist.app.training.recipe import make_recipe
        config = make_recipe({"model": "none", "data": {"source": config, **options}}).data
    config.check_source()
    return _load_named(config) if config.is_named else _load_files(config)


# --- what prepares images


def _load_named(config: "DataRecipe") -> ImageData:
    if config.image_size is not None or config.preset == "imagenet":
        raise DeepTwistError(
            f"{config.source} has a fixed image size and is kept in memory: leave out image_size "
            "and the imagenet preset"
        )
    config = replace(config, preset="cifar")
    if config.source == "digits":  # mean and std of the training split; a mirrored 2 is no digit
        config = _with_defaults(config, padding=1, flip=False, mean=(0.305,), std=(0.376,))
        return _image_data(config, config.source, *_digits())
    return _image_data(_with_defaults(config, padding=4), config.source, *_cifar10())


def _load_files(config: "DataRecipe") -> ImageData:
    train, test, classes = _list_source(config.source)
    if config.preset is None:
        assert isinstance(train.images, ImageFiles)
        first = train.images.first(skip_unreadable=config.skip_unreadable)
        size = config.image_size or max(first.size)
        config = replace(config, preset="cifar" if size <= _SMALL else "imagenet")
    if config.preset == "imagenet":
        config = _with_defaults(config, image_size=224, crop_pct=0.875)
    config = _with_defaults(config, eval_size=config.image_size)
    train, test = (
        _prepared(train, config, config.image_size),
        _prepared(test, config, config.eval_size),
    )
    if config.preset == "cifar":
        train, test = _decoded(train), _decoded(test)
    return _image_data(config, Path(config.source).name, train, test, classes)


def _with_defaults(config: "DataRecipe", **defaults: Any) -> "DataRecipe":
    """Return the config with values where it has `None`."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = min(16, max(1, len(os.sched_getaffinity(0)) // processes))
    defaults = {
        "flip": True, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "workers": workers, **defaults
    }  # fmt: skip
    return replace(config, **{n: v for n, v in defaults.items() if getattr(config, n) is None})


def _image_data(
    config: "DataRecipe", name: str, train: Split, test: Split, classes: tuple[str, ...]
) -> ImageData:
    """Return a data set with the augmentation that the config, which is whole, asks for."""
    height, width = train.images.shape[2:]
    padding = max(1, min(height, width) // 8) if config.padding is None else config.padding
    transform, mix = _train_transform(config, (height, width), padding), _mix(config, len(classes))
    on_device = not (config.auto_augment or config.erase or mix)
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
        transform=None if isinstance(train.images, Tensor) and on_device else transform,
        mix=mix,
        workers=config.workers or 0,
        resize=_resize(config, config.eval_size),
        interpolation=config.interpolation,
    )


def _train_transform(config: "DataRecipe", size: tuple[int, int], padding: int) -> Transform:
    """Return a preset's augmentation of one image to a height and width."""
    v2, interpolation = _transforms(config.interpolation)
    steps = [v2.RandomCrop(size, padding=padding)]
    if config.preset == "imagenet":
        steps = [v2.RandomResizedCrop(size, (config.scale, 1.0), interpolation=interpolation)]
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.auto_augment is not None:
        kind = v2.TrivialAugmentWide if config.auto_augment == "trivial" else v2.RandAugment
        steps.append(kind(interpolation=interpolation))
    steps.append(v2.ToImage())
    if config.erase:
        mean = [255 * value for value in config.mean or ()]  # what becomes 0
        steps.append(v2.RandomErasing(config.erase, value=mean))
    transform: Transform = v2.Compose([*steps, v2.ToPureTensor()])
    return transform


def _resize(config: "DataRecipe", size: int | None) -> int | None:
    """Return what the shorter side is resized to, of which the centre of this size is seen."""
    return None if size is None else int(size / (config.crop_pct or 1))


def eval_transform(resize: int | None, size: Sequence[int], interpolation: str) -> Transform:
    """Return evaluation's: the shorter side resized, the centre cropped; none without `resize`."""
    v2, mode = _transforms(interpolation)
    transform: Transform = v2.PILToTensor()
    if resize is not None:
        resized = v2.Resize(resize, interpolation=mode)
        transform = v2.Compose([resized, v2.CenterCrop(size), transform])
    return transform


def _mix(config: "DataRecipe", num_classes: int) -> Mix | None:
    """Return what blends a pair of images, `None` where the config asks for nothing."""
    v2, _ = _transforms(config.interpolation)
    options = (v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)
    kinds = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in options if alpha]
    return v2.RandomChoice(kinds) if kinds else None


def _transforms(interpolation: str) -> tuple[Any, Any]:
    with require_extra():
        from torchvision.transforms import InterpolationMode, v2
    return v2, InterpolationMode(interpolation)


# --- where images come from


Listed = tuple[Split, tuple[str, ...]]  # images that are not yet prepared; each label's class


def _list_source(source: str) -> tuple[Split, Split, tuple[str, ...]]:
    """List the training and the test images of a folder, or of ``hf/`` and a data set."""
    if source.startswith("hf/"):
        listed = _list_hub(source.removeprefix("hf/"))
    else:
        root = Path(source).expanduser().resolve()
        folders = {entry.name for entry in root.iterdir() if entry.is_dir()}
        if folders and not folders & {"train", "test", "val"}:
            whole, classes = _list_folder(root)
            return *_split(whole, source), classes
        names = "train", "test" if (root / "test").is_dir() else "val"
        listed = [_list_folder(root / name) for name in names]
    (train, classes), (test, others) = listed
    if classes != others:
        differing = sorted({*classes} ^ {*others})
        raise DeepTwistError(
            f"'{source}' has classes in one split only: {', '.join(differing)}: add or delete them"
        )
    return train, test, classes


def _listed(read: "Callable[[int], Image.Image]", labels: Tensor) -> Split:
    """Return images to be read; see `_prepared`."""
    as_is = eval_transform(None, (), "bilinear")
    return Split(ImageFiles(read, np.arange(len(labels)), as_is, ()), labels)


def _list_folder(split: Path) -> Listed:
    with require_extra():
        from torchvision.datasets import ImageFolder
    if not split.is_dir():
        raise DeepTwistError(
            f"no folder '{split}': images belong in CLASS/, or in train/CLASS/ and test/CLASS/ or "
            "val/CLASS/"
        )
    with explaining(f"no images in '{split}'", errors=(FileNotFoundError,)):
        folder = ImageFolder(str(split))
    # Encoded in an array, not a list of strings, which every worker would come to copy.
    names = np.array([os.fsencode(os.path.relpath(path, split)) for path, _ in folder.samples])
    read = partial(_read_file, str(split), names)
    return _listed(read, torch.tensor(folder.targets)), tuple(folder.classes)


def _split(whole: Split, source: str) -> tuple[Split, Split]:
    """Split class folders: the first fifth of each class's images, shuffled, to test on.

    The shuffle is always the same, whatever the seed of a run.
    """
    order = torch.randperm(len(whole.labels), generator=torch.Generator().manual_seed(0))
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    for label in whole.labels.unique():
        rows = order[whole.labels[order] == label]
        count = max(1, len(rows) // 5) if len(rows) > 1 else 0  # the only one is trained on
        parts[0].append(rows[count:])
        parts[1].append(rows[:count])
    train, test = (torch.cat(part).sort().values for part in parts)
    if not len(test):
        raise DeepTwistError(f"'{source}' has one image of each class: nothing is left to test on")
    logger.warning(
        "'%s' has no train/: of each class a fifth of the images are to test on, always the same "
        "ones (%d to train on, %d to test)",
        source,
        len(train),
        len(test),
    )
    return whole.subset(train), whole.subset(test)


def _list_hub(name: str) -> list[Listed]:
    with require_extra("huggingface"):
        import datasets
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser())
    # Of the network, of files, of formats.
    with explaining(f"cannot load data set hf/{name}", errors=(Exception,)):
        splits = datasets.load_dataset(name)
    tests = [split for split in ("test", "validation", "val") if split in splits]
    if "train" not in splits or not tests:
        raise DeepTwistError(f"hf/{name} has the splits {', '.join(splits)}: it needs train, test")
    features = splits["train"].features
    columns = [n for n, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [n for n, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not columns or not labels:
        raise DeepTwistError(f"hf/{name} has no column of images, or none of class labels")
    listed = []
    for split in ("train", tests[0]):
        read = partial(_read_row, f"hf/{name}/{split}", splits[split], columns[0])
        numbers = torch.tensor(splits[split].with_format("numpy")[labels[0]][:], dtype=torch.int64)
        classes = tuple(splits[split].features[labels[0]].names)
        listed.append((_listed(read, numbers), classes))
    return listed


def _read_file(root: str, names: npt.NDArray[np.bytes_], row: int) -> "Image.Image":
    return read_image(os.path.join(root, os.fsdecode(names[row])))


def read_image(path: str | Path, advice: str = _ADVICE) -> "Image.Image":
    """Read an image file as RGB.

    Raises:
        DeepTwistError: if it cannot be decoded.
    """
    with require_extra():
        from PIL import Image
    with _named(f"'{path}'", advice), Image.open(path) as image:
        return _to_rgb(image)


def _read_row(name: str, dataset: Any, column: str, row: int) -> "Image.Image":
    with _named(f"{row} of {name}"):
        return _to_rgb(dataset[int(row)][column])


@contextmanager
def _named(image: str, advice: str = _ADVICE) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged images surface as OSError, SyntaxError, ValueError, …
        raise DeepTwistError(
            f"cannot decode image {image} ({type(error).__name__}){advice}"
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


def _prepared(split: Split, config: "DataRecipe", size: int | None) -> Split:
    """Return files with evaluation's transform to this height and width."""
    files = split.images
    assert isinstance(files, ImageFiles)
    transform = eval_transform(_resize(config, size), (size or 0, size or 0), config.interpolation)
    skips, workers = config.skip_unreadable, config.workers or 0
    first = None if size else transform(files.first(skip_unreadable=skips))
    shape = (3, size or 0, size or 0) if first is None else tuple(first.shape)
    return Split(ImageFiles(files.read, files.rows, transform, shape, workers, skips), split.labels)


def _decoded(split: Split) -> Split:
    """Return a split whose images are in memory, if all of them fit."""
    needed = math.prod(split.images.shape)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise DeepTwistError(
            f"{len(split.labels):,} images take {needed / 2**30:.0f} GiB of this machine's "
            f"{memory / 2**30:.0f}: choose the imagenet preset, which reads them as needed"
        )
    images, labels = zip(*batches(split, 512), strict=True)
    return Split(torch.cat(images), torch.cat(labels))


def _digits() -> tuple[Split, Split, tuple[str, ...]]:
    """Return 1,437 training and 360 test images, each digit in equal shares; always the same.

    Source: the test set of UCI's 'Optical Recognition of Handwritten Digits', its levels 0 to 16
    scaled to 0 to 255.
    """
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
    advice = "give a folder that holds train/CLASS/*.png and test/CLASS/*.png instead"
    with explaining(f"cannot download CIFAR-10 into {folder}", advice, (OSError, RuntimeError)):
        parts = [CIFAR10(folder, train=part, download=True) for part in (True, False)]
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    train, test = (Split(x, torch.tensor(p.targets)) for x, p in zip(images, parts, strict=True))
    return train, test, tuple(parts[0].classes)
