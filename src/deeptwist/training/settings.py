"""What a training run is set to."""

from dataclasses import dataclass
from typing import Literal

from deeptwist.errors import DeepTwistError

Mode = Literal["dense", "deeptwist", "decomposed"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """SGD with Nesterov momentum and a cosine decay to zero: the same for every mode compared.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Images in a step.
        lr: The learning rate that the decay starts from.
        momentum: Of SGD.
        weight_decay: Of SGD, on every parameter.
        interval: S_D, optimizer steps between distortions, in DeepTwist mode.
        seed: Of the order of the images and their augmentation.
        precision: Lightning Fabric's name for it; bf16-mixed is bf16 autocast.
    """

    epochs: int = 6
    batch_size: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    interval: int = 200
    seed: int = 0
    precision: Precision = "32-true"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "interval"):
            if getattr(self, name) < 1:
                raise DeepTwistError(f"{name} {getattr(self, name)} is not a number from 1 on")
        for name in ("lr", "momentum", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise DeepTwistError(f"{name} {getattr(self, name)} is negative")
