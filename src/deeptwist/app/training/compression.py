"""The options of a plan as plain values: what recipes and the command line read and pass on."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from deeptwist.errors import DeepTwistError, check_int

if TYPE_CHECKING:  # the command line shows these fields in its help, which must not wait for torch
    from torch import Tensor, nn

    from deeptwist.decompositions import Decomposition
    from deeptwist.plan.calibration import Calibration
    from deeptwist.plan.layer_filter import Override
    from deeptwist.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Which layers are compressed, and how: `deeptwist.plan`'s arguments without tensors or code.

    Attributes:
        decomposition: How layers are held: svd, tiled_svd, spatial_svd, tucker or cp; of several,
            each layer takes the one that loses least for its cost.
        ratio: Dense ÷ factored weights that every compressed layer keeps at least.
        macs: Dense ÷ factored MACs that the layers to compress keep together: a budget.
        latency: Dense ÷ factored milliseconds, measured here, that these layers keep together.
        latency_ms: Milliseconds that the whole network takes at most, measured here.
        latency_batch: Examples in the batch that milliseconds are measured at.
        latency_runtime: What runs the network when it is measured.
        latency_threads: Processor threads; torch's choice if not given.
        allocation: uniform: the ratio for every layer; budget: ranks that lose least together.
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
    macs: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    latency_batch: int = 16
    latency_runtime: Literal["eager", "compile", "onnxruntime"] = "eager"
    latency_threads: int | None = None
    allocation: Literal["uniform", "budget"] | None = None
    rank: int | tuple[int, int] | None = None
    fraction: float | None = None
    tile: tuple[int, int] | None = None
    skip_first_conv: bool = False
    min_in_channels: int = 1
    linear: bool = True
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
        from deeptwist.decompositions import METHODS, from_dict

        names = [name.replace("-", "_") for name in self.decomposition]  # tiled-svd on the CLI
        values = {"rank": self.rank, "fraction": self.fraction, "tile": self.tile}
        options = {key: value for key, value in values.items() if value is not None}
        taken = {name: _options_of(METHODS[name]) for name in names if name in METHODS}
        for key in options:
            if len(taken) == len(names) and not any(key in own for own in taken.values()):
                takers = [name for name, method in METHODS.items() if key in _options_of(method)]
                raise DeepTwistError(
                    f"{key} is for {' or '.join(takers)}, not for {' or '.join(names)}"
                )
        return tuple(
            from_dict(
                {"method": name, **{k: v for k, v in options.items() if k in taken.get(name, ())}}
            )
            for name in names
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
        from deeptwist.plan.planner import plan

        return plan(
            model,
            self.methods,
            example_input=example_input,
            ratio=self.ratio,
            macs=self.macs,
            latency=self.latency,
            latency_ms=self.latency_ms,
            latency_batch=self.latency_batch,
            latency_runtime=self.latency_runtime,
            latency_threads=self.latency_threads,
            allocation=self.allocation,
            skip_first_conv=self.skip_first_conv,
            min_in_channels=self.min_in_channels,
            linear=self.linear,
            rank_multiple=self.rank_multiple,
            include=self.include,
            exclude=self.exclude,
            overrides=overrides,
            min_speedup=self.min_speedup,
            calibration=calibration,
        )


def _options_of(method: "type[Decomposition]") -> tuple[str, ...]:
    return tuple(field.name for field in fields(method))
