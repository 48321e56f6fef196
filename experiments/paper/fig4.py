"""Figure 4: how far distortions move the weights (Δw) and raise the loss (ΔL/L) on the way.

DeepTwist's training of Figure 3. Both fall as the network settles in a flat place near low-rank
weights, and with every fall of the learning rate.
"""

import math
import statistics
from itertools import groupby
from typing import Any

from experiments.paper.fig2 import deeptwist, pair
from experiments.paper.fig3 import distortions_of, epoch_of
from experiments.paper.plotting import Curve, draw
from experiments.paper.presets import Preset
from experiments.paper.results import NOT_RUN, Report, Results, Table, count_holds, is_higher

from deeptwist.training.recipe import Recipe

PLACE, NETWORK = "Figure 4", "resnet32"
CLAIM = "ΔL/L and Δw fall over distortion steps, sharply where the learning rate does."


def recipes(preset: Preset) -> dict[str, Recipe]:
    """Return DeepTwist at one size."""
    name = deeptwist(preset.reference_level)
    return {name: pair(preset, preset.reference_level)[name]}


def report(results: Results, preset: Preset) -> Report:
    """Return Δw and ΔL/L over the epochs, and their means over stretches of the training."""
    run = results.course(deeptwist(preset.reference_level))
    distortions = distortions_of(run)
    shifts, losses = (
        [
            (epoch_of(run, each), float(each[key]))
            for each in distortions
            if run is not None and each[key] is not None and math.isfinite(each[key])
        ]
        for key in ("weight_shift", "loss_increase")
    )
    label = "Δw = ‖W − W′‖ ÷ N"
    figures = draw("shift", "Δw", [Curve("Δw", shifts, 0)], x="epoch", y=label, scale="log")
    figures += draw("increase", "ΔL/L", [Curve("ΔL/L", losses, 1)], x="epoch", y="ΔL/L")
    rows = [
        (name, str(len(part)), _mean(part, "weight_shift"), _mean(part, "loss_increase"))
        for name, part in _stretches(distortions)
    ]
    title = f"Tucker {preset.reference_level}, DeepTwist: means over distortions"
    header = ("stretch", "distortions", "Δw", "ΔL/L")
    falls = [[is_higher(y[0][1], y[-1][1]) if len(y) > 1 else None] for y in (shifts, losses)]
    return Report(
        (Table(title, header, rows or [("all", NOT_RUN, NOT_RUN, NOT_RUN)]),),
        figures,
        (
            count_holds("Δw falls from the first distortion to the last", falls[0]),
            count_holds("ΔL/L falls from the first distortion to the last", falls[1]),
            "The paper prints no numbers of this figure.",
        ),
    )


def _stretches(distortions: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return those of each learning rate; thirds of the training where it falls all the time."""
    by_rate = [
        (f"learning rate {rate:g}", list(part))
        for rate, part in groupby(distortions, key=lambda each: float(each["lr"]))
    ]
    if len(by_rate) <= 5:
        return by_rate
    ends = [round(len(distortions) * third / 3) for third in range(4)]
    return [
        (f"{name} third", distortions[start:end])
        for name, start, end in zip(("first", "second", "last"), ends, ends[1:], strict=False)
    ]


def _mean(distortions: list[dict[str, Any]], key: str) -> str:
    values = [float(each[key]) for each in distortions if each[key] is not None]
    return f"{statistics.fmean(values):.3g}" if values else "–"
