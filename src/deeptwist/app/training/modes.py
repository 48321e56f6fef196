"""Training modes: which network is trained, when its weights are distorted, what is deployed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deeptwist.errors import unknown_name_error

if TYPE_CHECKING:  # recipes name modes, and the help that shows recipes must not wait for torch
    from torch import Tensor, nn

    from deeptwist.plan.calibration import Calibration
    from deeptwist.plan.plan import Plan
    from deeptwist.twist.distortion import DeepTwist


@dataclass(frozen=True)
class TrainingMode:
    """How a network is trained and what is deployed.

    Attributes:
        name: what recipes, the command line and a run's records call it.
        label: what tables and legends call it.
        compresses: whether a decomposed network is deployed.
        distorts: whether weights are distorted, on the way or at the end alone.
        at_intervals: whether the recipe's interval says when.
        is_ablation: whether it is a control experiment rather than a method to use.
    """

    name: str
    label: str
    compresses: bool = True
    distorts: bool = False
    at_intervals: bool = False
    is_ablation: bool = False

    def trained_network(
        self, model: "nn.Module", plan: "Plan", calibration: "Calibration | None" = None
    ) -> "nn.Module":
        """Return the network whose parameters are trained, which may be the model itself."""
        from deeptwist.decompose import decompose

        decomposes = self.compresses and not self.distorts
        return decompose(model, plan, calibration=calibration) if decomposes else model

    def deploy(self, model: "nn.Module", plan: "Plan") -> "nn.Module":
        """Return a trained network in the form that is deployed."""
        from deeptwist.decompose import decompose

        return decompose(model, plan) if self.distorts else model

    def attach(
        self,
        model: "nn.Module",
        plan: "Plan",
        *,
        interval: int,
        seed: int,
        steps: int,
        example_input: "Tensor",
    ) -> "DeepTwist | None":
        """Return what distorts the trained network, `None` in a mode without distortions.

        Args:
            model: what `trained_network` returned.
            plan: of the model.
            interval: S_D, where the mode has none of its own.
            seed: of noise.
            steps: optimizer steps in all.
            example_input: see `DeepTwist`.
        """
        from deeptwist.app.training.ablations import NoiseInPlaceOfDistortion
        from deeptwist.twist.distortion import DeepTwist

        if not self.distorts:
            return None
        interval = {"projected": 1, "decompose_at_end": steps + 1}.get(self.name, interval)
        return DeepTwist(
            model,
            plan,
            interval,
            example_input=example_input,
            perturb=NoiseInPlaceOfDistortion(seed) if self.name == "random_noise" else None,
        )


MODES = {
    mode.name: mode
    for mode in (
        TrainingMode("dense", "dense", compresses=False),
        TrainingMode("deeptwist", "DeepTwist", distorts=True, at_intervals=True),
        TrainingMode("finetune", "conventional fine-tuning"),
        TrainingMode(
            "projected", "control: projection at every step", distorts=True, is_ablation=True
        ),
        TrainingMode(
            "random_noise",
            "control: random noise",
            distorts=True,
            at_intervals=True,
            is_ablation=True,
        ),
        TrainingMode(
            "decompose_at_end",
            "control: decomposed once, at the end",
            distorts=True,
            is_ablation=True,
        ),
    )
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


def find_mode(name: str) -> TrainingMode:
    """Return the mode of this name, or of this name in earlier versions.

    Raises:
        DeepTwistError: if there is none.
    """
    if mode_name(name) not in MODES:
        raise unknown_name_error("mode", name, MODES)
    return MODES[mode_name(name)]
