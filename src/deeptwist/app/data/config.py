"""Which images, and how they are prepared: plain values that recipes and the command line read."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images of a training or an evaluation.

    Attributes:
        source: digits, cifar10, a folder with train/ and test/ (or val/) of class folders, or hf/
            and the name or the folder of a Hugging Face data set.
        preset: cifar: decoded once into memory, cropped from their zero-padded selves, mirrored;
            imagenet: decoded when needed, cropped at random scales, mirrored. Without it, cifar
            for images of up to 64 pixels.
        image_size: Height and width in training; 224 for imagenet, the images' own for cifar.
        padding: Pixels of zeros around an image, for cifar; an eighth of its size without it.
        flip: Whether images are mirrored at random; by default all but digits.
        scale: Smallest share of an image that a random crop covers, for imagenet.
        auto_augment: trivial (TrivialAugmentWide) or rand (RandAugment), after the crop.
        erase: Probability that a rectangle of an image is erased.
        mixup: Alpha of MixUp, which blends pairs of images; 0 for none.
        cutmix: Alpha of CutMix, which pastes from one image into another; 0 for none. Of both,
            each pair draws one.
        eval_size: Height and width in evaluation; image_size without it.
        crop_pct: Share of the resized image's shorter side that evaluation sees; 0.875 for
            imagenet, all for cifar.
        mean: Per channel, of pixel values from 0 to 1; ImageNet's without it.
        std: Per channel, of pixel values from 0 to 1; ImageNet's without it.
        interpolation: How images are resized.
        workers: Processes that read images beside each one that trains; as many as it has cores
            without it, 0 for none.
        skip_unreadable: Leave out images that cannot be decoded, with a warning, where they
            otherwise end the run.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (what pydantic looks for)

    source: str = "digits"
    preset: Literal["cifar", "imagenet"] | None = None
    image_size: int | None = None
    padding: int | None = None
    flip: bool | None = None
    scale: float = 0.08
    auto_augment: Literal["trivial", "rand"] | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    eval_size: int | None = None
    crop_pct: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    workers: int | None = None
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} {value} is not from {low} to {high}")
        if self.preset not in ("cifar", "imagenet", None):
            raise ValueError(f"preset {self.preset!r} is neither cifar nor imagenet")


_RANGES = [
    ("image_size", 1, 2**14),
    ("eval_size", 1, 2**14),
    ("padding", 0, 2**14),
    ("scale", 1e-6, 1),
    ("erase", 0, 1),
    ("mixup", 0, 100),
    ("cutmix", 0, 100),
    ("crop_pct", 0.01, 1),
    ("workers", 0, 512),
]
