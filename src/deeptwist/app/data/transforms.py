"""From images to a network's input: torchvision's transforms, and a batch's own on its device."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deeptwist.app.data.config import DataConfig
from deeptwist.app.data.dataset import Mix, Transform
from deeptwist.errors import require_extra


def train_transform(config: DataConfig, size: tuple[int, int], *, padding: int) -> Transform:
    """Return a preset's augmentation of one image, by torchvision's transforms.

    Args:
        config: names the preset.
        size: height and width that come out.
        padding: of the cifar preset.
    """
    v2, interpolation = _transforms(config)
    if config.preset == "imagenet":
        scale = (config.scale, 1.0)
        steps = [v2.RandomResizedCrop(size, scale=scale, interpolation=interpolation)]
    else:
        steps = [v2.RandomCrop(size, padding=padding)]
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


def eval_transform(config: DataConfig, size: int | None) -> Transform:
    """Return evaluation's preparation: the shorter side resized, the centre square cropped.

    Args:
        config: says which share of the shorter side is seen.
        size: height and width that come out; images stay as they are if `None`.
    """
    v2, interpolation = _transforms(config)
    transform: Transform = v2.PILToTensor()
    if size is not None:
        resized = v2.Resize(int(size / (config.crop_pct or 1)), interpolation=interpolation)
        transform = v2.Compose([resized, v2.CenterCrop(size), transform])
    return transform


def mix_transform(config: DataConfig, num_classes: int) -> Mix | None:
    """Return what blends a pair of images, `None` where the config asks for nothing."""
    v2, _ = _transforms(config)
    options = (v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)
    kinds = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in options if alpha]
    return v2.RandomChoice(kinds) if kinds else None


def augment(images: Tensor, draws: Tensor, *, padding: int, flip: bool) -> Tensor:
    """Crop each image at random from its zero-padded self and mirror it with probability ½.

    This is the standard augmentation for CIFAR (He et al. 2015, section 4.2).

    Args:
        images: uint8 (B, C, H, W).
        draws: float64 (B, 3), uniform in [0, 1).
        padding: pixels of zeros on each side; all (2 · padding + 1)² crops are equally likely.
        flip: whether images are mirrored left to right.

    Returns:
        uint8 (B, C, H, W), on the images' device.
    """
    count, _, height, width = images.shape
    draws = draws.to(images.device, non_blocking=True)
    if padding:
        top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
        padded = F.pad(images, (padding,) * 4)
        # A view (B, C, 2·padding + 1, 2·padding + 1, H, W) of every crop; indexing copies one each.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        images = crops[torch.arange(count, device=images.device), :, top, left]
    if flip:
        images = torch.where(draws[:, 2].view(-1, 1, 1, 1) < 0.5, images.flip(3), images)
    return images


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise pixels: (images / 255 − mean) / std.

    Args:
        images: uint8 (B, C, H, W).
        mean: per channel, of pixel values scaled to [0, 1].
        std: per channel, of pixel values scaled to [0, 1].

    Returns:
        float32 (B, C, H, W), on the images' device.
    """
    center, scale = (
        255 * torch.tensor(values).view(-1, 1, 1).to(images.device, non_blocking=True)
        for values in (mean, std)
    )
    return images.float().sub_(center).div_(scale)


def _transforms(config: DataConfig) -> tuple[Any, Any]:
    with require_extra():
        from torchvision.transforms import InterpolationMode, v2
    return v2, InterpolationMode(config.interpolation)
