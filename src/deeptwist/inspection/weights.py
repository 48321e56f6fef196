"""The weight that a module computes with: `weight_of` finds it once, or says why there is none.

A torch layer, and a subclass that overrides nothing of its computation, is read from its
attributes; a subclass with a forward of its own is traced. There is one small class for each way
in which a weight is kept.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deeptwist.errors import DeepTwistError
from deeptwist.inspection.run import eval_mode
from deeptwist.inspection.tracing import padding_of, trace_forward, trace_forwards
from deeptwist.layers.geometry import SUPPORTED_MODULES, ConvGeometry

_COMPUTATION = "forward", "_conv_forward", "weight", "__call__", "_call_impl"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_STANDARDIZED = {
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d",
}
_TRANSPOSED_LINEAR = "transformers.pytorch_utils.Conv1D"
_NORM_HOOKS = {  # hooks of torch.nn.utils, and the name of the parameter that they normalise
    "torch.nn.utils.weight_norm.WeightNorm": "weight_v",
    "torch.nn.utils.spectral_norm.SpectralNorm": "weight_orig",
}
_NORM_PARAMETRIZATIONS = {
    "torch.nn.utils.parametrizations._WeightNorm",
    "torch.nn.utils.parametrizations._SpectralNorm",
}


@dataclass(frozen=True, eq=False)
class Weight:
    """The weight of a torch layer: the parameter itself.

    Attributes:
        module: the layer that computes with it.
        geometry: of the layer, its own padding aside.
        padding: what the layer's forward does to its input first; `None` where nothing.
        is_computed: whether it is computed from its parameters at every call.
    """

    module: nn.Module
    geometry: ConvGeometry
    padding: nn.Module | None = None
    is_computed: ClassVar[bool] = False

    @staticmethod
    def holds(module: nn.Module) -> bool:
        """Whether a module keeps its weight in this way; the first of `_KINDS` counts."""
        return isinstance(module, SUPPORTED_MODULES)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that it is made of."""
        return weight_parameters(self.module)

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's bias (out_channels,), if it has one."""
        return cast(nn.Parameter | None, getattr(self.module, "bias", None))

    def read(self) -> Tensor:
        """Return the weight, shaped `geometry.weight_shape`; the parameter's memory if it can."""
        return cast(Tensor, self.module.weight).detach()

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Set the parameters so that the layer computes with this weight, or near it.

        Weight norm is met exactly. Spectral norm and weight standardisation normalise what they
        are given: the weight then is a multiple of it, for each output channel or as a whole.

        Args:
            weight: shaped as `read` returns it.
        """
        cast(Tensor, self.module.weight).copy_(weight)


class TransposedWeight(Weight):
    """The weight (i, o) of transformers' Conv1D, a linear layer."""

    @staticmethod
    def holds(module: nn.Module) -> bool:
        """Whether it is such a layer, its weight the parameter itself."""
        is_kind = class_name(computing_class(module)) == _TRANSPOSED_LINEAR
        return is_kind and not parametrize.is_parametrized(module) and _norm_hook(module) is None

    def read(self) -> Tensor:
        """Return the transposed parameter (o, i), a view."""
        return super().read().mT

    def write(self, weight: Tensor) -> None:
        """Set the parameter from (o, i)."""
        super().write(weight.mT)


class HookedWeight(Weight):
    """The weight that weight norm or spectral norm of torch.nn.utils computes in a hook."""

    is_computed = True

    @staticmethod
    def holds(module: nn.Module) -> bool:
        """Whether a layer has such a hook."""
        return isinstance(module, SUPPORTED_MODULES) and _norm_hook(module) is not None

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return what the hook would compute now, without a power iteration."""
        hook = _norm_hook(self.module)
        has_gain = hasattr(self.module, "weight_g")
        options = {} if has_gain else {"do_power_iteration": False}
        return cast(Tensor, hook.compute_weight(self.module, **options)).detach()

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Set the normalised parameter, and weight norm's gains."""
        hook = _norm_hook(self.module)
        getattr(self.module, _NORM_HOOKS[class_name(type(hook))]).copy_(weight)
        if hasattr(self.module, "weight_g"):
            gains = torch.norm_except_dim(weight, 2, hook.dim)
            cast(Tensor, self.module.weight_g).copy_(gains)
        self.module.weight = self.read()


class StandardizedWeight(Weight):
    """(w − mean) / standard deviation of each output channel, then a gain: as timm's."""

    is_computed = True

    @staticmethod
    def holds(module: nn.Module) -> bool:
        """Whether the class is known to do so."""
        return class_name(computing_class(module)) in _STANDARDIZED

    def read(self) -> Tensor:
        """Return the weight that the forward gives to the convolution."""
        forward = trace_forward(self.module, self.geometry, computes_weight=True)
        assert forward is not None, f"{type(self.module).__name__} calls no convolution"
        return forward.weight.detach()


class ParametrizedWeight(Weight):
    """The weight that torch's parametrizations compute: weight norm, spectral norm."""

    is_computed = True

    @staticmethod
    def holds(module: nn.Module) -> bool:
        """Whether a layer has any."""
        return isinstance(module, SUPPORTED_MODULES) and parametrize.is_parametrized(module)

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return what they compute now, without a power iteration."""
        with eval_mode(cast(nn.Module, self.module.parametrizations)):
            return super().read().clone()

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Assign, which torch takes back through the parametrization."""
        self.module.weight = weight


_KINDS = TransposedWeight, HookedWeight, StandardizedWeight, ParametrizedWeight, Weight


