"""Optional steps after training; not in the paper, so each is reported separately."""

from itertools import islice

import torch
from torch import nn

from deeptwist.app.data import ImageData, batches
from deeptwist.app.training.evaluation import preprocess
from deeptwist.decompose import recalibrate_batch_norm as recalibrate


def recalibrate_batch_norm(
    model: nn.Module, data: ImageData, num_batches: int, batch_size: int
) -> nn.Module:
    """Return a copy whose batch norms hold the statistics of training images as they meet them now.

    Args:
        model: deployed; left as it is.
        data: whose training split's images are seen, not augmented.
        num_batches: batches of a shuffle that is always the same.
        batch_size: images in each.
    """
    shuffle = torch.Generator().manual_seed(0)
    shuffled = islice(batches(data.train, batch_size, generator=shuffle), num_batches)
    return recalibrate(model, (preprocess(images, model, data) for images, _ in shuffled))
