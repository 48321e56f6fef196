"""The laws that every decomposition keeps.

A `Decomposition` is a frozen value: a method and its rank, without tensors. It names the
convolutions that a layer becomes (`convolutions`), from which all costs follow; it turns a kernel
into `Factors`; and it builds the factored layer.

Laws, each a test in ``tests/test_laws.py`` that every method joins:

- ``factors.reconstruct()`` has the kernel's shape, and decomposing it again changes nothing.
- The error never rises with the rank; at full rank it is zero (CP excepted).
- ``weight_numel`` counts the numbers that the layer stores, ``macs`` the work that it does.
- The layer equals the convolution with the reconstructed kernel.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from deeptwist.decompositions.ranks import check_ratio, largest_rank, round_down
from deeptwist.decompositions.subspace import Approximations
from deeptwist.errors import DeepTwistError, check_int, unknown_name_error
from deeptwist.layers.geometry import ConvGeometry, ParallelConvs

CONVOLUTIONS = (
    "convolutions"  # the implementation of a layer that is one convolution after the other
)


class CannotDecomposeError(DeepTwistError):
    """A layer that a decomposition cannot hold, or not as small as asked."""


class Factors(ABC):
    """The tensors that stand in for one kernel (g, o, i, *k)."""

    @abstractmethod
    def reconstruct(self) -> Tensor:
        """The kernel (g, o, i, *k) that the factors stand for, in the computing dtype."""

    @abstractmethod
    def kernels(self) -> list[Tensor]:
        """The kernel (g, o, i, *k) of each convolution in `Decomposition.convolutions`, in order."""

    @abstractmethod
    def starts(self) -> list[tuple[Tensor, ...]]:
        """What `Decomposition.follow` starts from, for each batch of `Decomposition.cut`."""


class FactoredLayer(nn.Sequential):
    """A convolution or linear layer held as factors: plain torch layers, one after the other.

    The geometry of the layer it stands in for stays readable (``in_channels``, ``stride``, …;
    ``in_features`` and ``out_features`` for a linear layer).
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        convolution: ConvGeometry,
        decomposition: "Decomposition",
        implementation: str,
    ):
        super().__init__(*stages)
        self.convolution = convolution
        self.decomposition = decomposition
        self.implementation = implementation
        if convolution.dims == 0:
            self.in_features, self.out_features = convolution.in_channels, convolution.out_channels
        else:
            for field in fields(convolution):
                setattr(self, field.name, getattr(convolution, field.name))

    def _get_name(self) -> str:
        return f"FactoredLayer[{self.decomposition}, {self.convolution}]"


