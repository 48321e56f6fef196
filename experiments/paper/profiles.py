"""How an experiment is trained: as the paper did, cut to a short schedule, or for a smoke test."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from deeptwist.errors import DeepTwistError
from deeptwist.training.recipe import (
    CompressionRecipe,
    DataRecipe,
    Mode,
    OptimizerRecipe,
    Recipe,
    RecordsRecipe,
    ScheduleRecipe,
)

ProfileName = Literal["paper", "short", "smoke"]
Network = Literal["resnet32", "vgg19", "resnet34"]

_OFTEN = 100  # steps between distortions from which on each is looked at


@dataclass(frozen=True)
class Point:
    """How small layers become.

    Attributes:
        ratio: of every layer.
        fraction: the paper's R_c for Tucker, where it states one; its own ratio is about `ratio`.
    """

    ratio: float
    fraction: float | None = None

    def of(self, method: str, **options: Any) -> dict[str, Any]:
        """A compression of this size, as fields of a `CompressionRecipe`."""
        if method == "tucker" and self.fraction is not None:
            return {"decomposition": method, "fraction": self.fraction, **options}
        return {"decomposition": method, "ratio": self.ratio, **options}

    def __str__(self) -> str:
        return f"{self.ratio:g}×"


@dataclass(frozen=True)
class Setting:
    """What a profile trains a network with; an experiment's cells vary it.

    Attributes:
        profile: its name.
        words: what the schedule is, for the reader of a result.
        recipe: of a compressed run; weights and images are filled in where it is run.
        start: of the dense network that compressed runs start from; none where they start from
            the weights that are given.
        points: sizes, in the order of what matters most.
        intervals: of the sweep of S_D, in the same order.
        tails: epochs in decomposed form, taken off the end of the schedule.
        tail_lr: the learning rate that they start from.
        needs_weights: whether weights have to be given.
        needs_data: whether images have to be given.
    """

    profile: ProfileName
    words: str
    recipe: Recipe
    start: Recipe | None
    points: tuple[Point, ...]
    intervals: tuple[int, ...]
    tails: tuple[int, ...]
    tail_lr: float
    needs_weights: bool = False
    needs_data: bool = False

    @property
    def middle(self) -> Point:
        """The size that curves are shown at: about 4×."""
        return min(self.points, key=lambda point: abs(point.ratio - 4.28))

    def compressed(self, mode: Mode, *, interval: int | None = None, **options: Any) -> Recipe:
        """The recipe in another mode, with other fields of its compression.

        Distortions that are many are not looked at one by one: that would take most of the time.
        """
        compression = replace(self.recipe.compression, **options)
        interval = interval or self.recipe.interval
        recipe = replace(self.recipe, mode=mode, interval=interval, compression=compression)
        if mode == "projected" or (interval < _OFTEN and self.profile != "smoke"):
            recipe = replace(recipe, records=replace(recipe.records, images=0))
        return recipe

    @property
    def dense(self) -> Recipe:
        """The dense network trained on as compressed ones are: what the schedule alone brings."""
        return replace(self.recipe, mode="dense")


_EVERY_CONVOLUTION = CompressionRecipe(decomposition="tucker", skip_first_conv=True, linear=False)
_WIDE_CONVOLUTIONS = CompressionRecipe(decomposition="tucker", min_in_channels=128, linear=False)
_FIXED = CompressionRecipe(decomposition="svd", ratio=4, include=("classifier.1", "classifier.4"))

_PAPER_POINTS = (
    Point(2.06, 0.6),
    Point(4.28, 0.4),
    Point(6.71, 0.3),
    Point(1.57, 0.7),
    Point(2.80, 0.5),
)
_PAPER_RECIPES: dict[Network, Recipe] = {
    "resnet32": Recipe(
        model="resnet32",
        interval=200,
        data=DataRecipe(source="cifar10"),
        optimizer=OptimizerRecipe(lr=0.1, nesterov=False, weight_decay=1e-4),
        schedule=ScheduleRecipe(epochs=200, kind="step", milestones=(100, 150)),
        compression=_EVERY_CONVOLUTION,
        records=RecordsRecipe(images=1000),
    ),
    "vgg19": Recipe(
        model="vgg19",
        interval=300,
        data=DataRecipe(source="cifar10"),
        optimizer=OptimizerRecipe(lr=0.01, nesterov=False, weight_decay=1e-4),
        schedule=ScheduleRecipe(
            epochs=300, kind="step", milestones=(50, 100, 150, 200, 250), factor=0.5
        ),
        compression=_WIDE_CONVOLUTIONS,
        fixed=_FIXED,
        records=RecordsRecipe(images=1000),
    ),
    "resnet34": Recipe(
        model="torchvision/resnet34",
        interval=1000,
        batch_size=256,
        precision="bf16-mixed",
        data=DataRecipe(source="imagenet", image_size=224),
        optimizer=OptimizerRecipe(lr=0.01, nesterov=False, weight_decay=1e-4),
        schedule=ScheduleRecipe(epochs=80, kind="step", milestones=(20, 50)),
        compression=_WIDE_CONVOLUTIONS,
        records=RecordsRecipe(images=1000, checkpoint_every=1000),
    ),
}

_SHORT = Recipe(
    model="resnet32",
    interval=100,  # a dozen distortions in three epochs
    precision="bf16-mixed",
    data=DataRecipe(source="cifar10"),
    optimizer=OptimizerRecipe(lr=0.025, weight_decay=5e-4),
    schedule=ScheduleRecipe(epochs=3),
    compression=_EVERY_CONVOLUTION,
    records=RecordsRecipe(images=250),
)
_SHORT_RECIPES: dict[Network, Recipe] = {
    "resnet32": _SHORT,
    # Without batch norm a few epochs teach a VGG19 nothing.
    "vgg19": replace(_SHORT, model="vgg19_bn", compression=_WIDE_CONVOLUTIONS, fixed=_FIXED),
    "resnet34": replace(
        _SHORT,
        model="torchvision/resnet34",
        batch_size=64,
        data=DataRecipe(source="imagenette224", image_size=64),  # 224 takes 12 times as long
        compression=_WIDE_CONVOLUTIONS,
    ),
}
_SHORT_STARTS: dict[Network, int] = {"resnet32": 4, "vgg19": 4, "resnet34": 6}  # epochs

_SMOKE = Recipe(
    model="resnet20",
    interval=2,
    batch_size=512,
    schedule=ScheduleRecipe(epochs=2),
    compression=_EVERY_CONVOLUTION,
    records=RecordsRecipe(images=32),
)


def setting_of(profile: ProfileName, network: Network) -> Setting:
    """What a profile trains a network with."""
    if profile == "paper":
        return _paper(network)
    return _short(network) if profile == "short" else _smoke(network)


def check_given(setting: Setting, data: str | None, weights: object) -> None:
    """Checks that what a profile cannot do without was given.

    Raises:
        DeepTwistError: naming the option that is missing.
    """
    model = setting.recipe.model
    if setting.needs_weights and weights is None:
        raise DeepTwistError(
            f"profile {setting.profile} starts from a trained {model}: give it with --weights FILE"
        )
    if setting.needs_data and data is None:
        raise DeepTwistError(
            f"profile {setting.profile} trains {model} on a folder of images "
            f"({setting.recipe.data.source}): give it with --data FOLDER"
        )


def _paper(network: Network) -> Setting:
    recipe = _PAPER_RECIPES[network]
    return Setting(
        profile="paper",
        words=f"the paper's schedule: {recipe.schedule.epochs} epochs from the trained network",
        recipe=recipe,
        start=None,
        points=_PAPER_POINTS,
        intervals=(200, 10, 20, 50, 100, 500, 1000, 2000, 5000),
        tails=(20, 50, 100),
        tail_lr=0.01,
        needs_weights=True,
        needs_data=network == "resnet34",
    )


def _short(network: Network) -> Setting:
    recipe, epochs = _SHORT_RECIPES[network], _SHORT_STARTS[network]
    start = replace(
        recipe,
        mode="dense",
        fixed=None,
        optimizer=replace(recipe.optimizer, lr=0.05),
        schedule=ScheduleRecipe(epochs=epochs),
    )
    return Setting(
        profile="short",
        words=f"a short schedule: {recipe.schedule.epochs} epochs, SGD {recipe.optimizer.lr} with "
        f"cosine decay, weight decay {recipe.optimizer.weight_decay}, {recipe.precision}, from "
        f"a dense network trained on the same images for {epochs} epochs",
        recipe=recipe,
        start=start,
        points=(Point(4), Point(2), Point(8)),
        intervals=(100, 1000, 10, 300, 30),
        tails=(1, 2),
        tail_lr=0.01,
        needs_weights=network == "resnet32",
        needs_data=network == "resnet34",
    )


def _smoke(network: Network) -> Setting:
    # Its images are too small for the other networks; layers of 64 channels stand in for wide ones.
    wide = replace(_WIDE_CONVOLUTIONS, min_in_channels=64)
    compression = _EVERY_CONVOLUTION if network == "resnet32" else wide
    return Setting(
        profile="smoke",
        words="a smoke test: ResNet-20 for a moment on 8×8 digits; its accuracies mean nothing",
        recipe=replace(_SMOKE, compression=compression),
        start=replace(_SMOKE, mode="dense", schedule=ScheduleRecipe(epochs=1)),
        points=(Point(4),),
        intervals=(2, 1),
        tails=(1,),
        tail_lr=0.01,
    )
