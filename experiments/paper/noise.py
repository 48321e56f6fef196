"""Sections 1 and 2: is it the direction of the distortions that helps, and their rarity?

Tucker at about 4×. DeepTwist is held against random noise that moves every layer as far at the
same steps, against projection to low rank at every step, and against a network that is decomposed
once, at the end. All take the same steps; conventional fine-tuning is shown beside them.
"""

from experiments.paper.fig2 import ACCURACY, pair
from experiments.paper.presets import Network, Preset
from experiments.paper.results import Report, Results, Table, count_holds

from deeptwist.app.training.recipe import Mode, Recipe

PLACE = "Sections 1 and 2"
NETWORK: Network = "resnet32"
CLAIM = (
    "The low-rank direction of the distortions is what helps, and occasional ones beat constant "
    "ones."
)
HEADER = ["weights moved by", ACCURACY, "difference from DeepTwist"]
CONTROLS: dict[str, Mode] = {
    "random noise of the same size at the same steps": "random_noise",
    "decomposed once, at the end": "decompose_at_end",
    "projection at every step": "projected",
}


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return DeepTwist, conventional fine-tuning, and the controls."""
    tucker = preset.reference_level.of("tucker")
    controls = {name: preset.compressed(mode, **tucker) for name, mode in CONTROLS.items()}
    return pair(preset, preset.reference_level) | controls


def report(results: Results, preset: Preset) -> Report:
    """Return the accuracy of each, and its distance from DeepTwist."""
    deeptwist, tuned = pair(preset, preset.reference_level)
    rows = [
        [name, results.shown(name), results.difference(name, deeptwist)]
        for name in (deeptwist, *CONTROLS, tuned)
    ]
    higher = [results.is_higher(deeptwist, control) for control in CONTROLS]
    notes = [
        count_holds("DeepTwist is higher than a control", higher),
        "The paper prints no numbers of these.",
    ]
    return Report([Table(f"Tucker {preset.reference_level}", HEADER, rows)], notes=notes)
