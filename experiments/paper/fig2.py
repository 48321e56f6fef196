"""Figure 2: ResNet-32 by Tucker at several ratios, by DeepTwist or fine-tuned the usual way.

All convolutions but the first are held by Tucker with R_s = R_c·S and R_t = R_c·T. For each size
the network is trained twice from the same weights, for the same steps: by DeepTwist, and as the
decomposed network (conventional fine-tuning). The dense network trained on as long says what the
schedule alone brings.
"""

from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Level, Network, Preset
from experiments.paper.results import Report, Results, Table, count_holds, number

from deeptwist.app.training.recipe import Recipe

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


def deeptwist(level: Level) -> str:
    """Return the name of DeepTwist's run."""
    return f"Tucker {level}, DeepTwist"


def conventional(level: Level) -> str:
    """Return the name of the fine-tuned run."""
    return f"Tucker {level}, conventional"


def pair(preset: Preset, level: Level) -> dict[str, Recipe]:
    """Return both trainings at one size."""
    tucker = level.of("tucker")
    return {
        deeptwist(level): preset.compressed("deeptwist", **tucker),
        conventional(level): preset.compressed("finetune", **tucker),
    }


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return two trainings for each size, and the dense network's."""
    pairs = [item for level in preset.levels for item in pair(preset, level).items()]
    return dict(pairs) | {DENSE: preset.dense}


def report(results: Results, preset: Preset) -> Report:
    """Return accuracy over the ratio."""
    levels, start = preset.sorted_levels, results.start()
    rows = [_row(results, level) for level in levels]
    rows.append(["start", "", number(start), "", "", "", f"{PAPER_START}", ""])
    rows.append([DENSE, "", results.shown(DENSE), "", "", "", "–", ""])
    curves = []
    for side, name in enumerate((deeptwist, conventional)):
        label = ("DeepTwist", "conventional fine-tuning")[side]
        points = [(level.ratio, results.accuracy(name(level))) for level in levels]
        curves.append(Curve(label, points, 0, dashed=side == 1))
        if preset.profile == "paper":
            printed = [(ratio, both[side]) for ratio, both in PAPER.items()]
            curves.append(Curve(f"paper: {label}", printed, 1, dashed=side == 1))
    title = "Accuracy over the compression ratio"
    figures = draw("accuracy", title, curves, start, x=RATIO, y=ACCURACY, log_x=True)
    higher = [results.is_higher(deeptwist(level), conventional(level)) for level in levels]
    at_smallest = "At the smallest ratio DeepTwist is above the network before compression"
    notes = [
        count_holds("DeepTwist is higher than conventional fine-tuning", higher),
        count_holds(at_smallest, [results.is_higher(deeptwist(levels[0]), None)]),
    ]
    return Report([Table("Test accuracy, %", HEADER, rows)], figures, notes)


def _row(results: Results, level: Level) -> list[str]:
    names = deeptwist(level), conventional(level)
    row = [str(level), results.ratio(names[0]), *map(results.shown, names)]
    row.append(results.difference(*names))
    ratio = min(PAPER, key=lambda ratio: abs(ratio - level.ratio))
    if abs(ratio / level.ratio - 1) > 0.1:  # too far to be held against
        return [*row, "–", "–", "–"]
    return [*row, f"{ratio:.2f}×", *(f"{accuracy:.2f}" for accuracy in PAPER[ratio])]
