"""DeepTwist in Lightning's Trainer."""

from contextlib import ExitStack
from typing import Any

from torch import nn

from deeptwist.errors import DeepTwistError, require_extra
from deeptwist.integrations import after_each_step, use_averages
from deeptwist.twist import DeepTwist

with require_extra("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer

_AVERAGES = "EMA", "Ema", "Averag"  # in the names of callbacks that average weights


class DeepTwistCallback(Callback):
    """Distorts while a Trainer fits, and decomposes at the end.

    Δw goes to the Trainer's loggers as ``weight_shift``, the state into its checkpoints: a fit
    resumed with ``ckpt_path`` goes on bit for bit.

    Attributes:
        twist: ``DeepTwist(module.network, plan, interval=200)``, of the network that is fitted.
        small: the decomposed network; none until the fit has ended.
    """

    def __init__(self, twist: DeepTwist):
        self.twist = twist
        self.small: nn.Module | None = None
        self._listening = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for later in callbacks[callbacks.index(self) + 1 :]:
            if any(word in kind.__name__ for kind in type(later).__mro__ for word in _AVERAGES):
                raise DeepTwistError(
                    f"{type(later).__name__} would put its average in place after the network is "
                    "decomposed: list DeepTwistCallback after it"
                )

        def step() -> None:
            if self.twist.step():
                self._log(trainer)

        # Not by Lightning's `global_step`: it counts the steps that AMP skipped.
        self._listening.enter_context(after_each_step(self.twist, trainer.optimizers, step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listening.close()
        use_averages(trainer.optimizers)
        self.small = self.twist.finish()
        self._log(trainer)

    def on_exception(self, *_: Any) -> None:
        self._listening.close()

    def _log(self, trainer: Trainer) -> None:
        metrics = {"weight_shift": self.twist.history[-1].weight_shift}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return self.twist.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.twist.load_state_dict(state_dict)
