"""Load weights from other people's files into a model, without running their code."""

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError

_WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into a model: every tensor of one fits one of the other.

    Args:
        model: receives the weights in its own dtype and on its own device; unchanged on error.
        path: a ``.safetensors`` file or a `torch.save` of tensors, never unpickled beyond those:
            a state dict, or a dict that holds one as 'state_dict', 'model', 'model_state',
            'model_state_dict' or 'state_dict_ema' (the first of these). The prefixes 'module.'
            and '_orig_mod.' are dropped where the model itself has none.

    Raises:
        DeepTwistError: if the file is missing, unreadable or not of tensors alone, or if names or
            shapes differ from the model's.
    """
    path = Path(path)
    expected = model.state_dict()
    weights = _without_prefixes(_state_dict(_read(path), path), expected)
    # Older files lack BatchNorm's step counter, which load_state_dict then fills in.
    lacking = (n for n in expected.keys() - weights.keys() if not n.endswith("num_batches_tracked"))
    named = ("missing", sorted(lacking)), ("unexpected", sorted(weights.keys() - expected.keys()))
    complaints = [f"{len(names)} {kind} ({_first(names)})" for kind, names in named if names]
    if complaints:
        raise DeepTwistError(f"'{path}' is not of this model: tensors {', '.join(complaints)}")
    wrong = [
        f"{name} {tuple(value.shape)} where the model has {tuple(expected[name].shape)}"
        for name, value in weights.items()
        if value.shape != expected[name].shape
    ]
    if wrong:
        raise DeepTwistError(f"'{path}' is not of this model: {_first(wrong)}")
    model.load_state_dict(weights)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DeepTwistError(f"no weights file at '{path}'")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"{refused[1]}, which could run code" if refused else "something unreadable"
        raise DeepTwistError(
            f"'{path}' holds {reason}: save model.state_dict() alone and load that"
        ) from error
    except Exception as error:  # damaged bytes surface as a dozen types
        raise DeepTwistError(
            f"'{path}' is damaged or not a checkpoint ({type(error).__name__})"
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        inner = (content[key] for key in _WRAPPERS if isinstance(content.get(key), dict))
        content = next(inner, content)
    if not isinstance(content, dict) or not content:
        raise DeepTwistError(
            f"'{path}' holds a {type(content).__name__} where a state dict belongs"
        )
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise DeepTwistError(
                f"{name!r} in '{path}' is not a tensor but of type {type(value).__name__}; "
                f"a state dict may stand under one of {', '.join(_WRAPPERS)}"
            )
    return content


def _without_prefixes(weights: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        wrapped = all(name.startswith(prefix) for name in weights)
        if wrapped and not any(name.startswith(prefix) for name in expected):
            bare = {name.removeprefix(prefix): value for name, value in weights.items()}
            return _without_prefixes(bare, expected)
    return weights


def _first(items: list[str], shown: int = 3) -> str:
    return ", ".join(items[:shown]) + (f", and {len(items) - shown} more" * (len(items) > shown))
