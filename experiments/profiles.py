"""Profiles: how long, on what and from where an experiment's networks are trained.

A profile is the words of ``deeptwist train`` that its runs share, and what they vary. Its runs are
the rows of ``results/PROFILE/runs.csv``, which experiments share: a run is known by its name.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

Network = Literal["resnet32", "vgg19", "resnet34"]
MODES = {"dense": "dense", "deeptwist": "DeepTwist", "finetune": "conventional fine-tuning"}
START = "START"  # stands for the weights that a run starts from


@dataclass(frozen=True)
class Run:
    """A training, but for its seed.

    Attributes:
        name: of its rows, followed there by the seed.
        words: of ``deeptwist train``.
        has_noise: whether noise takes a distortion's place, which no word says.
    """

    name: str
    words: str
    has_noise: bool = False


@dataclass(frozen=True)
class Size:
    """How small every layer becomes; for Tucker by the paper's R_c, where it states one."""

    ratio: float
    fraction: float | None = None

    def words(self, method: str) -> str:
        """Return the options of a method of this size."""
        if method == "tucker" and self.fraction is not None:
            return f"--fraction {self.fraction}"
        return f"--ratio {self.ratio:g}"

    def __str__(self) -> str:
        return f"{self.ratio:g}×"


@dataclass(frozen=True)
class Profile:
    """What a network is trained with; an experiment's runs vary it.

    Attributes:
        name: of its folder in ``results/``.
        description: of the schedule, for the reader of a result.
        words: the network, and the options that all runs share.
        start: the options of the dense network that runs start from; without them, they start
            from the weights that are given.
        epochs: of a run.
        layers: the options that say which layers are compressed, where not all convolutions but
            the first.
        sizes: in the order of what matters most.
        intervals: of the sweep of S_D, in the same order.
        finetune_after: epochs in decomposed form, taken off the end of the schedule.
        needs: options that have to be given.
        prefix: of the names of runs, where a folder has those of several networks.
    """

    name: str
    description: str
    words: str
    epochs: int
    layers: str = ""
    start: str = ""
    sizes: tuple[Size, ...] = (Size(4), Size(2), Size(8))
    intervals: tuple[int, ...] = (200, 100, 500, 20)
    finetune_after: tuple[int, ...] = (10, 25)
    needs: tuple[str, ...] = ("weights",)
    prefix: str = ""

    @property
    def reference(self) -> Size:
        """Return the size that curves are shown at: about 4×."""
        return min(self.sizes, key=lambda size: abs(size.ratio - 4.28))

    @property
    def sorted_sizes(self) -> list[Size]:
        """Return the sizes from the smallest ratio on."""
        return sorted(self.sizes, key=lambda size: size.ratio)

    def run(
        self, mode: str, method: str = "", size: Size | str = "", tile: str = "", **changes: Any
    ) -> Run:
        """Return a run.

        Args:
            mode: of training.
            method: decomposition, as options call it; none for a dense network.
            size: of every layer; or options, such as ``"--rank 8"``.
            tile: such as ``"64x64"``.
            changes: ``interval``, ``finetune_after`` (epochs of the schedule's that come after the
                last distortion), ``layers`` in place of the profile's.
        """
        layers = changes.pop("layers", self.layers)
        words, name = [self.words, f"--mode {mode}"], [mode]
        if method:
            sizes = size if isinstance(size, str) else size.words(method)
            words += [layers, f"--decomposition {method}", tile and f"--tile {tile}", sizes]
            short = sizes.replace("--rank ", "r").replace("--fraction ", "rc")
            if short.startswith("--ratio "):
                short = f"{short.removeprefix('--ratio ')}x"
            name += [method.replace("_", "-"), *([tile] if tile else []), short]
        if "interval" in changes:
            words.append(f"--interval {changes['interval']}")
            if f"--interval {changes['interval']} " not in f"{self.words} ":
                name.append(f"sd{changes['interval']}")
            if changes["interval"] < 100 and self.name != "smoke":
                words.append("--logging.images 0")  # so many are not looked at one by one
        if after := changes.get("finetune_after"):
            words.append(f"--epochs {self.epochs - after}")
            words.append(f"--finetune-after.epochs {after} --finetune-after.lr 0.01")
            name.append(f"after{after}")
        words.append(f"--weights {START}")
        return Run(self.prefix + "-".join(name), merge_options(*words))

    @property
    def dense(self) -> Run:
        """Return the dense network trained on as compressed ones are."""
        return self.run("dense")

    @property
    def start_run(self) -> Run:
        """Return the training of the dense network that runs start from."""
        words = merge_options(self.words, "--mode dense", self.start, f"--weights {START}")
        return Run(f"{self.prefix}start", words)


def merge_options(*parts: str) -> str:
    """Return a command's words, of which an option's later values replace earlier ones."""
    first: list[str] = []
    options: dict[str, list[str]] = {}
    for part in parts:
        given: dict[str, list[str]] = {}
        values = first
        for word in part.split():
            if word.startswith("--"):
                values = given.setdefault(word, [])
            values.append(word)
        options |= given
    return " ".join([*first, *(word for words in options.values() for word in words)])


