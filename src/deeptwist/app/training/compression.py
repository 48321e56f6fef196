"""The options of a plan as plain values: what recipes and the command line read and pass on."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from deeptwist.errors import DeepTwistError, check_int

if TYPE_CHECKING:  # the command line shows these fields in its help, which must not wait for torch
    from torch import Tensor, nn

    from deeptwist.decompositions import Decomposition
    from deeptwist.measure.latency import Latency
    from deeptwist.plan.calibration import Calibration
    from deeptwist.plan.layers import Override
    from deeptwist.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Which layers are compressed, and how: `deeptwist.plan`'s arguments without tensors or code.

    Attributes:
        decomposition: How layers are held: svd, tiled_svd, spatial_svd, tucker or cp; of several,
            each layer takes the one that loses least.
        ratio: Dense ÷ factored weights that every compressed layer keeps at least.
        weight_budget: Dense ÷ factored weights that the layers to compress keep together.
        macs: Dense ÷ factored MACs that the layers to compress keep together: a budget.
        latency: How many times as fast the whole network is to be, measured here.
        latency_ms: Milliseconds that the whole network takes at most, measured here.
        latency_batch: Examples in the batch that milliseconds are measured at.
        latency_runtime: What runs the network when it is measured.
        latency_threads: Processor threads; torch's choice if not given.
        rank: An explicit rank instead; two numbers for Tucker.
        fraction: For Tucker, the paper's fraction of the channels instead.
        tile: For tiled_svd: rows and columns of the lowered kernel.
        skip_first_conv: Keep the convolution that runs first.
        min_in_channels: Keep layers with fewer input channels.
        linear: Whether linear layers are compressed too.
        rank_multiple: Round ranks down to a multiple of this; with milliseconds, by the clock.
        include: Compress only layers of these names, globs, or expressions after re:.
        exclude: Keep layers of these names, globs, or expressions after re:.
        min_speedup: Keep layers that are not this many times as fast factored, timed here.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (what pydantic looks for)

    decomposition: tuple[str, ...] = ("spatial_svd",)
    ratio: float | None = None
    weight_budget: float | None = None
    macs: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    latency_batch: int = 16
    latency_runtime: Literal["eager", "compile", "onnxruntime"] = "eager"
    latency_threads: int | None = None
    rank: int | tuple[int, int] | None = None
    fraction: float | None = None
    tile: tuple[int, int] | None = None
    skip_first_conv: bool = True
    min_in_channels: int = 1
    linear: bool = False
    rank_multiple: int | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.decomposition, str):  # one name, as in most recipes
            object.__setattr__(self, "decomposition", (self.decomposition,))
        if self.rank_multiple == 1 and self.latency is None and self.latency_ms is None:
            # Without a clock the same as none, which earlier versions wrote as 1.
            object.__setattr__(self, "rank_multiple", None)
        check_int("min_in_channels", self.min_in_channels)
        for name in ("rank_multiple", "latency_batch", "latency_threads"):
            if (value := getattr(self, name)) is not None:
                check_int(name, value)
        for name in ("rank", "fraction"):
            value = getattr(self, name)
            if value is not None and self.ratio is not None:
                raise DeepTwistError(f"{name} {value} beside ratio {self.ratio}: give one")
        if self.min_speedup is not None and not self.min_speedup > 0:
            raise DeepTwistError(f"min_speedup {self.min_speedup} is not above 0")

    @property
    def methods(self) -> "tuple[Decomposition, ...]":
        """Return the decompositions, with the options `rank`, `fraction` and `tile` that they take.

        Raises:
            DeepTwistError: if there is no such method, or none takes an option, or its value.
        """
        from deeptwist.decompositions import METHODS, find_method

        kinds = [find_method(name) for name in self.decomposition]
        values = {"rank": self.rank, "fraction": self.fraction, "tile": self.tile}
        options: dict[str, Any] = {k: value for k, value in values.items() if value is not None}
        for key in options:
            if not any(key in _options_of(kind) for kind in kinds):
                takers = [name for name, kind in METHODS.items() if key in _options_of(kind)]
                names = " or ".join(kind.method for kind in kinds)
                raise DeepTwistError(f"{key} is for {' or '.join(takers)}, not for {names}")
        return tuple(
            kind(**{key: value for key, value in options.items() if key in _options_of(kind)})
            for kind in kinds
        )

    @property
    def label(self) -> str:
        """Return what tables call it."""
        return " or ".join(map(str, self.methods))

    def make_plan(
        self,
        model: "nn.Module",
        example_input: "Tensor | tuple[Tensor, ...]",
        overrides: "Mapping[str, Override] | None" = None,
        calibration: "Calibration | None" = None,
    ) -> "Plan":
        """Plan a model with these options; see `deeptwist.plan`."""
        from deeptwist.plan.layers import Layers
        from deeptwist.plan.planner import plan

        made = plan(
            model,
            self.methods,
            example_input=example_input,
            ratio=self.ratio,
            weights=self.weight_budget,
            macs=self.macs,
            latency=self._latency(),
            layers=Layers(
                skip_first_conv=self.skip_first_conv,
                min_in_channels=self.min_in_channels,
                linear=self.linear,
                include=self.include,
                exclude=self.exclude,
                overrides=overrides or {},
            ),
            rank_multiple=self.rank_multiple,
            calibration=calibration,
        )
        return self.without_slow_layers(model, made)

    def _latency(self) -> "Latency | None":
        from deeptwist.measure.latency import Latency

        if self.latency is None and self.latency_ms is None:
            return None
        return Latency(
            speedup=self.latency,
            ms=self.latency_ms,
            batch=self.latency_batch,
            runtime=self.latency_runtime,
            threads=self.latency_threads,
        )

    def without_slow_layers(self, model: "nn.Module", plan: "Plan") -> "Plan":
        """Return the plan without the layers that are not `min_speedup` times as fast."""
        from deeptwist.plan.latency import exclude_slow_layers

        if self.min_speedup is None:
            return plan
        return exclude_slow_layers(model, plan, self.min_speedup)


def _options_of(method: "type[Decomposition]") -> tuple[str, ...]:
    return tuple(field.name for field in fields(method))
