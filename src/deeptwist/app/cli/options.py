"""Options that several commands share, and what fills them in or is made of them."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Dict
from cyclopts.validators import Number

from deeptwist.app.cli.console import progress_bar
from deeptwist.app.folders import SMALL
from deeptwist.app.training.compression import HOW, SIZES, CompressionRecipe, Count, read_whole
from deeptwist.app.training.recipe import (
    CountOrNone,
    DataRecipe,
    Pixels,
    Positive,
    Recipe,
    read_values,
)
from deeptwist.errors import DeepTwistError, check_ratio, explaining
from deeptwist.networks.names import check_name, check_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deeptwist.app.data import ImageData
    from deeptwist.compress import Job
    from deeptwist.measure.runtimes import Setting

# Where a trained network is at hand, a few gentle epochs of its factors cost least.
COMPRESS_DEFAULTS: dict[str, Any] = {
    "mode": "finetune",
    "optimizer": {"lr": 0.02},
    "calibration_images": 1024,
}
Goal = Callable[[float], float]  # the dense network's accuracy → the least of the small one
_SIZES = "ratio", "weight_budget", "macs", "latency", "latency_ms", "rank", "fraction", "plan"
T = TypeVar("T")
Several = Annotated[tuple[T, ...], Parameter(consume_multiple=True)]
AsJson = Annotated[bool, Parameter("--json", help="Print JSON for a script instead of a table.")]
PlanOptions = Annotated[CompressionRecipe | None, Parameter(name="*", group=HOW)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """A network and its weights.

    Attributes:
        model: resnet20 … resnet110, vgg19, torchvision/NAME, timm/NAME, hf-hub:OWNER/NAME or
            package.module:factory.
        weights: A checkpoint (.safetensors, .pt, .pth, .ckpt, read without unpickling code), or a
            name that the network's library downloads: DEFAULT, IMAGENET1K_V1, a1_in1k.
        num_classes: Outputs of the network; the data set's where there is one.
    """

    model: str = field(kw_only=False)
    weights: str | None = None
    num_classes: int | None = None

    def build(self, sizes: Mapping[str, Any], *, bare: bool = False) -> "nn.Module":
        """Return the network, with its weights or `bare`, of these sizes, but for its options'."""
        from deeptwist.networks.build import build_model
        from deeptwist.networks.weights import build_trained

        own = {} if self.num_classes is None else {"num_classes": self.num_classes}
        make = build_model if bare else partial(build_trained, weights=self.weights)
        return make(self.model, **{**sizes, **own}).eval()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NetworkOptions(WeightOptions):
    """A network, its weights and its input.

    Attributes:
        input: Input size without the batch, such as 3x224x224.
        image_size: Side of square images, in place of --input 3xSIDExSIDE.
    """

    input: Annotated[int | tuple[int, ...] | None, SIZES, Parameter(validator=Number(gte=1))] = None
    image_size: Pixels | None = None

    @property
    def sizes(self) -> dict[str, int | None]:
        """Return the classes and channels that it is built for, `None` for its own number."""
        is_set = self.input is not None and not self.model.startswith("torchvision/")
        channels = self.size[0] if is_set else 3
        own = None if channels == 3 else channels  # which every network takes by itself
        return {"num_classes": self.num_classes, "in_channels": own}

    @property
    def size(self) -> tuple[int, ...]:
        """Return the network's input size without the batch."""
        if self.image_size is not None:
            if self.input is not None:
                raise DeepTwistError("--input and --image-size say the same: leave one of them out")
            return 3, self.image_size, self.image_size
        if self.input is None:
            return (3, 224, 224) if "/" in self.model else (3, 32, 32)
        return (self.input,) if isinstance(self.input, int) else self.input

    def example_input(self, batch: int = 2) -> "Tensor":
        """Return standard normal numbers of the network's input size."""
        import torch

        shape = batch, *self.size
        problem = f"no memory for an input of {'×'.join(map(str, shape))} numbers"
        with explaining(problem, errors=(RuntimeError, TypeError)):  # or no integer holds it
            return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def load_images(self, source: str) -> "ImageData":
        """Load a data set, folders of images at the network's input size."""
        from deeptwist.app.data import load_data

        size = None if DataRecipe(source=source).is_named else self.size[-1]
        return load_data(source, image_size=size)


