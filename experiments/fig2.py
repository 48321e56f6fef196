"""Figure 2: ResNet-32 by Tucker at several ratios, by DeepTwist or fine-tuned the usual way.

All convolutions but the first are held by Tucker with R_s = R_c·S and R_t = R_c·T. For each size
the network is trained twice from the same weights, for the same steps: by DeepTwist, and as the
decomposed network (conventional fine-tuning). The dense network trained on as long says what the
schedule alone brings.
"""

from experiments.page import Report, Results, Table, count_holds, number
from experiments.plots import Curve, draw
from experiments.profiles import Network, Profile, Run, Size

PLACE = "Figure 2"
NETWORK: Network = "resnet32"
CLAIM = (
    "DeepTwist is more accurate than conventional fine-tuning at every ratio, and at the "
    "smallest above the network before compression."
)
# Accuracy by ratio, DeepTwist and conventional; read off the paper's plot.
PAPER = {
    1.57: (92.92, 92.20),
    2.06: (92.62, 92.09),
    2.80: (92.43, 91.75),
    4.28: (91.49, 90.96),
    6.71: (90.43, 89.77),
}
PAPER_START = 92.63
DENSE = "dense, trained as long"
HEADER = ["ratio", "whole network", "DeepTwist", "conventional", "difference", "paper's ratio"]
HEADER += ["paper: DeepTwist", "paper: conventional"]
RATIO, ACCURACY = "compression ratio of every layer", "test accuracy, %"
BEFORE = "before compression"


def deeptwist(size: Size) -> str:
    """Return what DeepTwist's run is called."""
    return f"Tucker {size}, DeepTwist"


def conventional(size: Size) -> str:
    """Return what the fine-tuned run is called."""
    return f"Tucker {size}, conventional"


def pair(profile: Profile, size: Size) -> dict[str, Run]:
    """Return both trainings at one size."""
    return {
        deeptwist(size): profile.run("deeptwist", "tucker", size),
        conventional(size): profile.run("finetune", "tucker", size),
    }


def runs(profile: Profile) -> dict[str, Run]:
    """Return two trainings for each size, and the dense network's."""
    pairs = [item for size in profile.sizes for item in pair(profile, size).items()]
    return dict(pairs) | {DENSE: profile.dense}


def report(results: Results, profile: Profile) -> Report:
    """Return accuracy over the ratio."""
    sizes, start = profile.sorted_sizes, results.start()
    rows = [_row(results, size) for size in sizes]
    rows.append(["start", "", number(start), "", "", "", f"{PAPER_START}", ""])
    rows.append([DENSE, "", results.shown(DENSE), "", "", "", "–", ""])
    curves = []
    for side, name in enumerate((deeptwist, conventional)):
        label = ("DeepTwist", "conventional fine-tuning")[side]
        points = [(size.ratio, results.accuracy(name(size))) for size in sizes]
        curves.append(Curve(label, points, 0, dashed=side == 1))
        if profile.name == "paper":
            printed = [(ratio, both[side]) for ratio, both in PAPER.items()]
            curves.append(Curve(f"paper: {label}", printed, 1, dashed=side == 1))
    title = "Accuracy over the compression ratio"
    figures = draw("accuracy", title, curves, (BEFORE, start), x=RATIO, y=ACCURACY, log_x=True)
    higher = [results.is_higher(deeptwist(size), conventional(size)) for size in sizes]
    at_smallest = "At the smallest ratio DeepTwist is above the network before compression"
    notes = [
        count_holds("DeepTwist is higher than conventional fine-tuning", higher),
        count_holds(at_smallest, [results.is_higher(deeptwist(sizes[0]), None)]),
    ]
    return Report([Table("Test accuracy, %", HEADER, rows)], figures, notes)


def _row(results: Results, size: Size) -> list[str]:
    names = deeptwist(size), conventional(size)
    row = [str(size), results.ratio(names[0]), *map(results.shown, names)]
    row.append(results.difference(*names))
    ratio = min(PAPER, key=lambda ratio: abs(ratio - size.ratio))
    if abs(ratio / size.ratio - 1) > 0.1:  # too far to be held against
        return [*row, "–", "–", "–"]
    return [*row, f"{ratio:.2f}×", *(f"{accuracy:.2f}" for accuracy in PAPER[ratio])]