def weight_of(module: nn.Module) -> Weight | str:
    """Return the weight that a module computes with, or why it must be kept as it is."""
    try:
        geometry = layer_geometry(module)
        reason = _unknown_parametrization(module)
        if reason is not None:
            return reason
        padding = _padding(module, geometry)
    except DeepTwistError as error:
        return str(error)
    dtype = next(p for p in weight_parameters(module) if p.dim() > 1).dtype
    if dtype not in _FLOATS:
        return f"has weights of type {dtype}".replace("torch.", "")
    return _kind(module)(module, geometry, padding)


def layer_geometry(module: nn.Module) -> ConvGeometry:
    """Return the geometry of a layer, whether its weight can be found or not.

    Raises:
        DeepTwistError: if it is no layer, or its attributes are not those of one.
    """
    if not is_layer(module):
        raise DeepTwistError(f"is {_described(computing_class(module))}, not a convolution")
    try:
        if _kind(module) is TransposedWeight:
            inputs, outputs = cast(Tensor, module.weight).shape
            return ConvGeometry(inputs, outputs)
        geometry = ConvGeometry.from_module(module)
        _check_attributes(module, geometry)
    except (AttributeError, TypeError, DeepTwistError) as error:
        raise DeepTwistError(f"has an unusual geometry: {error}") from error
    return geometry


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution, a linear layer, or of a class derived from one."""
    return any(kind.holds(module) for kind in _KINDS)


def weight_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return all parameters of a layer but its bias."""
    bias = getattr(module, "bias", None)
    return [parameter for parameter in module.parameters() if parameter is not bias]


def _kind(module: nn.Module) -> type[Weight]:
    return next(kind for kind in _KINDS if kind.holds(module))


def _padding(module: nn.Module, geometry: ConvGeometry) -> nn.Module | None:
    """Return the padding of a forward of the module's own, if it has one.

    Raises:
        DeepTwistError: if the forward computes more than the layer behind a padding.
    """
    kind, own_class = _kind(module), computing_class(module)
    if own_class in SUPPORTED_MODULES or kind is TransposedWeight:
        return None
    forwards = trace_forwards(module, geometry, computes_weight=kind is StandardizedWeight)
    # Numbers besides the weight and the bias may come into play later, as an adapter's.
    known = {id(module.weight), id(module.bias)}
    others = [x for x in (*module.parameters(), *module.buffers()) if id(x) not in known]
    if forwards is None or (others and not kind.is_computed):
        raise DeepTwistError(f"is {_described(own_class)}, whose forward computes something else")
    return padding_of(forwards, geometry)


def _check_attributes(module: nn.Module, geometry: ConvGeometry) -> None:
    """Check that a layer's attributes, which may be set by hand, agree with what it computes."""
    shapes = {tuple(p.shape) for p in weight_parameters(module)}
    expected = geometry.weight_shape
    if expected not in shapes:
        raise DeepTwistError(f"its weight {shapes} is not of shape {expected}")
    margins = getattr(module, "_reversed_padding_repeated_twice", None)
    if geometry.padding_mode != "zeros" and geometry.padding != "same":
        padding = geometry.padding
        if tuple(margins or ()) != tuple(side for pad in reversed(padding) for side in (pad, pad)):
            raise DeepTwistError(f"its padding {padding} is not the one that it was made with")


def _unknown_parametrization(module: nn.Module) -> str | None:
    if not parametrize.is_parametrized(module):
        return None
    parts = [*cast(nn.ModuleDict, module.parametrizations).items()]
    kinds = [type(part) for _, chain in parts for part in cast(nn.ModuleList, chain)]
    known = all(class_name(kind) in _NORM_PARAMETRIZATIONS for kind in kinds)
    if [name for name, _ in parts] == ["weight"] and len(kinds) == 1 and known:
        return None
    return (
        f"has a weight parametrized by {kinds[0].__name__}: "
        "torch.nn.utils.parametrize.remove_parametrizations first"
    )


def class_name(kind: type) -> str:
    """Return a class's name with its module's."""
    return f"{kind.__module__}.{kind.__qualname__}"


def computing_class(module: nn.Module) -> type:
    """Return the class whose forward the module runs: its own, or one it is derived from."""
    kind = parametrize.type_before_parametrizations(module)
    return next(base for base in kind.__mro__ if any(name in vars(base) for name in _COMPUTATION))


def _described(kind: type) -> str:
    article = "an" if kind.__name__[0] in "AEIO" else "a"  # "a UNet", as it is spoken
    return f"{article} {kind.__name__} ({kind.__module__})"


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward, weight and spectral norm aside."""
    before = [hook for hook in module._forward_pre_hooks.values() if not _is_norm(hook)]
    return bool(
        before or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_compiled_forward(module: nn.Module) -> bool:
    """Whether ``module.forward = torch.compile(module.forward)`` is all that is stored on it."""
    compiled = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
    if compiled is None:
        return False
    method = getattr(compiled, "__wrapped__", compiled)  # torch puts a frame around its own code
    return getattr(method, "__func__", method) is type(module).forward


def _is_norm(hook: object) -> bool:
    return class_name(type(hook)) in _NORM_HOOKS and getattr(hook, "name", None) == "weight"


def _norm_hook(module: nn.Module) -> Any:
    return next((hook for hook in module._forward_pre_hooks.values() if _is_norm(hook)), None)


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


def get_weight(model: nn.Module, name: str) -> Weight:
    """Return the weight of the layer that a name in a plan stands for.

    Raises:
        AttributeError: if there is no such module.
        DeepTwistError: if it computes with no weight of its own, naming the layer.
    """
    weight = weight_of(get_layer(model, name))
    if isinstance(weight, str):
        raise DeepTwistError(f"layer {name!r} {weight}")
    return weight
