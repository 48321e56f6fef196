"""The weight that a module computes with: `weight_of` finds it once, or says why there is none.

A torch layer, and a subclass that overrides nothing of its computation, is read from its
attributes; a subclass with a forward of its own is traced. There is one small class for each way
in which a weight is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deeptwist.errors import DeepTwistError, explaining
from deeptwist.inspection.run import eval_mode
from deeptwist.inspection.tracing import (
    class_name,
    computing_class,
    describe_class,
    other_forward_error,
    trace_forward,
    trace_padding,
)
from deeptwist.layers.geometry import SUPPORTED_MODULES, ConvGeometry

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_STANDARDIZED = {
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d",
}
_TRANSPOSED_LINEAR = "transformers.pytorch_utils.Conv1D"
_NORM_HOOKS = {"torch.nn.utils.weight_norm.WeightNorm", "torch.nn.utils.spectral_norm.SpectralNorm"}
_NORM_PARAMETRIZATIONS = {
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


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules of a model, as `named_modules` with duplicates, and these projections."""
    projections: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        yield name, module
        if has_in_projection(module):
            if module not in projections:
                projections[module] = InProjection(cast(nn.MultiheadAttention, module))
            yield f"{name}.{InProjection.NAME}".lstrip("."), projections[module]


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

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that it is made of."""
        return _parameters(self.module)

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's bias (out_channels,), if it has one."""
        return cast(nn.Parameter | None, getattr(self.module, "bias", None))

    @property
    def has_hooks(self) -> bool:
        """Whether calling the module does more than its forward, weight and spectral norm aside."""
        module = self.module
        before = [hook for hook in module._forward_pre_hooks.values() if not _is_norm(hook)]
        after = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
        return bool(before or after)

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

    def read(self) -> Tensor:
        """Return the transposed parameter (o, i), a view."""
        return super().read().mT

    def write(self, weight: Tensor) -> None:
        """Set the parameter from (o, i)."""
        super().write(weight.mT)


class HookedWeight(Weight):
    """The weight that weight norm or spectral norm of torch.nn.utils computes in a hook."""

    is_computed = True

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
        if hasattr(self.module, "weight_g"):
            gains = torch.norm_except_dim(weight, 2, _norm_hook(self.module).dim)
            cast(Tensor, self.module.weight_g).copy_(gains)
            cast(Tensor, self.module.weight_v).copy_(weight)
        else:
            cast(Tensor, self.module.weight_orig).copy_(weight)
        self.module.weight = self.read()


class StandardizedWeight(Weight):
    """(w − mean) / standard deviation of each output channel, then a gain: as timm's."""

    is_computed = True

    def read(self) -> Tensor:
        """Return the weight that the forward gives to the convolution."""
        forward = trace_forward(self.module, self.geometry, computes_weight=True)
        assert forward is not None, f"{type(self.module).__name__} calls no convolution"
        return forward.weight.detach()


class ParametrizedWeight(Weight):
    """The weight that torch's parametrizations compute: weight norm, spectral norm."""

    is_computed = True

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return what they compute now, without a power iteration."""
        with eval_mode(cast(nn.Module, self.module.parametrizations)):
            return super().read().clone()

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Assign, which torch takes back through the parametrization."""
        self.module.weight = weight


def _kind_of(module: nn.Module) -> type[Weight] | None:
    """Return how a module keeps its weight; `None` where it is no layer."""
    is_layer, name = isinstance(module, SUPPORTED_MODULES), class_name(computing_class(module))
    is_normed, is_parametrized = _norm_hook(module) is not None, parametrize.is_parametrized(module)
    if name == _TRANSPOSED_LINEAR and not is_normed and not is_parametrized:
        return TransposedWeight
    if is_layer and is_normed:
        return HookedWeight
    if name in _STANDARDIZED:
        return StandardizedWeight
    if is_layer:
        return ParametrizedWeight if is_parametrized else Weight
    return None


@dataclass(frozen=True, eq=False)
class Kept:
    """A module whose weight cannot be found, or that has none.

    Attributes:
        reason: why it must be kept as it is.
        geometry: of a layer; `None` where it is none, or cannot be read.
        parameters: those that count as weights: a layer's but its bias, another module's own
            matrices.
    """

    reason: str
    geometry: ConvGeometry | None
    parameters: list[nn.Parameter]
    padding: ClassVar[None] = None


