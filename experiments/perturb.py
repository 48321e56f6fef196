"""Control experiments of the paper: noise of a distortion's size, at the same steps."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseInPlaceOfDistortion:
    """Moves a weight as far as a distortion would, in a random direction: see `DeepTwist.perturb`.

    Attributes:
        seed: of the directions.
    """

    seed: int

    def __call__(self, name: str, step: int, weight: Tensor, approximation: Tensor) -> Tensor:
        """Return the weight with noise of the norm of its distortion, other at every step."""
        seed = zlib.crc32(f"{self.seed}/{step}/{name}".encode())
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        noise = noise.to(weight, non_blocking=True)
        size = torch.linalg.vector_norm(approximation - weight)
        moved: Tensor = weight + size / torch.linalg.vector_norm(noise) * noise
        return moved
