"""Beyond Section 4.1: fine-tuning what the paper held to be impossible to fine-tune.

SVD of the lowered kernel, spatial SVD and aligned tiles run as plain convolutions, so their
factors can be trained. Each is fine-tuned the conventional way, learnt by DeepTwist, and learnt
by DeepTwist for most of the epochs and fine-tuned in decomposed form for the rest: the tail. All
take the same number of epochs.
"""

from dataclasses import replace

from experiments.paper.cells import Cell
from experiments.paper.drawing import Curve, chart, known
from experiments.paper.experiment import Experiment
from experiments.paper.findings import Findings, Finished, Table, above, count_note
from experiments.paper.profiles import Point, Setting

from deeptwist.training.recipe import Mode, TailRecipe

ALIGNED = (64, 72)  # a multiple of the nine taps: whole input channels
METHODS: tuple[tuple[str, str], ...] = (
    ("spatial SVD", "spatial_svd"),
    ("SVD", "svd"),
    ("aligned tiles", "tiled_svd"),
)
MODES: tuple[tuple[str, Mode], ...] = (("conventional", "finetune"), ("DeepTwist", "deeptwist"))


def cells(setting: Setting) -> list[Cell]:
    """By size, then by method: both ways, and each split."""
    found = []
    for point in setting.points:
        for words, method in METHODS:
            tile = {"tile": ALIGNED} if method == "tiled_svd" else {}
            options = point.of(method, **tile)
            learnt = setting.compressed("deeptwist", **options)
            found += [
                Cell(f"{words} {point}, {way}", setting.compressed(mode, **options))
                for way, mode in MODES
            ]
            for epochs in setting.tails:
                shorter = replace(learnt.schedule, epochs=learnt.schedule.epochs - epochs)
                last = TailRecipe(epochs=epochs, lr=setting.tail_lr)
                recipe = replace(learnt, schedule=shorter, tail=last)
                found.append(Cell(split(words, point, epochs), recipe))
    return found


def split(words: str, point: Point, epochs: int) -> str:
    """The name of a cell that ends with a tail."""
    return f"{words} {point}, tail of {epochs}"


def show(finished: Finished, setting: Setting) -> Findings:
    """Accuracy by size, method and split."""
    tails = sorted(setting.tails)
    rows, learnt_higher, tail_higher = [], [], []
    for point in sorted(setting.points, key=lambda point: point.ratio):
        for words, _ in METHODS:
            ways = [f"{words} {point}, {way}" for way, _ in MODES]
            splits = [split(words, point, epochs) for epochs in tails]
            shown = [finished.shown(name) for name in ways]
            shown += [finished.shown(name, variant="tail") for name in splits]
            rows.append((f"{words} {point}", finished.ratio(ways[0]), *shown))
            tuned, learnt = (finished.accuracy(name) for name in ways)
            learnt_higher.append(above(learnt, tuned))
            tail_higher += [
                above(finished.accuracy(name, variant="tail"), tuned) for name in splits
            ]
    header = (
        "",
        "whole network",
        *(way for way, _ in MODES),
        *(f"tail of {epochs} epoch{'s' * (epochs > 1)}" for epochs in tails),
    )
    figure = chart(
        "splits",
        f"Accuracy over the split of the epochs, {setting.middle}",
        [
            Curve(words, _by_split(finished, setting, words), color)
            for color, (words, _) in enumerate(METHODS)
        ],
        x="epochs of fine-tuning at the end (0: DeepTwist)",
        y="test accuracy, %",
    )
    return Findings(
        (
            Table(
                f"Test accuracy, %, after {setting.recipe.schedule.epochs} epochs in all",
                header,
                tuple(rows),
            ),
        ),
        () if figure is None else (figure,),
        (
            count_note("DeepTwist is higher than conventional fine-tuning", learnt_higher),
            count_note("DeepTwist with a tail is higher than conventional", tail_higher),
            "Not in the paper.",
        ),
    )


def _by_split(finished: Finished, setting: Setting, words: str) -> tuple[tuple[float, float], ...]:
    """(epochs of fine-tuning, accuracy in percent) at the middle size, of what has been run."""
    point, whole = setting.middle, setting.recipe.schedule.epochs
    tuned, learnt = (finished.accuracy(f"{words} {point}, {way}") for way, _ in MODES)
    found = {0: learnt, whole: tuned} | {
        epochs: finished.accuracy(split(words, point, epochs), variant="tail")
        for epochs in setting.tails
    }
    return known(sorted(found.items()))


EXPERIMENT = Experiment(
    name="tail",
    place="Beyond Section 4.1",
    claim="Open: the paper held that SVD of the lowered kernel cannot be fine-tuned. Which split "
    "of the epochs between DeepTwist and fine-tuning is best?",
    network="resnet32",
    cells=cells,
    show=show,
)
