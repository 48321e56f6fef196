"""A recipe: all that a training run is set to, as one YAML file says it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails
from torch import nn

from deeptwist.decompositions import Decomposition, from_dict
from deeptwist.errors import DeepTwistError, unknown_name_error
from deeptwist.plan.plan import Plan, plan, read_plan

Mode = Literal["dense", "deeptwist", "decomposed", "projection", "noise", "once"]
Precision = Literal["32-true", "bf16-mixed", "64-true"]
Method = Literal["svd", "tiled_svd", "spatial_svd", "tucker", "cp"]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataRecipe:
    """The images.

    Attributes:
        source: digits, cifar10, or a folder with train/ and test/ (or val/) of class folders.
        image_size: a folder's images are resized to this height and width.
        validation: images held out of the training split, the last ones of a fixed shuffle, on
            which the best weights are chosen; none are chosen where it is 0.
    """

    source: str = "digits"
    image_size: Count | None = None
    validation: Amount = 0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimizerRecipe:
    """SGD.

    Attributes:
        lr: the learning rate that the schedule starts from.
        momentum: 0 for none.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: on every parameter.
    """

    lr: NotNegative = 0.05
    momentum: NotNegative = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 5e-4


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ScheduleRecipe:
    """How long, and how the learning rate falls.

    Attributes:
        epochs: passes over the training split.
        kind: ``cosine`` to zero, step by step; or ``step``, by `factor` at each milestone.
        milestones: epochs after which the rate falls.
        factor: what it is multiplied by there.
    """

    epochs: Count = 6
    kind: Literal["cosine", "step"] = "cosine"
    milestones: tuple[Count, ...] = ()
    factor: Share = 0.1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "cosine" and self.milestones:
            raise ValueError("a cosine has no milestones: write kind: step")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CompressionRecipe:
    """Which layers are compressed, and how: what `deeptwist.plan` takes.

    Attributes:
        decomposition: how layers are held.
        ratio: dense ÷ factored weights that every compressed layer keeps at least.
        rank: an explicit rank instead; two numbers for Tucker.
        fraction: for Tucker, the paper's fraction of the channels instead.
        tile: for tiled_svd: rows and columns.
        skip_first_conv: keep the convolution that runs first.
        min_in_channels: keep layers with fewer input channels.
        linear: whether linear layers are compressed too.
        rank_multiple: ranks that the ratio sets are rounded down to a multiple of this.
        include: names, globs, or expressions after ``re:``, of the layers to compress.
        exclude: the same, of the layers to keep.
        plan: a file that ``deeptwist plan --out`` wrote, in place of all the above.
    """

    decomposition: Method = "tiled_svd"
    ratio: float | None = None
    rank: Count | tuple[Count, Count] | None = None
    fraction: float | None = None
    tile: tuple[Count, Count] | None = None
    skip_first_conv: bool = False
    min_in_channels: Count = 1
    linear: bool = True
    rank_multiple: Count = 1
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    plan: str | None = None

    @property
    def method(self) -> Decomposition:
        """The decomposition that this names."""
        own = {"rank": self.rank, "fraction": self.fraction, "tile": self.tile}
        given = {name: value for name, value in own.items() if value is not None}
        return from_dict({"method": self.decomposition, **given})

    @property
    def label(self) -> str:
        """What tables call it."""
        return str(self.method) if self.plan is None else f"plan {self.plan}"

    def make_plan(self, model: nn.Module, example_input: torch.Tensor) -> Plan:
        """The plan that this makes for a model; see `deeptwist.plan`."""
        if self.plan is not None:
            return read_plan(Path(self.plan))
        return plan(
            model,
            self.method,
            ratio=self.ratio,
            example_input=example_input,
            skip_first_conv=self.skip_first_conv,
            min_in_channels=self.min_in_channels,
            linear=self.linear,
            rank_multiple=self.rank_multiple,
            include=self.include,
            exclude=self.exclude,
        )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DistillationRecipe:
    """Learning from the dense network that the run started from (Hinton et al., 2015).

    Attributes:
        weight: of the teacher's part of the loss; the labels' part has the rest.
        temperature: that both networks' logits are divided by.
    """

    weight: Share = 0.5
    temperature: Annotated[float, Field(gt=0)] = 4.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TailRecipe:
    """Fine-tuning in the decomposed form after the last distortion, with a cosine decay.

    Attributes:
        epochs: passes over the training split.
        lr: the learning rate that the decay starts from.
    """

    epochs: Count = 1
    lr: NotNegative = 0.01


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RecordsRecipe:
    """What is kept on the way.

    Attributes:
        images: spread over the training and over the test split, always the same, on which loss and
            accuracy are measured just before and just after every distortion; 0 for none.
        checkpoint_every: optimizer steps between checkpoints.
    """

    images: Amount = 100
    checkpoint_every: Count = 200


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Recipe:
    """All that a run is set to; every field may be left out but the model's.

    Modes: ``dense`` trains the network as it is; ``deeptwist`` distorts it while it trains and
    decomposes it at the end; ``decomposed`` decomposes it first and trains the factors, which is
    conventional fine-tuning. Controls: ``projection`` distorts at every step; ``noise`` adds
    random noise of the distortion's size in its place; ``once`` distorts at the end alone.

    Attributes:
        model: resnet20 … resnet110, vgg19, torchvision/NAME, timm/NAME or package.module:factory.
        weights: a checkpoint to start from; random ones without it.
        mode: see above.
        interval: S_D, optimizer steps between distortions.
        tolerance: squared error above the optimum that a distortion on the way may have.
        batch_size: images in a step, of all processes together.
        seed: of initial weights, of the order of the images and their augmentation.
        precision: Lightning Fabric's name for it; bf16-mixed is bf16 autocast.
        data: the images.
        optimizer: SGD.
        schedule: epochs and learning rate.
        compression: which layers, and how; a dense run reads only its costs.
        fixed: layers that are decomposed before training and not trained (the paper's
            fully-connected layers of VGG19); a dense run leaves them as they are.
        label_smoothing: share of the target that is spread over all classes.
        ema: decay of an exponential moving average of the weights, a row of its own.
        distillation: of the dense network; none without it.
        recalibration: training batches on which batch norm's statistics are taken anew after the
            last distortion, a row of its own; 0 for none.
        tail: of fine-tuning in the decomposed form, a row of its own.
        records: what is kept on the way.
    """

    model: str
    weights: str | None = None
    mode: Mode = "deeptwist"
    interval: Count = 200
    tolerance: Annotated[float, Field(ge=0, le=1)] = 1e-3
    batch_size: Count = 128
    seed: Amount = 0
    precision: Precision = "32-true"
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    compression: CompressionRecipe = field(default_factory=CompressionRecipe)
    fixed: CompressionRecipe | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: Share | None = None
    distillation: DistillationRecipe | None = None
    recalibration: Amount = 0
    tail: TailRecipe | None = None
    records: RecordsRecipe = field(default_factory=RecordsRecipe)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tail is not None and self.mode in ("dense", "decomposed"):
            raise ValueError(f"a tail follows distortions, mode {self.mode} has none")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `make_recipe` is its inverse."""
        values: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return values


