"""How an experiment is trained: as the paper did, cut shorter, or for a smoke test."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deeptwist.app.training.recipe import (
    CompressionRecipe,
    DataRecipe,
    Mode,
    OptimizerRecipe,
    Recipe,
    RecordsRecipe,
    ScheduleRecipe,
    read_recipe,
)
from deeptwist.errors import DeepTwistError

Profile = Literal["paper", "long", "long-32", "ten", "short", "smoke"]
Network = Literal["resnet32", "vgg19", "resnet34"]

_ONLY: dict[Profile, Network] = {"long": "resnet32", "long-32": "resnet32", "ten": "vgg19"}
_RECIPES = Path(__file__).parents[2] / "recipes"
_DATA: dict[Network, str] = {"resnet32": "cifar10", "vgg19": "cifar10", "resnet34": "imagenet"}
_EVERY_CONVOLUTION = CompressionRecipe(decomposition=("tucker",))
_WIDE_CONVOLUTIONS = CompressionRecipe(
    decomposition=("tucker",), skip_first_conv=False, min_in_channels=128
)
_SHORT = Recipe(
    model="resnet32",
    interval=100,  # a dozen distortions in three epochs
    precision="bf16-mixed",
    data=DataRecipe(source="cifar10"),
    optimizer=OptimizerRecipe(lr=0.025, weight_decay=5e-4),
    schedule=ScheduleRecipe(epochs=3),
    records=RecordsRecipe(images=250),
)
_SMOKE = Recipe(
    model="resnet20",
    interval=2,
    batch_size=512,
    schedule=ScheduleRecipe(epochs=2),
    records=RecordsRecipe(images=32),
)


@dataclass(frozen=True)
class Level:
    """How small every layer becomes; for Tucker by the paper's R_c, where it states one."""

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
        needs: options that have to be given.
    """

    profile: Profile
    description: str
    recipe: Recipe
    start: Recipe | None = None
    levels: tuple[Level, ...] = (Level(4), Level(2), Level(8))
    intervals: tuple[int, ...] = (200, 100, 500, 20)
    tails: tuple[int, ...] = (10, 25)
    needs: tuple[str, ...] = ("weights",)

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
        recipe = replace(self.recipe, mode=mode, compression=compression)
        if interval is not None:
            recipe = replace(recipe, interval=interval)
        many = interval is not None and interval < 100 and self.profile != "smoke"
        if mode == "projected" or many:
            recipe = replace(recipe, records=replace(recipe.records, images=0))
        return recipe

    @property
    def dense(self) -> Recipe:
        """Return the dense network trained on as compressed ones are."""
        return replace(self.recipe, mode="dense")


def preset_of(profile: Profile, network: Network) -> Preset:
    """Return what a profile trains a network with.

    Raises:
        DeepTwistError: if it does not train this one.
    """
    if network != (only := _ONLY.get(profile, network)):
        raise DeepTwistError(f"profile {profile} trains {only} alone, not {network}")
    compression = _EVERY_CONVOLUTION if network == "resnet32" else _WIDE_CONVOLUTIONS
    if profile == "smoke":
        return _smoke(compression)
    recipe = read_recipe(_RECIPES / f"{network}-{_DATA[network]}-paper.yaml")
    recipe = replace(recipe, compression=compression)
    if profile == "short":
        return _short(network, recipe)
    if profile == "ten":
        return _ten_of_vgg(recipe)
    if profile == "paper":
        return Preset(
            profile,
            f"the paper's schedule: {recipe.schedule.epochs} epochs from the trained network",
            recipe,
            levels=(*map(Level, (2.06, 4.28, 6.71, 1.57, 2.80), (0.6, 0.4, 0.3, 0.7, 0.5)),),
            intervals=(200, 10, 20, 50, 100, 500, 1000, 2000, 5000),
            tails=(20, 50, 100),
            needs=("weights", "data") if network == "resnet34" else ("weights",),
        )
    size = None if profile == "long-32" else 16
    return Preset(
        profile,
        "the paper's regime, halved: 100 epochs from 0.1, divided by 10 after 50 and 75, weight "
        f"decay 1e-4, images of {size or 32}×{size or 32}, from the trained network",
        replace(
            recipe,
            data=replace(recipe.data, image_size=size),
            schedule=replace(recipe.schedule, epochs=100, milestones=(50, 75)),
        ),
    )


def _short(network: Network, paper: Recipe) -> Preset:
    recipe = replace(_SHORT, compression=paper.compression, fixed=paper.fixed)
    epochs = 4
    if network == "vgg19":  # without batch norm a few epochs teach it nothing
        recipe = replace(recipe, model="vgg19_bn")
    elif network == "resnet34":
        epochs = 6
        data = DataRecipe(source="imagenette224", image_size=64)  # 224 takes 12 times as long
        recipe = replace(recipe, model=paper.model, batch_size=64, data=data)
    return Preset(
        "short",
        f"a short schedule: {_describe(recipe)}, from a dense network trained on the same images "
        f"for {epochs} epochs",
        recipe,
        start=_dense_start(recipe, epochs),
        intervals=(100, 1000, 10, 300, 30),
        tails=(1, 2),
        needs={"resnet32": ("weights",), "resnet34": ("data",)}.get(network, ()),
    )


def _ten_of_vgg(paper: Recipe) -> Preset:
    recipe = replace(
        _SHORT,
        model="vgg19_bn",
        interval=200,
        cuda_graphs=True,
        compression=paper.compression,
        fixed=paper.fixed,
        schedule=ScheduleRecipe(epochs=10),
        records=replace(_SHORT.records, checkpoint_every=1000),
    )
    start = _dense_start(recipe, 30)
    return Preset(
        "ten",
        f"{_describe(recipe)}, from a dense network with batch norm, trained on the same images "
        f"for {start.schedule.epochs} epochs from {start.optimizer.lr}",
        recipe,
        start=start,
        needs=(),
    )


def _dense_start(recipe: Recipe, epochs: int) -> Recipe:
    """Return the training of the dense network that the runs of a recipe start from."""
    return replace(
        recipe,
        mode="dense",
        fixed=None,
        optimizer=replace(recipe.optimizer, lr=0.05),
        schedule=ScheduleRecipe(epochs=epochs),
    )


def _describe(recipe: Recipe) -> str:
    optimizer = recipe.optimizer
    return (
        f"{recipe.schedule.epochs} epochs, SGD {optimizer.lr} with cosine decay, weight decay "
        f"{optimizer.weight_decay}, {recipe.precision}"
    )


def _smoke(compression: CompressionRecipe) -> Preset:
    # Its images are too small for the other networks; layers of 64 channels stand in for wide ones.
    if compression.min_in_channels > 1:
        compression = replace(compression, min_in_channels=64)
    return Preset(
        "smoke",
        "a smoke test: ResNet-20 for a moment on 8×8 digits; its accuracies mean nothing",
        replace(_SMOKE, compression=compression),
        start=replace(_SMOKE, mode="dense", schedule=ScheduleRecipe(epochs=1)),
        levels=(Level(4),),
        intervals=(2, 1),
        tails=(1,),
        needs=(),
    )
