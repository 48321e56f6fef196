"""Beyond Section 4.1: fine-tuning what the paper held to be impossible to fine-tune.

SVD of the lowered kernel, spatial SVD and aligned tiles run as plain convolutions, so their
factors can be trained. Each is fine-tuned the conventional way, learnt by DeepTwist, and learnt
by DeepTwist for most of the epochs and fine-tuned in decomposed form for the rest: the tail. All
take the same number of epochs.
"""

from experiments.fig2 import ACCURACY
from experiments.page import Report, Results, Table, count_holds
from experiments.plots import Curve, draw
from experiments.profiles import Network, Profile, Run

PLACE = "Beyond Section 4.1"
NETWORK: Network = "resnet32"
CLAIM = (
    "Open: the paper held that SVD of the lowered kernel cannot be fine-tuned. Which split of the "
    "epochs between DeepTwist and fine-tuning is best?"
)
AFTER = "accuracy_tail"
METHODS = {  # decomposition and tile, a multiple of the nine taps: whole input channels
    "spatial SVD": ("spatial_svd", ""),
    "SVD": ("svd", ""),
    "aligned tiles": ("tiled_svd", "64x72"),
}


def runs(profile: Profile) -> dict[str, Run]:
    """Return, by size, then by method, both ways and each split."""
    trainings = {}
    for size in profile.sizes:
        for label, (method, tile) in METHODS.items():
            ratio = f"--ratio {size.ratio:g}"
            for mode, ending in (("finetune", "conventional"), ("deeptwist", "DeepTwist")):
                trainings[f"{label} {size}, {ending}"] = profile.run(mode, method, ratio, tile)
            for epochs in profile.finetune_after:
                run = profile.run("deeptwist", method, ratio, tile, finetune_after=epochs)
                trainings[f"{label} {size}, tail of {epochs}"] = run
    return trainings


def report(results: Results, profile: Profile) -> Report:
    """Return accuracy by size, method and split."""
    epochs, tails = profile.epochs, sorted(profile.finetune_after)
    rows, learnt_higher, tail_higher, curves = [], [], [], []
    for size in profile.sorted_sizes:
        for color, label in enumerate(METHODS):
            name = f"{label} {size}"
            tuned, learnt = f"{name}, conventional", f"{name}, DeepTwist"
            splits = [f"{name}, tail of {tail}" for tail in tails]
            shown = [results.shown(tuned), results.shown(learnt)]
            shown += [results.shown(split, AFTER) for split in splits]
            rows.append([name, results.ratio(tuned), *shown])
            learnt_higher.append(results.is_higher(learnt, tuned))
            tail_higher += [results.is_higher(split, tuned, AFTER) for split in splits]
            if size == profile.reference:
                ends = [results.accuracy(split, AFTER) for split in splits]
                heights = [results.accuracy(learnt), *ends, results.accuracy(tuned)]
                points = list(zip((0, *tails, epochs), heights, strict=True))
                curves.append(Curve(label, points, color))
    title = f"Accuracy over the split of the epochs, {profile.reference}"
    x = "epochs of fine-tuning at the end (0: DeepTwist)"
    figures = draw("splits", title, curves, x=x, y=ACCURACY)
    notes = [
        count_holds("DeepTwist is higher than conventional fine-tuning", learnt_higher),
        count_holds("DeepTwist with a tail is higher than conventional", tail_higher),
        "Not in the paper.",
    ]
    header = ["", "whole network", "conventional", "DeepTwist"]
    header += [f"tail of {tail} epoch{'s' * (tail > 1)}" for tail in tails]
    title = f"Test accuracy, %, after {epochs} epochs in all"
    return Report([Table(title, header, rows)], figures, notes)
