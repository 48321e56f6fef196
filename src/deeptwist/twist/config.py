"""The options of a distorted training as plain values: what recipes read and pass on."""

from dataclasses import dataclass
from typing import Literal

from deeptwist.errors import DeepTwistError, unknown_name_error

Momentum = Literal["keep", "reset", "project"]


@dataclass(frozen=True, kw_only=True)
class TwistConfig:
    """How distortions change on the way: `DeepTwist`'s arguments, as shares of a training.

    Attributes:
        ramp: Share of the training over which ranks fall from the largest useful ones to the
            planned ones; 0 for the planned ones from the start, as in the paper.
        choose_ranks: Share of the training in which every distortion chooses the ranks anew, for no
            more weights and MACs together than planned; 0 for the planned ranks, as in the paper.
        lr_power: The interval grows as the learning rate falls: interval / (share of the
            schedule's highest rate)^lr_power; 0 for one that does not.
        momentum: Of distorted weights: keep (the paper), reset to zero, or project on the tangent
            space of the low-rank weights.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (what pydantic looks for)

    ramp: float = 0.0
    choose_ranks: float = 0.0
    lr_power: float = 0.0
    momentum: Momentum = "keep"

    def __post_init__(self) -> None:
        for name, share in (("ramp", self.ramp), ("choose_ranks", self.choose_ranks)):
            if not 0 <= share <= 1:
                raise DeepTwistError(f"{name} {share} is not a share of the training, from 0 to 1")
        if not 0 <= self.lr_power < float("inf"):
            raise DeepTwistError(f"lr_power {self.lr_power} is not a finite number from 0")
        check_momentum_name(self.momentum)


def check_momentum_name(momentum: str) -> None:
    """Check what is to become of momentum.

    Raises:
        DeepTwistError: if there is no such choice.
    """
    if momentum not in ("keep", "reset", "project"):
        raise unknown_name_error("momentum", momentum, ("keep", "reset", "project"))
