"""The factors of a whole network, followed from one distortion to the next."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeptwist.decompose import Dense, check_finite, factorize, get_planned_module, norms
from deeptwist.decompositions import Decomposition, Factors
from deeptwist.decompositions.matrix import MatrixDecomposition
from deeptwist.decompositions.subspace import Approximations
from deeptwist.errors import DeepTwistError
from deeptwist.layers.geometry import (
    ConvGeometry,
    compute_dtype,
    kernel_to_weight,
    weight_to_kernel,
)
from deeptwist.plan.plan import Plan
from deeptwist.plan.planned_layer import CompressedLayer

# Numbers handled at once, so that what is computed from them is found in a processor's cache; a
# layer that holds more, and cannot be divided, is taken alone.
_AT_ONCE = {"cpu": 5 * 2**17}
_AT_ONCE_ELSEWHERE = 2**26

Weights = Mapping[str, Tensor]  # by layer
Starts = dict[str, list[tuple[Tensor, ...]]]  # by layer, for each batch of `Decomposition.cut`


@dataclass(frozen=True)
class Block:
    """What is gathered, factored and written at once: some layers that are alike, or part of one.

    Attributes:
        names: the layers.
        decomposition: of each.
        convolution: one that has the kernels of all layers for its groups.
        rows: the output channels that are meant, where a single layer is divided; else none.
    """

    names: tuple[str, ...]
    decomposition: Decomposition
    convolution: ConvGeometry
    rows: range | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its kernel (g, o, i, *k)."""
        groups, out, *rest = self.convolution.kernel_shape
        return (groups, out if self.rows is None else len(self.rows), *rest)

    def of(self, weights: Weights) -> list[Tensor]:
        """Its layers' weights, or the part of one that is meant, of those of a network."""
        found = [weights[name] for name in self.names]
        return found if self.rows is None else [found[0][self.rows.start : self.rows.stop]]

    def kernel(self, weights: Weights) -> Tensor:
        """Its kernel (g, o, i, *k), of the weights of a network."""
        weight = _cat(self.of(weights))
        if self.convolution.transposed:
            return weight_to_kernel(weight, self.convolution)
        return weight.reshape(self.shape)

    def split(self, kernel: Tensor) -> Sequence[Tensor]:
        """A kernel of its shape as one weight, or part of a weight, for each of its layers."""
        return kernel_to_weight(kernel, self.convolution).chunk(len(self.names))


@dataclass(frozen=True)
class Tracked:
    """The factors of compressed layers, and how they were found.

    Attributes:
        weights: of every compressed layer, in the model's memory.
        factors: of every block that was factored.
        starts: what the next ones may be found from, by layer.
        norms: ‖W‖_F of every compressed layer; infinite where its square is beyond fp32.
        iterations: the most steps that any matrix or tensor took; 0 where all is exact.
        fallbacks: by layer, how many of its matrices or tensors had to be factored exactly.
    """

    weights: Weights
    factors: list[tuple[Block, Factors]]
    starts: Starts
    norms: dict[str, float]
    iterations: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Share:
    """A block's share of a stack: the batch of this number of its `Decomposition.cut`."""

    block: Block
    place: int  # of the block among all
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
        module = get_planned_module(model, layer) if exact else model.get_submodule(layer.name)
        weights[layer.name] = cast(Dense, module).weight.detach()
    sizes = dict(zip(weights, norms(weights.values()), strict=True))
    if not all(map(math.isfinite, sizes.values())):
        check_finite(weights)
    if names is not None:
        plan = replace(plan, compressed=tuple(x for x in plan.compressed if x.name in names))
    if exact:
        factors = factorize(model, plan)
        found = []
        for layer in plan.compressed:
            assert layer.convolution is not None
            block = Block((layer.name,), _decomposition(layer), layer.convolution)
            found.append((block, factors[layer.name]))
        return Tracked(weights, found, {name: f.starts() for name, f in factors.items()}, sizes)
    return _followed(weights, _blocks(plan, weights), starts, tolerance, sizes)


