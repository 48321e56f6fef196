"""Optional steps after training; not in the paper, so each is reported separately."""

import copy
from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deeptwist.data import ImageData, batches
from deeptwist.training.evaluation import preprocess


@torch.no_grad()
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
    model = copy.deepcopy(model).eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all that it sees
        norm.train()
    shuffle = torch.Generator().manual_seed(0)
    for images, _ in islice(batches(data.train, batch_size, generator=shuffle), num_batches):
        model(preprocess(images, model, data))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
