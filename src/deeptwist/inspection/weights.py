"""What a module with weights computes, judged by what its class overrides, and its weight.

A torch layer, and a subclass that overrides nothing of its computation, is read from its
attributes. A subclass with a forward of its own is run on a tiny input while torch's functions are
recorded: where it pads its input at most, and calls the layer's function once on its own weight and
bias, it is that layer behind a padding. A few classes are known to compute their weight first.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from deeptwist.errors import DeepTwistError
from deeptwist.inspection.modes import eval_mode
from deeptwist.layers.geometry import SUPPORTED_MODULES, ConvGeometry
from deeptwist.layers.padding import ConstantPad, SamePad

_COMPUTATION = "forward", "_conv_forward", "weight", "__call__", "_call_impl"
_STANDARDIZED = {  # (w − mean) / standard deviation of each output channel, then a gain
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d",
}
_TRANSPOSED_LINEAR = "transformers.pytorch_utils.Conv1D"  # a linear layer with weight (in, out)
_NORMS = {  # hooks of torch.nn.utils, by class, and the name of the parameter that they normalise
    "torch.nn.utils.weight_norm.WeightNorm": "weight_v",
    "torch.nn.utils.spectral_norm.SpectralNorm": "weight_orig",
}
_REPARAMETRIZATIONS = {
    "torch.nn.utils.parametrizations._WeightNorm",
    "torch.nn.utils.parametrizations._SpectralNorm",
}


class InProjection(nn.Linear):
    """The projection of queries, keys and values in one, which torch's attention holds itself.

    It has the attention's own parameter; `swap` puts its factors into the copy as a submodule of
    this name.
    """

    NAME = "in_proj"

    def __init__(self, attention: nn.MultiheadAttention):
        outputs, inputs = attention.in_proj_weight.shape
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.weight = attention.in_proj_weight
        self.train(attention.training)


def has_in_projection(module: nn.Module) -> bool:
    """Whether a module is torch's attention, its forward its own, with one weight for all three."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and computing_class(module) is nn.MultiheadAttention
        and module._parameters.get("in_proj_weight") is not None
    )


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module that a layer's name in a plan stands for.

    Raises:
        AttributeError: if there is none.
    """
    owner, _, last = name.rpartition(".")
    if last == InProjection.NAME and has_in_projection(model.get_submodule(owner)):
        return InProjection(cast(nn.MultiheadAttention, model.get_submodule(owner)))
    return model.get_submodule(name)


def class_name(kind: type) -> str:
    """Return a class's name with its module's."""
    return f"{kind.__module__}.{kind.__qualname__}"


def computing_class(module: nn.Module) -> type:
    """Return the class whose forward the module runs: its own, or one it is derived from."""
    kind = parametrize.type_before_parametrizations(module)
    return next(base for base in kind.__mro__ if any(name in vars(base) for name in _COMPUTATION))


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution, a linear layer, or of a class derived from one."""
    return isinstance(module, SUPPORTED_MODULES) or _is_transposed_linear(module)


def layer_geometry(module: nn.Module) -> ConvGeometry:
    """Return the geometry of a module that `is_layer`, the padding by its forward not included.

    Raises:
        DeepTwistError: if its attributes are not those of a convolution.
    """
    if _is_transposed_linear(module):
        inputs, outputs = cast(Tensor, module.weight).shape
        return ConvGeometry(inputs, outputs)
    return ConvGeometry.from_module(module)


def unsupported_reason(module: nn.Module) -> str | None:
    """Return why a module's computation is not that of one weight, `None` where it is."""
    reason = class_reason(module)
    if reason is None and "forward" in vars(module) and not has_compiled_forward(module):
        return "has a forward of its own, stored on the module"
    if reason is None and has_hooks(module):
        return "has hooks (pruning, …), which a factored layer would lose"
    return reason


def class_reason(module: nn.Module) -> str | None:
    """Return why a module's class does not compute with one weight, `None` where it does."""
    kind = computing_class(module)
    if not is_layer(module):
        return f"is {_described(kind)}, not a convolution"
    if parametrize.is_parametrized(module):
        reason = _unknown_parametrization(module)
        if reason is not None:
            return reason
    if kind in SUPPORTED_MODULES or computes_weight(module) or _is_transposed_linear(module):
        return None
    call = _traced(module)
    if call is None:
        return f"is {_described(kind)}, whose forward computes something else"
    return None


def has_compiled_forward(module: nn.Module) -> bool:
    """Whether ``module.forward = torch.compile(module.forward)`` is all that is stored on it."""
    compiled = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
    if compiled is None:
        return False
    method = getattr(compiled, "__wrapped__", compiled)  # torch puts a frame around its own code
    return getattr(method, "__func__", method) is type(module).forward


