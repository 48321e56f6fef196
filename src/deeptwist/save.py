"""A decomposed model on disk: a folder with ``config.json`` and ``model.safetensors``.

Nothing is pickled. Loading replays the layer swaps on the network that was decomposed, then loads
strictly. The caller makes that network, or it is built by its name in the folder, which may be that
of a function of the user's own, as 'package.module:factory': nothing else there names code to run.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deeptwist._version import __version__
from deeptwist.decompose import is_channels_last, planned_weight, replace_layers, set_channels_last
from deeptwist.decompositions import Decomposition
from deeptwist.errors import DATA_ERRORS, DeepTwistError, check_int, explaining
from deeptwist.files import atomic_write, check_suffix, explaining_writes
from deeptwist.inspection.run import Argument, check_unwrapped
from deeptwist.inspection.swap import stored_modules
from deeptwist.inspection.weights import get_layer
from deeptwist.layers.factored import factored_layers
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.networks.build import build_model
from deeptwist.plan.codec import decode, encode
from deeptwist.plan.plan import CompressedLayer, Plan

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_LARGEST_CONFIG = 16 * 2**20  # bytes; a network of ten thousand layers takes a fifth


@dataclass(frozen=True)
class SavedLayer:
    """A factored layer, as the configuration holds it under its name."""

    convolution: ConvGeometry
    decomposition: Decomposition

    def __post_init__(self) -> None:
        self.decomposition.resolve(self.convolution, None)  # refused with its name, when read


@dataclass(frozen=True)
class Saved:
    """What a folder's configuration says of its network; see `save`."""

    format_version: int
    deeptwist_version: str
    base_model: str
    weights_sha256: str
    aliases: dict[str, str]  # of tensors: the other names of those that are shared
    module_versions: dict[str, int]  # where not 1: what a state dict has as metadata
    layers: dict[str, SavedLayer]
    channels_last: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Argument, ...] = ()  # that the network was planned on
    keywords: tuple[str, ...] = ()
    extra_states: dict[str, str] = field(default_factory=dict)  # as JSON: `get_extra_state`'s

    def plan(self) -> Plan:
        """Return the plan of what is factored alone."""
        layers = plan_layers(self.layers)
        return Plan(layers, inputs=self.inputs, keywords=self.keywords)


