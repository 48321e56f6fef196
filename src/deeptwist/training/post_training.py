"""What may follow the last distortion; none of it is the paper's, so each has a row of its own."""

import copy
from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deeptwist.data import Dataset, batches
from deeptwist.training.evaluation import as_input


@torch.no_grad()
def recalibrated(model: nn.Module, data: Dataset, num_batches: int, batch_size: int) -> nn.Module:
    """A copy whose batch norms hold the statistics of training images as they meet them now.

    Args:
        model: deployed; left as it is.
        data: of whose training split images are seen, not augmented.
        num_batches: seen, of a shuffle that is always the same.
        batch_size: images in each.
    """
    model = copy.deepcopy(model)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [module.momentum for module in norms]
    model.eval()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the plain mean over all that it sees
        module.train()
    shuffle = torch.Generator().manual_seed(0)
    for images, _ in islice(batches(data.train, batch_size, generator=shuffle), num_batches):
        model(as_input(images, model, data))
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    return model.eval()
