"""DeepTwist in the Trainer of Hugging Face."""

import io
from base64 import b64decode, b64encode
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from deeptwist.errors import DeepTwistError, require_extra
from deeptwist.integrations.optimizer_hooks import after_each_step, use_averages
from deeptwist.twist.distortion import DeepTwist

with require_extra("transformers"):
    from accelerate.utils import extract_model_from_parallel
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState


class DeepTwistCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Distorts while a Trainer trains, and decomposes at the end.

    Its state is in the ``trainer_state.json`` of every checkpoint: a run resumed with
    ``resume_from_checkpoint`` goes on bit for bit.

    Attributes:
        twist: ``DeepTwist(model, plan, interval=200)``, of the trained model or of one inside it.
        small: the decomposed model; none until training has ended.
    """

    def __init__(self, twist: DeepTwist):
        self.twist = twist
        self.small: nn.Module | None = None
        self._listening = ExitStack()

    def on_init_end(self, args: Any, *_: Any, **__: Any) -> None:
        if args.restore_callback_states_from_checkpoint:
            raise DeepTwistError("restore_callback_states_from_checkpoint loses the twist: omit it")

    def on_train_begin(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        file = io.BytesIO(b64decode(saved["attributes"]["twist"]))
        self.twist.load_state_dict(torch.load(file, weights_only=True))
        # Not by `on_optimizer_step`: it comes for steps that AMP skipped, too.
        handle = after_each_step(self.twist, [has["optimizer"].optimizer], self.twist.step)
        self._listening.close()  # of a run that an exception ended
        self._listening.enter_context(handle)

    def on_train_end(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        self._listening.close()
        use_averages([has["optimizer"].optimizer])
        # AMP's forward is bound to the model itself: a copy would go on calling this one.
        extract_model_from_parallel(self.twist.model, keep_fp32_wrapper=False)
        self.small = self.twist.finish()

    def state(self) -> dict[str, Any]:
        torch.save(self.twist.state_dict(), file := io.BytesIO())
        return {"args": {}, "attributes": {"twist": b64encode(file.getvalue()).decode()}}
