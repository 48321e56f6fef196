"""The factors of a whole network, followed from one distortion to the next."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeptwist.convolution import computing_dtype, kernel_of
from deeptwist.decompositions import Decomposition, Factors
from deeptwist.errors import DeepTwistError
from deeptwist.factorization import Dense, check_finite, factorize, norms, planned_module
from deeptwist.planning import Plan, PlannedLayer
from deeptwist.subspace import Approximations

# Numbers stacked at once; a layer that holds more is taken alone.
_STACK = {"cpu": 2**20}
_STACK_ELSEWHERE = 2**26

Starts = dict[str, list[tuple[Tensor, ...]]]  # by layer, for each batch of `Decomposition.cut`


@dataclass(frozen=True)
class Tracked:
    """The factors of compressed layers, and how they were found.

    Attributes:
        factors: by layer.
        starts: what the next ones may be found from.
        norms: ‖W‖_F of every compressed layer; infinite where its square is beyond fp32.
        iterations: the most steps that any matrix or tensor took; 0 where all is exact.
        fallbacks: by layer, how many of its matrices or tensors had to be factored exactly.
    """

    factors: dict[str, Factors]
    starts: Starts
    norms: dict[str, float]
    iterations: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Share:
    """A layer's share of a stack: one batch of its `Decomposition.cut`."""

    layer: PlannedLayer
    number: int
    count: int


def track(
    model: nn.Module,
    plan: Plan,
    starts: Starts,
    tolerance: float,
    names: Collection[str] | None = None,
) -> Tracked:
    """The factors of compressed layers as they are now; the model is not touched.

    What is of one shape and rank goes through one call, across layers, in stacks of bounded size:
    besides the factors, it holds one stack and what is computed from it.

    Args:
        model: the network that was planned.
        plan: see `deeptwist.plan`.
        starts: of the last time; empty for exact factors.
        tolerance: the squared error above the optimum, relatively; 0 for exact factors.
        names: the layers to factor, all if not given; every weight is checked all the same.

    Raises:
        DeepTwistError: if a weight is not finite, naming the layer; or if the plan is for
            another model.
    """
    exact = not (starts and tolerance)
    weights = {}
    for layer in plan.compressed:
        # To compare a layer with its plan takes as long as to follow it.
        module = planned_module(model, layer) if exact else model.get_submodule(layer.name)
        weights[layer.name] = cast(Dense, module).weight.detach()
    sizes = dict(zip(weights, norms(weights.values()), strict=True))
    if not all(map(math.isfinite, sizes.values())):
        check_finite(weights)
    if names is not None:
        plan = replace(plan, layers=tuple(x for x in plan.compressed if x.name in names))
    if exact:
        factors = factorize(model, plan)
        return Tracked(factors, {name: f.starts() for name, f in factors.items()}, sizes)
    mine = [layer.name for layer in plan.compressed]
    found: dict[str, dict[int, tuple[Tensor, ...]]] = {name: {} for name in mine}
    following: dict[str, dict[int, tuple[Tensor, ...]]] = {name: {} for name in mine}
    iterations, fallbacks = 0, dict.fromkeys(mine, 0)
    for shares in _stacks(plan, weights):
        approximations = _follow(shares, weights, starts, tolerance)
        iterations = max(iterations, approximations.steps)
        begin = 0
        for share in shares:
            name, part = share.layer.name, slice(begin, begin + share.count)
            found[name][share.number] = tuple(x[part] for x in approximations.factors)
            following[name][share.number] = tuple(x[part] for x in approximations.start)
            fallbacks[name] += sum(part.start <= n < part.stop for n in approximations.exact)
            begin = part.stop
    return Tracked(
        {
            layer.name: _decomposition(layer).factors(
                _in_order(found[layer.name]), layer.convolution.kernel_shape
            )
            for layer in plan.compressed
            if layer.convolution is not None
        },
        {name: _in_order(parts) for name, parts in following.items()},
        sizes,
        iterations,
        {name: count for name, count in fallbacks.items() if count},
    )


