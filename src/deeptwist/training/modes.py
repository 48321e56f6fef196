"""Training modes: which network is trained, when its weights are distorted, what is deployed."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from deeptwist.errors import unknown_name_error
from deeptwist.twist.config import TwistConfig

if TYPE_CHECKING:  # recipes name modes, and the help that shows recipes must not wait for torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from deeptwist.plan.calibration import Calibration
    from deeptwist.plan.plan import Plan
    from deeptwist.twist.distortion import DeepTwist, Perturb
    from deeptwist.twist.schedules import Interval


@dataclass(frozen=True)
class TrainingMode(ABC):
    """How a network is trained and what is deployed.

    Attributes:
        name: what recipes, the command line and a run's records call it.
        label: what tables and legends call it.
        compresses: whether a decomposed network is deployed.
        distorts: whether weights are distorted, on the way or at the end alone.
        at_intervals: whether the recipe's interval says when.
        is_ablation: whether it is a control experiment rather than a method to use.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    compresses: ClassVar[bool] = True
    distorts: ClassVar[bool] = False
    at_intervals: ClassVar[bool] = False
    is_ablation: ClassVar[bool] = False

    @abstractmethod
    def trained_network(
        self, model: "nn.Module", plan: "Plan", calibration: "Calibration | None" = None
    ) -> "nn.Module":
        """Return the network whose parameters are trained, which may be the model itself."""

    def attach(
        self,
        model: "nn.Module",
        plan: "Plan",
        *,
        steps: int,
        lr_factor: Callable[[int], float],
        optimizer: "Optimizer",
        example_input: "Tensor",
    ) -> "DeepTwist | None":
        """Return what distorts the trained network, `None` in a mode without distortions.

        Args:
            model: what `trained_network` returned.
            plan: of the model.
            steps: optimizer steps in all.
            lr_factor: the share of the learning rate that a step has.
            optimizer: of the model's parameters.
            example_input: see `DeepTwist`.
        """
        return None

    def deploy(self, model: "nn.Module", plan: "Plan") -> "nn.Module":
        """Return a trained network in the form that is deployed."""
        return model


@dataclass(frozen=True)
class Dense(TrainingMode):
    """Train the network as it is."""

    name = "dense"
    label = "dense"
    compresses = False

    def trained_network(
        self, model: "nn.Module", plan: "Plan", calibration: "Calibration | None" = None
    ) -> "nn.Module":
        """Return the model."""
        return model


@dataclass(frozen=True)
class Finetune(TrainingMode):
    """Decompose the network first and train its factors: conventional fine-tuning."""

    name = "finetune"
    label = "conventional fine-tuning"

    def trained_network(
        self, model: "nn.Module", plan: "Plan", calibration: "Calibration | None" = None
    ) -> "nn.Module":
        """Return the decomposed model."""
        from deeptwist.decompose import decompose

        return decompose(model, plan, calibration=calibration)


@dataclass(frozen=True, kw_only=True)
class _DistortingMode(TrainingMode):
    """Train the dense network, distort it, decompose it at the end."""

    distorts = True

    twist: TwistConfig = field(default_factory=TwistConfig)

    def trained_network(
        self, model: "nn.Module", plan: "Plan", calibration: "Calibration | None" = None
    ) -> "nn.Module":
        return model

    def attach(
        self,
        model: "nn.Module",
        plan: "Plan",
        *,
        steps: int,
        lr_factor: Callable[[int], float],
        optimizer: "Optimizer",
        example_input: "Tensor",
    ) -> "DeepTwist":
        from deeptwist.twist.distortion import DeepTwist
        from deeptwist.twist.schedules import follow_learning_rate

        interval, power = self._interval(steps), self.twist.lr_power
        if self.at_intervals and power:
            assert isinstance(interval, int)
            interval = follow_learning_rate(interval, lr_factor, steps, power)
        return DeepTwist(
            model,
            plan,
            interval,
            ramp_steps=round(self.twist.ramp * steps),
            choose_ranks_steps=round(self.twist.choose_ranks * steps),
            momentum=self.twist.momentum,
            optimizer=optimizer,
            example_input=example_input,
            perturb=self._perturb(),
        )

    def deploy(self, model: "nn.Module", plan: "Plan") -> "nn.Module":
        from deeptwist.decompose import decompose

        return decompose(model, plan)

    @abstractmethod
    def _interval(self, steps: int) -> "Interval":
        """Return S_D for a training of so many optimizer steps."""

    def _perturb(self) -> "Perturb | None":
        """Return what is written in place of an approximation; see `DeepTwist`."""
        return None


@dataclass(frozen=True)
class Twist(_DistortingMode):
    """Distort at every `interval`-th step: DeepTwist."""

    name = "deeptwist"
    label = "DeepTwist"
    at_intervals = True

    interval: "Interval"

    def _interval(self, steps: int) -> "Interval":
        return self.interval


@dataclass(frozen=True)
class Projected(_DistortingMode):
    """Distort at every step."""

    name = "projected"
    label = "control: projection at every step"
    is_ablation = True

    def _interval(self, steps: int) -> int:
        return 1


@dataclass(frozen=True)
class RandomNoise(_DistortingMode):
    """Add random noise of each distortion's size in its place, at every `interval`-th step."""

    name = "random_noise"
    label = "control: random noise"
    at_intervals = True
    is_ablation = True

    interval: "Interval"
    seed: int

    def _interval(self, steps: int) -> "Interval":
        return self.interval

    def _perturb(self) -> "Perturb":
        from deeptwist.training.ablations import NoiseInPlaceOfDistortion

        return NoiseInPlaceOfDistortion(self.seed)


@dataclass(frozen=True)
class DecomposeAtEnd(_DistortingMode):
    """Distort once, at the end."""

    name = "decompose_at_end"
    label = "control: decomposed once, at the end"
    is_ablation = True

    def _interval(self, steps: int) -> int:
        return steps + 1


MODES: dict[str, type[TrainingMode]] = {
    mode.name: mode for mode in (Dense, Twist, Finetune, Projected, RandomNoise, DecomposeAtEnd)
}
_ALIASES = {  # names of earlier versions
    "decomposed": "finetune",
    "projection": "projected",
    "noise": "random_noise",
    "once": "decompose_at_end",
}


def mode_name(name: str) -> str:
    """Return today's name of a mode that may be written as in earlier versions."""
    return _ALIASES.get(name, name)


def find_mode(name: str) -> type[TrainingMode]:
    """Return the mode of this name, or of this name in earlier versions.

    Raises:
        DeepTwistError: if there is none.
    """
    if mode_name(name) not in MODES:
        raise unknown_name_error("mode", name, MODES)
    return MODES[mode_name(name)]
