"""How an experiment is trained: as the paper did, cut shorter, or for a smoke test."""

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

Profile = Literal["paper", "long", "long-32", "short", "smoke"]
Network = Literal["resnet32", "vgg19", "resnet34"]

_OFTEN = 100  # steps between distortions from which on each is looked at


@dataclass(frozen=True)
class Level:
    """How small layers become.

    Attributes:
        ratio: of every layer.
        fraction: the paper's R_c for Tucker, where it states one; its own ratio is about `ratio`.
    """

    ratio: float
    fraction: float | None = None

    def of(self, method: str, **options: Any) -> dict[str, Any]:
        """Return a compression of this size, as fields of a `CompressionRecipe`."""
        if method == "tucker" and self.fraction is not None:
            return {"decomposition": method, "fraction": self.fraction, **options}
        return {"decomposition": method, "ratio": self.ratio, **options}

    def __str__(self) -> str:
        return f"{self.ratio:g}×"


@dataclass(frozen=True)
class Preset:
    """What a profile trains a network with; an experiment's runs vary it.

    Attributes:
        profile: its name.
        description: of the schedule, for the reader of a result.
        recipe: of a compressed run; weights and images are filled in where it is run.
        start: of the dense network that compressed runs start from; `None` where they start from
            the weights that are given.
        levels: sizes, in the order of what matters most.
        intervals: of the sweep of S_D, in the same order.
        tails: epochs in decomposed form, taken off the end of the schedule.
        needs_weights: whether weights have to be given.
        needs_data: whether images have to be given.
    """

    profile: Profile
    description: str
    recipe: Recipe
    start: Recipe | None = None
    levels: tuple[Level, ...] = (Level(4), Level(2), Level(8))
    intervals: tuple[int, ...] = (200, 100, 500, 20)
    tails: tuple[int, ...] = (10, 25)
    needs_weights: bool = True
    needs_data: bool = False

    @property
    def reference_level(self) -> Level:
        """Return the size that curves are shown at: about 4×."""
        return min(self.levels, key=lambda level: abs(level.ratio - 4.28))

    @property
    def sorted_levels(self) -> list[Level]:
        """Return the sizes from the smallest ratio on."""
        return sorted(self.levels, key=lambda level: level.ratio)

    def compressed(self, mode: Mode, *, interval: int | None = None, **options: Any) -> Recipe:
        """Return the recipe in another mode, with other fields of its compression.

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
        """Return the dense network trained on as compressed ones are."""
        return replace(self.recipe, mode="dense")

    def check_inputs(self, data: str | None, weights: object) -> None:
        """Check that what the profile cannot do without was given.

        Raises:
            DeepTwistError: naming the option that is missing.
        """
        model = self.recipe.model
        if self.needs_weights and weights is None:
            raise DeepTwistError(
                f"profile {self.profile} starts from a trained {model}: give it with --weights FILE"
            )
        if self.needs_data and data is None:
            raise DeepTwistError(
                f"profile {self.profile} trains {model} on a folder of images "
                f"({self.recipe.data.source}): give it with --data FOLDER"
            )


_EVERY_CONVOLUTION = CompressionRecipe(decomposition="tucker", skip_first_conv=True, linear=False)
_WIDE_CONVOLUTIONS = CompressionRecipe(decomposition="tucker", min_in_channels=128, linear=False)
_FIXED = CompressionRecipe(decomposition="svd", ratio=4, include=("classifier.1", "classifier.4"))

_PAPER_LEVELS = (
    Level(2.06, 0.6),
    Level(4.28, 0.4),
    Level(6.71, 0.3),
    Level(1.57, 0.7),
    Level(2.80, 0.5),
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


def preset_of(profile: Profile, network: Network) -> Preset:
    """Return what a profile trains a network with.

    Raises:
        DeepTwistError: if it does not train this one.
    """
    if profile == "paper":
        return _paper(network)
    if profile.startswith("long"):
        if network != "resnet32":
            raise DeepTwistError(f"profile {profile} trains resnet32 alone, not {network}")
        return _long(profile)
    return _short(network) if profile == "short" else _smoke(network)


def _paper(network: Network) -> Preset:
    recipe = _PAPER_RECIPES[network]
    return Preset(
        profile="paper",
        description=f"the paper's schedule: {recipe.schedule.epochs} epochs from the trained "
        "network",
        recipe=recipe,
        levels=_PAPER_LEVELS,
        intervals=(200, 10, 20, 50, 100, 500, 1000, 2000, 5000),
        tails=(20, 50, 100),
        needs_data=network == "resnet34",
    )


def _long(profile: Profile) -> Preset:
    size = None if profile == "long-32" else 16
    paper = _PAPER_RECIPES["resnet32"]
    return Preset(
        profile=profile,
        description="the paper's regime, halved: 100 epochs from 0.1, divided by 10 after 50 and "
        f"75, weight decay 1e-4, images of {size or 32}×{size or 32}, from the trained network",
        recipe=replace(
            paper,
            data=replace(paper.data, image_size=size),
            schedule=ScheduleRecipe(epochs=100, kind="step", milestones=(50, 75)),
        ),
    )


def _short(network: Network) -> Preset:
    recipe, epochs = _SHORT_RECIPES[network], _SHORT_STARTS[network]
    start = replace(
        recipe,
        mode="dense",
        fixed=None,
        optimizer=replace(recipe.optimizer, lr=0.05),
        schedule=ScheduleRecipe(epochs=epochs),
    )
    return Preset(
        profile="short",
        description=f"a short schedule: {recipe.schedule.epochs} epochs, SGD "
        f"{recipe.optimizer.lr} with cosine decay, weight decay {recipe.optimizer.weight_decay}, "
        f"{recipe.precision}, from a dense network trained on the same images for {epochs} epochs",
        recipe=recipe,
        start=start,
        intervals=(100, 1000, 10, 300, 30),
        tails=(1, 2),
        needs_weights=network == "resnet32",
        needs_data=network == "resnet34",
    )


def _smoke(network: Network) -> Preset:
    # Its images are too small for the other networks; layers of 64 channels stand in for wide ones.
    wide = replace(_WIDE_CONVOLUTIONS, min_in_channels=64)
    compression = _EVERY_CONVOLUTION if network == "resnet32" else wide
    return Preset(
        profile="smoke",
        description="a smoke test: ResNet-20 for a moment on 8×8 digits; its accuracies mean "
        "nothing",
        recipe=replace(_SMOKE, compression=compression),
        start=replace(_SMOKE, mode="dense", schedule=ScheduleRecipe(epochs=1)),
        levels=(Level(4),),
        intervals=(2, 1),
        tails=(1,),
        needs_weights=False,
    )
