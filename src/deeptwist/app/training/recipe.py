"""Recipes: everything that a training run is configured with, as one YAML file.

The same dataclasses are the options of ``deeptwist train``: cyclopts reads them from the command
line over the file, pydantic checks them.
"""

from collections.abc import Mapping
from dataclasses import field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from cyclopts import Parameter
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from deeptwist.app.data.config import DataConfig
from deeptwist.app.training.compression import CompressionConfig
from deeptwist.app.training.modes import MODES, TrainingMode, mode_name
from deeptwist.errors import DeepTwistError, unknown_name_error

if TYPE_CHECKING:  # the command line's help must not wait for torch
    from torch import Tensor, nn

    from deeptwist.plan.calibration import Calibration
    from deeptwist.plan.layers import Override
    from deeptwist.plan.plan import Plan

Mode = Literal["dense", "deeptwist", "finetune", "projected", "random_noise", "decompose_at_end"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

_STRICT = ConfigDict(extra="forbid")


def _sizes(value: object) -> object:
    """Read sizes that the command line joins by ``x``: ``"64x72"`` is (64, 72)."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value  # what cyclopts makes of a tuple's only word
    if not isinstance(value, str):
        return value
    sizes = value.lower().replace("×", "x").split("x")
    return sizes if len(sizes) > 1 else value


Sizes = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_sizes), Parameter(n_tokens=1)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataRecipe(DataConfig):
    """The images, and those to choose the best weights on.

    Attributes:
        validation: Images held out of the training split, the last ones of a fixed shuffle.
    """

    source: Annotated[str, Parameter(alias="--data")] = "digits"
    image_size: Annotated[PositiveInt | None, Parameter(alias="--image-size")] = None
    validation: NonNegativeInt = 0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimizerRecipe:
    """How weights are updated.

    Attributes:
        name: torch's optimizers in small letters (sgd, adamw, …), or timm/NAME.
        lr: The learning rate that the schedule starts from.
        momentum: 0 for none; for optimizers that have one.
        nesterov: Whether the momentum is Nesterov's.
        betas: Decays of Adam's and its kin's moments; the optimizer's own without it.
        weight_decay: Applied to every parameter, or as decay_all says.
        decay_all: Whether weight decay applies to norms and biases too.
        clip_norm: The largest norm of the gradient of all parameters; unlimited without it.
        accumulate: Parts that a step's batch goes through the network in, to save memory; batch
            norm sees each by itself.
        freeze: Modules of these names, globs, or expressions after re:, are left as they are, batch
            norm's statistics too.
    """

    name: str = "sgd"
    lr: Annotated[NotNegative, Parameter(alias="--lr")] = 0.05
    momentum: NotNegative = 0.9
    nesterov: Annotated[bool, Parameter(negative="--no-nesterov")] = True
    betas: tuple[Decay, Decay] | None = None
    weight_decay: NotNegative = 5e-4
    decay_all: Annotated[bool, Parameter(negative="--no-decay-all")] = True
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    accumulate: PositiveInt = 1
    freeze: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name != "sgd":  # which the command line's help need not import torch for
            from deeptwist.app.training.optimizer_names import check_optimizer

            check_optimizer(self.name)
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ScheduleRecipe:
    """How long training takes, and how the learning rate falls.

    Attributes:
        epochs: Passes over the training split; 0 trains nothing.
        kind: cosine or polynomial to zero, step by step; or step, by the factor at each milestone.
        milestones: Epochs after which the rate falls.
        factor: What it is multiplied by there.
        power: Of the polynomial; 1 for a straight line.
        warmup_epochs: Epochs, or parts of one, in which the rate rises from near zero.
    """

    epochs: Annotated[NonNegativeInt, Parameter(alias="--epochs")] = 6
    kind: Literal["cosine", "step", "polynomial"] = "cosine"
    milestones: tuple[PositiveInt, ...] = ()
    factor: Share = 0.1
    power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    warmup_epochs: NotNegative = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "step" and self.milestones:
            raise ValueError(f"a {self.kind} has no milestones: write kind: step")
        if 0 < self.epochs <= self.warmup_epochs:
            raise ValueError(f"a warm-up of {self.warmup_epochs:g} epochs leaves none to train")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CompressionRecipe(CompressionConfig):
    """Which layers are compressed, and how; or a file that says so.

    Attributes:
        decomposition: How layers are held: svd, tiled_svd, spatial_svd, tucker or cp; of several,
            each layer takes the one that loses least.
        rank: An explicit rank instead: 8, or 24x24 for Tucker.
        skip_first_conv: Keep the convolution that runs first.
        linear: Whether linear layers are compressed too.
        tile: For tiled_svd: rows x columns of the lowered kernel, such as 64x72.
        override: PATTERN=keep, PATTERN=RATIO or PATTERN=METHOD:rank=…; the last match counts.
        plan: A plan that 'deeptwist plan --out' wrote, instead of all these choices.
    """

    decomposition: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda names: (names,) if isinstance(names, str) else names),
        Parameter(consume_multiple=True),
    ] = ("spatial_svd",)
    rank: Annotated[
        PositiveInt | tuple[PositiveInt, PositiveInt] | None,
        BeforeValidator(_sizes),
        Parameter(n_tokens=1),
    ] = None
    tile: Sizes | None = None
    skip_first_conv: Annotated[bool, Parameter(negative="--no-skip-first-conv")] = True
    linear: Annotated[bool, Parameter(negative="--no-linear")] = False
    override: tuple[str, ...] = ()
    plan: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = [o.name for o in fields(self) if getattr(self, o.name) != o.default]
        changed = [name for name in changed if name not in ("plan", "min_speedup")]
        if self.plan is not None and changed:
            raise ValueError(f"a plan leaves nothing to choose: leave out {', '.join(changed)}")

    @property
    def label(self) -> str:
        """Return what tables call it."""
        return super().label if self.plan is None else f"plan {self.plan}"

    def make_plan(
        self,
        model: "nn.Module",
        example_input: "Tensor | tuple[Tensor, ...]",
        overrides: "Mapping[str, Override] | None" = None,
        calibration: "Calibration | None" = None,
    ) -> "Plan":
        """Read or make the plan for a model; see `deeptwist.plan`."""
        from deeptwist.app.training.overrides import parse_override
        from deeptwist.plan.plan import read_plan

        if self.plan is not None:
            return self.without_slow_layers(model, read_plan(Path(self.plan)))
        overrides = {**dict(map(parse_override, self.override)), **(overrides or {})}
        return super().make_plan(model, example_input, overrides, calibration)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DistillationRecipe:
    """Learning from a teacher's outputs (Hinton et al., 2015).

    Attributes:
        model: The teacher, named as networks are; the dense network that the run starts from
            without it.
        weights: The teacher's checkpoint.
        weight: Of the teacher's part of the loss; the labels' part has the rest.
        temperature: Divides both networks' logits.
    """

    model: str | None = None
    weights: str | None = None
    weight: Share = 0.5
    temperature: Annotated[float, Field(gt=0)] = 4.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.model is None) != (self.weights is None):
            raise ValueError("a teacher is a model and its weights: give both or neither")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TailRecipe:
    """Fine-tuning in the decomposed form after the last distortion, with a cosine decay.

    Attributes:
        epochs: Passes over the training split.
        lr: The learning rate that the decay starts from.
    """

    epochs: PositiveInt = 1
    lr: NotNegative = 0.01


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RecordsRecipe:
    """What is recorded during training.

    Attributes:
        images: Images of each split, always the same, on which loss and accuracy are measured
            just before and just after every distortion; 0 for none.
        checkpoint_every: Optimizer steps between checkpoints.
    """

    images: NonNegativeInt = 100
    checkpoint_every: PositiveInt = 200


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Recipe:
    """Everything that a run is configured with; every field but the model's has a default.

    Modes: ``dense`` trains the network as it is; ``deeptwist`` distorts it while it trains and
    decomposes it at the end; ``finetune`` decomposes it first and trains the factors. Controls:
    ``projected`` distorts at every step; ``random_noise`` adds noise of the distortion's size in
    its place; ``decompose_at_end`` distorts at the end alone.

    Attributes:
        model: resnet20 … resnet110, vgg19, torchvision/NAME, timm/NAME or package.module:factory.
        weights: A checkpoint to start from; random weights without it.
        mode: How to train; projected, random_noise and decompose_at_end are the paper's controls.
        interval: S_D, optimizer steps between distortions.
        batch_size: Images in a step, of all processes together.
        seed: Of initial weights, of the order of the images and their augmentation.
        precision: Lightning Fabric's name for it: bf16-mixed is bf16 autocast, 16-mixed fp16's with
            a scaled loss; a step that overflows is taken again, at half the scale.
        cuda_graphs: Replay a step's forward and backward passes as CUDA graphs, several times as
            fast for small networks on a GPU; elsewhere it changes nothing.
        compile: torch.compile's backend for a step's passes, inductor say, which with cuda_graphs
            replays graphs of its own; none without it.
        checkpoint_gradients: Compute activations again in the backward pass, to save memory; for
            timm's networks that offer it.
        data: The images.
        optimizer: How weights are updated.
        schedule: Epochs and learning rate.
        compression: Which layers, and how; a dense run reads only its costs.
        calibration_images: Training images to choose ranks on, and to decompose on before
            fine-tuning, so that the layers' outputs lose least; 0 for the weights.
        fixed: Layers that are decomposed before training and not trained (the paper's
            fully-connected layers of VGG19); a dense run leaves them as they are.
        label_smoothing: Share of the target that is spread over all classes.
        ema: Decay of an exponential moving average of the weights, a row of its own; decomposed
            after training, as an average of distorted weights is not of low rank.
        distillation: From a teacher, the dense network or another; none without it.
        recalibration: Training batches to take batch norm's statistics anew on in every network
            that is deployed; 0 for none.
        tail: Fine-tuning in the decomposed form, a row of its own.
        records: What is recorded during training.
    """

    model: Annotated[str, Parameter(show=False)]  # the command line's first word
    weights: str | None = None
    mode: Annotated[Mode, BeforeValidator(mode_name)] = "deeptwist"
    interval: PositiveInt = 200
    batch_size: PositiveInt = 128
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Precision = "32-true"
    cuda_graphs: bool = False
    compile: str | None = None
    checkpoint_gradients: bool = False
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    compression: Annotated[CompressionRecipe, Parameter(name=("compression", "*"))] = field(
        default_factory=CompressionRecipe
    )
    calibration_images: NonNegativeInt = 0
    fixed: CompressionRecipe | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: Share | None = None
    distillation: DistillationRecipe | None = None
    recalibration: NonNegativeInt = 0
    tail: TailRecipe | None = None
    records: RecordsRecipe = field(default_factory=RecordsRecipe)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tail is not None and not MODES[self.mode].distorts:
            raise ValueError(f"a tail follows distortions, mode {self.mode} has none")
        if self.cuda_graphs and self.compile not in (None, "inductor"):
            raise ValueError(f"cuda_graphs goes with compile: inductor or none, not {self.compile}")
        return self

    @property
    def training_mode(self) -> TrainingMode:
        """Return the mode by its name."""
        return MODES[self.mode]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `make_recipe` is the inverse."""
        values: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return values


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        DeepTwistError: if the file cannot be read, or a key or a value is not one of a recipe's.
    """
    return make_recipe(read_values(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """Read a recipe's file as plain values, unchecked, those of earlier versions in today's form.

    Raises:
        DeepTwistError: if the file cannot be read, or does not hold keys and values.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DeepTwistError(f"cannot read recipe '{path}': {error}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise DeepTwistError(f"recipe '{path}' is not valid YAML: {reason}") from error
    if not isinstance(values, dict):
        raise DeepTwistError(f"recipe '{path}' holds a {type(values).__name__}, not keys: values")
    values.pop("tolerance", None)  # earlier versions' limit on a distortion's error
    return values


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe of plain values, nested as in the YAML file.

    Raises:
        DeepTwistError: if a key or a value is not one of a recipe's, naming it and the nearest.
    """
    try:
        return _adapter().validate_python(values)
    except ValidationError as error:
        raise explain(error) from error


def explain(error: ValidationError) -> DeepTwistError:
    """Return the first of a recipe's mistakes in one line: key, value, reason, nearest key."""
    errors = error.errors()
    key, kind, value = _key(errors[0]["loc"]), errors[0]["type"], errors[0]["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden", "invalid_key"):
        return unknown_name_error("recipe key", ".".join(map(str, errors[0]["loc"])), _keys())
    if kind == "missing":
        return DeepTwistError(f"the recipe lacks {'.'.join(map(str, errors[0]['loc']))!r}")
    # A value that may be of several kinds has a reason from each.
    reasons = [each["msg"] for each in errors if _key(each["loc"]) == key]
    reason = ", or ".join(dict.fromkeys(reasons)).replace("Value error, ", "")
    is_recipe = "CompressionRecipe" not in error.title  # by itself it is a command's options
    if not key:
        return DeepTwistError(f"the recipe contradicts itself: {reason}" if is_recipe else reason)
    # A section as a whole is more than one line should show.
    shown = f" is {value!r}" if not isinstance(value, dict) else ""
    name = f"recipe key {key!r}" if is_recipe else f"option --{key.replace('_', '-')}"
    return DeepTwistError(f"{name}{shown}: {reason}")


def _key(location: tuple[int | str, ...]) -> str:
    """Return the key in an error's location, without the branches that pydantic tried below it."""
    key = ""
    for part in location:
        longer = f"{key}.{part}" if key else str(part)
        if longer in _keys():
            key = longer
    return key


@cache
def _keys() -> tuple[str, ...]:
    """Return all keys of a recipe, sections and dotted ones, and of a compression by itself."""
    sections = {
        "fixed": CompressionRecipe(),
        "distillation": DistillationRecipe(),
        "tail": TailRecipe(),
    }
    keys: list[str] = []
    for name, value in {**vars(Recipe(model="")), **sections}.items():
        keys.append(name)
        if hasattr(value, "__dataclass_fields__"):
            keys += [f"{name}.{option.name}" for option in fields(value)]
    return (*keys, *(option.name for option in fields(CompressionRecipe)))


@cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)