_SGD = "--no-nesterov --optimizer.weight-decay 1e-4 --logging.images 1000"
_STEPS = "--schedule.kind step" + 2 * " --schedule.milestones {}"
_WIDE = "--no-skip-first-conv --min-in-channels {}"
_FROZEN = (
    "--frozen-compression.decomposition svd --frozen-compression.ratio 4 "
    "--frozen-compression.linear "
    "--frozen-compression.include classifier.1 --frozen-compression.include classifier.4"
)
_SHORT = "--lr 0.025 --precision bf16-mixed --logging.images 250"
_PAPER = "the paper's schedule: {} epochs from the trained network"
_LONG = Profile(
    "long-32",
    "the paper's regime, halved: 100 epochs from 0.1, divided by 10 after 50 and 75, weight "
    "decay 1e-4, images of 32×32, from the trained network",
    f"resnet32 --data cifar10 --epochs 100 {_STEPS.format(50, 75)} --lr 0.1 {_SGD} --interval 200",
    100,
)
_SHORT_32 = Profile(
    "short",
    "a short schedule: 3 epochs, SGD 0.025 with cosine decay, weight decay 0.0005, bf16-mixed, "
    "from a dense network trained on the same images for 4 epochs",
    f"resnet32 --data cifar10 --epochs 3 {_SHORT} --interval 100",
    3,
    start="--epochs 4 --lr 0.05",
    intervals=(100, 1000, 10, 300, 30),
    finetune_after=(1, 2),
)
_SMOKE = Profile(
    "smoke",
    "a smoke test: ResNet-20 for a moment on 8×8 digits; its accuracies mean nothing",
    "resnet20 --data digits --epochs 2 --batch-size 512 --interval 2 --logging.images 32",
    2,
    start="--epochs 1",
    sizes=(Size(4),),
    intervals=(2, 1),
    finetune_after=(1,),
    needs=(),
)
# Its images are too small for the other networks; layers of 64 channels stand in for wide ones.
_SMOKE_WIDE = replace(_SMOKE, layers=_WIDE.format(64))
PROFILES: dict[Network, list[Profile]] = {
    "resnet32": [
        _SHORT_32,
        replace(
            _LONG,
            name="long",
            description=_LONG.description.replace("32×32", "16×16"),
            words=f"{_LONG.words} --image-size 16",
        ),
        _LONG,
        Profile(
            "paper",
            _PAPER.format(200),
            f"resnet32 --data cifar10 --epochs 200 {_STEPS.format(100, 150)} --lr 0.1 {_SGD} "
            "--interval 200",
            200,
            sizes=(*map(Size, (2.06, 4.28, 6.71, 1.57, 2.80), (0.6, 0.4, 0.3, 0.7, 0.5)),),
            intervals=(200, 10, 20, 50, 100, 500, 1000, 2000, 5000),
            finetune_after=(20, 50, 100),
        ),
        _SMOKE,
    ],
    "vgg19": [
        Profile(
            "vgg19",
            "10 epochs, SGD 0.025 with cosine decay, weight decay 0.0005, bf16-mixed, from a dense "
            "network with batch norm, trained on the same images for 30 epochs from 0.05",
            f"vgg19_bn --data cifar10 --epochs 10 {_SHORT} --interval 200 --cuda-graphs {_FROZEN}",
            10,
            layers=_WIDE.format(128),
            start="--epochs 30 --lr 0.05",
            needs=(),
        ),
        Profile(  # with batch norm, without which a few epochs teach it nothing
            "short",
            _SHORT_32.description,
            f"vgg19_bn --data cifar10 --epochs 3 {_SHORT} --interval 100 {_FROZEN}",
            3,
            layers=_WIDE.format(128),
            start=_SHORT_32.start,
            needs=(),
            prefix="vgg19-",
        ),
        Profile(
            "paper",
            _PAPER.format(300),
            "vgg19 --data cifar10 --epochs 300 --schedule.kind step --schedule.factor 0.5 "
            + " ".join(f"--schedule.milestones {epoch}" for epoch in range(50, 300, 50))
            + f" --lr 0.01 {_SGD} --interval 300 {_FROZEN}",
            300,
            layers=_WIDE.format(128),
            prefix="vgg19-",
        ),
        _SMOKE_WIDE,
    ],
    "resnet34": [
        Profile(  # 224 pixels take 12 times as long
            "short",
            _SHORT_32.description.replace("4 epochs", "6 epochs"),
            "torchvision/resnet34 --data imagenette224 --image-size 64 --batch-size 64 --epochs 3 "
            f"{_SHORT} --interval 100",
            3,
            layers=_WIDE.format(128),
            start="--epochs 6 --lr 0.05",
            needs=("data",),
            prefix="resnet34-",
        ),
        Profile(
            "paper",
            _PAPER.format(80),
            "torchvision/resnet34 --data imagenet --data.preset imagenet --image-size 224 "
            "--batch-size 256 --precision bf16-mixed --logging.checkpoint-every 1000 "
            f"--epochs 80 {_STEPS.format(20, 50)} --lr 0.01 {_SGD} --interval 1000",
            80,
            layers=_WIDE.format(128),
            needs=("weights", "data"),
            prefix="resnet34-",
        ),
        _SMOKE_WIDE,
    ],
}