@dataclass(frozen=True)
class Decomposition(ABC):
    """A method and its rank; holds no tensors. See the module's docstring for its laws."""

    method: ClassVar[str]

    @property
    @abstractmethod
    def needs_ratio(self) -> bool:
        """Whether its rank is open."""

    @abstractmethod
    def without_rank(self) -> "Decomposition":
        """The same decomposition with its rank open, for a ratio to set."""

    @abstractmethod
    def round_ranks(self, multiple: int) -> "Decomposition":
        """Its ranks rounded down to multiples, where they are that large; it must be resolved."""

    @abstractmethod
    def resolve(self, convolution: ConvGeometry, ratio: float | None) -> "Decomposition":
        """The decomposition with every open choice made for this layer.

        Args:
            convolution: the layer.
            ratio: dense ÷ factored weights to keep at least, where no rank is given.

        Raises:
            CannotDecomposeError: if no rank keeps the ratio, or the given rank does not fit.
        """

    @abstractmethod
    def convolutions(self, convolution: ConvGeometry) -> tuple[ParallelConvs, ...]:
        """The convolutions that the layer becomes, level after level."""

    @abstractmethod
    def lowered_shape(self, convolution: ConvGeometry) -> tuple[int, int] | None:
        """The matrix that one group's kernel is lowered to; none for a tensor method."""

    @abstractmethod
    def decompose(self, kernel: Tensor) -> Factors:
        """Approximates a kernel (g, o, i, *k); the rank must be resolved."""

    @abstractmethod
    def cut(self, kernel: Tensor) -> Sequence[tuple[Tensor, Any]]:
        """The parts that are approximated each by itself: batches (b, *part), and their rank."""

    @abstractmethod
    def follow(self, parts: Tensor, start: Sequence[Tensor], tolerance: float) -> Approximations:
        """Approximates parts from what approximated them a moment ago, at a fraction of the cost.

        Args:
            parts: (b, *part), as `cut` has them but of any number of kernels; finite.
            start: tensors (b, …): `Factors.starts`, or `Approximations.start` of the last time.
            tolerance: the squared error above that of `decompose`, relatively, to stop at.
        """

    @abstractmethod
    def factors(self, parts: Sequence[Sequence[Tensor]], shape: Sequence[int]) -> Factors:
        """The factors of a kernel of this shape, of those that `follow` found of its parts.

        Args:
            parts: for each batch of `cut`, the kernel's share of `Approximations.factors`.
            shape: (g, o, i, *k).
        """

    def weight_numel(self, convolution: ConvGeometry) -> int:
        """How many numbers the factors hold, the bias not counted."""
        return sum(part.weight_numel for level in self.convolutions(convolution) for part in level)

    def workload(
        self, convolution: ConvGeometry, input_size: Sequence[int]
    ) -> list[tuple[ConvGeometry, tuple[int, ...]]]:
        """Every convolution of the factored layer with the spatial size that it is given."""
        size, work = tuple(input_size), []
        for level in self.convolutions(convolution):
            work += [(part, size) for part in level]
            size = level[0].output_size(size)
        return work

    def macs(self, convolution: ConvGeometry, input_size: Sequence[int]) -> int:
        """Multiply-accumulates of the factored layer for one example of this spatial size."""
        return sum(part.macs(size) for part, size in self.workload(convolution, input_size))

    def implementations(self, convolution: ConvGeometry) -> tuple[str, ...]:
        """The exact forms that the layer can run in, the one that should be fastest first."""
        return (CONVOLUTIONS,)

    def make_layer(
        self,
        convolution: ConvGeometry,
        kernels: Sequence[Tensor],
        bias: Tensor | None,
        implementation: str | None = None,
    ) -> FactoredLayer:
        """The layer that holds these kernels.

        Args:
            convolution: the geometry of the layer that it stands in for.
            kernels: one for each convolution in `convolutions`.
            bias: (out_channels,) or none.
            implementation: one of `implementations`; the first if not given.

        Raises:
            DeepTwistError: if the layer has no such implementation.
        """
        implementations = self.implementations(convolution)
        if implementation is None:
            implementation = implementations[0]
        elif implementation not in implementations:
            raise unknown_name_error("implementation", implementation, implementations)
        stages = self.make_modules(convolution, kernels, bias, implementation)
        # What follows from the geometry, as the order of channels, is made on the processor.
        return FactoredLayer(stages, convolution, self, implementation).to(kernels[0].device)

    def make_modules(
        self,
        convolution: ConvGeometry,
        kernels: Sequence[Tensor],
        bias: Tensor | None,
        implementation: str,
    ) -> list[nn.Module]:
        """The modules of `layer`, in order."""
        parts = [part for level in self.convolutions(convolution) for part in level]
        biases = [None] * (len(parts) - 1) + [bias]
        return [part.make_module(k, b) for part, k, b in zip(parts, kernels, biases, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `deeptwist.decompositions.from_dict` is its inverse."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"method": self.method, **plain}

    def __str__(self) -> str:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        shown = ", ".join(f"{name}={value}" for name, value in values if value is not None)
        return f"{type(self).__name__}({shown})"


@dataclass(frozen=True)
class SingleRankDecomposition(Decomposition):
    """A decomposition whose size one rank sets."""

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_int(f"{type(self).__name__} rank", self.rank)

    @abstractmethod
    def full_rank(self, convolution: ConvGeometry) -> int:
        """The rank from which on nothing is lost."""

    @property
    def needs_ratio(self) -> bool:  # noqa: D102
        return self.rank is None

    def without_rank(self) -> Self:  # noqa: D102
        return replace(self, rank=None)

    def round_ranks(self, multiple: int) -> Self:  # noqa: D102
        return replace(self, rank=round_down(self.resolved_rank, multiple))

    @property
    def resolved_rank(self) -> int:
        """The rank, once resolved."""
        if self.rank is None:
            raise DeepTwistError(f"{self} has no rank: resolve it for a layer first")
        return self.rank

    def resolve(self, convolution: ConvGeometry, ratio: float | None) -> Self:  # noqa: D102
        full = self.full_rank(convolution)
        if self.rank is not None:
            if self.rank > full:
                raise CannotDecomposeError(
                    f"cannot hold {type(self).__name__} rank {self.rank}: at most {full}"
                )
            return self
        if ratio is None:
            raise DeepTwistError(f"{self} has no rank: give it one, or give a ratio")
        budget = convolution.weight_numel / check_ratio(ratio)

        def weight_numel(rank: int) -> int:
            return replace(self, rank=rank).weight_numel(convolution)

        rank = largest_rank(weight_numel, full, budget)
        if rank == 0:
            raise cannot_shrink(convolution, weight_numel(1), ratio)
        return replace(self, rank=rank)


def cannot_shrink(convolution: ConvGeometry, smallest: int, ratio: float) -> CannotDecomposeError:
    """The error for a layer that not even rank 1 makes `ratio` times smaller."""
    dense = convolution.weight_numel
    return CannotDecomposeError(
        f"cannot be {ratio:g}× smaller: rank 1 holds {smallest:,} of {dense:,} weights"
    )
