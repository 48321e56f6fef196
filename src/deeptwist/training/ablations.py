"""Control experiments of the paper: noise of a distortion's size, at the same steps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deeptwist.plan.plan import Plan
from deeptwist.twist.distortion import DeepTwist, Distortion


class RandomNoiseBaseline(DeepTwist):
    """Moves every planned weight as far as a distortion would, in a random direction.

    `finish` distorts as ever: the network that is deployed is low-rank.
    """

    def __init__(self, model: nn.Module, plan: Plan, interval: int, *, seed: int, **options: Any):
        """Attach as `DeepTwist` does, with a seed for the directions."""
        super().__init__(model, plan, interval, **options)
        self._seed = seed

    @torch.no_grad()
    def distort(self, loss: Callable[[], Tensor | float] | None = None) -> Distortion:
        """Add noise now; return the record of the distortion that has its size."""
        layers = self.plan.compressed
        weights = [self.model.get_parameter(f"{layer.name}.weight") for layer in layers]
        before = None if loss is None else float(loss())
        undistorted = [weight.clone() for weight in weights]
        record = super().distort()
        generator = torch.Generator().manual_seed(hash((self._seed, self.steps)))
        for layer, weight, original in zip(layers, weights, undistorted, strict=True):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            size = record.layer_shifts[layer.name] * layer.weight_numel
            weight.copy_(original + size / torch.linalg.vector_norm(noise) * noise)
        after = None if loss is None else float(loss())
        increase = (after - before) / before if before and after is not None else None
        self.records[-1] = replace(record, loss_increase=increase)
        return self.records[-1]
