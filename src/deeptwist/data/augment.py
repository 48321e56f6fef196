"""Turn stored pixels into a network's input, a batch at a time, on the batch's device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(
    images: Tensor,
    *,
    padding: int,
    flip: bool,
    generator: torch.Generator,
    share: tuple[int, int] = (0, 1),
) -> Tensor:
    """Crop each image at random from its zero-padded self and mirror it with probability ½.

    This is the standard augmentation for CIFAR (He et al. 2015, section 4.2).

    Args:
        images: uint8 (B, C, H, W).
        padding: pixels of zeros on each side; all (2 · padding + 1)² crops are equally likely.
        flip: whether images are mirrored left to right.
        generator: on the CPU, whatever the device of the images.
        share: (rank, world): the images are every world-th of a batch, from the rank-th on; each
            gets what it would in the whole batch.

    Returns:
        uint8 (B, C, H, W), on the images' device.
    """
    count, _, height, width = images.shape
    rank, world = share
    if padding:
        offsets = torch.randint(2 * padding + 1, (2, count * world), generator=generator)
        offsets = offsets[:, rank::world]
        top, left = offsets.to(images.device, non_blocking=True)
        padded = F.pad(images, (padding,) * 4)
        # A view (B, C, 2·padding + 1, 2·padding + 1, H, W) of every crop; indexing copies one each.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        images = crops[torch.arange(count, device=images.device), :, top, left]
    if flip:
        mirrored = torch.randint(2, (count * world, 1, 1, 1), generator=generator)
        mirrored = mirrored[rank::world].to(images.device, non_blocking=True)
        images = torch.where(mirrored.bool(), images.flip(3), images)
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