@Parameter(name="*", group="Images")
@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Images that ranks and factors are chosen on.

    Attributes:
        calibrate: Data set whose training images' outputs the layers are to keep: digits, cifar10,
            or a folder with train/ of class folders.
        calibration_images: How many of them.
    """

    calibrate: str | None = None
    calibration_images: Count = 1024


NO_CALIBRATION = CalibrationOptions()


@Parameter(name="*", group="Sweep")
@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """A plan at ratios from 1.5 to 8 instead of one.

    Attributes:
        sweep: Plan at many ratios, and mark where the loss begins to run away.
        data: Data set for a sweep: calibrates on its training images, and tells accuracy without
            training on its test images.
        test_images: How many of those, at most.
        page: Draw the sweep on this HTML page.
    """

    sweep: bool = False
    data: str | None = None
    test_images: Count = 1000
    page: Path | None = None

    def __post_init__(self) -> None:
        if not self.sweep and (self.data is not None or self.page is not None):
            raise DeepTwistError("--data and --page are a sweep's: add --sweep")


NO_SWEEP = SweepOptions()


def values_of_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Let the recipe, or the network, that a command names fill in what is not written."""
    if commands not in (("train",), ("compress",)):
        return
    data, source = arguments["--data"], arguments["--data.source"]
    source.tokens += data.tokens  # the name of a section alone is its source
    data.tokens.clear()
    recipe = next((a.tokens[0].value for a in arguments if a.index == 0 and a.tokens), None)
    if recipe is None:
        return  # cyclopts says that it is missing
    is_file = recipe.endswith((".yaml", ".yml"))
    values: dict[str, Any] = read_values(recipe) if is_file else {"model": recipe}
    if not is_file and commands == ("compress",):
        values |= COMPRESS_DEFAULTS
    Dict(values, source=recipe, use_commands_as_keys=False)(app, commands, arguments)


def check_inputs(
    model: str, weights: str | None = None, data: DataRecipe | str | None = None
) -> None:
    """Check that a network, its weights and images are there, as far as names and files tell."""
    check_name(model)
    if weights is not None:
        check_weights(model, weights)
    if data is not None:
        (DataRecipe(source=data) if isinstance(data, str) else data).check_source()


def find_small(small: Path) -> Path:
    """Return the folder of a saved network, which may be a run's or a job's.

    Raises:
        DeepTwistError: if it is not there.
    """
    if not small.is_dir():
        raise DeepTwistError(f"no config.json in {small}: not a folder that deeptwist saved")
    inner, config = small / SMALL, "config.json"
    return inner if (inner / config).is_file() and not (small / config).is_file() else small


def given_sizes(compression: CompressionRecipe) -> list[str]:
    """Return the options that say how small, of those that are given."""
    return [name for name in _SIZES if getattr(compression, name) is not None]


def check_size(compression: CompressionRecipe, *, or_goal: bool = False) -> None:
    """Check that something says how small the network shall be, as a goal would too.

    Raises:
        DeepTwistError: if nothing does, a number that does compresses nothing, or a plan is not
            there.
    """
    if not given_sizes(compression) and not compression.overrides:
        others = "--weight-budget 4, --macs 3 or --latency 2"
        if or_goal:
            others = "--macs 3, --latency 2, or --goal 'accuracy>=dense-0.01'"
        raise DeepTwistError(f"say how small: --ratio 4, {others}")
    for factor in (compression.ratio, compression.weight_budget, compression.macs):
        if factor is not None:
            check_ratio(factor)
    if compression.plan is not None and not Path(compression.plan).exists():
        raise DeepTwistError(f"cannot read plan {compression.plan}: no such file")


def make_job(
    network: NetworkOptions,
    options: CompressionRecipe | None,
    calibration: CalibrationOptions = NO_CALIBRATION,
    data: "ImageData | None" = None,
    *,
    recalibrate: bool = False,
) -> "Job":
    """Return the job on a network without training, calibrated where images are given.

    With `data` the network is built for those images, and calibrated on them.

    Raises:
        DeepTwistError: if there is no such network, nothing says how small it shall be, or there
            are no images to recalibrate on.
    """
    check_inputs(network.model, network.weights, calibration.calibrate)
    recipe = options or CompressionRecipe()
    check_size(recipe)
    if recalibrate and data is None and calibration.calibrate is None:
        raise DeepTwistError("there are no images to recalibrate on: give --calibrate DATA")
    from deeptwist.app.training.evaluation import test_inputs, training_inputs
    from deeptwist.compress import Job
    from deeptwist.decompose import recalibrate_batch_norm

    dense = network.build(network.sizes if data is None else data.sizes)
    example = network.example_input() if data is None else test_inputs(data, dense, 2)
    if data is None and calibration.calibrate is not None:
        data = network.load_images(calibration.calibrate)
    count = calibration.calibration_images
    batches: list[Tensor] = []

    def read() -> "Iterator[Tensor]":
        """Yield the images to calibrate on, and keep them."""
        if data is not None:
            for x in training_inputs(data, dense, count, progress=progress_bar):
                batches.append(x)
                yield x

    def recover(small: "nn.Module", learns: bool) -> "nn.Module":
        return recalibrate_batch_norm(small, batches) if recalibrate else small

    metadata: dict[str, Any] = {k: v for k, v in network.sizes.items() if v is not None}
    if data is not None and _outputs(dense, example) == len(data.classes):
        metadata = data.metadata
    make_plan = partial(recipe.make_plan, dense, example)
    job = Job(dense, make_plan, read, recover, None, progress_bar, metadata)
    if data is not None:
        job.calibrate()
    return job


