"""What a recipe and the command line say of a plan: which layers are compressed, and how."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, Token
from cyclopts.validators import Number

from deeptwist.errors import DeepTwistError
from deeptwist.plan.layers import Layers

if TYPE_CHECKING:  # the command line's help must not wait for torch
    from torch import Tensor, nn

    from deeptwist.decompositions import Decomposition
    from deeptwist.plan.calibration import Calibration
    from deeptwist.plan.layers import Override
    from deeptwist.plan.plan import Plan


def read_whole(_: Any, tokens: Sequence[Token]) -> int:
    """Read a whole number: cyclopts itself rounds others."""
    try:
        return int(tokens[-1].value)
    except ValueError:
        raise ValueError(f"{tokens[-1].value!r} is not a whole number") from None


def _read_sizes(_: Any, tokens: Sequence[Token]) -> int | tuple[int, ...]:
    """Read sizes joined by x, or a list of them: 64x72 is (64, 72), and 8 a number."""
    sizes = [size for token in tokens for size in _sizes(token.value)]
    return tuple(sizes) if len(sizes) > 1 else sizes[0]


def _sizes(text: str) -> list[int]:
    words = text.lower().replace("×", "x").split("x")
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{text!r} is not a size like 8 or 64x72")
    return [*map(int, words)]


def _numbers(text: str) -> list[Any]:
    try:
        return _sizes(text)
    except ValueError:
        return [float(text)]


def _check_rank(_: Any, rank: int | tuple[int, ...] | None) -> None:
    if isinstance(rank, tuple) and len(rank) != 2:
        raise ValueError("Write one rank, or two such as 24x24.")


def _check_tile(_: Any, tile: int | tuple[int, ...] | None) -> None:
    if isinstance(tile, int) or (tile and len(tile) != 2):
        raise ValueError("Write rows and columns, such as 64x72.")


HOW = "Compression"  # a group of options, in help
Count = Annotated[int, Parameter(converter=read_whole, validator=Number(gte=1))]
SIZES = Parameter(n_tokens=1, accepts_keys=False, converter=_read_sizes)


@dataclass(frozen=True, kw_only=True)
class CompressionRecipe(Layers):
    """Which layers are compressed, and how; or a file that says so.

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
        rank: An explicit rank instead: 8, or 24x24 for Tucker.
        fraction: For Tucker, the paper's fraction of the channels instead.
        tile: For tiled_svd: rows x columns of the lowered kernel, such as 64x72.
        skip_first_conv: Keep the convolution that runs first.
        min_in_channels: Keep layers with fewer input channels.
        linear: Whether linear layers are compressed too.
        rank_multiple: Round ranks down to a multiple of this; with milliseconds, by the clock.
        include: Compress only layers of these names, globs, or expressions after re:.
        exclude: Keep layers of these names, globs, or expressions after re:.
        min_speedup: Keep layers that are not this many times as fast factored, timed here.
        overrides: PATTERN=keep, PATTERN=RATIO or PATTERN=METHOD:rank=…; the last match counts.
        plan: A plan that 'deeptwist plan --out' wrote, instead of all these choices.
    """

    decomposition: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("spatial_svd",)
    ratio: float | None = None
    weight_budget: float | None = None
    macs: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    latency_batch: Count = 16
    latency_runtime: Literal["eager", "compile", "onnxruntime"] = "eager"
    latency_threads: Count | None = None
    rank: Annotated[
        int | tuple[int, int] | None, SIZES, Parameter(validator=(Number(gte=1), _check_rank))
    ] = None
    fraction: float | None = None
    tile: Annotated[
        tuple[int, int] | None, SIZES, Parameter(validator=(Number(gte=1), _check_tile))
    ] = None
    skip_first_conv: Annotated[bool, Parameter(negative="no-skip-first-conv")] = True
    min_in_channels: Count = 1
    linear: Annotated[bool, Parameter(negative="no-linear")] = False
    rank_multiple: Count | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Annotated[tuple[str, ...], Parameter(alias="override")] = ()  # type: ignore[assignment]
    min_speedup: Annotated[float | None, Parameter(validator=Number(gt=0))] = None
    plan: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "fraction"):
            value = getattr(self, name)
            if value is not None and self.ratio is not None:
                raise DeepTwistError(f"{name} {value} beside ratio {self.ratio}: give one")
        changed = [o.name for o in fields(self) if getattr(self, o.name) != o.default]
        changed = [name for name in changed if name not in ("plan", "min_speedup")]
        if self.plan is not None and changed:
            raise DeepTwistError(f"a plan leaves nothing to choose: leave out {', '.join(changed)}")

    @property
    def methods(self) -> "tuple[Decomposition, ...]":
        """Return the decompositions, with the options `rank`, `fraction` and `tile` that they take.

        Raises:
            DeepTwistError: if there is no such method, or none takes an option, or its value.
        """
        from deeptwist.decompositions import METHODS, find_method

        kinds = [find_method(name) for name in self.decomposition]
        takes = {kind: {field.name for field in fields(kind)} for kind in METHODS.values()}
        given = {key: getattr(self, key) for key in ("rank", "fraction", "tile")}
        options = {key: value for key, value in given.items() if value is not None}
        for key in options:
            if not any(key in takes[kind] for kind in kinds):
                takers = " or ".join(name for name, kind in METHODS.items() if key in takes[kind])
                names = " or ".join(kind.method for kind in kinds)
                raise DeepTwistError(f"{key} is for {takers}, not for {names}")
        own = [{k: v for k, v in options.items() if k in takes[kind]} for kind in kinds]
        return tuple(kind(**values) for kind, values in zip(kinds, own, strict=True))

    @property
    def label(self) -> str:
        """Return what tables call it."""
        return " or ".join(map(str, self.methods)) if self.plan is None else f"plan {self.plan}"

    def make_plan(
        self,
        model: "nn.Module",
        example_input: "Tensor | tuple[Tensor, ...]",
        calibration: "Calibration | None" = None,
        ratio: float | None = None,
        *,
        find: str = "ratio",
    ) -> "Plan":
        """Read or make the plan for a model, see `deeptwist.plan`.

        With a ratio it is the value of the option `find`, which says how small.
        """
        from deeptwist.decompose import check_plan
        from deeptwist.plan.latency import Latency, exclude_slow_layers
        from deeptwist.plan.plan import read_plan
        from deeptwist.plan.planner import plan

        if ratio is not None:
            sized = replace(self, **{find: ratio})  # type: ignore[arg-type]
            return sized.make_plan(model, example_input, calibration)
        if self.plan is not None:
            made = read_plan(Path(self.plan))
            check_plan(model, made)
        else:
            rules = {field.name: getattr(self, field.name) for field in fields(Layers)}
            rules["overrides"] = dict(map(_read_override, self.overrides))
            timed = self.latency_batch, self.latency_runtime, self.latency_threads
            has_clock = self.latency is not None or self.latency_ms is not None
            made = plan(
                model,
                self.methods,
                example_input=example_input,
                ratio=self.ratio,
                weights=self.weight_budget,
                macs=self.macs,
                latency=Latency(self.latency, self.latency_ms, *timed) if has_clock else None,
                layers=Layers(**rules),
                rank_multiple=self.rank_multiple,
                calibration=calibration,
            )
        if self.min_speedup is None:
            return made
        return exclude_slow_layers(model, made, self.min_speedup)


def _read_override(text: str) -> "tuple[str, Override]":
    """Read ``PATTERN=keep``, ``PATTERN=2.5`` (a ratio) or ``PATTERN=tucker:rank=24x24``."""
    from deeptwist.decompositions import Decomposition
    from deeptwist.plan.codec import decode

    pattern, equals, choice = text.partition("=")
    if not equals or not pattern or not choice:
        raise DeepTwistError(
            f"cannot read override {text!r}: write 'PATTERN=keep', 'PATTERN=2.5' or "
            "'PATTERN=tucker:rank=24x24'"
        )
    if choice == "keep":
        return pattern, None
    method, _, options = choice.partition(":")
    try:
        if not options:
            return pattern, float(choice)
    except ValueError:
        pass
    values: dict[str, Any] = {"method": method.replace("-", "_")}
    for option in filter(None, options.split(",")):
        name, _, value = option.partition("=")
        try:
            sizes = _numbers(value)
        except ValueError as error:
            raise DeepTwistError(
                f"cannot read {name} in override {text!r}: {value!r} is not a number"
            ) from error
        values[name] = tuple(sizes) if len(sizes) > 1 else sizes[0]
    return pattern, decode(Decomposition, values)
