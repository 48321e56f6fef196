"""The laws that every decomposition keeps.

A `Decomposition` is a frozen value: a method and its rank, without tensors. It names the
convolutions that a layer becomes (`convolutions`), from which all costs follow; it turns a kernel
into `Factors`; and it builds the factored layer.

Laws, each a test in ``tests/test_laws.py`` that every method joins:

- ``factors.reconstruct()`` has the kernel's shape, and decomposing it again changes nothing.
- The error never rises with the rank; at full rank it is zero (CP excepted).
- ``weight_numel`` counts the numbers that the layer stores, ``macs`` the work that it does.
- The layer equals the convolution with the reconstructed kernel.
- A start changes the time, and the result by little: ``docs/decompositions.md`` says how little.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError, check_int, check_ratio
from deeptwist.layers.factored import FactoredLayer
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs, compute_dtype
from deeptwist.layers.moments import SecondMoment

Tensors = tuple[Tensor, ...]  # one kernel's factors, as its method's `factorize` gives them


class CannotDecomposeError(DeepTwistError):
    """A layer that a decomposition cannot hold, or not as small as asked."""


@dataclass(frozen=True)
class Factors:
    """The tensors that stand in for one kernel.

    Attributes:
        decomposition: whose factors they are.
        shape: the kernel's, (g, o, i, *k).
        tensors: as `Decomposition.factorize` gives them.
    """

    decomposition: "Decomposition"
    shape: tuple[int, ...]
    tensors: Tensors

    def reconstruct(self) -> Tensor:
        """Return the kernel (g, o, i, *k) that the factors stand for, in the factors' dtype."""
        # A loop that runs under autocast must not have its weights computed in bf16.
        with torch.autocast(self.tensors[0].device.type, enabled=False):
            return self.decomposition.reconstruct(self.tensors, self.shape)

    def kernels(self) -> list[Tensor]:
        """Return the kernel (g, o, i, *k) of each of `Decomposition.convolutions`, in order."""
        return self.decomposition.kernels(self.tensors, self.shape)

    def to(
        self, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "Factors":
        """Return the same factors on another device, or in another dtype."""
        tensors = tuple(tensor.to(device=device, dtype=dtype) for tensor in self.tensors)
        return replace(self, tensors=tensors)


@dataclass(frozen=True)
class Decomposition(ABC):
    """A method and its rank; holds no tensors. See the module's docstring for its laws.

    Its options are its dataclass fields. They have defaults, and become JSON and back by
    themselves: whole numbers, floats, and tuples of them.

    Attributes:
        rank: `None` to let a ratio set it.
    """

    method: ClassVar[str]
    rank: int | tuple[int, ...] | None = None

    @abstractmethod
    def resolve(self, convolution: ConvGeometry, ratio: float | None) -> "Decomposition":
        """Return the decomposition with every open choice made for this layer.

        Args:
            convolution: the layer.
            ratio: dense ÷ factored weights to keep at least, where no rank is given.

        Raises:
            CannotDecomposeError: if no rank keeps the ratio, or the given rank does not fit.
        """

    @abstractmethod
    def full_rank(self, convolution: ConvGeometry) -> int | tuple[int, ...]:
        """Return the rank from which on nothing is lost."""

    @abstractmethod
    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:
        """Return the convolutions that the layer becomes, one stage after another."""

    @abstractmethod
    def factorize(
        self,
        kernel: Tensor,  # (g, o, i, *k)
        start: Tensors | None,
        second_moment: SecondMoment | None,
    ) -> Tensors:  # the first axis of each is a batch: of groups, or of tiles
        """Return the factors of a kernel.

        Args:
            kernel: finite, in fp32 or fp64.
            start: factors of a kernel that was nearly this one, of the same shapes and dtype, or
                `None` for exact ones. One refines them in a fixed number of steps, without
                reading a number back: an accelerator must not be waited for.
            second_moment: where given, ‖(W − W′) M^½‖ is made small in place of ‖W − W′‖.
        """

    @abstractmethod
    def reconstruct(self, tensors: Tensors, shape: Sequence[int]) -> Tensor:
        """Return the kernel of this shape (g, o, i, *k) that factors stand for."""

    @abstractmethod
    def kernels(self, tensors: Tensors, shape: Sequence[int]) -> list[Tensor]:
        """Return the kernel (g, o, i, *k) of each of `convolutions`, in order, from factors."""

    def tensors(self, kernels: Sequence[Tensor], shape: Sequence[int]) -> Tensors:
        """Invert `kernels`; raise `CannotDecomposeError` if the method has no way back."""
        raise CannotDecomposeError(f"{self} cannot read its factors from its layer's weights")

    def tangent(self, tensors: Tensors, gradients: Tensors, damping: float) -> Tensors:
        """Return the steps of the factors that move their product as the dense gradient would.

        To first order it then moves by the dense gradient's projection onto what small steps of
        factors can reach, however its scale is spread over them.

        Args:
            tensors: the factors, in fp32 or fp64.
            gradients: of the loss, one for each.
            damping: see `deeptwist.precondition`.

        Raises:
            CannotDecomposeError: if the method has no closed form for them.
        """
        raise CannotDecomposeError(f"{self} has no closed form for preconditioned gradients")

    def parts(self, convolution: ConvGeometry) -> list[ConvGeometry]:
        """Return all of `convolutions`, in the order of their kernels."""
        return [part for stage in self.convolutions(convolution) for part in stage]

    def decompose(
        self,
        kernel: Tensor,  # (g, o, i, *k)
        start: Factors | None = None,
        *,
        second_moment: SecondMoment | None = None,
    ) -> Factors:
        """Approximate a kernel.

        Args:
            kernel: finite; computed in fp32, or in fp64 where it is fp64. The rank must be
                resolved.
            start: this decomposition's factors of a kernel that was nearly this one. They are
                refined by a few steps, at a fraction of the time; without them they are exact.
            second_moment: of the layer's inputs, for the least mean squared error of its outputs
                in place of the weights'; a start is then not used. Never worse for them than
                without it.

        Raises:
            DeepTwistError: if the start is another decomposition's.
        """
        kernel = kernel.detach().to(compute_dtype(kernel.dtype))
        if second_moment is not None:
            second_moment = second_moment.to(kernel.device)
        if start is not None:
            if start.decomposition != self:
                raise DeepTwistError(f"{self} cannot start from factors of {start.decomposition}")
            start = start.to(device=kernel.device, dtype=kernel.dtype)
        # A loop that runs under autocast must not have its factors computed in bf16.
        with torch.no_grad(), torch.autocast(kernel.device.type, enabled=False):
            shape = tuple(kernel.shape)
            if second_moment is None:
                tensors = self.factorize(kernel, start.tensors if start else None, None)
                return Factors(self, shape, tensors)
            # Where a method cannot take a whole moment into account, the plain way may be better.
            weighted, plain = (
                Factors(self, shape, self.factorize(kernel, None, moment))
                for moment in (second_moment, None)
            )
            lost = [second_moment.squared_norm(kernel - x.reconstruct()) for x in (weighted, plain)]
            return plain if lost[1] < lost[0] else weighted

    def refine_together(
        self,
        kernels: Sequence[Tensor],  # (g, o, i, *k) each
        starts: Sequence[Factors],
    ) -> list[Factors]:
        """Refine the factors of kernels of one shape at once, as groups of one; see `decompose`."""
        if len(kernels) == 1:
            return [self.decompose(kernels[0], starts[0])]
        columns = zip(*(start.tensors for start in starts), strict=True)
        stacked = torch.cat(list(kernels))
        start = Factors(self, tuple(stacked.shape), tuple(map(torch.cat, columns)))
        refined = self.decompose(stacked, start)
        parts = zip(*(tensor.chunk(len(kernels)) for tensor in refined.tensors), strict=True)
        return [Factors(self, tuple(kernels[0].shape), tensors) for tensors in parts]

    def errors_at_all_ranks(
        self,
        kernel: Tensor,  # (g, o, i, *k)
        second_moment: SecondMoment | None = None,
    ) -> Tensor | None:  # (full rank,), or (full R_t, full R_s)
        """Return the relative error at every rank, from one spectrum; `None` where there is no way.

        Args:
            kernel: finite; the rank need not be resolved.
            second_moment: as for `decompose`; the error is then that of the outputs.

        Returns:
            ‖W − W′‖_F / ‖W‖_F in fp64, with the rank, less one, for its index. See the method for
            whether it is exact.
        """
        return None

    @property
    def needs_ratio(self) -> bool:
        """Return whether its rank is open."""
        return self == self.without_rank()

    def without_rank(self) -> Self:
        """Return the same decomposition with its rank open, for a ratio to set."""
        return replace(self, rank=None)

    def round_ranks(self, multiple: int) -> Self:
        """Return it with ranks rounded down to multiples, where they are that large."""

        def rounded(rank: int) -> int:
            return rank // multiple * multiple or rank

        if isinstance(self.rank, tuple):
            return replace(self, rank=tuple(map(rounded, self.rank)))
        return self if self.rank is None else replace(self, rank=rounded(self.rank))

    def lowered_shape(self, convolution: ConvGeometry) -> tuple[int, int] | None:
        """Return the matrix that one group's kernel is lowered to; `None` for a tensor method."""
        return None

    def weight_numel(self, convolution: ConvGeometry) -> int:
        """Return how many numbers the factors hold, the bias not counted."""
        return sum(part.weight_numel for part in self.parts(convolution))

    def built_convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:
        """Return `convolutions` as the layer runs them: larger where they multiply zeros too."""
        return self.convolutions(convolution)

    def workload(
        self, convolution: ConvGeometry, input_size: Sequence[int]
    ) -> list[tuple[ConvGeometry, tuple[int, ...]]]:
        """Return every convolution of the factored layer with the spatial size that it is given.

        Args:
            convolution: the geometry of the layer that it stands in for.
            input_size: that layer's spatial input size.
        """
        size, work = tuple(input_size), []
        for stage in self.built_convolutions(convolution):
            work += [(part, size) for part in stage]
            size = stage[0].output_size(size)
        return work

    def macs(self, convolution: ConvGeometry, input_size: Sequence[int]) -> int:
        """Return the factored layer's multiply-accumulates for one example of this spatial size."""
        return sum(part.macs(size) for part, size in self.workload(convolution, input_size))

    def make_layer(
        self,
        convolution: ConvGeometry,
        kernels: Sequence[Tensor],  # (g, o, i, *k), one for each of `convolutions`
        bias: Tensor | None,  # (out_channels,)
    ) -> FactoredLayer:
        """Return the layer that holds these kernels, in place of one of this geometry."""
        modules = self.make_modules(convolution, kernels, bias)
        # What follows from the geometry, as the order of channels, is made on the processor.
        return FactoredLayer(modules, convolution, self).to(kernels[0].device)

    def make_modules(
        self,
        convolution: ConvGeometry,
        kernels: Sequence[Tensor],  # (g, o, i, *k) each
        bias: Tensor | None,  # (out_channels,)
    ) -> list[nn.Module]:
        """Return the modules of `make_layer`, in order."""
        parts = self.parts(convolution)
        biases = [None] * (len(parts) - 1) + [bias]
        return [part.make_module(k, b) for part, k, b in zip(parts, kernels, biases, strict=True)]

    def __str__(self) -> str:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        shown = ", ".join(f"{name}={value}" for name, value in values if value is not None)
        return f"{type(self).__name__}({shown})"


@dataclass(frozen=True)
class SingleRankDecomposition(Decomposition):
    """A decomposition whose size one rank sets.

    Attributes:
        rank: R, per group; `None` to let a ratio set it.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_int(f"{type(self).__name__} rank", self.rank)

    @abstractmethod
    def full_rank(self, convolution: ConvGeometry) -> int:
        """Return the rank from which on nothing is lost."""

    @property
    def resolved_rank(self) -> int:
        """Return the rank, once resolved."""
        if self.rank is None:
            raise no_rank_error(self)
        return self.rank

    def resolve(self, convolution: ConvGeometry, ratio: float | None) -> "Decomposition":
        full = self.full_rank(convolution)
        if self.rank is not None:
            if self.rank > full:
                raise CannotDecomposeError(
                    f"cannot hold {type(self).__name__} rank {self.rank}: at most {full}"
                )
            return self
        if ratio is None:
            raise no_rank_error(self)
        budget = convolution.weight_numel / check_ratio(ratio)

        def weight_numel(rank: int) -> int:
            return replace(self, rank=rank).weight_numel(convolution)

        rank = largest_rank(weight_numel, full, budget)
        if rank == 0:
            raise cannot_shrink_error(convolution, weight_numel(1), ratio)
        return replace(self, rank=rank)


def rescale_to_moment(
    errors: Tensor,  # at all ranks
    at: Tensor,  # one of them, a scalar
    kernel: Tensor,  # (g, o, i, *k)
    approximation: Tensor,  # (g, o, i, *k)
    moment: SecondMoment,
) -> Tensor:  # as errors
    """Return errors in the metric of a part of a moment, scaled so that `at` is the outputs'.

    `at` is the approximation's error, and the moment is whole.
    """
    if float(at) <= 0:
        return errors
    exact = moment.relative_error(kernel, approximation)
    return (errors * (exact / float(at))).clamp_max(1)


def no_rank_error(decomposition: Decomposition) -> DeepTwistError:
    """Return the error for a decomposition that is used before its rank is known."""
    return DeepTwistError(f"{decomposition} has no rank: give it one, or give a ratio")


def cannot_shrink_error(
    convolution: ConvGeometry, smallest: int, ratio: float
) -> CannotDecomposeError:
    """Return the error for a layer that not even rank 1 makes `ratio` times smaller."""
    dense = convolution.weight_numel
    return CannotDecomposeError(
        f"cannot be {ratio:g}× smaller: rank 1 holds {smallest:,} of {dense:,} weights"
    )


def largest_rank(weight_numel: Callable[[int], int], maximum: int, budget: float) -> int:
    """Return the largest rank from 1 to `maximum` whose weights fit the budget; 0 if none does.

    Ranks round down, so that a compression ratio is a promise.

    Args:
        weight_numel: the number of weights at a rank, never falling with it.
        maximum: the full rank.
        budget: the most weights allowed.
    """
    return bisect_right(range(1, maximum + 1), budget, key=weight_numel)