@torch.no_grad()
def _followed(
    weights: Weights, blocks: list[Block], starts: Starts, tolerance: float, sizes: dict[str, float]
) -> Tracked:
    found: list[dict[int, tuple[Tensor, ...]]] = [{} for _ in blocks]
    following: dict[str, dict[int, list[tuple[Tensor, ...]]]] = {}
    iterations, fallbacks = 0, dict.fromkeys(sizes, 0)
    for stack in _stacks(blocks, weights):
        approximations = _follow(stack, weights, starts, tolerance)
        iterations = max(iterations, approximations.steps)
        begin = 0
        for share in stack:
            mine = slice(begin, begin + share.count)
            found[share.place][share.number] = tuple(x[mine] for x in approximations.factors)
            for name in share.block.names:
                mine = slice(begin, begin + share.count // len(share.block.names))
                pieces = following.setdefault(name, {}).setdefault(share.number, [])
                pieces.append(tuple(x[mine] for x in approximations.start))
                fallbacks[name] += sum(mine.start <= n < mine.stop for n in approximations.exact)
                begin = mine.stop
    return Tracked(
        weights,
        [
            (block, block.decomposition.factors([parts[n] for n in sorted(parts)], block.shape))
            for block, parts in zip(blocks, found, strict=True)
        ],
        {
            name: [tuple(map(_cat, zip(*parts[n], strict=True))) for n in sorted(parts)]
            for name, parts in following.items()
        },
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


def _blocks(plan: Plan, weights: Weights) -> list[Block]:
    """Alike layers side by side and large ones in parts, so that each block is of bounded size."""
    alike: dict[tuple[Decomposition, ConvGeometry, torch.dtype, torch.device], list[str]] = {}
    for layer in plan.compressed:
        assert layer.convolution is not None
        weight = weights[layer.name]
        key = _decomposition(layer), layer.convolution, weight.dtype, weight.device
        alike.setdefault(key, []).append(layer.name)
    blocks = []
    for (decomposition, convolution, _, device), names in alike.items():
        limit = _at_once(device)
        count = max(1, limit // convolution.weight_numel)
        for some in (names[n : n + count] for n in range(0, len(names), count)):
            together = _side_by_side(convolution, len(some))
            blocks += [
                Block(tuple(some), decomposition, together, rows)
                for rows in _rows(decomposition, together, limit)
            ]
    return blocks


def _rows(
    decomposition: Decomposition, convolution: ConvGeometry, limit: int
) -> list[range | None]:
    """The parts of its rows in which a kernel can be cut, to at most `limit` numbers if it can."""
    groups, out, *rest = convolution.kernel_shape
    if convolution.weight_numel <= limit or groups > 1 or convolution.transposed:
        return [None]
    apart = out
    if isinstance(decomposition, MatrixDecomposition):
        apart = decomposition.rows_apart(convolution.kernel_shape)
    rows = max(apart, limit // math.prod(rest) // apart * apart)
    return [range(n, min(n + rows, out)) for n in range(0, out, rows)] if rows < out else [None]


@lru_cache(maxsize=1024)
def _side_by_side(convolution: ConvGeometry, count: int) -> ConvGeometry:
    return replace(
        convolution,
        groups=count * convolution.groups,
        in_channels=count * convolution.in_channels,
        out_channels=count * convolution.out_channels,
    )


def _stacks(blocks: list[Block], weights: Weights) -> Iterator[list[_Share]]:
    """The shares of every stack."""
    alike: dict[tuple[Any, ...], list[tuple[_Share, int]]] = {}
    for place, block in enumerate(blocks):
        weight = weights[block.names[0]]
        kind = type(block.decomposition).follow
        dtype = compute_dtype(weight.dtype)
        for number, ((count, *shape), rank) in enumerate(_cuts(block.decomposition, block.shape)):
            key = kind, tuple(shape), rank, dtype, weight.device
            share = _Share(block, place, number, count)
            alike.setdefault(key, []).append((share, count * math.prod(shape)))
    for (*_, device), shares in alike.items():
        stack: list[_Share] = []
        room = limit = _at_once(device)
        for share, numbers in shares:
            if stack and numbers > room:
                yield stack
                stack, room = [], limit
            stack.append(share)
            room -= numbers
        yield stack


def _follow(
    stack: list[_Share], weights: Weights, starts: Starts, tolerance: float
) -> Approximations:
    parts = _cat([s.block.decomposition.cut(s.block.kernel(weights))[s.number][0] for s in stack])
    parts = parts.to(compute_dtype(parts.dtype))
    given = [bases for share in stack for bases in _bases(share, starts)]
    start = tuple(_cat(tensors).to(parts) for tensors in zip(*given, strict=True))
    with torch.autocast(parts.device.type, enabled=False):
        return stack[0].block.decomposition.follow(parts, start, tolerance)


def _bases(share: _Share, starts: Starts) -> list[tuple[Tensor, ...]]:
    """What a share starts from: all that its layers have, or a part of what its layer has."""
    block = share.block
    given = [starts[name][share.number] for name in block.names]
    if block.rows is None:
        return given
    count = len(given[0][0])
    begin = count * block.rows.start // block.convolution.out_channels
    return [tuple(bases[begin : begin + share.count] for bases in given[0])]


def _at_once(device: torch.device) -> int:
    return _AT_ONCE.get(device.type, _AT_ONCE_ELSEWHERE)


@lru_cache(maxsize=1024)
def _cuts(decomposition: Decomposition, shape: tuple[int, ...]) -> list[tuple[torch.Size, Any]]:
    """The shapes (b, *part) and ranks of the batches cut from a kernel of this shape."""
    kernel = torch.empty(shape, device="meta")
    return [(parts.shape, rank) for parts, rank in decomposition.cut(kernel)]


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _decomposition(layer: CompressedLayer) -> Decomposition:
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
