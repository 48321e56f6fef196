"""Sections 1 and 2: is it the direction of the distortions that helps, and their rarity?

Tucker at about 4×. DeepTwist is held against random noise that moves every layer as far at the
same steps, against projection to low rank at every step, and against a network that is decomposed
once, at the end. All take the same steps; conventional fine-tuning is shown beside them.
"""

from experiments.paper.fig2 import conventional, deeptwist, pair
from experiments.paper.presets import Preset
from experiments.paper.results import Report, Results, Table, count_holds, difference, is_higher

from deeptwist.training.recipe import Mode, Recipe

PLACE, NETWORK = "Sections 1 and 2", "resnet32"
CLAIM = (
    "The low-rank direction of the distortions is what helps, and occasional ones beat constant "
    "ones."
)
CONTROLS: dict[Mode, str] = {
    "random_noise": "random noise of the same size at the same steps",
    "decompose_at_end": "decomposed once, at the end",
    "projected": "projection at every step",
}


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return DeepTwist, conventional fine-tuning, and the controls."""
    tucker = preset.reference_level.of("tucker")
    controls = {name: preset.compressed(mode, **tucker) for mode, name in CONTROLS.items()}
    return pair(preset, preset.reference_level) | controls


def report(results: Results, preset: Preset) -> Report:
    """Return the accuracy of each, and its distance from DeepTwist."""
    level, accuracy = preset.reference_level, results.accuracy
    ours = deeptwist(level)
    rows = [
        (name, results.shown(name), difference(accuracy(name), accuracy(ours)))
        for name in (ours, *CONTROLS.values(), conventional(level))
    ]
    header = ("weights moved by", "test accuracy, %", "difference from DeepTwist")
    higher = [is_higher(accuracy(ours), accuracy(name)) for name in CONTROLS.values()]
    notes = (
        count_holds("DeepTwist is higher than a control", higher),
        "The paper prints no numbers of these.",
    )
    return Report((Table(f"Tucker {level}", header, rows),), notes=notes)
