"""Section 2: how often to distort. S_D from 10 to 5,000 optimizer steps, Tucker at about 4×.

Too often, and training cannot move the weights far enough between distortions; too rarely, and
few distortions shape the network. An S_D beyond the length of the run leaves the last one alone.
"""

from experiments.paper.cells import Cell
from experiments.paper.drawing import Curve, chart, known
from experiments.paper.experiment import Experiment
from experiments.paper.experiments.fig3 import distortions_of
from experiments.paper.findings import NOT_RUN, Findings, Finished, Table
from experiments.paper.profiles import Setting


def name_of(steps: int) -> str:
    """A cell's name."""
    return f"S_D {steps}"


def cells(setting: Setting) -> list[Cell]:
    """One training for each S_D."""
    tucker = setting.middle.of("tucker")
    return [
        Cell(name_of(steps), setting.compressed("deeptwist", interval=steps, **tucker))
        for steps in setting.intervals
    ]


def show(finished: Finished, setting: Setting) -> Findings:
    """Accuracy over S_D."""
    steps = sorted(setting.intervals)
    found = known((one, finished.accuracy(name_of(one))) for one in steps)
    figure = chart(
        "accuracy",
        "Accuracy over S_D",
        [Curve(f"Tucker {setting.middle}, DeepTwist", found, 0)],
        x="S_D, optimizer steps between distortions",
        y="test accuracy, %",
        log_x=True,
    )
    rows = tuple(
        (str(one), _distortions(finished, one), finished.shown(name_of(one))) for one in steps
    )
    notes = []
    if len(found) > 2:
        best = max(found, key=lambda point: point[1])
        inside = best not in (found[0], found[-1])
        notes.append(
            f"Best at S_D = {best[0]:g}, {'between' if inside else 'at one of'} the ends of what "
            f"has been run; the ends are {best[1] - found[0][1]:.2f} and "
            f"{best[1] - found[-1][1]:.2f} points lower."
        )
    return Findings(
        (
            Table(
                f"Tucker {setting.middle}, DeepTwist",
                ("S_D", "distortions", "test accuracy, %"),
                rows,
            ),
        ),
        () if figure is None else (figure,),
        (*notes, "The paper states that 100 to 5,000 is useful and prints no numbers."),
    )


def _distortions(finished: Finished, steps: int) -> str:
    run = finished.first(name_of(steps))
    return NOT_RUN if run is None else str(len(distortions_of(run)))


EXPERIMENT = Experiment(
    name="interval",
    place="Section 2",
    claim="The optimum of S_D is broad (100 to 5,000); too small and too large both lose.",
    network="resnet32",
    cells=cells,
    show=show,
)
