"""What the forward of a layer's subclass does besides calling the layer's function.

It is run on tiny inputs while torch's functions are recorded: where it pads its input at most, and
calls the function once on its own weight and bias, it is that layer behind a padding.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from deeptwist.errors import DeepTwistError
from deeptwist.layers.factored import ConstantPad, SamePad
from deeptwist.layers.geometry import ConvGeometry

_COMPUTATION = "forward", "_conv_forward", "weight", "__call__", "_call_impl"
_METADATA = {
    *("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta", "requires_grad"),
    *("size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "stride"),
    *("__len__", "itemsize", "nelement", "ndimension", "get_device", "is_sparse", "is_quantized"),
    *("is_mps", "is_xpu", "is_cpu", "is_nested", "names", "is_leaf", "data_ptr"),
}


def class_name(kind: type) -> str:
    """Return a class's name with its module's."""
    return f"{kind.__module__}.{kind.__qualname__}"


def computing_class(module: nn.Module) -> type:
    """Return the class whose forward the module runs: its own, or one it is derived from."""
    kind = parametrize.type_before_parametrizations(module)
    return next(base for base in kind.__mro__ if any(name in vars(base) for name in _COMPUTATION))


def describe_class(kind: type) -> str:
    """Return a class with its article and its module."""
    article = "an" if kind.__name__[0] in "AEIO" else "a"  # "a UNet", as it is spoken
    return f"{article} {kind.__name__} ({kind.__module__})"


def has_compiled_forward(module: nn.Module) -> bool:
    """Whether ``module.forward = torch.compile(module.forward)`` is all that is stored on it."""
    compiled = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
    if compiled is None:
        return False
    method = getattr(compiled, "__wrapped__", compiled)  # torch puts a frame around its own code
    return getattr(method, "__func__", method) is type(module).forward


class TracedForward(NamedTuple):
    """A forward that pads its input and calls the layer's function."""

    weight: Tensor  # what it gives the function as its weight
    margins: tuple[int, ...]  # of the padding, as `F.pad` takes them; none where it does not pad
    mode: str  # of the padding
    is_all: bool  # whether it calls nothing else


class FunctionCall(NamedTuple):
    """One call of a function of torch."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def given(self) -> Iterator[Any]:
        """All arguments; of lists and tuples, as `torch.cat` is given, what is in them."""
        for argument in (*self.args, *self.kwargs.values()):
            yield from argument if isinstance(argument, list | tuple) else [argument]

    def named(self, *names: str) -> dict[str, Any]:
        """Return the arguments by name, given the names in their order."""
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


class FunctionWatch(TorchFunctionMode):
    """Tells of the functions of torch that are called, but not of questions about shape or type."""

    def __init__(self, see: Callable[[FunctionCall], None]):
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_metadata(func):
            self._see(FunctionCall(func, args, kwargs or {}, result))
        return result


def _is_metadata(func: Any) -> bool:
    """Whether a function of torch only asks a tensor for its shape, type or place."""
    name = getattr(func, "__name__", "")
    owner = getattr(func, "__self__", None)
    return (getattr(owner, "__name__", "") if name == "__get__" else name) in _METADATA


def trace_padding(
    module: nn.Module, geometry: ConvGeometry, *, computes_weight: bool
) -> nn.Module | None:
    """Return the module that pads as a layer's forward does; `None` where it does not pad.

    Args:
        module: of a class derived from a layer.
        geometry: of the layer.
        computes_weight: whether the forward may compute the weight from the parameters first.

    Raises:
        DeepTwistError: if the forward computes anything else, or pads in a way of its own.
    """
    margins, mode = [], "constant"
    sizes = range(1 + max(geometry.stride, default=0))  # all that the stride tells apart
    for extra in sizes:
        forward = trace_forward(module, geometry, extra, computes_weight=computes_weight)
        if forward is None:
            raise other_forward_error(module)
        margins.append(forward.margins)
        mode = forward.mode
    if not any(any(margin) for margin in margins):
        return None
    if len(set(margins)) == 1:
        return ConstantPad(margins[0], mode)
    same = SamePad(geometry.kernel_size, geometry.stride, geometry.dilation)
    for extra, margin in zip(sizes, margins, strict=True):
        expected = tuple(same.margins(_input_size(geometry, extra)))
        if mode != "constant" or (margin or (0,) * len(expected)) != expected:
            raise DeepTwistError("pads its input in a way of its own")
    return same


def other_forward_error(module: nn.Module) -> DeepTwistError:
    """Return the error for a layer's subclass that is not the layer behind a padding."""
    kind = describe_class(computing_class(module))
    return DeepTwistError(f"is {kind}, whose forward computes something else")


def trace_forward(
    module: nn.Module, geometry: ConvGeometry, extra: int = 0, *, computes_weight: bool
) -> TracedForward | None:
    """Trace a module's forward on an input larger by so much; `None` as `trace_padding` refuses."""
    reference = next(p for p in module.parameters() if p.dim() > 1)
    x = reference.new_zeros(1, geometry.in_channels, *_input_size(geometry, extra))
    was_training = module.training
    module.training = False
    calls: list[FunctionCall] = []
    try:
        # A parametrized weight is computed before, once, and is itself in every use.
        with torch.no_grad(), parametrize.cached():
            weight = module.weight
            with FunctionWatch(calls.append):
                y = type(module).forward(module, x)
            forward = _only_call(module, geometry, x, y, calls)
    except Exception:  # a forward of any class, on an input that it may not be made for
        return None
    finally:
        module.training = was_training
    is_own = forward is not None and forward.is_all and forward.weight is weight
    return forward if computes_weight or is_own else None


def _only_call(
    module: nn.Module, geometry: ConvGeometry, x: Tensor, y: Any, calls: list[FunctionCall]
) -> TracedForward | None:
    """Return the one call of the layer's function, behind one padding at most."""
    kind = "conv_transpose" if geometry.transposed else "conv"
    name = f"{kind}{geometry.dims}d" if geometry.dims else "linear"
    layer_calls = [call for call in calls if getattr(call.func, "__name__", "") == name]
    pads = [call for call in calls if call.func in (functional.pad, torch._C._nn.pad)]
    if len(layer_calls) != 1 or len(pads) > 1:
        return None
    options = ("stride", "padding", "dilation", "groups")
    values = layer_calls[0].named("input", "weight", "bias", *options)
    margins, mode, padded = (), "constant", x
    for pad in pads:
        given, padded = pad.named("input", "pad", "mode", "value"), pad.result
        margins, mode = tuple(given["pad"]), given.get("mode", "constant")
        if given["input"] is not x or given.get("value"):
            return None
    if values["input"] is not padded or layer_calls[0].result is not y:
        return None
    own = {key: getattr(module, key, None) for key in ("bias", *options)}
    if values.get("bias") is not own["bias"] or any(
        values.get(k, own[k]) != own[k] for k in options
    ):
        return None
    return TracedForward(values["weight"], margins, mode, len(calls) == 1 + len(pads))


def _input_size(geometry: ConvGeometry, extra: int) -> list[int]:
    """A spatial size that the kernel fits into, by one and `extra` larger."""
    steps = zip(geometry.dilation, geometry.kernel_size, strict=True)
    return [dilation * (size - 1) + 2 + extra for dilation, size in steps]
