"""Options that several commands share; each group knows the call that it stands for."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from cyclopts import Parameter

from deeptwist.cli.parsing import (
    make_decomposition,
    parse_override,
    parse_rank,
    parse_sizes,
    parse_tile,
)
from deeptwist.errors import DeepTwistError, check_int

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deeptwist.benchmark.networks import Setting
    from deeptwist.decompositions import Decomposition
    from deeptwist.plan.plan import Plan
    from deeptwist.training.recipe import Recipe

MethodName = Literal["svd", "tiled-svd", "spatial-svd", "tucker", "cp"]
Model = Annotated[
    str,
    Parameter(
        help="resnet20 … resnet110, vgg19, torchvision/NAME, timm/NAME or package.module:factory."
    ),
]
T = TypeVar("T")
Several = Annotated[tuple[T, ...], Parameter(consume_multiple=True)]
AsJson = Annotated[bool, Parameter("--json", help="Print JSON for a script instead of a table.")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The network's weights and input.

    Attributes:
        weights: A checkpoint (.safetensors, or .pt/.pth/.th, read without unpickling code).
        num_classes: Outputs of the network; the data set's where there is one.
        input: Input size without the batch, such as 3x224x224.
    """

    weights: Path | None = None
    num_classes: int | None = None
    input: str | None = None

    def build(
        self, model: str, *, num_classes: int | None = None, in_channels: int | None = None
    ) -> "nn.Module":
        """The network with its weights; what the data set says yields to what is written."""
        from deeptwist.models import build_model, load_weights

        if self.input is not None and in_channels is None and not model.startswith("torchvision/"):
            in_channels = parse_sizes(self.input, "3x224x224")[0]
        if in_channels == 3:
            in_channels = None  # what every network takes by itself
        network = build_model(
            model, num_classes=self.num_classes or num_classes, in_channels=in_channels
        )
        if self.weights is not None:
            load_weights(network, self.weights)
        return network.eval()

    def example_input(self, model: str, batch: int = 2) -> "Tensor":
        """Standard normal numbers of the network's input size."""
        import torch

        usual = "3x224x224" if "/" in model else "3x32x32"
        shape = parse_sizes(self.input or usual, "3x224x224")
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What networks are timed with; several values of one option are all combined.

    Attributes:
        batch: Images in the batch.
        threads: Processor threads; torch's choice if not given.
        dtype: Type of weights and images.
        runtime: What runs the networks.
        rounds: Samples of each network.
        layers: Whether each layer is timed by itself too (in the first of these settings).
    """

    batch: Several[int] = (16,)
    threads: Several[int] = ()
    dtype: Several[Literal["float32", "bfloat16", "float16"]] = ("float32",)
    runtime: Several[Literal["eager", "compile", "onnxruntime"]] = ("eager",)
    rounds: int = 15
    layers: Annotated[bool, Parameter(negative="--no-layers")] = True

    def build(self) -> "list[Setting]":
        """Every combination of the values."""
        import torch

        from deeptwist.benchmark.networks import settings_of

        for name, counts, least in (
            ("batch", self.batch, 1),
            ("threads", self.threads, 1),
            ("rounds", (self.rounds,), 2),
        ):
            for count in counts:
                check_int(name, count, least)
        threads = self.threads or (torch.get_num_threads(),)
        return settings_of(self.batch, threads, self.dtype, self.runtime)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Which layers are compressed, and how.

    Attributes:
        decomposition: How layers are held.
        ratio: Dense ÷ factored weights that every compressed layer keeps at least.
        rank: An explicit rank instead: 8, or 24x24 for Tucker.
        fraction: For Tucker, the paper's fraction of the channels instead.
        tile: For tiled-svd: rows x columns of the lowered kernel, such as 64x72.
        skip_first_conv: Keep the convolution that runs first.
        min_in_channels: Keep layers with fewer input channels.
        linear: Whether linear layers are compressed too.
        rank_multiple: Round ranks that the ratio sets down to a multiple; 16 suits AVX-512.
        include: Compress only layers of this name, glob, or expression after re:.
        exclude: Keep layers of this name, glob, or expression after re:.
        min_speedup: Keep layers that are not this many times as fast factored, timed here.
        tune: Time the exact forms of every layer and take the fastest.
        override: PATTERN=keep, PATTERN=RATIO or PATTERN=METHOD:rank=…; the last match counts.
        plan: Use a plan that 'deeptwist plan --out' wrote, instead of all the above.
    """

    decomposition: MethodName = "tiled-svd"
    ratio: float | None = None
    rank: str | None = None
    fraction: float | None = None
    tile: str | None = None
    skip_first_conv: bool = False
    min_in_channels: int = 1
    linear: Annotated[bool, Parameter(negative="--no-linear")] = True
    rank_multiple: int = 1
    include: list[str] | None = None
    exclude: list[str] | None = None
    override: list[str] | None = None
    min_speedup: float | None = None
    tune: bool = False
    plan: Path | None = None

    def method(self) -> "Decomposition":
        """The decomposition that was asked for."""
        return make_decomposition(
            self.decomposition, tile=self.tile, rank=self.rank, fraction=self.fraction
        )

    def build(self, network: "nn.Module", example_input: "Tensor") -> "Plan":
        """The plan for a network."""
        from deeptwist.benchmark.layers import compare_layers, keep_slow_layers
        from deeptwist.plan.autotune import tune
        from deeptwist.plan.plan import read_plan

        made = read_plan(self.plan) if self.plan is not None else self._make(network, example_input)
        if self.tune:
            made = tune(network, made)
        if self.min_speedup is not None:
            measured = compare_layers(made, next(network.parameters()))
            made = keep_slow_layers(made, measured, self.min_speedup)
        return made

    def changes(self) -> dict[str, object]:
        """What differs from the defaults, as values of a recipe's compression.

        Raises:
            DeepTwistError: for what only a plan holds.
        """
        usual = PlanOptions()
        given = {
            name: value for name, value in asdict(self).items() if value != getattr(usual, name)
        }
        for name in ("override", "min_speedup", "tune"):
            if name in given:
                raise DeepTwistError(
                    f"--{name.replace('_', '-')} is of plans: write one with 'deeptwist plan … "
                    "--out plan.json' and train with --plan plan.json"
                )
        if self.decomposition != usual.decomposition:
            given["decomposition"] = self.decomposition.replace("-", "_")
        if self.tile is not None:
            given["tile"] = parse_tile(self.tile)
        if self.rank is not None:
            given["rank"] = parse_rank(self.rank)
        if self.plan is not None:
            given["plan"] = str(self.plan)
        return given

    def _make(self, network: "nn.Module", example_input: "Tensor") -> "Plan":
        from deeptwist.plan.plan import plan

        return plan(
            network,
            self.method(),
            ratio=self.ratio,
            example_input=example_input,
            skip_first_conv=self.skip_first_conv,
            min_in_channels=self.min_in_channels,
            linear=self.linear,
            rank_multiple=self.rank_multiple,
            include=self.include or ("*",),
            exclude=self.exclude or (),
            overrides=dict(parse_override(text) for text in self.override or ()),
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What is changed of a recipe; --set reaches every field of it.

    Attributes:
        set: KEY=VALUE, such as optimizer.lr=0.05 or compression.ratio=4.
        data: digits, cifar10, or a folder with train/ and test/ (or val/) of class folders.
        mode: How to train; noise, projection and once are the paper's controls.
        weights: A checkpoint to start from.
        epochs: Passes over the training split.
        lr: The learning rate that the schedule starts from.
        batch_size: Images in a step.
        interval: S_D, optimizer steps between distortions.
        seed: Of weights, order and augmentation.
        precision: bf16-mixed is bf16 autocast.
        image_size: Resize a folder's images to this height and width.
    """

    set: Several[str] = ()
    data: str | None = None
    mode: Literal["dense", "deeptwist", "decomposed", "projection", "noise", "once"] | None = None
    weights: Path | None = None
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    interval: int | None = None
    seed: int | None = None
    precision: Literal["32-true", "bf16-mixed", "64-true"] | None = None
    image_size: int | None = None

    def recipe(self, network: str, compression: dict[str, object]) -> "Recipe":
        """The recipe of a file, or of a network's name, with these changes.

        Args:
            network: the file or the name.
            compression: changes of the recipe's compression.
        """
        from deeptwist.training.recipe import make_recipe, read_recipe

        keys = {
            "data": "data.source",
            "image_size": "data.image_size",
            "epochs": "schedule.epochs",
            "lr": "optimizer.lr",
        }
        given = {name: value for name, value in asdict(self).items() if name != "set"}
        values = {keys.get(n, n): value for n, value in given.items() if value is not None}
        values |= {f"compression.{name}": value for name, value in compression.items()}
        changes = [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
        changes += self.set
        if network.endswith((".yaml", ".yml")):
            return read_recipe(network, changes)
        return make_recipe({"model": network}, changes)
