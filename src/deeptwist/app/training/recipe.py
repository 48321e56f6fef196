"""Recipes: everything that a training run is configured with, as one YAML file.

The same dataclasses are the options of ``deeptwist train``: cyclopts reads both, and checks them.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict
from cyclopts.validators import Number

from deeptwist.app.training.compression import HOW, Count, read_whole
from deeptwist.app.training.compression import CompressionRecipe as CompressionRecipe
from deeptwist.errors import DeepTwistError, require_extra, unknown_name_error

if TYPE_CHECKING:
    from torch.optim import Optimizer


def _within(**bounds: float) -> Parameter:
    return Parameter(validator=Number(**bounds))


_NAMED = "digits", "cifar10"  # data sets
Mode = Literal["dense", "deeptwist", "finetune"]
CountOrNone = Annotated[int, Parameter(converter=read_whole, validator=Number(gte=0))]
Pixels = Annotated[int, Parameter(converter=read_whole, validator=Number(gte=1, lte=2**14))]
NotNegative = Annotated[float, _within(gte=0, lt=math.inf)]
Positive = Annotated[float, _within(gt=0, lt=math.inf)]
Share = Annotated[float, _within(gt=0, lt=1)]
Decay = Annotated[float, _within(gte=0, lt=1)]
Probability = Annotated[float, _within(gte=0, lte=1)]


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """The images of a training or an evaluation.

    Attributes:
        source: digits, cifar10, a folder of class folders (split, always alike) or with train/ and
            test/ (or val/) of these, or hf/ and the name or the folder of a Hugging Face data set.
        preset: cifar: decoded once into memory, cropped from their zero-padded selves, mirrored;
            imagenet: decoded when needed, cropped at random scales, mirrored. Without it, cifar
            for images of up to 64 pixels.
        image_size: Height and width in training; 224 for imagenet, the images' own for cifar.
        padding: Pixels of zeros around an image, for cifar; an eighth of its size without it.
        flip: Whether images are mirrored at random; by default all but digits.
        scale: Smallest share of an image that a random crop covers, for imagenet.
        auto_augment: trivial (TrivialAugmentWide) or rand (RandAugment), after the crop.
        erase: Probability that a rectangle of an image is erased.
        mixup: Alpha of MixUp, which blends pairs of images; 0 for none.
        cutmix: Alpha of CutMix, which pastes from one image into another; 0 for none. Of both,
            each pair draws one.
        eval_size: Height and width in evaluation; image_size without it.
        crop_pct: Share of the resized image's shorter side that evaluation sees; 0.875 for
            imagenet, all for cifar.
        mean: Per channel, of pixel values from 0 to 1; ImageNet's without it.
        std: Per channel, of pixel values from 0 to 1; ImageNet's without it.
        interpolation: How images are resized.
        workers: Processes that read images beside each one that trains; as many as it has cores
            without it, 0 for none.
        skip_unreadable: Leave out images that cannot be decoded, with a warning, where they
            otherwise end the run.
        validation: Images held out of the training split, the last ones of a fixed shuffle.
    """

    source: Annotated[str, Parameter(alias="--data")] = "digits"
    preset: Literal["cifar", "imagenet"] | None = None
    image_size: Annotated[Pixels | None, Parameter(alias="--image-size")] = None
    padding: CountOrNone | None = None
    flip: bool | None = None
    scale: Annotated[float, _within(gt=0, lte=1)] = 0.08
    auto_augment: Literal["trivial", "rand"] | None = None
    erase: Probability = 0.0
    mixup: Annotated[float, _within(gte=0, lte=100)] = 0.0
    cutmix: Annotated[float, _within(gte=0, lte=100)] = 0.0
    eval_size: Pixels | None = None
    crop_pct: Annotated[float, _within(gte=0.01, lte=1)] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    workers: CountOrNone | None = None
    skip_unreadable: Annotated[bool, Parameter(alias="--skip-unreadable")] = False
    validation: CountOrNone = 0

    @property
    def is_named(self) -> bool:
        """Return whether the images have a name of their own, and a fixed size."""
        return self.source in _NAMED

    def check_source(self) -> None:
        """Check that the images are there.

        Raises:
            DeepTwistError: if they are not; of Hugging Face's, only loading them tells.
        """
        path = Path(self.source).expanduser()
        if self.is_named or self.source.startswith("hf/") or path.is_dir():
            return
        if path.name == self.source:
            known = [*_NAMED, "path/to/folder", "hf/NAME"]
            raise unknown_name_error("data set", self.source, known)
        raise DeepTwistError(f"no folder of images at '{path.resolve()}'")


@dataclass(frozen=True, kw_only=True)
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
        precondition: Step factored layers as the dense form would be stepped, in mode finetune
            and in finetune_after.
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
    precondition: bool = False
    clip_norm: Positive | None = None
    accumulate: Count = 1
    freeze: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()

    def __post_init__(self) -> None:
        if self.name == "sgd":  # the command line's help need not import torch for it
            return
        if self.name.startswith("timm/"):
            with require_extra("timm"):
                from timm.optim import list_optimizers  # type: ignore[attr-defined]
            known = [f"timm/{optimizer}" for optimizer in list_optimizers()]
        else:
            known = [*torch_optimizers(), "timm/NAME"]
        if self.name not in known:
            raise unknown_name_error("optimizer", self.name, known)


@dataclass(frozen=True, kw_only=True)
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

    epochs: Annotated[CountOrNone, Parameter(alias="--epochs")] = 6
    kind: Literal["cosine", "step", "polynomial"] = "cosine"
    milestones: tuple[Count, ...] = ()
    factor: Share = 0.1
    power: Positive = 1.0
    warmup_epochs: NotNegative = 0.0

    def __post_init__(self) -> None:
        if self.kind != "step" and self.milestones:
            raise DeepTwistError(f"a {self.kind} has no milestones: write schedule.kind: step")
        if 0 < self.epochs <= self.warmup_epochs:
            raise DeepTwistError(f"a warm-up of {self.warmup_epochs:g} epochs leaves none to train")


@dataclass(frozen=True, kw_only=True)
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
    temperature: Positive = 4.0

    def __post_init__(self) -> None:
        if (self.model is None) != (self.weights is None):
            raise DeepTwistError("a teacher is a model and its weights: give both or neither")


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """Fine-tuning in the decomposed form after the last distortion, with a cosine decay.

    Attributes:
        epochs: Passes over the training split.
        lr: The learning rate that the decay starts from.
    """

    epochs: Count = 1
    lr: NotNegative = 0.01


@dataclass(frozen=True, kw_only=True)
class LoggingRecipe:
    """What is recorded during training.

    Attributes:
        images: Images of each split, always the same, on which loss and accuracy are measured
            just before and just after every distortion; 0 for none.
        checkpoint_every: Optimizer steps between checkpoints.
    """

    images: CountOrNone = 100
    checkpoint_every: Count = 200


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run is configured with; every field but the model's has a default.

    Modes: ``dense`` trains the network as it is; ``deeptwist`` distorts it while it trains and
    decomposes it at the end; ``finetune`` decomposes it first and trains the factors.

    Attributes:
        model: resnet20 … resnet110, vgg19, torchvision/NAME, timm/NAME, hf-hub:OWNER/NAME or
            package.module:factory.
        weights: A checkpoint to start from, or a name that the network's library downloads
            (DEFAULT, IMAGENET1K_V1, a1_in1k); random weights without it. Where they are for other
            classes, the last layer begins anew.
        mode: How to train.
        interval: S_D, optimizer steps between distortions; 1 projects at every step, and one beyond
            the end decomposes once, at the end.
        batch_size: Images in a step, of all processes together.
        seed: Of initial weights, of the order of the images and their augmentation.
        precision: Lightning Fabric's name for it: bf16-mixed is bf16 autocast, of compress's
            distillation too; 16-mixed is fp16's with a scaled loss; a step that overflows is taken
            again, at half the scale.
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
        frozen_compression: Layers that are decomposed before training and not trained (the paper's
            fully-connected layers of VGG19); a dense run leaves them as they are.
        label_smoothing: Share of the target that is spread over all classes.
        ema: Decay of an exponential moving average of the weights, a row of its own; decomposed
            after training, as an average of distorted weights is not of low rank.
        distillation: From a teacher, the dense network or another; none without it.
        batch_norm_batches: Training batches to take batch norm's statistics anew on in every
            network that is deployed; 0 for none.
        finetune_after: Fine-tuning in the decomposed form, a row of its own.
        logging: What is recorded during training.
    """

    model: Annotated[str, Parameter(show=False)]  # the command line's first word
    weights: Annotated[str | None, Parameter(group="Parameters")] = None
    mode: Mode = "deeptwist"
    interval: Count = 200
    batch_size: Count = 128
    seed: Annotated[int, Parameter(converter=read_whole, validator=Number(gte=0, lt=2**63))] = 0
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    cuda_graphs: bool = False
    compile: str | None = None
    checkpoint_gradients: bool = False
    data: Annotated[DataRecipe, Parameter(group="Images")] = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    compression: Annotated[CompressionRecipe, Parameter(name=("compression", "*"), group=HOW)] = (
        field(default_factory=CompressionRecipe)
    )
    calibration_images: CountOrNone = 0
    frozen_compression: CompressionRecipe | None = None
    label_smoothing: Decay = 0.0
    ema: Share | None = None
    distillation: DistillationRecipe | None = None
    batch_norm_batches: CountOrNone = 0
    finetune_after: FinetuneRecipe | None = None
    logging: LoggingRecipe = field(default_factory=LoggingRecipe)

    def __post_init__(self) -> None:
        if self.finetune_after is not None and self.mode != "deeptwist":
            raise DeepTwistError(f"finetune_after follows distortions, mode {self.mode} has none")
        if self.optimizer.precondition and not (self.mode == "finetune" or self.finetune_after):
            raise DeepTwistError(
                f"mode {self.mode} trains no factors to precondition: finetune does"
            )
        if self.cuda_graphs and self.compile not in (None, "inductor"):
            raise DeepTwistError(
                f"cuda_graphs goes with compile: inductor or none, not {self.compile}"
            )

    @property
    def compresses(self) -> bool:
        """Return whether a decomposed network is deployed."""
        return self.mode != "dense"

    @property
    def distorts(self) -> bool:
        """Return whether weights are distorted while the network trains."""
        return self.mode == "deeptwist"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `make_recipe` is the inverse."""
        return asdict(self)


def torch_optimizers() -> "dict[str, type[Optimizer]]":
    """Return torch's optimizers that any network can be trained by, named in small letters."""
    from torch import optim

    kinds = {name: kind for name, kind in vars(optim).items() if inspect.isclass(kind)}
    for name in ("Optimizer", "Muon", "SparseAdam", "LBFGS"):
        kinds.pop(name, None)  # the last take matrices, sparse gradients, closures only
    return {name.lower(): kind for name, kind in kinds.items() if issubclass(kind, optim.Optimizer)}


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        DeepTwistError: if the file cannot be read, or a key or a value is not one of a recipe's.
    """
    return make_recipe(read_values(path), str(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """Read a recipe's file as plain values, unchecked.

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
    return values


def make_recipe(values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """Make a recipe of plain values, nested as in the YAML file.

    Args:
        values: by key.
        source: where they are from, for messages.

    Raises:
        DeepTwistError: if a key or a value is not one of a recipe's, naming it and the nearest.
    """

    def read(recipe: Annotated[Recipe, Parameter(name="*")]) -> Recipe:
        return recipe

    app = App(
        default_command=read, config=Dict(dict(values), source=source), result_action="return_value"
    )
    try:
        recipe: Recipe = app([], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise DeepTwistError(" ".join(str(error).split())) from error
    return recipe