def computes_weight(module: nn.Module) -> bool:
    """Whether the module's weight is computed from its parameters at every call."""
    return (
        class_name(computing_class(module)) in _STANDARDIZED
        or parametrize.is_parametrized(module, "weight")
        or _norm_hook(module) is not None
    )


def read_weight(module: nn.Module) -> Tensor:
    """Return the weight that a layer computes with, (o, i, *k) or as its torch class has it.

    It shares the parameter's memory unless `computes_weight`.
    """
    with torch.no_grad():
        if _is_transposed_linear(module):
            return cast(Tensor, module.weight).detach().mT
        hook = _norm_hook(module)
        if hook is not None:
            return _hooked_weight(module, hook)
        if class_name(computing_class(module)) in _STANDARDIZED:
            call = _traced(module)
            assert call is not None, f"{type(module).__name__} calls no convolution"
            return call.weight.detach()
        if parametrize.is_parametrized(module, "weight"):
            with eval_mode(cast(nn.Module, module.parametrizations)):  # no power iteration
                return cast(Tensor, module.weight).detach().clone()
        return cast(Tensor, module.weight).detach()


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Set the parameters of a layer so that it computes with this weight, or near it.

    Weight norm is met exactly. Spectral norm and weight standardisation normalise what they are
    given: the layer's weight then is a multiple of it, for each output channel or as a whole.
    """
    hook = _norm_hook(module)
    if hook is not None:
        getattr(module, _NORMS[class_name(type(hook))]).copy_(weight)
        if hasattr(module, "weight_g"):
            cast(Tensor, module.weight_g).copy_(torch.norm_except_dim(weight, 2, hook.dim))
        module.weight = _hooked_weight(module, hook)
    elif parametrize.is_parametrized(module, "weight"):
        module.weight = weight
    elif _is_transposed_linear(module):
        cast(Tensor, module.weight).copy_(weight.mT)
    else:
        cast(Tensor, module.weight).copy_(weight)


def as_weight(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return a tensor of the weight parameter's shape as `read_weight` shows that: a view."""
    return tensor.mT if _is_transposed_linear(module) else tensor


def weight_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the layer's weight is made of."""
    bias = getattr(module, "bias", None)
    return [parameter for parameter in module.parameters() if parameter is not bias]


def input_padding(module: nn.Module) -> nn.Module | None:
    """Return the padding that the layer's forward applies itself, `None` where it applies none."""
    if computing_class(module) in SUPPORTED_MODULES or _is_transposed_linear(module):
        return None
    convolution = layer_geometry(module)
    calls = [_traced(module, extra) for extra in _sizes(convolution)]
    margins = [call.margins for call in calls if call is not None]
    if not any(any(margin) for margin in margins):
        return None
    return _padding(convolution, margins, calls[0].mode if calls[0] else "constant")


@dataclass(frozen=True)
class _Call:
    """What a module's forward does on a tiny input: pad it, and call the layer's function."""

    weight: Tensor
    margins: tuple[int, ...]  # as `F.pad` takes them
    mode: str