def costs(plan: Plan) -> dict[str, float]:
    """What it takes to factor each compressed layer, in products with its weights."""
    found: dict[str, float] = {}
    for layer in plan.compressed:
        assert layer.convolution is not None
        found[layer.name] = sum(
            math.prod(shape) * (sum(rank) if isinstance(rank, tuple) else rank)
            for shape, rank in _cuts(_decomposition(layer), layer.convolution.kernel_shape)
        )
    return found


def _stacks(plan: Plan, weights: dict[str, Tensor]) -> Iterator[list[_Share]]:
    """The shares of every stack."""
    alike: dict[tuple[Any, ...], list[tuple[_Share, int]]] = {}
    for layer in plan.compressed:
        assert layer.convolution is not None
        weight, decomposition = weights[layer.name], _decomposition(layer)
        cuts = _cuts(decomposition, layer.convolution.kernel_shape)
        for number, ((count, *shape), rank) in enumerate(cuts):
            kind = type(decomposition).follow
            key = kind, tuple(shape), rank, computing_dtype(weight.dtype), weight.device
            share = _Share(layer, number, count)
            alike.setdefault(key, []).append((share, count * math.prod(shape)))
    for (*_, device), shares in alike.items():
        stack: list[_Share] = []
        room = limit = _STACK.get(device.type, _STACK_ELSEWHERE)
        for share, numbers in shares:
            if stack and numbers > room:
                yield stack
                stack, room = [], limit
            stack.append(share)
            room -= numbers
        yield stack


@torch.no_grad()
def _follow(
    shares: list[_Share], weights: dict[str, Tensor], starts: Starts, tolerance: float
) -> Approximations:
    batches, sources = [], []
    for share in shares:
        layer = share.layer
        assert layer.convolution is not None
        kernel = kernel_of(weights[layer.name], layer.convolution)
        batches.append(_decomposition(layer).cut(kernel)[share.number][0])
        sources.append(starts[layer.name][share.number])
    parts = _cat(batches)
    parts = parts.to(computing_dtype(parts.dtype))
    start = tuple(_cat(tensors).to(parts) for tensors in zip(*sources, strict=True))
    with torch.autocast(parts.device.type, enabled=False):
        return _decomposition(shares[0].layer).follow(parts, start, tolerance)


@lru_cache(maxsize=1024)
def _cuts(decomposition: Decomposition, shape: tuple[int, ...]) -> list[tuple[torch.Size, Any]]:
    """The shapes (b, *part) and ranks of the batches cut from a kernel of this shape."""
    kernel = torch.empty(shape, device="meta")
    return [(parts.shape, rank) for parts, rank in decomposition.cut(kernel)]


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _in_order(parts: dict[int, tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return [parts[number] for number in sorted(parts)]


def _decomposition(layer: PlannedLayer) -> Decomposition:
    assert layer.decomposition is not None
    return layer.decomposition


def check_starts(plan: Plan, starts: Any) -> Starts:
    """What `track` may start from, of a checkpoint.

    Raises:
        DeepTwistError: if it is for another plan.
        AttributeError, LookupError, TypeError, ValueError: if it is of another form.
    """
    if not starts:
        return {}
    checked: Starts = {}
    for layer in plan.compressed:
        assert layer.convolution is not None
        kernel = torch.zeros(layer.convolution.kernel_shape)
        given = [tuple(tensors) for tensors in starts[layer.name]]
        expected = _decomposition(layer).decompose(kernel).starts()
        if shapes_of(given) != shapes_of(expected):
            raise DeepTwistError(f"the bases of layer {layer.name!r} are for another plan")
        checked[layer.name] = given
    return checked


def shapes_of(starts: Sequence[tuple[Tensor, ...]]) -> list[list[torch.Size]]:
    """The shapes of one layer's tensors."""
    return [[tensor.shape for tensor in tensors] for tensors in starts]