def read_recipe(path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file.
        changes: ``"optimizer.lr=0.05"``, over what the file says.

    Raises:
        DeepTwistError: if the file cannot be read, or a key or a value is not one of a recipe's.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DeepTwistError(f"cannot read recipe '{path}': {error}") from None
    except yaml.YAMLError as error:
        raise DeepTwistError(
            f"recipe '{path}' is no YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise DeepTwistError(f"recipe '{path}' holds a {type(values).__name__}, not keys: values")
    return make_recipe(values, changes)


def make_recipe(values: Mapping[str, Any], changes: Iterable[str] = ()) -> Recipe:
    """A recipe of plain values.

    Args:
        values: nested as in the YAML file.
        changes: ``"optimizer.lr=0.05"``, over those values; the text is read as YAML.

    Raises:
        DeepTwistError: if a key or a value is not one of a recipe's, naming it and the nearest.
    """
    changed = dict(values)
    for change in changes:
        changed = _with(changed, change)
    try:
        return _adapter().validate_python(changed)
    except ValidationError as error:
        raise _complaint(error, changed) from None


def _with(values: Mapping[str, Any], change: str) -> dict[str, Any]:
    key, equals, written = change.partition("=")
    if not equals or not key:
        raise DeepTwistError(f"cannot read {change!r}: write KEY=VALUE, such as optimizer.lr=0.05")
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        raise DeepTwistError(f"cannot read the value in {change!r}") from None
    *sections, last = key.split(".")
    result = dict(values)
    section = result
    for name in sections:
        inner = section.get(name) or {}
        if not isinstance(inner, dict):
            raise DeepTwistError(f"cannot set {key!r}: {name!r} is {inner!r}, not a section")
        section[name] = dict(inner)
        section = section[name]
    section[last] = value
    return result


def _complaint(error: ValidationError, values: Mapping[str, Any]) -> DeepTwistError:
    errors = error.errors()
    first = errors[0]
    path, keys = _field(first["loc"])
    name = ".".join(path)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden", "invalid_key"):
        wrong = str(first["loc"][len(path)])
        return unknown_name_error(
            "recipe key", ".".join([*path, wrong]), [".".join([*path, k]) for k in keys]
        )
    if first["type"] == "missing" and len(path) == len(first["loc"]):
        return DeepTwistError(f"the recipe lacks {name!r}")
    # A value that may be of several kinds has a reason from each.
    reasons = [_reason(one) for one in errors if _field(one["loc"])[0] == path]
    message = ", or ".join(dict.fromkeys(reasons))
    if not path:
        return DeepTwistError(f"the recipe contradicts itself: {message}")
    value: Any = values
    for key in path:
        value = value[key]
    # A section as a whole is more than one line should show.
    shown = f" is {value!r}" if not isinstance(value, dict) else ""
    return DeepTwistError(f"recipe key {name!r}{shown}: {message}")


def _reason(error: ErrorDetails) -> str:
    if error["type"] == "missing":
        return "a number is missing"
    return error["msg"].removeprefix("Value error, ")


def _field(location: Iterable[int | str]) -> tuple[list[str], Mapping[str, Any]]:
    """The keys in an error's location, and those that the last of them has below it.

    After them, pydantic names the places in a value and the branches that it tried.
    """
    below: Any = {
        **asdict(Recipe(model="")),
        "fixed": asdict(CompressionRecipe()),
        "distillation": asdict(DistillationRecipe()),
        "tail": asdict(TailRecipe()),
    }
    path: list[str] = []
    for part in location:
        if part not in below:
            break
        path.append(str(part))
        inner = below[part]
        below = inner if isinstance(inner, dict) else {}
    return path, below


@cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)
