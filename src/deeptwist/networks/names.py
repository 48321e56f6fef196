"""The names of networks and of their weights, known without the seconds that torch takes to import.

What passes here may still be refused by whoever builds the network.
"""

import re
from importlib.util import find_spec
from pathlib import Path

from deeptwist.errors import DeepTwistError, unknown_name_error

RESNETS = {f"resnet{6 * blocks + 2}": blocks for blocks in (3, 5, 7, 9, 18)}  # in each stage
VGGS = {"vgg19": False, "vgg19_bn": True}  # whether it has batch norm
HUB = "hf-hub:"  # as timm names what is on Hugging Face's hub


def check_name(name: str) -> None:
    """Check that a network's name is one, see `build_model`.

    Raises:
        DeepTwistError: if it is not, naming the nearest.
    """
    source, _, network = name.partition("/")
    if name in RESNETS or name in VGGS or HUB in (name[: len(HUB)], network[: len(HUB)]):
        return
    if source in ("torchvision", "timm"):
        known = registered(source)
        if known and network.partition(".")[0] not in known:  # else it is not installed
            raise unknown_name_error(f"{source} model", network, known)
    elif ":" not in name:
        packages = "torchvision", "timm"
        there = [f"'{package}/{name}'" for package in packages if name in registered(package)]
        if there:
            raise DeepTwistError(f"unknown model {name!r}: did you mean {' or '.join(there)}?")
        others = [f"{package}/{network or 'NAME'}" for package in packages]
        others.append("package.module:factory")
        raise unknown_name_error("model", name, [*RESNETS, *VGGS, *others])


def check_weights(name: str, weights: str | Path) -> None:
    """Check that weights are a file, or may be a name that the network's library has.

    Raises:
        DeepTwistError: if they are neither.
    """
    if Path(weights).exists():
        return
    if not re.fullmatch(rf"\w+|timm/.+|{HUB}.+", str(weights)):
        raise DeepTwistError(f"no weights file at '{weights}'")
    is_hub = str(weights).startswith(HUB)
    if not is_hub and name.partition("/")[0] not in ("torchvision", "timm"):
        raise DeepTwistError(f"no weights file at '{weights}', and {name} has none by name")


def registered(package: str) -> set[str]:
    """Return the classifiers that torchvision or timm registers; none where it is not installed."""
    spec = find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or []
    files = (path for place in places for path in Path(place, "models").glob("*.py"))
    pattern = re.compile(r"^@register_model\b.*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    return {name for path in files for name in pattern.findall(path.read_text(encoding="utf-8"))}
