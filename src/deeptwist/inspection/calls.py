"""One run of the example: which layers it calls, whose weights it reads, and its MACs."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from deeptwist.errors import DeepTwistError, first_line
from deeptwist.inspection.modes import FORWARD_ERRORS, undisturbed
from deeptwist.inspection.weights import is_metadata
from deeptwist.layers.geometry import ConvGeometry, LayerCall


@dataclass
class Recording:
    """What the example input does with a model's layers.

    Attributes:
        calls: by layer, in order of first use: every use, `F.linear` on its weight included.
        read: the layers whose weights `F.linear` was given by another module.
        surprises: by layer, a use that no factored layer serves.
        macs: multiply-accumulates of the whole network, of all its examples together; `None`
            where torch could not count them.
    """

    calls: dict[nn.Module, list[LayerCall]] = field(default_factory=dict)
    read: set[nn.Module] = field(default_factory=set)
    surprises: dict[nn.Module, str] = field(default_factory=dict)
    macs: int | None = None


def record(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    geometries: Mapping[nn.Module, ConvGeometry],
    paddings: Mapping[nn.Module, nn.Module],
    holders: Mapping[Tensor, nn.Module],
) -> Recording:
    """Run a model once, in evaluation mode, and leave it as it was.

    Args:
        model: any network.
        inputs: its positional inputs.
        geometries: of the layers to watch.
        paddings: of those that pad their input themselves.
        holders: by parameter, the layer whose weight it is.

    Raises:
        DeepTwistError: if the model cannot run on the inputs.
    """
    try:
        counter = FlopCounterMode(display=False)
        recording = _run(model, inputs, _Watch(geometries, paddings, holders), [counter])
        recording.macs = int(counter.get_total_flops()) // 2
    except FORWARD_ERRORS:
        # Either the model or the counter failed.
        try:
            recording = _run(model, inputs, _Watch(geometries, paddings, holders), [])
        except FORWARD_ERRORS as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise DeepTwistError(
                f"{type(model).__name__} cannot run on the example input {shapes}: "
                f"{first_line(error)}"
            ) from error
    return recording


def _run(
    model: nn.Module, inputs: tuple[Tensor, ...], watch: "_Watch", modes: Sequence[FlopCounterMode]
) -> Recording:
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, inputs))
        for module in watch.geometries:
            handles = (
                module.register_forward_pre_hook(watch.enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(watch.leave, always_call=True),
            )
            for handle in handles:
                stack.callback(handle.remove)
        # The counter knows not every fused attention, the processor's for one.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for counter in modes:
            stack.enter_context(counter)
        stack.enter_context(watch)
        model(*inputs)
    return watch.recording


class _Watch(TorchFunctionMode):
    """Follows layers' calls by hooks, and reads of their weights through torch's functions."""

    def __init__(
        self,
        geometries: Mapping[nn.Module, ConvGeometry],
        paddings: Mapping[nn.Module, nn.Module],
        holders: Mapping[Tensor, nn.Module],
    ):
        super().__init__()
        self.geometries = geometries
        self.recording = Recording()
        self._holders = {id(parameter): module for parameter, module in holders.items()}
        self._paddings = paddings
        self._running: list[nn.Module] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(module)
        arguments = [*args, *kwargs.values()]
        if len(arguments) != 1 or not isinstance(arguments[0], Tensor):
            self.recording.surprises[module] = "is called with more than its input"
            return
        self.recording.calls.setdefault(module, []).append(self._call(module, arguments[0]))

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        self._running.pop()

    def _call(self, module: nn.Module, x: Tensor) -> LayerCall:
        dims = self.geometries[module].dims
        if dims == 0:
            return LayerCall(x.shape[:-1].numel(), ())
        size = x.shape[-dims:]
        if module in self._paddings:
            size = self._paddings[module](torch.empty(1, *size, device="meta")).shape[-dims:]
        return LayerCall(x.shape[0] if x.dim() == dims + 2 else 1, tuple(size))

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not is_metadata(func):
            for argument in _flat([*args, *kwargs.values()]):
                module = self._holders.get(id(argument))
                if module is not None and module not in self._running:
                    self._read(module, func, args, kwargs)
        return func(*args, **kwargs)

    def _read(
        self, module: nn.Module, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        names = ["input", "weight", "bias"]
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        is_linear = getattr(func, "__name__", "") == "linear" and isinstance(module, nn.Linear)
        if is_linear and id(values["weight"]) in self._holders:
            self.recording.read.add(module)
            call = LayerCall(values["input"].shape[:-1].numel(), ())
            self.recording.calls.setdefault(module, []).append(call)
            return
        name = getattr(func, "__name__", str(func))
        if func is functional.multi_head_attention_forward and isinstance(module, nn.Linear):
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            role = next(key for key, value in given.items() if value is module.weight)
            x = given[_PROJECTED.get(role, "query")]
            if role != "in_proj_weight" or given["query"] is given["key"] is given["value"]:
                call = LayerCall(x.shape[:-1].numel(), ())
                self.recording.calls.setdefault(module, []).append(call)
                return
            self.recording.surprises[module] = (
                "projects keys or values of other inputs than queries"
            )
        self.recording.surprises.setdefault(
            module, f"has a weight that its owner reads ({name.strip('_')})"
        )


_PROJECTED = {"k_proj_weight": "key", "v_proj_weight": "value"}  # the others: the query


def _flat(values: list[Any]) -> list[Any]:
    """The arguments, and those in lists and tuples of them, as `torch.cat` is given."""
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, list | tuple) else [value]
    return flat
