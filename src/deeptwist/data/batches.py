"""A split in batches, once through."""

from collections.abc import Iterator

import torch
from torch import Tensor

from deeptwist.data.dataset import Split
from deeptwist.errors import DeepTwistError


def batches(
    split: Split,
    batch_size: int,
    *,
    generator: torch.Generator | None,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the batches of one pass over a split.

    Args:
        split: the images and labels.
        batch_size: images in each batch.
        generator: on the CPU; draws the order, at the call. Without it the order is the stored one.
        drop_last: whether to leave out a last batch that would be smaller.

    Returns:
        Batches of images, uint8 (B, C, H, W), and labels, int64 (B,), on the split's device.

    Raises:
        DeepTwistError: if `batch_size` is not positive.
    """
    if batch_size < 1:
        raise DeepTwistError(f"batch_size must be at least 1, not {batch_size}")
    count = len(split.labels)
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    order = order.to(split.images.device)
    end = count - count % batch_size if drop_last else count
    chunks = (order[start : start + batch_size] for start in range(0, end, batch_size))
    return ((split.images[rows], split.labels[rows]) for rows in chunks)
