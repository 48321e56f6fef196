"""Figure 4: how far distortions move the weights (Δw) and raise the loss (ΔL/L) on the way.

DeepTwist's training of Figure 3. Both fall as the network settles in a flat place near low-rank
weights, and with every fall of the learning rate.
"""

import math
import statistics
from itertools import groupby
from typing import Any

from experiments.paper.fig2 import deeptwist, pair
from experiments.paper.fig3 import distortions_of
from experiments.paper.plotting import Curve, Points, draw
from experiments.paper.presets import Network, Preset
from experiments.paper.results import NOT_RUN, Report, Results, Table, count_holds

from deeptwist.app.training.recipe import Recipe

PLACE = "Figure 4"
NETWORK: Network = "resnet32"
CLAIM = "ΔL/L and Δw fall over distortion steps, sharply where the learning rate does."
HEADER = ["stretch", "distortions", "Δw", "ΔL/L"]
KEYS = ("weight_shift", "loss_increase")


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return DeepTwist at one size."""
    name = deeptwist(preset.reference_level)
    return {name: pair(preset, preset.reference_level)[name]}


def report(results: Results, preset: Preset) -> Report:
    """Return Δw and ΔL/L over the epochs, and their means over stretches of the training."""
    distortions = distortions_of(results.course(deeptwist(preset.reference_level)))
    shifts, losses = (
        [(x, each[key]) for x, each in distortions if math.isfinite(_or_nan(each[key]))]
        for key in KEYS
    )
    y = "Δw = ‖W − W′‖ ÷ N"
    figures = draw("shift", "Δw", [Curve("Δw", shifts, 0)], x="epoch", y=y, scale="log")
    figures += draw("increase", "ΔL/L", [Curve("ΔL/L", losses, 1)], x="epoch", y="ΔL/L")
    rows = [
        [name, str(len(part)), *(_mean(part, key) for key in KEYS)]
        for name, part in _stretches([each for _, each in distortions])
    ]
    title = f"Tucker {preset.reference_level}, DeepTwist: means over distortions"
    notes = [
        count_holds("Δw falls from the first distortion to the last", [_falls(shifts)]),
        count_holds("ΔL/L falls from the first distortion to the last", [_falls(losses)]),
        "The paper prints no numbers of this figure.",
    ]
    return Report([Table(title, HEADER, rows or [["all", *3 * [NOT_RUN]]])], figures, notes)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _falls(points: Points) -> bool | None:
    return points[0][1] > points[-1][1] if len(points) > 1 else None


def _stretches(distortions: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return those of each learning rate; thirds of the training where it falls all the time."""
    by_rate = groupby(distortions, key=lambda each: float(each["lr"]))
    stretches = [(f"learning rate {rate:g}", list(part)) for rate, part in by_rate]
    if len(stretches) <= 5:
        return stretches
    first, second = (round(len(distortions) * third / 3) for third in (1, 2))
    parts = distortions[:first], distortions[first:second], distortions[second:]
    return list(zip(("first third", "second third", "last third"), parts, strict=True))


def _mean(distortions: list[dict[str, Any]], key: str) -> str:
    values = [float(each[key]) for each in distortions if each[key] is not None]
    return f"{statistics.fmean(values):.3g}" if values else "–"