def save(
    model: nn.Module,
    path: str | Path,
    *,
    base_model: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a decomposed model to a folder, each file under a temporary name first.

    Args:
        model: what `DeepTwist.finish` or `decompose` gave.
        path: the folder; made where it is missing, a saved model in it replaced.
        base_model: a name for the network that was decomposed, its class where none is given.
            Where it is one that `build_model` takes, the folder loads by itself.
        metadata: what else is to be known of the network, in values that JSON holds: names of its
            classes, how images become its input. Its 'num_classes' and 'in_channels' are what a
            `base_model` is built with.

    Returns:
        The folder.

    Raises:
        DeepTwistError: if the model has no factored layer, or one whose tensors are no longer
            those that it was made with, or if the folder cannot be written, or the metadata.
    """
    check_unwrapped(model)
    if not (factored := factored_layers(model)):
        raise DeepTwistError(
            f"this {type(model).__name__} has no factored layer: decompose it first"
        )
    tensors, aliases = deduplicate(model)
    states = model.state_dict()._metadata  # type: ignore[attr-defined]
    versions = {name: values.get("version") for name, values in states.items()}
    inputs, keywords = next(iter(factored.values())).planned_call
    folder = Path(path)
    check_suffix(folder)
    config = Saved(
        format_version=FORMAT_VERSION,
        deeptwist_version=__version__,
        base_model=base_model or type(model).__name__,
        weights_sha256="",
        aliases=aliases,
        module_versions={name: n for name, n in versions.items() if n not in (None, 1)},
        layers={name: SavedLayer(m.convolution, m.decomposition) for name, m in factored.items()},
        channels_last=is_channels_last(model),
        metadata=dict(metadata or {}),
        inputs=inputs,
        keywords=keywords,
        extra_states=_extra_states(model),
    )
    with explaining("the metadata is not JSON's"):
        json.dumps(encode(config.metadata), allow_nan=False)
    for layer in config.plan().compressed:
        _check_readable(factored[layer.name], layer)
    with explaining_writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Both are complete before either takes its place.
        with atomic_write(folder / WEIGHTS) as weights, atomic_write(folder / CONFIG) as text:
            save_file(tensors, weights)
            values = encode(replace(config, weights_sha256=_sha256(weights)))
            text.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return folder


def load(path: str | Path, model: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """Read a folder that `save` wrote.

    Args:
        path: the folder.
        model: the network that was decomposed, or a factory of it; its weights do not matter.
            Without it the network is built by its name in the folder: where that is
            'package.module:factory' this imports that module, so trust who wrote the folder.

    Returns:
        The decomposed model, in evaluation mode, in the types that were saved, on the CPU.

    Raises:
        DeepTwistError: if a file is missing, damaged or of an unknown format, or if the model
            is not the one that was decomposed, or is on the meta device, or has no name.
    """
    folder = Path(path)
    config = read_saved(folder)
    plan = config.plan()
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise DeepTwistError(f"no {WEIGHTS} in {folder}")
    if _sha256(weights) != config.weights_sha256:
        raise DeepTwistError(f"{weights} is damaged: its checksum is not the one in {CONFIG}")
    if model is None:
        model = _build_named(config, folder)
    base = model if isinstance(model, nn.Module) else model()
    if not isinstance(base, nn.Module):
        raise DeepTwistError(f"the factory gave a {type(base).__name__}, not a model")
    if any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers())):
        raise DeepTwistError(
            f"this {type(base).__name__} is on the meta device, where nothing can be read into it: "
            "make it on the CPU"
        )
    small = make_layers(base, plan).cpu()
    if config.channels_last:
        set_channels_last(small)
    with explaining(f"{weights} is not a valid safetensors file", errors=(SafetensorError,)):
        state = load_file(weights)
    stored = stored_modules(small, {x.name: get_layer(base, x.name) for x in plan.compressed})
    if stored:
        raise DeepTwistError(
            f"a function stored on this {type(base).__name__} refers to the dense layer "
            f"{stored[0]!r} and would go on running it: load first, store it afterwards"
        )
    _load_strictly(small, state, config)
    return small.eval()


def deduplicate(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state's tensors, each once, and the other names of those that are shared."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    taken: set[int] = set()  # memory that a tensor before holds: safetensors refuses to share it
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):  # a module's extra state
            continue
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            aliases[name] = owner
            continue
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage()
        is_whole = memory.nbytes() == own.numel() * own.element_size()
        tensors[name] = own if is_whole and memory.data_ptr() not in taken else own.clone()
        taken.add(memory.data_ptr())
    return tensors, aliases


def _extra_states(model: nn.Module) -> dict[str, str]:
    """Return what `get_extra_state` gives besides tensors, as JSON by its name in a state dict."""
    states = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            continue
        try:
            states[name] = json.dumps(value)
            is_plain = json.loads(states[name]) == value
        except (TypeError, ValueError):
            is_plain = False
        if not is_plain:
            raise DeepTwistError(
                f"the extra state {name!r} ({type(value).__name__}) cannot be kept as JSON: have "
                "get_extra_state return plain numbers, strings, lists and dicts, or a tensor"
            )
    return states


def _check_readable(module: nn.Module, layer: CompressedLayer) -> None:
    """Refuse a layer whose tensors are not those that `load` will look for."""
    kernels = _empty_kernels(layer, "meta")
    bias = torch.empty(layer.convolution.out_channels, device="meta")
    made = layer.decomposition.make_layer(layer.convolution, kernels, bias)
    strangers = module.state_dict().keys() - made.state_dict().keys()
    if strangers:
        raise DeepTwistError(
            f"layer {layer.name!r} holds {min(strangers)!r}, which {layer.decomposition} does not: "
            "save it before its parametrizations are removed, or export it"
        )


def read_saved(folder: Path) -> Saved:
    """Read what a folder says of its network.

    Raises:
        DeepTwistError: if there is no configuration, or one that is damaged or of another format.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise DeepTwistError(f"no {CONFIG} in {path.parent}: not a folder that deeptwist saved")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise DeepTwistError(f"{path} is too large for a configuration: not read")
    with explaining(f"{path} is not JSON"):
        values = json.loads(path.read_text(encoding="utf-8"))
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise DeepTwistError(
            f"{path} has format version {version!r}: this deeptwist reads {FORMAT_VERSION}"
        )
    with explaining(f"{path} is damaged", errors=DATA_ERRORS):
        saved: Saved = decode(Saved, values)
        saved.plan()  # refuses what no layer can be
    return saved


def _build_named(saved: Saved, folder: Path) -> nn.Module:
    """Build the network whose name a folder holds."""
    sizes = {key: saved.metadata.get(key) for key in ("num_classes", "in_channels")}
    problem = f"{folder} does not say how to build {saved.base_model!r}"
    advice = "give the network that was decomposed, load(path, model)"
    with explaining(problem, advice, (DeepTwistError, RuntimeError)):  # or no memory holds them
        for key, size in sizes.items():
            if size is not None:
                check_int(key, size)
        return build_model(saved.base_model, **sizes)


def plan_layers(layers: Mapping[str, SavedLayer]) -> tuple[CompressedLayer, ...]:
    """Return saved layers as a plan has them."""
    held = layers.items()
    return tuple(CompressedLayer(n, "", x.convolution, x.decomposition) for n, x in held)


def make_layers(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of a model in which planned layers are made, their numbers not yet read.

    Raises:
        DeepTwistError: if the model has no such layers.
    """
    for layer in plan.compressed:  # before anything takes the memory that the file says it needs
        planned_weight(model, layer)
    kernels = {layer.name: _empty_kernels(layer) for layer in plan.compressed}
    return replace_layers(model, plan, kernels)


def _empty_kernels(layer: CompressedLayer, device: str = "cpu") -> list[Tensor]:
    parts = layer.decomposition.parts(layer.convolution)
    return [torch.empty(part.kernel_shape, device=device) for part in parts]


def _load_strictly(model: nn.Module, tensors: dict[str, Tensor], config: Saved) -> None:
    """Copy tensors into a model of exactly their names, shapes and kinds of types."""
    for alias, name in config.aliases.items():
        if alias in tensors or name not in tensors:
            raise DeepTwistError(
                f"{CONFIG} is damaged: {alias!r} is to be {name!r}, and {WEIGHTS} does not agree"
            )
    state: OrderedDict[str, Any] = OrderedDict(tensors)
    state |= {alias: tensors[name] for alias, name in config.aliases.items()}
    state |= {name: json.loads(text) for name, text in config.extra_states.items()}
    expected = model.state_dict(keep_vars=True)
    stranger = f"the saved model is another one ({config.base_model!r})"
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or extra:
        raise DeepTwistError(
            f"{stranger}: {len(missing)} tensors missing {sorted(missing)[:2]}, "
            f"{len(extra)} unexpected {sorted(extra)[:2]}"
        )
    for name, tensor in expected.items():
        saved = state[name]
        if not isinstance(saved, Tensor) or not isinstance(tensor, Tensor):
            continue  # a module's extra state, which is its own to check
        if saved.shape != tensor.shape:
            raise DeepTwistError(
                f"{stranger}: {name!r} is {tuple(saved.shape)} there and {tuple(tensor.shape)} here"
            )
        if saved.dtype != tensor.dtype:
            if not (saved.is_floating_point() and tensor.is_floating_point()):
                raise DeepTwistError(
                    f"{stranger}: {name!r} is {saved.dtype} there and {tensor.dtype} here"
                )
            tensor.data = tensor.data.to(saved.dtype)
    # Copied, not assigned: what is tied stays tied, and no memory of the file's is held on to.
    metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    state._metadata = {  # type: ignore[attr-defined]
        name: {**values, "version": config.module_versions.get(name, 1)}
        for name, values in metadata.items()
    }
    model.load_state_dict(state, strict=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
