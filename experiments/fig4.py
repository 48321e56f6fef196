"""Figure 4: how far distortions move the weights (Δw) and raise the loss (ΔL/L) on the way.

DeepTwist's training of Figure 3. Both fall as the network settles in a flat place near low-rank
weights, and with every fall of the learning rate.
"""

import pandas as pd

from experiments.fig2 import deeptwist, pair
from experiments.fig3 import distortions_of, points
from experiments.page import NOT_RUN, Report, Results, Table, count_holds
from experiments.plots import Curve, Points, draw
from experiments.profiles import Network, Profile, Run

PLACE = "Figure 4"
NETWORK: Network = "resnet32"
NEEDS_EPOCHS = True
CLAIM = "ΔL/L and Δw fall over distortion steps, sharply where the learning rate does."
HEADER = ["stretch", "distortions", "Δw", "ΔL/L"]
KEYS = ["weight_shift", "loss_increase"]


def runs(profile: Profile) -> dict[str, Run]:
    """Return DeepTwist at one size."""
    name = deeptwist(profile.reference)
    return {name: pair(profile, profile.reference)[name]}


def report(results: Results, profile: Profile) -> Report:
    """Return Δw and ΔL/L over the epochs, and their means over stretches of the training."""
    distortions = distortions_of(results, deeptwist(profile.reference))
    shifts, losses = (points(distortions, key) for key in KEYS)
    y = "Δw = ‖W − W′‖ ÷ N"
    figures = draw("shift", "Δw", [Curve("Δw", shifts, 0)], x="epoch", y=y, scale="log")
    figures += draw("increase", "ΔL/L", [Curve("ΔL/L", losses, 1)], x="epoch", y="ΔL/L")
    rows = [
        [name, str(len(part)), *(f"{mean:.3g}" for mean in part.reindex(columns=KEYS).mean())]
        for name, part in _stretches(distortions).items()
    ]
    title = f"Tucker {profile.reference}, DeepTwist: means over distortions"
    notes = [
        count_holds("Δw falls from the first distortion to the last", [_falls(shifts)]),
        count_holds("ΔL/L falls from the first distortion to the last", [_falls(losses)]),
        "The paper prints no numbers of this figure.",
    ]
    return Report([Table(title, HEADER, rows or [["all", *3 * [NOT_RUN]]])], figures, notes)


def _falls(points: Points) -> bool | None:
    return points[0][1] > points[-1][1] if len(points) > 1 else None


def _stretches(distortions: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return those of each learning rate; thirds of the training where it falls all the time."""
    by_rate = distortions.groupby("lr", sort=False)
    if by_rate.ngroups <= 5:
        return {f"learning rate {rate:g}": part for rate, part in by_rate}
    first, second = (round(len(distortions) * third / 3) for third in (1, 2))
    return {
        "first third": distortions[:first],
        "second third": distortions[first:second],
        "last third": distortions[second:],
    }
