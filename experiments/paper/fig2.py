"""Figure 2: ResNet-32 by Tucker at several ratios, by DeepTwist or fine-tuned the usual way.

All convolutions but the first are held by Tucker with R_s = R_c·S and R_t = R_c·T. For each size
the network is trained twice from the same weights, for the same steps: by DeepTwist, and as the
decomposed network (conventional fine-tuning). The dense network trained on as long says what the
schedule alone brings.
"""

from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Level, Preset
from experiments.paper.results import (
    Report,
    Results,
    Table,
    count_holds,
    difference,
    is_higher,
    number,
    printed,
)

from deeptwist.training.recipe import Recipe

PLACE, NETWORK = "Figure 2", "resnet32"
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
HEADER = ("ratio", "whole network", "DeepTwist", "conventional", "difference", "paper's ratio")


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
    pairs = [pair(preset, level) for level in preset.levels]
    return {name: recipe for each in pairs for name, recipe in each.items()} | {DENSE: preset.dense}


def report(results: Results, preset: Preset) -> Report:
    """Return accuracy over the ratio."""
    levels, start = preset.sorted_levels, results.start()
    learnt, tuned = (
        [(level.ratio, results.accuracy(name(level))) for level in levels]
        for name in (deeptwist, conventional)
    )
    rows = [_row(results, level) for level in levels]
    rows.append(("start", "", number(start), "", "", "", printed(PAPER_START), ""))
    rows.append((DENSE, "", results.shown(DENSE), "", "", "", "–", ""))
    curves = [Curve("DeepTwist", learnt, 0)]
    curves.append(Curve("conventional fine-tuning", tuned, 0, dashed=True))
    if preset.profile == "paper":
        for side, name in enumerate(("paper: DeepTwist", "paper: conventional")):
            points = [(ratio, both[side]) for ratio, both in PAPER.items()]
            curves.append(Curve(name, points, 1, dashed=side == 1))
    figures = draw(
        "accuracy",
        "Accuracy over the compression ratio",
        curves,
        x="compression ratio of every layer",
        y="test accuracy, %",
        start=start,
        log_x=True,
    )
    higher = [is_higher(ours[1], other[1]) for ours, other in zip(learnt, tuned, strict=True)]
    above = [is_higher(learnt[0][1], start)]
    notes = (
        count_holds("DeepTwist is higher than conventional fine-tuning", higher),
        count_holds(
            "At the smallest ratio DeepTwist is above the network before compression", above
        ),
    )
    header = (*HEADER, "paper: DeepTwist", "paper: conventional")
    return Report((Table("Test accuracy, %", header, rows),), figures, notes)


def _row(results: Results, level: Level) -> tuple[str, ...]:
    names = deeptwist(level), conventional(level)
    nearest = min(PAPER, key=lambda ratio: abs(ratio - level.ratio))
    comparable = abs(nearest / level.ratio - 1) < 0.1
    return (
        str(level),
        results.ratio(names[0]),
        *(results.shown(name) for name in names),
        difference(*(results.accuracy(name) for name in names)),
        f"{nearest:.2f}×" if comparable else "–",
        *(printed(value) for value in (PAPER[nearest] if comparable else (None, None))),
    )