class _Trace(TorchFunctionMode):
    """Records the functions of torch that are called, but for questions about shapes and types."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not is_metadata(func):
            self.calls.append((func, args, kwargs or {}, result))
        return result


_METADATA = {
    *("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta", "requires_grad"),
    *("size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "stride"),
    *("__len__", "itemsize", "nelement", "ndimension", "get_device", "is_sparse", "is_quantized"),
    *("is_mps", "is_xpu", "is_cpu", "is_nested", "names", "is_leaf", "data_ptr"),
}


def is_metadata(func: Any) -> bool:
    """Whether a function of torch only asks a tensor for its shape, type or place."""
    name = getattr(func, "__name__", "")
    owner = getattr(func, "__self__", None)
    return (getattr(owner, "__name__", "") if name == "__get__" else name) in _METADATA


def _sizes(convolution: ConvGeometry) -> range:
    return range(1 + max(convolution.stride, default=0))


def _traced(module: nn.Module, extra: int = 0) -> _Call | None:
    """Run the module on a tiny input; `None` where it does more than pad and call its function."""
    convolution = layer_geometry(module)
    weight = next(p for p in weight_parameters(module) if p.dim() > 1)
    reach = [
        d * (k - 1) + 1 for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)
    ]
    x = weight.new_zeros(1, convolution.in_channels, *(size + 1 + extra for size in reach))
    was_training, own = module.training, {id(p) for p in module.parameters()}
    module.training = False
    try:
        with torch.no_grad(), _Trace() as trace:
            y = type(module).forward(module, x)
    except Exception:  # a forward of any class, on an input that it may not be made for
        return None
    finally:
        module.training = was_training
    call = _single_call(module, x, y, trace.calls)
    is_known = class_name(computing_class(module)) in _STANDARDIZED
    return call if call is not None and (is_known or _adds_nothing(module, call, own)) else None


def _single_call(module: nn.Module, x: Tensor, y: Any, calls: list[Any]) -> _Call | None:
    name = "linear" if isinstance(module, nn.Linear) else f"conv{x.dim() - 2}d"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        name = f"conv_transpose{x.dim() - 2}d"
    layer_calls = [call for call in calls if getattr(call[0], "__name__", "") == name]
    is_known = class_name(computing_class(module)) in _STANDARDIZED
    pads = [call for call in calls if call[0] in (functional.pad, torch._C._nn.pad)]
    if len(layer_calls) != 1 or len(pads) > 1:
        return None
    if not is_known and len(calls) > 1 + len(pads):
        return None
    _, args, kwargs, result = layer_calls[0]
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    padded = values["input"]
    margins: tuple[int, ...] = ()
    mode = "constant"
    if pads:
        _, pad_args, pad_kwargs, pad_result = pads[0]
        pad_names = ["input", "pad", "mode", "value"]
        pad_values = {**dict(zip(pad_names, pad_args, strict=False)), **pad_kwargs}
        if pad_values["input"] is not x or pad_result is not padded or pad_values.get("value"):
            return None
        margins, mode = tuple(pad_values["pad"]), pad_values.get("mode", "constant")
    if result is not y or (not pads and padded is not x):
        return None
    if values.get("bias") is not getattr(module, "bias", None):
        return None
    return _Call(values["weight"], margins, mode) if _same_options(module, values) else None


def _same_options(module: nn.Module, values: dict[str, Any]) -> bool:
    """Whether a convolution was called with the module's own stride, padding and so on."""
    return all(
        key not in values or values[key] == getattr(module, key, None)
        for key in ("stride", "padding", "dilation", "groups")
    )


def _adds_nothing(module: nn.Module, call: _Call, own: set[int]) -> bool:
    """Whether the module has its weight and bias and no numbers besides."""
    parameters = {id(module.weight), id(module.bias)} - {id(None)}
    is_own = call.weight is module.weight or parametrize.is_parametrized(module)
    return is_own and (own <= parameters or computes_weight(module)) and not [*module.buffers()]


def _padding(convolution: ConvGeometry, margins: list[tuple[int, ...]], mode: str) -> nn.Module:
    if len(set(margins)) == 1:
        return ConstantPad(margins[0], mode)
    same = SamePad(convolution.kernel_size, convolution.stride, convolution.dilation)
    reach = [
        d * (k - 1) + 1 for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)
    ]
    for extra, margin in zip(_sizes(convolution), margins, strict=False):
        expected = tuple(same.margins([size + 1 + extra for size in reach]))
        if mode != "constant" or (margin or (0,) * len(expected)) != expected:
            raise DeepTwistError("pads its input in a way of its own")
    return same


def _described(kind: type) -> str:
    article = "an" if kind.__name__[0] in "AEIO" else "a"  # "a UNet", as it is spoken
    return f"{article} {kind.__name__} ({kind.__module__})"


def _is_transposed_linear(module: nn.Module) -> bool:
    return class_name(computing_class(module)) == _TRANSPOSED_LINEAR


def _unknown_parametrization(module: nn.Module) -> str | None:
    parts = [*cast(nn.ModuleDict, module.parametrizations).items()]
    kinds = [type(part) for _, chain in parts for part in cast(nn.ModuleList, chain)]
    known = all(class_name(kind) in _REPARAMETRIZATIONS for kind in kinds)
    if [name for name, _ in parts] == ["weight"] and len(kinds) == 1 and known:
        return None
    return (
        f"has a weight parametrized by {kinds[0].__name__}: "
        "torch.nn.utils.parametrize.remove_parametrizations first"
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward, weight and spectral norm aside."""
    before = [hook for hook in module._forward_pre_hooks.values() if not _is_norm(hook)]
    return bool(
        before or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_norm(hook: object) -> bool:
    return class_name(type(hook)) in _NORMS and getattr(hook, "name", None) == "weight"


def _norm_hook(module: nn.Module) -> Any:
    return next((hook for hook in module._forward_pre_hooks.values() if _is_norm(hook)), None)


def _hooked_weight(module: nn.Module, hook: Any) -> Tensor:
    if hasattr(module, "weight_g"):
        return cast(Tensor, hook.compute_weight(module)).detach()
    return cast(Tensor, hook.compute_weight(module, do_power_iteration=False)).detach()


def distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state's tensors, each once, and the other names of those that are shared."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    taken: set[int] = set()  # memory that a tensor before holds: safetensors refuses to share it
    for name, tensor in model.state_dict(keep_vars=True).items():
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
