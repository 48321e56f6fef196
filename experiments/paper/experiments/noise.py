"""Sections 1 and 2: is it the direction of the distortions that helps, and their rarity?

Tucker at about 4×. DeepTwist is held against random noise that moves every layer as far at the
same steps, against projection to low rank at every step, and against a network that is decomposed
once, at the end. All take the same steps; conventional fine-tuning is shown beside them.
"""

from experiments.paper.cells import Cell
from experiments.paper.experiment import Experiment
from experiments.paper.experiments.fig2 import conventional, deeptwist, pair
from experiments.paper.findings import (
    Findings,
    Finished,
    Table,
    above,
    count_note,
    difference,
)
from experiments.paper.profiles import Setting

from deeptwist.training.recipe import Mode

CONTROLS: dict[Mode, str] = {
    "random_noise": "random noise of the same size at the same steps",
    "decompose_at_end": "decomposed once, at the end",
    "projected": "projection at every step",
}


def cells(setting: Setting) -> list[Cell]:
    """DeepTwist, conventional fine-tuning, and the controls."""
    tucker = setting.middle.of("tucker")
    controls = [Cell(name, setting.compressed(mode, **tucker)) for mode, name in CONTROLS.items()]
    return pair(setting, setting.middle) + controls


def show(finished: Finished, setting: Setting) -> Findings:
    """Accuracy of each, and its distance from DeepTwist."""
    ours = deeptwist(setting.middle)
    names = ours, *CONTROLS.values(), conventional(setting.middle)
    accuracy = finished.accuracy
    rows = tuple(
        (name, finished.shown(name), difference(accuracy(name), accuracy(ours))) for name in names
    )
    header = "weights moved by", "test accuracy, %", "difference from DeepTwist"
    higher = [above(accuracy(ours), accuracy(name)) for name in CONTROLS.values()]
    return Findings(
        (Table(f"Tucker {setting.middle}", header, rows),),
        (),
        (
            count_note("DeepTwist is higher than a control", higher),
            "The paper prints no numbers of these.",
        ),
    )


EXPERIMENT = Experiment(
    name="noise",
    place="Sections 1 and 2",
    claim="The low-rank direction of the distortions is what helps, and occasional ones beat "
    "constant ones.",
    network="resnet32",
    cells=cells,
    show=show,
)
