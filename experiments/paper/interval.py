"""Section 2: how often to distort. S_D from 10 to 5,000 optimizer steps, Tucker at about 4×.

Too often, and training cannot move the weights far enough between distortions; too rarely, and
few distortions shape the network. An S_D beyond the length of the run leaves the last one alone.
"""

import math

from experiments.paper.plotting import Curve, draw, known
from experiments.paper.presets import Preset
from experiments.paper.results import NOT_RUN, Report, Results, Table

from deeptwist.training.recipe import Recipe

PLACE, NETWORK = "Section 2", "resnet32"
CLAIM = "The optimum of S_D is broad (100 to 5,000); too small and too large both lose."


def run_name(interval: int) -> str:
    """Return a run's name."""
    return f"S_D {interval}"


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return one training for each S_D."""
    tucker = preset.reference_level.of("tucker")
    return {
        run_name(interval): preset.compressed("deeptwist", interval=interval, **tucker)
        for interval in preset.intervals
    }


def report(results: Results, preset: Preset) -> Report:
    """Return accuracy over S_D."""
    intervals = sorted(preset.intervals)
    points = known((each, results.accuracy(run_name(each))) for each in intervals)
    title = f"Tucker {preset.reference_level}, DeepTwist"
    figures = draw(
        "accuracy",
        "Accuracy over S_D",
        [Curve(title, points, 0)],
        x="S_D, optimizer steps between distortions",
        y="test accuracy, %",
        log_x=True,
    )
    rows = [
        (str(each), _distortions(results, each), results.shown(run_name(each)))
        for each in intervals
    ]
    notes = []
    if len(points) > 2:
        best = max(points, key=lambda point: point[1])
        inside = best not in (points[0], points[-1])
        notes.append(
            f"Best at S_D = {best[0]:g}, {'between' if inside else 'at one of'} the ends of what "
            f"has been run; the ends are {best[1] - points[0][1]:.2f} and "
            f"{best[1] - points[-1][1]:.2f} points lower."
        )
    notes.append("The paper states that 100 to 5,000 is useful and prints no numbers.")
    header = ("S_D", "distortions", "test accuracy, %")
    return Report((Table(title, header, rows),), figures, tuple(notes))


def _distortions(results: Results, interval: int) -> str:
    """Return how many there were: one at every interval, and one at the end."""
    run = results.first(run_name(interval))
    return NOT_RUN if run is None else str(math.ceil(run.summary.steps / interval))