def weight_of(module: nn.Module) -> Weight | Kept:
    """Return the weight that a module computes with, or why it must be kept as it is."""
    kind = _kind_of(module)
    if kind is None:
        reason = f"is {describe_class(computing_class(module))}, not a convolution"
        return Kept(reason, None, _own_matrices(module))
    parameters, geometry = _parameters(module), None
    try:
        geometry = _geometry(module, kind)
        _check_parametrization(module)
        padding = _padding(module, kind, geometry)
        dtype = next(p for p in parameters if p.dim() > 1).dtype
        if dtype not in _FLOATS:
            raise DeepTwistError(f"has weights of type {dtype}".replace("torch.", ""))
    except DeepTwistError as error:
        return Kept(str(error), geometry, parameters)
    return kind(module, geometry, padding)


def get_weight(model: nn.Module, name: str) -> Weight:
    """Return the weight of the layer that a name in a plan stands for.

    Raises:
        AttributeError: if there is no such module.
        DeepTwistError: if it must be kept, naming the layer.
    """
    weight = weight_of(get_layer(model, name))
    if isinstance(weight, Kept):
        raise DeepTwistError(f"layer {name!r} {weight.reason}")
    return weight


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    bias = getattr(module, "bias", None)
    return [parameter for parameter in module.parameters() if parameter is not bias]


def _own_matrices(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters that are a matrix at least, as an embedding's."""
    own = dict(module.named_parameters(recurse=False))
    if has_in_projection(module):
        del own["in_proj_weight"]
    matrices = [p for p in own.values() if sum(side > 1 for side in p.shape) > 1]
    if parametrize.is_parametrized(module):
        matrices += module.get_submodule("parametrizations").parameters()
    return matrices


def _geometry(module: nn.Module, kind: type[Weight]) -> ConvGeometry:
    """Return a layer's geometry, from attributes that may have been set by hand."""
    with explaining("has an unusual geometry", errors=(AttributeError, TypeError, DeepTwistError)):
        if kind is TransposedWeight:
            return ConvGeometry(*cast(Tensor, module.weight).shape)
        geometry = ConvGeometry.from_module(module)
        _check_attributes(module, geometry)
        return geometry


def _check_attributes(module: nn.Module, geometry: ConvGeometry) -> None:
    """Check that a layer's attributes agree with what it computes."""
    shapes = {tuple(p.shape) for p in _parameters(module)}
    expected = geometry.weight_shape
    if expected not in shapes:
        raise DeepTwistError(f"its weight {shapes} is not of shape {expected}")
    margins = getattr(module, "_reversed_padding_repeated_twice", None)
    if geometry.padding_mode != "zeros" and geometry.padding != "same":
        padding = geometry.padding
        if tuple(margins or ()) != tuple(side for pad in reversed(padding) for side in (pad, pad)):
            raise DeepTwistError(f"its padding {padding} is not the one that it was made with")


def _check_parametrization(module: nn.Module) -> None:
    """Check that a layer's parametrizations, if it has any, are one known norm of its weight."""
    if not parametrize.is_parametrized(module):
        return
    parts = [*cast(nn.ModuleDict, module.parametrizations).items()]
    kinds = [type(part) for _, chain in parts for part in cast(nn.ModuleList, chain)]
    known = all(class_name(kind) in _NORM_PARAMETRIZATIONS for kind in kinds)
    if [name for name, _ in parts] != ["weight"] or len(kinds) != 1 or not known:
        raise DeepTwistError(
            f"has a weight parametrized by {kinds[0].__name__}: "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )


def _padding(module: nn.Module, kind: type[Weight], geometry: ConvGeometry) -> nn.Module | None:
    """Return the padding of a forward of the module's own, if it has one."""
    if computing_class(module) in SUPPORTED_MODULES or kind is TransposedWeight:
        return None
    # Numbers besides the weight and the bias may come into play later, as an adapter's.
    known = {id(module.weight), id(module.bias)}
    others = [x for x in (*module.parameters(), *module.buffers()) if id(x) not in known]
    if others and not kind.is_computed:
        raise other_forward_error(module)
    return trace_padding(module, geometry, computes_weight=kind is StandardizedWeight)


def _is_norm(hook: object) -> bool:
    return class_name(type(hook)) in _NORM_HOOKS and getattr(hook, "name", None) == "weight"


def _norm_hook(module: nn.Module) -> Any:
    return next((hook for hook in module._forward_pre_hooks.values() if _is_norm(hook)), None)
