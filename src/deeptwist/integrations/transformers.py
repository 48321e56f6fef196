"""DeepTwist in Hugging Face's Trainer, and decomposed networks in its ``from_pretrained``.

A decomposed network's config names its factored layers where transformers looks for how weights
are quantised. Once this module is imported, ``from_pretrained`` makes these layers and loads them.
"""

import io
from base64 import b64decode, b64encode
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import nn

from deeptwist.errors import DeepTwistError, require_extra
from deeptwist.integrations import after_each_step, use_averages
from deeptwist.plan.codec import decode
from deeptwist.plan.plan import Plan
from deeptwist.save import SavedLayer, make_layers, plan_layers
from deeptwist.twist import DeepTwist

with require_extra("transformers"):
    from accelerate.utils import extract_model_from_parallel
    from transformers import TrainerCallback
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.trainer_callback import ExportableState
    from transformers.utils.quantization_config import QuantizationConfigMixin


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


@register_quantization_config("deeptwist")
class FactoredConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The factored layers of a network, as its config holds them.

    Attributes:
        layers: by name, their geometry and decomposition in plain values.
    """

    def __init__(self, layers: dict[str, Any], quant_method: str = "deeptwist"):
        self.layers, self.quant_method = layers, quant_method


@register_quantizer("deeptwist")
class FactoredLoader(HfQuantizer):  # type: ignore[misc]
    """Makes factored layers in a network before `from_pretrained` reads its weights."""

    is_trainable = True

    def is_serializable(self, **_: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        layers = decode(dict[str, SavedLayer], self.quantization_config.layers)
        with torch.device("cpu"):  # transformers builds on meta, where tables of indices get lost
            small = make_layers(model, Plan(plan_layers(layers)))
        model.__dict__.update(small.__dict__)  # the very module is what weights are read into
        self._tables = {
            name: {key: table.clone() for key, table in small.get_submodule(name).named_buffers()}
            for name in layers
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> nn.Module:
        for name, tables in self._tables.items():  # in no file: transformers has made empty ones
            for key, table in tables.items():
                model.get_submodule(name).get_buffer(key).copy_(table)
        # Nothing is quantised: it trains and is saved like any other, its config as it is.
        del model.hf_quantizer
        model.is_quantized = False
        return cast(nn.Module, model)
