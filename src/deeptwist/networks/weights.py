"""Trained weights for a network: from a file, or by the name that the network's library has."""

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError, unknown_name_error
from deeptwist.networks.build import MODELS, build_model, downloading, make_timm
from deeptwist.networks.names import check_weights

logger = logging.getLogger("deeptwist")

_WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema")
_COUNTER = "num_batches_tracked"
_LIGHTNING = "pytorch-lightning_version"  # beside the state dict, which may hold other modules too


def build_trained(
    name: str,
    weights: str | Path | None = None,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Build a network with trained weights; where there are none, that is said in a warning.

    Args:
        name: see `build_model`; ``"timm/NAME.TAG"`` and ``"hf-hub:OWNER/NAME"`` name weights too.
        weights: a file, see `load_weights`. Or a name, which the network's library downloads:
            'DEFAULT' or another of torchvision's enumeration or of timm's tags, or
            ``"hf-hub:OWNER/NAME"``.
        num_classes: see `build_model`.
        in_channels: see `build_model`.
        new_head: whether weights for other classes than `num_classes` are taken too, the last
            layer's aside, which is then said in a warning.

    Raises:
        DeepTwistError: if there is no such network, or no such weights, they cannot be downloaded,
            or do not fit.
    """
    model = build_model(name, num_classes=num_classes, in_channels=in_channels)
    classes = num_classes if new_head else None
    if weights is None and re.fullmatch(r"timm/.+\..+|hf-hub:.+", name):
        weights = name
    if weights is None:
        if name in MODELS or "/" in name:  # a factory of the user's may have loaded some
            logger.warning("%s has random weights: --weights gives it trained ones", name)
    elif Path(weights).exists():
        load_weights(model, weights, classes=classes)
    else:
        check_weights(name, weights)
        state = _from_library(name, str(weights), in_channels)
        _load_state(model, state, f"{name} {weights}", classes)
    return model


def _from_library(name: str, weights: str, in_channels: int | None) -> dict[str, Tensor]:
    """Return the weights of a name, downloaded by the network's library unless it has them."""
    source, _, network = name.partition("/")
    if source == "torchvision":
        import torchvision.models as models

        known = models.get_model_weights(network).__members__
        if weights not in known:
            raise unknown_name_error(f"weights of {name}", weights, known)
        options = {"aux_logits": True} if network == "googlenet" else {}  # which it else drops
        with downloading(f"{name} {weights}", known[weights].url):
            model = models.get_model(network, weights=known[weights], progress=False, **options)
    else:
        if weights == "DEFAULT":
            weights = network.partition(".")[0]
        elif re.fullmatch(r"\w+", weights):
            weights = f"{network.partition('.')[0]}.{weights}"
        given = {} if in_channels is None else {"in_chans": in_channels}
        model = make_timm(weights.removeprefix("timm/"), pretrained=True, **given)
    state: dict[str, Tensor] = model.state_dict()
    return state


def load_weights(model: nn.Module, path: str | Path, *, classes: int | None = None) -> None:
    """Load a checkpoint into a model: every tensor of one fits one of the other.

    Args:
        model: receives the weights in its own dtype and on its own device; unchanged on error.
        path: a ``.safetensors`` file or a `torch.save` of tensors, never unpickled beyond those:
            a state dict, or a dict that holds one as 'state_dict', 'model', 'model_state',
            'model_state_dict' or 'state_dict_ema' (the first of these). What wrappers put in front
            of every name is dropped: 'module.', '_orig_mod.', and the attribute that holds the
            model in a checkpoint of Lightning's, which may hold others.
        classes: of the model, to leave its last layer as it is where the file is for another
            number of them, and say so in a warning; such a file is refused if not given.

    Raises:
        DeepTwistError: if the file is missing, unreadable or not of tensors alone, or if names or
            shapes differ from the model's.
    """
    path = Path(path)
    content = _read(path)
    is_lightning = isinstance(content, dict) and _LIGHTNING in content
    weights = _without_prefix(_state_dict(content, path), model.state_dict(), is_lightning)
    _load_state(model, weights, f"'{path}'", classes)


def _load_state(
    model: nn.Module, weights: dict[str, Tensor], source: str, classes: int | None
) -> None:
    """Load weights that are of the model, their last layer aside if that is for other classes."""
    expected = model.state_dict()
    # Older files lack BatchNorm's step counter, which load_state_dict then fills in.
    lacking = (n for n in expected.keys() - weights.keys() if not n.endswith(_COUNTER))
    named = ("missing", sorted(lacking)), ("unexpected", sorted(weights.keys() - expected.keys()))
    complaints = [f"{len(names)} {kind} ({_first(names)})" for kind, names in named if names]
    if complaints:
        raise DeepTwistError(f"{source} is not of this model: tensors {', '.join(complaints)}")
    wrong = {n: value for n, value in weights.items() if value.shape != expected[n].shape}
    numbers = {(*value.shape[:1], *expected[n].shape[:1]) for n, value in wrong.items()}
    is_head = all(value.shape[1:] == expected[n].shape[1:] for n, value in wrong.items())
    if wrong and is_head and len(numbers) == 1 and {classes} == {n[-1] for n in numbers}:
        there = numbers.pop()[0]
        names = _first([*wrong])
        logger.warning("%s is for %d classes, not %d: new %s", source, there, classes, names)
        weights = {**weights, **{name: expected[name] for name in wrong}}
    elif wrong:
        shapes = [
            f"{n} {tuple(value.shape)} where the model has {tuple(expected[n].shape)}"
            for n, value in wrong.items()
        ]
        raise DeepTwistError(f"{source} is not of this model: {_first(shapes)}")
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


def _without_prefix(
    weights: dict[str, Tensor], expected: Mapping[str, Tensor], is_lightning: bool
) -> dict[str, Tensor]:
    """Return the weights by the model's own names where one prefix leads to all of them."""
    names = [name for name in expected if not name.endswith(_COUNTER)]
    if not names or names[0] in weights:
        return weights
    ends = (n for n in weights if n.endswith(f".{names[0]}"))
    for prefix in sorted((n.removesuffix(names[0]) for n in ends), key=len):
        below = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        if below.keys() >= {*names} and (is_lightning or len(below) == len(weights)):
            return below
    return weights


def _first(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f", and {len(items) - 3} more" * (len(items) > 3))
