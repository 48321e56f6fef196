"""Section 2: how often to distort. S_D from 10 to 5,000 optimizer steps, Tucker at about 4×.

Too often, and training cannot move the weights far enough between distortions; too rarely, and
few distortions shape the network. An S_D beyond the length of the run leaves the last one alone.
"""

import math

from experiments.fig2 import ACCURACY
from experiments.page import NOT_RUN, Report, Results, Table
from experiments.plots import Curve, draw, known
from experiments.profiles import Network, Profile, Run

PLACE = "Section 2"
NETWORK: Network = "resnet32"
CLAIM = "The optimum of S_D is broad (100 to 5,000); too small and too large both lose."


def runs(profile: Profile) -> dict[str, Run]:
    """Return one training for each S_D."""
    return {
        f"S_D {interval}": profile.run("deeptwist", "tucker", profile.reference, interval=interval)
        for interval in profile.intervals
    }


def report(results: Results, profile: Profile) -> Report:
    """Return accuracy over S_D."""
    names = {interval: f"S_D {interval}" for interval in sorted(profile.intervals)}
    points = known((interval, results.accuracy(name)) for interval, name in names.items())
    title = f"Tucker {profile.reference}, DeepTwist"
    x, curves = "S_D, optimizer steps between distortions", [Curve(title, points, 0)]
    figures = draw("accuracy", "Accuracy over S_D", curves, x=x, y=ACCURACY, log_x=True)
    rows = []
    for interval, name in names.items():
        run = results.of(name)  # one distortion at every interval, and one at the end
        count = str(math.ceil(run["steps"].iloc[0] / interval)) if len(run) else NOT_RUN
        rows.append([str(interval), count, results.shown(name)])
    notes = ["The paper states that 100 to 5,000 is useful and prints no numbers."]
    if len(points) > 2:
        best, height = max(points, key=lambda point: point[1])
        where = "at one of" if best in (points[0][0], points[-1][0]) else "between"
        lower = " and ".join(f"{height - points[end][1]:.2f}" for end in (0, -1))
        best_note = f"Best at S_D = {best:g}, {where} the ends of what has been run; the ends are "
        notes.insert(0, f"{best_note}{lower} points lower.")
    return Report([Table(title, ["S_D", "distortions", ACCURACY], rows)], figures, notes)
