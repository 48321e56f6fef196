"""Networks by name: the paper's, torchvision's, timm's and the user's own; weights for them."""

import inspect
import os
import pickle
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deeptwist.app.networks import VGG19, ResNet
from deeptwist.errors import DeepTwistError, require_extra, unknown_name_error

MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{6 * blocks + 2}": partial(ResNet, blocks) for blocks in (3, 5, 7, 9, 18)},
    "vgg19": VGG19,
    "vgg19_bn": partial(VGG19, batch_norm=True),
}
_WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's


def build_model(
    name: str, *, num_classes: int | None = None, in_channels: int | None = None
) -> nn.Module:
    """Build a network with random weights; nothing is ever downloaded.

    Args:
        name: one of `MODELS`, ``"torchvision/NAME"`` (its image classifiers), ``"timm/NAME"``, or
            ``"package.module:factory"``, looked for in the current directory first.
        num_classes: logits that come out; the network's own default if not given.
        in_channels: channels of the images; the network's own default if not given.

    Returns:
        The network. A factory of the user's is handed whichever of the two numbers are given and
        named in its signature, and nothing else.

    Raises:
        DeepTwistError: if no such network exists, or the package that holds it is not installed.
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    given = {key: value for key, value in sizes.items() if value is not None}
    source, _, network = name.partition("/")
    if name in MODELS:
        return MODELS[name](**given)
    if source == "torchvision":
        return _from_torchvision(network, **given)
    if source == "timm":
        return _from_timm(network, num_classes, in_channels)
    if ":" in name:
        return _from_factory(name, given)
    others = [f"{package}/{network or 'NAME'}" for package in ("torchvision", "timm")]
    raise unknown_name_error("model", name, [*MODELS, *others, "package.module:factory"])


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


def _from_torchvision(network: str, in_channels: int = 3, **given: int) -> nn.Module:
    with require_extra():
        import torchvision.models as models
    # The other tasks' networks would download a backbone, and none returns plain logits.
    classifiers = models.list_models(module=models)
    if network not in classifiers:
        raise unknown_name_error("torchvision model", network, classifiers)
    if in_channels != 3:
        raise DeepTwistError(
            f"torchvision/{network} takes 3 input channels, not {in_channels}: "
            "the timm/ networks take any number"
        )
    model: nn.Module = models.get_model(network, weights=None, **given)
    return model


def _from_timm(network: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    with require_extra("timm"):
        import timm
    known = {*timm.list_models(), *timm.list_pretrained()}  # bare, and with a weights' tag
    if network not in known:
        raise unknown_name_error("timm model", network, known)
    model: nn.Module = timm.create_model(
        network, pretrained=False, num_classes=num_classes, in_chans=in_channels
    )
    return model


def _from_factory(name: str, given: dict[str, int]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not module_name or module_name.startswith("."):
        raise DeepTwistError(
            f"module {module_name!r} has no full name: write 'package.module:factory'"
        )
    sys.path.insert(0, directory := os.getcwd())
    try:
        factory = pkgutil.resolve_name(name)
    except ModuleNotFoundError as error:
        # A module that is there but lacks one of its own imports keeps its traceback.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise DeepTwistError(
            f"no module {error.name!r} in {directory} or among the installed packages"
        ) from error
    except AttributeError as error:
        if module_name not in sys.modules:  # the module's own mistake
            raise
        members = vars(sys.modules[module_name]).items()
        public = [key for key, value in members if callable(value) and key[0] != "_"]
        raise unknown_name_error(f"factory in {module_name}", attribute, public) from error
    finally:
        sys.path.remove(directory)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise DeepTwistError(f"{name} is of type {type(factory).__name__}, not a function to call")
    model = factory(**_matching_kwargs(factory, given, name))
    if not isinstance(model, nn.Module):
        raise DeepTwistError(f"{name} returned type {type(model).__name__}, not an nn.Module")
    return model


def _matching_kwargs(
    factory: Callable[..., object], given: dict[str, int], name: str
) -> dict[str, int]:
    """Return the sizes that a factory's signature names."""
    signature = inspect.signature(factory)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        given = {key: value for key, value in given.items() if key in signature.parameters}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise DeepTwistError(f"{name} needs more ({error}): wrap it in a function") from error
    return given


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