def _outputs(network: "nn.Module", example_input: "Tensor") -> int | None:
    """Return how many numbers a network gives for an example, if that is all that it gives."""
    import torch

    with torch.no_grad():
        output = network(example_input)
    is_logits = isinstance(output, torch.Tensor) and output.dim() == 2
    return output.shape[1] if is_logits else None


@Parameter(name="*", group="Timing")
@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Settings to time networks in; several values of one option are all combined.

    Attributes:
        batch: Images in the batch.
        threads: Processor threads; torch's choice if not given.
        dtype: Type of weights and images.
        runtime: What runs the networks.
        rounds: Samples of each network.
        layers: Time each layer by itself too (in the first of these settings).
    """

    batch: Several[Count] = (16,)
    threads: Several[Count] = ()
    dtype: Several[Literal["float32", "bfloat16", "float16"]] = ("float32",)
    runtime: Several[Literal["eager", "compile", "onnxruntime"]] = ("eager",)
    rounds: Annotated[int, Parameter(converter=read_whole, validator=Number(gte=2))] = 15
    layers: Annotated[bool, Parameter(negative="--no-layers")] = True

    def settings(self) -> "list[Setting]":
        """Return every combination of the values."""
        import torch

        from deeptwist.measure.runtimes import Setting

        threads = self.threads or (torch.get_num_threads(),)
        combinations = product(self.runtime, self.dtype, threads, self.batch)
        return [Setting(b, t, dtype, runtime) for runtime, dtype, t, b in combinations]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CompressOptions(BenchmarkOptions):
    """What the whole job takes besides a recipe.

    Attributes:
        goal: 'accuracy>=0.90' or 'accuracy>=dense-0.01', instead of a size: the smallest network
            that keeps it without labels is searched.
        find: Which of these options a goal finds the largest value of; macs without it.
        distill_steps: Steps in which the decomposed network learns from the dense one, without
            labels, before it is trained with them; without it as many as are then trained, 1,500 at
            most, and as --distill-minutes allows. For --mode finetune.
        distill_minutes: Minutes of it, at most.
        distill_images: Training images that it learns on, augmented as in training.
        int8: Quantise both networks by onnxruntime too.
        keep_calibration: Leave calibration.safetensors in the folder when the job is done.
        runtime: What runs the networks; ONNX files are written where onnxruntime is among them.
    """

    goal: Annotated[str | None, Parameter(group=HOW)] = None
    find: Annotated[
        Literal["ratio", "weight-budget", "macs", "latency"] | None, Parameter(group=HOW)
    ] = None
    distill_steps: Annotated[CountOrNone | None, Parameter(group="Training")] = None
    distill_minutes: Annotated[Positive, Parameter(group="Training")] = 10.0
    distill_images: Annotated[Count, Parameter(group="Training")] = 2048
    int8: bool = False
    keep_calibration: Annotated[bool, Parameter(group="Parameters")] = False
    runtime: Several[Literal["eager", "compile", "onnxruntime"]] = ("eager", "onnxruntime")
    layers: Annotated[bool, Parameter(show=False)] = False

    def check(self, recipe: Recipe) -> Goal | None:
        """Check what is asked for, before any work; return the goal, if there is one.

        Raises:
            DeepTwistError: if parts of it do not go together, or nothing says how small.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise DeepTwistError("compress is one process: train in several by 'deeptwist train'")
        if not recipe.compresses:
            raise DeepTwistError(
                f"mode {recipe.mode} compresses nothing: finetune and deeptwist do"
            )
        if recipe.frozen_compression is not None:
            raise DeepTwistError("compress takes no frozen_compression: 'deeptwist train' does")
        if self.int8 and "onnxruntime" not in self.runtime:
            raise DeepTwistError("--int8 is onnxruntime's: add it to --runtime")
        if self.distill_steps and recipe.mode != "finetune":
            raise DeepTwistError(
                f"mode {recipe.mode} begins from the dense network: distill with --mode finetune"
            )
        if self.goal is None:
            if self.find is not None:
                raise DeepTwistError("--find is a goal's: add --goal")
            check_size(recipe.compression, or_goal=True)
            return None
        given = given_sizes(recipe.compression)
        if given:
            raise DeepTwistError(f"a --goal finds the size: leave out {', '.join(given)}")
        match = re.fullmatch(r"accuracy>=(dense-)?(0?\.\d+)", self.goal.replace(" ", ""))
        if match is None:
            raise DeepTwistError(
                f"cannot read the goal {self.goal!r}: write 'accuracy>=0.90' or "
                "'accuracy>=dense-0.01'"
            )
        number = float(match[2])
        return (lambda dense: dense - number) if match[1] else (lambda _: number)
