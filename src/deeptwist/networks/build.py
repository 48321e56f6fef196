"""Networks by name: the paper's, torchvision's, timm's and the user's own."""

import inspect
import os
import pkgutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import nn

from deeptwist.errors import DeepTwistError, explaining, require_extra, unknown_name_error
from deeptwist.networks.cifar import VGG19, ResNet
from deeptwist.networks.names import HUB, RESNETS, VGGS, check_name

MODELS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(ResNet, blocks) for name, blocks in RESNETS.items()},
    **{name: partial(VGG19, batch_norm=has_norm) for name, has_norm in VGGS.items()},
}


def build_model(
    name: str, *, num_classes: int | None = None, in_channels: int | None = None
) -> nn.Module:
    """Build a network with random weights; nothing is downloaded but a hub's configuration.

    Args:
        name: one of `MODELS`, ``"torchvision/NAME"`` (its image classifiers), ``"timm/NAME"``,
            ``"hf-hub:OWNER/NAME"`` (timm's, there), or ``"package.module:factory"``, looked for in
            the current directory first.
        num_classes: logits that come out; the network's own default if not given.
        in_channels: channels of the images; the network's own default if not given.

    Returns:
        The network. A factory of the user's is handed whichever of the two numbers are given and
        named in its signature, and nothing else.

    Raises:
        DeepTwistError: if no such network exists, or the package that holds it is not installed.
    """
    check_name(name)
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    given = {key: value for key, value in sizes.items() if value is not None}
    source, _, network = name.partition("/")
    if name in MODELS:
        return MODELS[name](**given)
    if source == "torchvision":
        return _from_torchvision(network, **given)
    if source == "timm" or name.startswith(HUB):
        network = name if name.startswith(HUB) else network
        return make_timm(network, num_classes=num_classes, in_chans=in_channels)
    return _from_factory(name, given)


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


def make_timm(network: str, **options: Any) -> nn.Module:
    """Make one of timm's networks; see `timm.create_model`."""
    with require_extra("timm"):
        import timm
    known = {*timm.list_models(), *timm.list_pretrained()}  # bare, and with a weights' tag
    if network not in known and not network.startswith(HUB):
        raise unknown_name_error("timm model", network, known)
    page = network.removeprefix(HUB)
    if not network.startswith(HUB):
        page = getattr(timm.get_pretrained_cfg(network, True), "hf_hub_id", None) or ""
    is_download = options.get("pretrained") or network.startswith(HUB)
    with downloading(network, f"https://huggingface.co/{page}") if is_download else nullcontext():
        model: nn.Module = timm.create_model(network, **options)
    return model


@contextmanager
def downloading(what: str, page: str) -> Iterator[None]:
    """Tell in one line what could not be downloaded, and the way to a file.

    The hub's client would try for a minute: where its host has no address it looks into its cache.
    """
    hub: Any = sys.modules.get("huggingface_hub.constants")
    offline = getattr(hub, "HF_HUB_OFFLINE", None)
    try:
        if offline is False and not getproxies():
            try:
                socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
            except OSError:
                hub.HF_HUB_OFFLINE = True
        where = f"download its weights from {page} where there is a net"
        advice = f"{where}, and give the file: --weights FILE"
        with explaining(f"cannot get {what}", advice, (Exception,)):  # of the net, caches, formats
            yield
    finally:
        if offline is not None:
            hub.HF_HUB_OFFLINE = offline


def _from_factory(name: str, given: dict[str, int]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not module_name or module_name.startswith("."):
        raise DeepTwistError(
            f"module {module_name!r} has no full name: write 'package.module:factory'"
        )
    if module_name.partition(".")[0] in sys.stdlib_module_names:  # a folder's name is not trusted
        raise DeepTwistError(f"{name} is Python's own, and no network's")
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
    with explaining(f"{name} needs more", "wrap it in a function", (TypeError,)):
        signature.bind(**given)
    return given
